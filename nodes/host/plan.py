"""How a UNet is run in an inversion; what memory and device allow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch

# Numbers in memory at the peak of a step, for each picture, latent pixel and channel of the first block: without
# checkpointing SD 1.5 takes 343 at 64x64, with it 236 (benchmarks/results/inversion_speed.md). Both with room to spare.
KEPT, KEPT_CHECKPOINTED = 500, 300


@dataclass(frozen=True)
class Plan:
    """How the UNet is run; what memory and device allow."""

    device: torch.device
    dtype: torch.dtype
    gradients: bool
    checkpointing: bool
    rows: int  # most pictures that go through at once
    activations: int  # bytes that they take, estimated

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        how = "forward passes"
        if self.gradients:
            how = f"gradients {'with' if self.checkpointing else 'without'} checkpointing"
        return f"{how} on {self.device} in {dtype}, {self.rows} pictures at a time"


def plan_run(
    model: Any, latents: tuple[int, ...], *, gradients: bool, checkpointing: bool | None = None
) -> Plan:
    """Choose for batches of ``latents`` [N, C, H, W]: as many of them at once as fit into memory, with checkpointing
    if not one does without. ``checkpointing`` overrules that."""
    device = model.load_device
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    count, *shape = latents
    if not gradients:
        each = int(model.memory_required([1, *shape]))
        rows = max(1, min(count, _room(device) // max(each, 1)))
        return Plan(device, dtype, False, False, rows, each * rows)
    if dtype != torch.float32:  # half precision underflows on the way back
        bf16 = comfy.model_management.should_use_bf16(device)
        dtype = torch.bfloat16 if bf16 else torch.float32
    room = _room(device) - count_parameters(model) * dtype.itemsize
    config = model.model.model_config.unet_config
    numbers = shape[1] * shape[2] // config.get("fold", 1) ** 2 * config["model_channels"]
    full, less = (dtype.itemsize * kept * numbers for kept in (KEPT, KEPT_CHECKPOINTED))
    if checkpointing is None:
        checkpointing = full > room
    each = less if checkpointing else full
    rows = max(1, min(count, room // each))
    return Plan(device, dtype, True, checkpointing, rows, each * rows)


def _room(device: torch.device) -> int:
    """Bytes to be had on a device: what is free and what the host's models would make free, less a margin."""
    management = comfy.model_management
    free = management.get_free_memory(device)
    if device.type != "cpu":
        loaded = [m for m in management.current_loaded_models if m.device == device]
        free += sum(m.model_loaded_memory() for m in loaded)
    return int(0.8 * free)


def count_parameters(model: Any) -> int:
    """How many numbers a model has."""
    return sum(p.numel() for p in model.model.diffusion_model.parameters())
