"""The whitened form of a DK layer: parameters in which steps of one size change the response about equally.

Preconditioning with the moments that the decomposition has gathered. Kin: Desjardins et al., "Natural Neural
Networks", NeurIPS 2015; Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate
Curvature", ICML 2015. Notation as in `solve`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dk2pnet.decompose.solve import damped, diagonal_blocks

__all__ = ["Whitening", "whiten"]

# Eigenvalues of the correlation of the kernels' responses are raised to this: what hardly differs stays bounded.
_LEAST = 1e-3


@dataclass(frozen=True)
class Whitening:
    """Constants of the whitened form of one layer with R kernels of q numbers in G groups; float64.

    Row vectors, kernels group after group: ``kappa_r = k_r to_kappa[r]`` and back ``k_r = kappa_r to_kernel[r]``, both
    (R, q, q); ``Q_g = P_g to_q[g]`` and back ``P_g = Q_g to_combination[g]``, both (G, R/G, R/G). At the start every
    kappa has unit length and Q the root mean square 1.
    """

    to_kappa: Tensor
    to_kernel: Tensor
    to_q: Tensor
    to_combination: Tensor


def whiten(
    kernels: Tensor, combination: Tensor, channels: Tensor, A: Tensor | None, damping: float = 1e-3
) -> Whitening:
    """The whitening of one layer at its kernels ``(R, q)`` and combination ``(G, N, R/G)``.

    With L the Cholesky factor of the moments of a kernel's channel, ``|k L|^2`` is the second moment of the kernel's
    response: kappa is kL divided by its length at the start. With Sigma the second moments of the responses of all
    kernels, so scaled, ``Q = P Sigma^1/2``, divided by its root mean square.

    Parameters
    ----------
    channels : (R,) source channel of each kernel *inside its group*
    A : second moments ``(G, C q, C q)`` of the input patches; None for the identity
    damping : as in `solve`
    """
    kernels, combination, channels = kernels.double().cpu(), combination.double().cpu(), channels.cpu()
    groups, _, per_group = combination.shape
    R, q = kernels.shape
    if A is None:
        A = torch.eye((int(channels.max()) + 1) * q, dtype=torch.float64).expand(groups, -1, -1)
    inputs = A.shape[1]
    width = inputs // q
    moments = damped(A, width, q, damping)
    group, rows = torch.arange(R) // per_group, torch.arange(R)
    roots = torch.linalg.cholesky(diagonal_blocks(moments, width, q))[group, channels]  # L of each kernel, (R, q, q)
    inverse = torch.linalg.solve_triangular(roots, torch.eye(q, dtype=roots.dtype).expand_as(roots), upper=False)
    norms = (kernels.unsqueeze(1) @ roots).flatten(1).norm(dim=1)
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    placed = kernels.new_zeros(R, width, q)
    placed[rows, channels] = kernels / norms.unsqueeze(1)
    placed = placed.view(groups, per_group, inputs)
    gram = placed @ moments.reshape(groups, inputs, inputs) @ placed.transpose(1, 2)
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(_LEAST)  # the same in both roots, so that the start is exact
    root, inverse_root = ((vectors * values.pow(p).unsqueeze(1)) @ vectors.transpose(1, 2) for p in (0.5, -0.5))
    by_group = norms.view(groups, per_group)
    to_q = by_group.unsqueeze(2) * root
    scale = (combination @ to_q).square().mean().sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    lengths = norms.view(-1, 1, 1)
    return Whitening(roots / lengths, inverse * lengths, to_q / scale, scale * inverse_root / by_group.unsqueeze(1))
