"""Exported LoRAs in the programs that people use them with: the same update of all 64 weights as in ComfyUI."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import w2wpp
from w2wpp import SD15

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
peft = pytest.importorskip("peft", reason="PEFT is not installed")
pytest.importorskip("transformers", reason="diffusers reads LoRA files only beside transformers")

LORA = SD15.unpack(0.02 * torch.randn(SD15.size, generator=torch.Generator().manual_seed(0)))


def unet() -> Any:
    """SD 1.5's, with memory that nobody touches for its weights."""
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(cross_attention_dim=768).to_empty(device="cpu")


def updates(model: torch.nn.Module, adapter: str) -> Iterator[tuple[str, torch.Tensor]]:
    """What an adapter adds to each weight, as PEFT computes it."""
    for name, module in model.named_modules():
        if adapter in getattr(module, "lora_A", ()):
            yield name, module.get_delta_weight(adapter)


def assert_same_updates(model: torch.nn.Module, adapter: str) -> None:
    found = dict(updates(model, adapter))
    assert found.keys() == LORA.keys()
    for name, (a, b) in LORA.items():
        torch.testing.assert_close(found[name], 27.0 * b @ a, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_diffusers_loads_an_exported_file(tmp_path: Path, format: str) -> None:
    path = tmp_path / "face.safetensors"
    w2wpp.save_lora(LORA, path, format=format, alpha=SD15.alpha)
    loader, model = diffusers.loaders.StableDiffusionLoraLoaderMixin, unet()
    state, alphas = loader.lora_state_dict(str(path))
    loader.load_lora_into_unet(state, alphas, model, adapter_name="face")
    assert_same_updates(model, "face")


def test_peft_loads_an_exported_folder(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    w2wpp.save_lora(LORA, path, format="peft", alpha=SD15.alpha)
    model = peft.PeftModel.from_pretrained(unet(), str(tmp_path))
    assert_same_updates(model.base_model.model, "default")
