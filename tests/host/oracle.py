"""What the host's own loader makes of LoRA files beside what this library does; run by the host's Python.

oracle.py HOST REPO FOLDER writes the cases of tests/lora/foreign.py into FOLDER and prints, for each, how many of
the 64 modules the host patches and how far its updates lie from this library's, as JSON.
"""

# ruff: noqa: E402 - the host is found by its path first

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

HOST, REPO, FOLDER = sys.argv[1:4]
sys.path[:] = [HOST, *(p for p in sys.path if Path(p or ".").resolve() != Path(REPO)), REPO]
sys.argv = [sys.argv[0], "--cpu"]

import comfy.options

comfy.options.enable_args_parsing()

import comfy.lora
import comfy.lora_convert
import comfy.utils
import torch

from w2wpp import load_lora, save_lora
from w2wpp.lora.match import match_modules
from w2wpp.lora.names import UNET, module_name
from w2wpp.lora.products import Product

spec = importlib.util.spec_from_file_location("foreign", Path(REPO, "tests/lora/foreign.py"))
foreign = importlib.util.module_from_spec(spec)
sys.modules["foreign"] = foreign
spec.loader.exec_module(foreign)

CONFIG = {
    "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
}  # fmt: skip
SDXL = {
    "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
}  # fmt: skip
SMALL = {
    "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [0, 1],
    "transformer_depth_middle": 1, "transformer_depth_output": [0, 0, 1, 1],
}  # fmt: skip
# All that the host's map of names asks of a model.
WEIGHTS = {
    f"diffusion_model.{name}": None for name in comfy.utils.unet_to_diffusers(CONFIG).values()
}
MODEL = SimpleNamespace(
    model_config=SimpleNamespace(unet_config=CONFIG), state_dict=lambda: WEIGHTS
)
KEYS = comfy.lora.model_lora_keys_unet(MODEL, {})


def of_the_host(path: Path) -> dict[str, torch.Tensor]:
    """The update of every module that the host patches, on top of the cases' base weights."""
    tensors = comfy.lora_convert.convert_lora(
        comfy.utils.load_torch_file(str(path), safe_load=True)
    )
    patches = comfy.lora.load_lora(tensors, KEYS, log_missing=False)
    found = {}
    for module in foreign.SHAPES:
        key = KEYS["lora_unet_" + module.replace(".", "_")]
        if key in patches:
            weight = foreign.base_weight(module)
            patch = (1.0, patches[key], 1.0, None, None)
            found[module] = comfy.lora.calculate_weight([patch], weight.clone(), key) - weight
    return found


def of_the_library(path: Path) -> dict[str, torch.Tensor]:
    deltas = match_modules(load_lora(path), foreign.LAYOUT, base=foreign.base_weight).deltas
    return {n: d.b @ d.a if isinstance(d, Product) else d.d for n, d in deltas.items()}


def compared(path: Path) -> dict[str, float]:
    host, ours = of_the_host(path), of_the_library(path)
    missed = sum(float((host[n] - ours[n]).square().sum()) for n in host)
    size = sum(float(t.square().sum()) for t in host.values())
    return {
        "patched": len(host),
        "ours": len(ours),
        "error": (missed / size) ** 0.5 if size else 0.0,
    }


def misread(config: dict, layers: int) -> list[str]:
    """Names of the original checkpoints that this library reads as another module than the host does."""
    odd = []
    for diffusers, original in comfy.utils.unet_to_diffusers(config).items():
        if not diffusers.endswith(".weight") or "label_emb" in original:
            continue
        wanted, name = diffusers.removesuffix(".weight"), original.removesuffix(".weight")
        for spelled in (f"diffusion_model.{name}", f"lora_unet_{name.replace('.', '_')}"):
            if module_name(spelled, layers) != (UNET, wanted):
                odd.append(spelled)
        if module_name(f"lora_unet_{wanted.replace('.', '_')}") != (UNET, wanted):
            odd.append(wanted)
    return odd


logging.disable(logging.WARNING)
found = {}
for number, (name, case) in enumerate(foreign.cases().items()):
    found[name] = compared(foreign.write(case, Path(FOLDER, str(number))))
lora = foreign.LAYOUT.unpack(torch.randn(foreign.LAYOUT.size, generator=foreign.generator(1)))
for format in ("kohya", "diffusers"):
    path = save_lora(lora, Path(FOLDER, f"{format}.safetensors"), format=format, alpha=27.0)
    found[f"written as {format}"] = compared(path)
folder = save_lora(lora, Path(FOLDER, "peft"), format="peft", alpha=27.0)
found["written as peft"] = compared(folder / "adapter_model.safetensors")
found["misread names"] = misread(CONFIG, 2) + misread(SDXL, 2) + misread(SMALL, 1)
print(json.dumps(found))
