"""Many LoRAs in one forward pass: every sample of the batch carries its own A and B.

A batch is ordered by LoRA: N LoRAs, M samples each, B = N * M rows. Hooks add ``scale * (x A^T) B^T`` to the output
of each adapted linear layer, as two batched products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .layout import Layout


@contextmanager
def loras_applied(unet: nn.Module, layout: Layout | None, vectors: Tensor | None) -> Iterator[None]:
    """Within the block, sample ``i`` of a batch is painted by LoRA ``i * N // B`` of ``vectors`` [N, P]."""
    if vectors is None or layout is None:
        yield
        return
    scale = layout.scale
    handles = []
    try:
        for name, (down, up) in layout.unpack(vectors).items():
            module = unet.get_submodule(name)
            handles.append(module.register_forward_hook(_hook(down, up * scale)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(down: Tensor, up: Tensor) -> Any:
    """Add x [B, n, in] -> x A^T B^T with down [N, r, in] and up [N, out, r]."""

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        hidden = inputs[0]
        grouped = hidden.reshape(len(down), -1, hidden.shape[-1])
        low = torch.bmm(grouped, down.to(grouped.dtype).transpose(1, 2))
        added = torch.bmm(low, up.to(low.dtype).transpose(1, 2))
        return output + added.reshape(output.shape)

    return add
