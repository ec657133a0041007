"""Where a small network of one's own is trained: where the host computes."""

from __future__ import annotations

import comfy.model_management

from ...w2wpp.training.compute import Compute


def host_compute() -> Compute:
    """The host's GPU if it is one that trainings know (PyTorch's cuda), else the CPU."""
    device = comfy.model_management.get_torch_device()
    return Compute(device, "tf32") if device.type == "cuda" else Compute()
