"""Many LoRAs in one forward pass: every sample of the batch carries its own A and B.

A batch is ordered by LoRA: N LoRAs, M samples each, B = N * M rows. A hook adds ``scale * (x A^T) B^T`` to the output
of each adapted linear layer, as two batched products; to that of a convolution, its kernels A and then B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import ConfigError
from .layout import Layout

# factors(module name) -> down [N, r, in] and up [N, out, r]; the inputs of a convolution are channels * kernel
Factors = Callable[[str], tuple[Tensor, Tensor]]
CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}


@dataclass(frozen=True, eq=False)
class Site:
    """Where an update acts: a layer, or some of its output rows, as where a model fuses q, k and v into one."""

    layer: nn.Module
    rows: tuple[int, int] | None = None  # first and count


@contextmanager
def loras_applied(unet: nn.Module, layout: Layout | None, vectors: Tensor | None) -> Iterator[None]:
    """Within the block, sample ``i`` of a batch is painted by LoRA ``i * N // B`` of ``vectors`` [N, P]."""
    if vectors is None or layout is None:
        yield
        return
    modules = {module.name: unet.get_submodule(module.name) for module in layout.modules}
    vectors = vectors.to(next(unet.parameters()).device)
    with hooked(modules, layout.unpack(vectors).__getitem__, layout.scale):
        yield


@contextmanager
def hooked(
    sites: Mapping[str, Site | nn.Module], factors: Factors, scale: float, *, tiled: bool = False
) -> Iterator[None]:
    """Within the block, layers add the LoRAs that ``factors`` has for their names when they are called.

    ``tiled``: row i of a batch has LoRA i % N, as where a host puts the rows of one prompt after those of another.
    Raises ConfigError for a layer that is neither linear nor a plain convolution.
    """
    layers: dict[nn.Module, list[tuple[str, tuple[int, int] | None]]] = {}
    for name, site in sites.items():
        site = site if isinstance(site, Site) else Site(site)
        _require_linear(name, site.layer)
        layers.setdefault(site.layer, []).append((name, site.rows))
    handles = []
    try:
        for layer, parts in layers.items():
            parts.sort(key=lambda part: part[1] or (0, 0))
            _require_apart(parts)
            if len(parts) == 1 and parts[0][1] is None and isinstance(layer, nn.Linear):
                hook = _hook(parts[0][0], factors, scale, tiled)
            else:
                hook = _hook_of_parts(parts, factors, scale, tiled)
            handles.append(layer.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _require_linear(name: str, layer: nn.Module) -> None:
    plain = isinstance(layer, nn.Linear) or (
        isinstance(layer, tuple(CONVOLUTIONS))
        and layer.groups == 1
        and layer.padding_mode == "zeros"
    )
    if not plain:
        raise ConfigError(
            f"LoRAs can be tried out on linear layers and plain convolutions; {name} is of the kind "
            f"{type(layer).__name__}."
        )


def _require_apart(parts: list[tuple[str, tuple[int, int] | None]]) -> None:
    for (name, rows), (other, others) in pairwise(parts):
        if rows is None or others is None or sum(rows) > others[0]:
            raise ConfigError(f"{name} and {other} are the same weights of the model.")


def _of_rows(x: Tensor, pair: tuple[Tensor, Tensor], tiled: bool) -> tuple[Tensor, Tensor]:
    """A and B such that the rows of x are ordered by them."""
    if not tiled:
        return pair
    times, rest = divmod(len(x), len(pair[0]))
    if rest:
        raise ConfigError(f"A batch of {len(x)} rows does not consist of {len(pair[0])} people.")
    return pair[0].repeat(times, 1, 1), pair[1].repeat(times, 1, 1)


def _hook(name: str, factors: Factors, scale: float, tiled: bool) -> Callable[..., Tensor]:
    def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        return with_loras(x, output, *_of_rows(x, factors(name), tiled), scale)

    return add


def _hook_of_parts(
    parts: list[tuple[str, tuple[int, int] | None]], factors: Factors, scale: float, tiled: bool
) -> Callable[..., Tensor]:
    """Of a convolution, or of a layer whose rows are several modules': what they add stands side by side."""

    def add(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        channels = output.ndim - 1 if isinstance(layer, nn.Linear) else 1
        pieces, at = [], 0
        for name, rows in parts:
            start, count = rows or (0, output.shape[channels])
            pieces.append(_zeros(output, start - at, channels))
            pair = _of_rows(inputs[0], factors(name), tiled)
            pieces.append(_update(layer, inputs[0], *pair))
            at = start + count
        pieces.append(_zeros(output, output.shape[channels] - at, channels))
        return torch.add(output, torch.cat(pieces, channels), alpha=scale)

    return add


def _zeros(like: Tensor, count: int, dim: int) -> Tensor:
    return like.new_zeros(*like.shape[:dim], count, *like.shape[dim + 1 :])


def _update(layer: nn.Module, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """B A x: of a linear layer [B, ..., in] -> [B, ..., out], of a convolution [B, in, ...] -> [B, out, ...]."""
    down, up = down.to(x.dtype), up.to(x.dtype)
    if isinstance(layer, nn.Linear):
        grouped = x.reshape(len(down), -1, x.shape[-1])
        low = torch.bmm(grouped, rearrange(down, "n r i -> n i r"))
        return torch.bmm(low, rearrange(up, "n o r -> n r o")).reshape(*x.shape[:-1], up.shape[1])
    convolve = next(f for kind, f in CONVOLUTIONS.items() if isinstance(layer, kind))
    n, rank = down.shape[:2]
    side_by_side = rearrange(x, "(n m) c ... -> m (n c) ...", n=n)
    kernels = down.reshape(n * rank, -1, *layer.kernel_size)  # type: ignore[misc]
    how = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    low = convolve(side_by_side, kernels, groups=n, **how)  # [m, n * r, ...]
    size = low.shape[2:]
    low = rearrange(low.flatten(2), "m (n r) s -> n r (m s)", n=n)
    out = rearrange(torch.bmm(up, low), "n o (m s) -> (n m) o s", m=len(side_by_side))
    return out.unflatten(2, size)


def with_loras(x: Tensor, output: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """A linear layer's x [B, ..., in] and output [B, ..., out] -> output + scale * (x A^T) B^T, [B, ..., out].

    down [N, r, in] and up [N, out, r]; B is a multiple of N. Without gradients the output is changed in place.
    """
    grouped = x.reshape(len(down), -1, x.shape[-1])
    low = torch.bmm(grouped, rearrange(down.to(x.dtype), "n r i -> n i r"))
    flat = output.reshape(len(up), -1, output.shape[-1])
    right = rearrange(up.to(low.dtype), "n o r -> n r o")
    if torch.is_grad_enabled():
        return torch.baddbmm(flat, low, right, alpha=scale).reshape(output.shape)
    return flat.baddbmm_(low, right, alpha=scale).reshape(output.shape)
