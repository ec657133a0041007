"""Many LoRAs in one forward pass: every sample of the batch carries its own A and B.

A batch is ordered by LoRA: N LoRAs, M samples each, B = N * M rows. A hook adds ``scale * (x A^T) B^T`` to the output
of each adapted linear layer, as two batched products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from .layout import Layout

# factors(module name) -> down [N, r, in] and up [N, out, r]
Factors = Callable[[str], tuple[Tensor, Tensor]]


@contextmanager
def loras_applied(unet: nn.Module, layout: Layout | None, vectors: Tensor | None) -> Iterator[None]:
    """Within the block, sample ``i`` of a batch is painted by LoRA ``i * N // B`` of ``vectors`` [N, P]."""
    if vectors is None or layout is None:
        yield
        return
    modules = {module.name: unet.get_submodule(module.name) for module in layout.modules}
    with hooked(modules, layout.unpack(vectors).__getitem__, layout.scale):
        yield


@contextmanager
def hooked(modules: Mapping[str, nn.Module], factors: Factors, scale: float) -> Iterator[None]:
    """Within the block, linear layers add the LoRAs that ``factors`` has for their names when they are called."""
    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(_hook(name, factors, scale)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(name: str, factors: Factors, scale: float) -> Callable[..., Tensor]:
    def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return with_loras(inputs[0], output, *factors(name), scale)

    return add


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
