"""Latencies in tests: measured for a moment only, or not at all."""

from dk2pnet.deploy.latency import Latency, compare_latency

# Every room that took the function by name.
_ROOMS = (
    "deploy.costs",
    "commands.deliver",
    "commands.explore",
    "students.latency_budget",
)


def time_by(compare, monkeypatch):
    """Let `compare` stand for `compare_latency` everywhere."""
    for room in _ROOMS:
        monkeypatch.setattr(f"dk2pnet.{room}.compare_latency", compare)


def quick(*networks, **options):
    """`compare_latency`, for a moment."""
    return compare_latency(*networks, **options | {"seconds": 0.01, "rounds_min": 2})


def still(networks, *_, **__):
    """Every network takes a millisecond."""
    return {name: Latency(1.0, 0.9, 1.1, 3) for name in networks}
