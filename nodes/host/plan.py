"""How a UNet is run in an inversion; what memory and device allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch

from .model import blocks_of, has_frames, patch_side

# Numbers in memory at the peak of a step, for each picture, latent pixel and channel of the first block: without
# checkpointing SD 1.5 takes 343 at 64x64, with it 236 (benchmarks/results/inversion_speed.md). Both with room to spare.
KEPT, KEPT_CHECKPOINTED = 500, 300
# The same for transformers, for each token and output of a linear layer; the prompt's tokens are not known yet.
KEPT_OUTPUTS, PROMPT_TOKENS = 4, 512
SUMS = 1 << 30  # bytes that comparing LoRAs takes at least: 100 of SDXL of rank 32 take half of it


@dataclass(frozen=True)
class Plan:
    """How the UNet is run; what memory and device allow."""

    device: torch.device
    dtype: torch.dtype
    gradients: bool
    checkpointing: bool
    rows: int  # most pictures that go through at once
    activations: int  # bytes that they take, estimated
    latents: tuple[int, ...]  # (C, h, w) of a picture

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
        each = int(model.memory_required([1, *frames(model, shape)]))
        rows = max(1, min(count, _room(device) // max(each, 1)))
        return Plan(device, dtype, False, False, rows, each * rows, tuple(shape))
    if dtype != torch.float32:  # half precision underflows on the way back
        bf16 = comfy.model_management.should_use_bf16(device)
        dtype = torch.bfloat16 if bf16 else torch.float32
    room = _room(device) - count_parameters(model) * dtype.itemsize
    full, less = (dtype.itemsize * numbers for numbers in _kept(model, shape))
    if checkpointing is None:
        checkpointing = full > room
    each = less if checkpointing else full
    rows = max(1, min(count, room // each))
    return Plan(device, dtype, True, checkpointing, rows, each * rows, tuple(shape))


def frames(model: Any, shape: Sequence[int]) -> list[int]:
    """(C, h, w) as the model has it."""
    return [shape[0], 1, *shape[1:]] if has_frames(model.model) else list(shape)


def _kept(model: Any, shape: Sequence[int]) -> tuple[int, int]:
    """Numbers that a picture leaves for the way back, without checkpointing and with it."""
    config, network = model.model.model_config.unet_config, model.model.diffusion_model
    if "model_channels" in config:
        numbers = shape[1] * shape[2] // config.get("fold", 1) ** 2 * config["model_channels"]
        return KEPT * numbers, KEPT_CHECKPOINTED * numbers
    tokens = shape[1] * shape[2] // patch_side(model) ** 2 + PROMPT_TOKENS
    blocks = [_outputs(block) for block in blocks_of(network)]
    whole = KEPT_OUTPUTS * _outputs(network) * tokens
    # Each block's inputs, a share of its outputs, and all of the largest one.
    return whole, whole // 4 + KEPT_OUTPUTS * max(blocks, default=0) * tokens


def _outputs(module: torch.nn.Module) -> int:
    return sum(m.out_features for m in module.modules() if isinstance(m, torch.nn.Linear))


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


def device_for_sums() -> torch.device:
    """Where sums over many LoRAs are taken: the host's GPU, if it knows double precision and some of it is free, or
    the CPU."""
    device = comfy.model_management.get_torch_device()
    if device.type != "cuda":
        return torch.device("cpu")
    comfy.model_management.free_memory(SUMS, device)
    free = comfy.model_management.get_free_memory(device)
    return device if free >= SUMS else torch.device("cpu")
