"""What others do to a convolution, each written from its paper, on the library of its authors where there is one.

Every low-rank method gives options for a layer: modules that stand in for it, with their multiply-adds and their error
relative to the layer's energy in the method's own measure. One queue (the one of `dk2pnet`) then spends the budget over
the network for each of them, so that no method suffers from ranks chosen badly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from dk2pnet.decompose.select import Option
from dk2pnet.decompose.solve import solve, spectrum
from dk2pnet.layer import DKConv2d
from dk2pnet.networks.network import Site

__all__ = ["Peer", "channel_pca", "cp", "gdws", "gdws_weights", "per_channel_svd", "pruned", "spatial_svd", "tucker"]

# One way to replace a layer: multiply-adds of one image, relative error, and the module.
Peer = tuple[Option, Callable[[], nn.Module]]


def _conv(weight: Tensor, conv: nn.Conv2d, stride: tuple[int, int], padding: tuple[int, int], bias: bool) -> nn.Conv2d:
    made = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], stride, padding, bias=bias)  # type: ignore[arg-type]
    with torch.no_grad():
        made.weight.copy_(weight)
        if made.bias is not None and conv.bias is not None:
            made.bias.copy_(conv.bias)
    return made


def _inputs(site: Site) -> int:
    return site.input_size[0] * site.input_size[1]


def spatial_svd(site: Site) -> list[Peer]:
    """Jaderberg et al. 2014: C -> r by kh x 1, then r -> N by 1 x kw; the best such pair in the weight's norm."""
    conv = site.module
    N, C, kh, kw = conv.weight.shape
    W = conv.weight.detach().double().permute(1, 2, 0, 3).reshape(C * kh, N * kw)
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    between = site.positions * conv.stride[1]  # the first convolution keeps the width
    peers = []
    for rank in range(1, len(S) + 1):

        def make(rank: int = rank) -> nn.Module:
            root = S[:rank].sqrt()
            first = (U[:, :rank] * root).view(C, kh, rank).permute(2, 0, 1).unsqueeze(3)
            second = (root[:, None] * V[:rank]).view(rank, N, kw).permute(1, 0, 2).unsqueeze(2)
            return nn.Sequential(
                _conv(first, conv, (conv.stride[0], 1), (conv.padding[0], 0), False),
                _conv(second, conv, (1, conv.stride[1]), (0, conv.padding[1]), conv.bias is not None),
            )

        cost = rank * (C * kh * between + N * kw * site.positions)
        peers.append((Option(cost, float(S[rank:].square().sum() / S.square().sum())), make))
    return peers


def tucker(site: Site, steps: int = 12) -> list[Peer]:
    """Kim et al. 2016: 1 x 1, C -> r; kh x kw, r -> s; 1 x 1, s -> N. TensorLy's partial Tucker decomposition."""
    import tensorly
    from tensorly.decomposition import partial_tucker

    tensorly.set_backend("pytorch")
    conv = site.module
    N, C, kh, kw = conv.weight.shape
    W = conv.weight.detach().double()
    peers = []
    for step in range(1, steps + 1):
        out, inside = max(round(N * step / steps), 1), max(round(C * step / steps), 1)
        (core, (last, first)), errors = partial_tucker(W, rank=[out, inside], modes=[0, 1], n_iter_max=50)
        error = float(errors[-1]) ** 2 if step < steps else 0.0

        def make(core: Tensor = core, first: Tensor = first, last: Tensor = last) -> nn.Module:
            return nn.Sequential(
                _conv(first.T[:, :, None, None], conv, (1, 1), (0, 0), False),
                _conv(core, conv, conv.stride, conv.padding, False),  # type: ignore[arg-type]
                _conv(last[:, :, None, None], conv, (1, 1), (0, 0), conv.bias is not None),
            )

        cost = C * inside * _inputs(site) + (inside * out * kh * kw + out * N) * site.positions
        peers.append((Option(cost, error), make))
    return peers


def cp(site: Site, steps: int = 5) -> list[Peer]:
    """Lebedev et al. 2015 with one depthwise kh x kw between two 1 x 1: TensorLy's CP of the (N, C, kh kw) tensor."""
    import tensorly
    from tensorly.decomposition import parafac

    tensorly.set_backend("pytorch")
    conv = site.module
    N, C, kh, kw = conv.weight.shape
    W = conv.weight.detach().double().flatten(2)
    peers = []
    for step in range(1, steps + 1):
        rank = max(round(2.5 * max(N, C) * step / steps), 1)
        found = parafac(W, rank, n_iter_max=60, init="random", random_state=0, tol=1e-5)
        scale, (out, inside, kernels) = found.weights, found.factors
        rebuilt = torch.einsum("r,nr,cr,qr->ncq", scale, out, inside, kernels)
        error = float((W - rebuilt).square().sum() / W.square().sum())

        def make(out: Tensor = out * scale, inside: Tensor = inside, kernels: Tensor = kernels) -> nn.Module:
            rank = out.shape[1]
            middle = nn.Conv2d(rank, rank, (kh, kw), conv.stride, conv.padding, groups=rank, bias=False)  # type: ignore[arg-type]
            with torch.no_grad():
                middle.weight.copy_(kernels.T.reshape(rank, 1, kh, kw))
            return nn.Sequential(
                _conv(inside.T[:, :, None, None], conv, (1, 1), (0, 0), False),
                middle,
                _conv(out[:, :, None, None], conv, (1, 1), (0, 0), conv.bias is not None),
            )

        cost = rank * (C * _inputs(site) + (kh * kw + N) * site.positions)
        peers.append((Option(cost, error), make))
    return peers


def channel_pca(site: Site, A: Tensor, mean: Tensor) -> list[Peer]:
    """Zhang et al. 2015 (linear): kh x kw, C -> r; 1 x 1, r -> N, from the principal components of the responses.

    ``A (C q, C q)``, ``mean (C q,)``: second moment and mean of the input patches.
    """
    conv = site.module
    N, C, kh, kw = conv.weight.shape
    W = conv.weight.detach().double().flatten(1)
    centred = A - mean.outer(mean)
    values, vectors = torch.linalg.eigh(W @ centred @ W.T)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    middle = W @ mean
    peers = []
    for rank in range(1, N + 1):

        def make(rank: int = rank) -> nn.Module:
            basis = vectors[:, :rank]
            last = _conv(basis[:, :, None, None], conv, (1, 1), (0, 0), True)
            with torch.no_grad():
                last.bias.copy_(middle - basis @ (basis.T @ middle))  # type: ignore[union-attr]
                if conv.bias is not None:
                    last.bias += conv.bias  # type: ignore[operator]
            first = _conv((basis.T @ W).view(rank, C, kh, kw), conv, conv.stride, conv.padding, False)  # type: ignore[arg-type]
            return nn.Sequential(first, last)

        cost = rank * (C * kh * kw + N) * site.positions
        peers.append((Option(cost, float(values[rank:].sum() / values.sum().clamp_min(1e-300))), make))
    return peers


def gdws(site: Site, counts: Tensor) -> nn.Module:
    """GDWS: the singular vectors of every channel's slice; our layer without moments is exactly that."""
    return DKConv2d.from_factors(site.module, solve(site.module.weight.detach(), counts), form="folded")


def per_channel_svd(site: Site) -> list[Peer]:
    """The same layer with as many kernels in every channel: 1 of them, 2, ..., all."""
    conv = site.module
    energies = spectrum(conv.weight.detach())
    peers = []
    for count in range(1, energies.shape[2] + 1):
        counts = torch.full((energies.shape[0] * energies.shape[1],), count)
        cost = counts.numel() * count * (conv.kernel_size[0] * conv.kernel_size[1] + conv.out_channels) * site.positions
        error = float(energies[:, :, count:].sum() / energies.sum())
        peers.append((Option(cost, error), partial(gdws, site, counts)))
    return peers


def gdws_weights(model: nn.Module, sites: Iterable[Site], images: Tensor) -> dict[str, Tensor]:
    """GDWS's alpha (C,) of every layer: how much noise in a channel's weights moves the decision.

    Mean over images of the sum over other classes j of ``|d(z_y - z_j) / dW_c|^2 / (2 (z_y - z_j)^2)``, y the class
    that the model answers (Dbouk and Shanbhag 2021, section 3, after Sakr et al. 2017).
    """
    sites = list(sites)
    weights = [site.module.weight for site in sites]
    alpha = {site.name: torch.zeros(site.module.weight.shape[1], dtype=torch.float64) for site in sites}
    flags = [weight.requires_grad for weight in weights]
    model.eval()
    for weight in weights:
        weight.requires_grad_(True)
    for x in images.split(1):
        logits = model(x)[0]
        answer = int(logits.argmax())
        others = [j for j in range(len(logits)) if j != answer]
        for j in others:
            margin = logits[answer] - logits[j]
            gradients = torch.autograd.grad(margin, weights, retain_graph=j != others[-1])
            for site, gradient in zip(sites, gradients, strict=True):
                noise = gradient.double().square().sum((0, 2, 3))
                alpha[site.name] += noise / (2 * float(margin.detach()) ** 2) / len(images)
    for weight, flag in zip(weights, flags, strict=True):
        weight.requires_grad_(flag)
    return alpha


def pruned(model: nn.Module, example: Tensor, ratio: float, ignored: list[nn.Module]) -> nn.Module:
    """Torch-Pruning: group magnitude importance, one global ranking of channels, `ratio` of them removed."""
    import torch_pruning as tp

    student = copy.deepcopy(model)
    names = {module: name for name, module in model.named_modules()}
    modules = dict(student.named_modules())
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    pruner = tp.pruner.MagnitudePruner(
        student,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=ratio,
        max_pruning_ratio=0.9,
        ignored_layers=[modules[names[module]] for module in ignored],
    )
    pruner.step()
    return student
