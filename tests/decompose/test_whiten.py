"""The whitened form: exact at the start, of unit size, and round in the metric of the moments."""

import pytest
import torch

from dk2pnet.decompose.whiten import whiten


def problem(groups=1, channels=4, outputs=5, per_group=6, q=9, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    root = normal(groups, channels * q, 400)
    source = torch.cat([torch.arange(per_group) % channels for _ in range(groups)])
    return normal(groups * per_group, q), normal(groups, outputs, per_group), source, root @ root.mT / 400


def there(w, kernels, combination):
    return (kernels.unsqueeze(1) @ w.to_kappa).squeeze(1), combination @ w.to_q


@pytest.mark.parametrize("groups", [1, 3])
def test_there_and_back_is_exact_and_the_start_has_unit_size(groups):
    kernels, combination, source, A = problem(groups)
    w = whiten(kernels, combination, source, A)
    kappa, Q = there(w, kernels, combination)
    assert torch.allclose(kappa.norm(dim=1), torch.ones(len(kernels), dtype=torch.float64))
    assert float(Q.square().mean()) == pytest.approx(1)
    assert torch.allclose((kappa.unsqueeze(1) @ w.to_kernel).squeeze(1), kernels)
    assert torch.allclose(Q @ w.to_combination, combination)


def test_a_step_in_q_moves_the_response_by_its_own_length():
    """tr(dP Sigma dP') for the change of P that belongs to dQ, with Sigma the moments of the responses: |dQ|^2 s^2."""
    kernels, combination, source, A = problem()
    w = whiten(kernels, combination, source, A, damping=1e-12)
    placed = torch.zeros(len(kernels), 4, 9, dtype=torch.float64)
    placed[torch.arange(len(kernels)), source] = kernels
    placed = placed.flatten(1)
    sigma = placed @ A[0] @ placed.T
    sizes = []
    for seed in range(5):
        step = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        moved = (step @ w.to_combination)[0]
        sizes.append(float((moved @ sigma * moved).sum() / step.square().sum()))
    assert max(sizes) == pytest.approx(min(sizes), rel=1e-6)


def test_a_step_in_kappa_moves_a_kernels_response_by_its_own_length():
    kernels, combination, source, A = problem()
    w = whiten(kernels, combination, source, A, damping=1e-12)
    blocks = A[0].view(4, 9, 4, 9)
    step = torch.randn(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for number, channel in enumerate(source.tolist()):
        moments = blocks[channel, :, channel]
        moved, kernel = step @ w.to_kernel[number], kernels[number]
        relative = (moved @ moments @ moved) / (kernel @ moments @ kernel)
        assert float(relative) == pytest.approx(float(step.square().sum()), rel=1e-6)


@pytest.mark.parametrize("dead", ["kernel", "input", "layer", "combination"])
def test_what_is_zero_stays_finite_and_exact(dead):
    kernels, combination, source, A = problem()
    if dead == "kernel":
        kernels[2] = 0
    elif dead == "combination":
        combination.zero_()
    elif dead == "layer":
        A.zero_()
    else:
        A.view(4, 9, 4, 9)[1] = 0
        A.view(4, 9, 4, 9)[:, :, 1] = 0
    w = whiten(kernels, combination, source, A)
    kappa, Q = there(w, kernels, combination)
    assert all(bool(torch.isfinite(part).all()) for part in (kappa, Q, w.to_kernel, w.to_combination))
    assert torch.allclose((kappa.unsqueeze(1) @ w.to_kernel).squeeze(1), kernels, atol=1e-9)
    assert torch.allclose(Q @ w.to_combination, combination, atol=1e-9)


def test_kernels_that_repeat_each_other_are_bounded():
    kernels, combination, source, A = problem()
    kernels[4] = kernels[0]  # the same source channel: Sigma is singular
    w = whiten(kernels, combination, source, A)
    assert torch.allclose(combination @ w.to_q @ w.to_combination, combination)
    assert float(w.to_combination.abs().max()) < 1e3


def test_without_moments_the_identity_stands_in():
    kernels, combination, source, _ = problem()
    eye = torch.eye(36, dtype=torch.float64).unsqueeze(0)
    one, other = whiten(kernels, combination, source, None), whiten(kernels, combination, source, eye)
    assert torch.allclose(one.to_kernel, other.to_kernel)
    assert torch.allclose(one.to_combination, other.to_combination)
