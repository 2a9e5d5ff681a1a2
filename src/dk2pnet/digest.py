"""What tells one set of tensors from another: weights, images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["digest_of"]


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """What tells other tensors apart (a network's ``state_dict()``, images), 16 characters."""
    digest = hashlib.sha256()
    for name, value in tensors.items():
        digest.update(name.encode())
        if isinstance(value, Tensor) and not value.is_quantized:
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:  # extra state of a module of the network's own
            digest.update(repr(value).encode())
    return digest.hexdigest()[:16]
