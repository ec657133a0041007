"""LoRA files as written, by the ecosystem's rules.

kohya      one file, lora_unet_<module with underscores>.lora_down.weight | .lora_up.weight | .alpha:
           ComfyUI, kohya's tools, A1111 and diffusers' load_lora_weights take it
diffusers  one file, unet.<module>.lora_A.weight | .lora_B.weight: diffusers' load_lora_weights
peft       a folder: adapter_model.safetensors (base_model.model.<module>.lora_A.weight ...) with
           adapter_config.json for PEFT's from_pretrained, and the same as
           pytorch_lora_weights.safetensors (<module>.lora_A.weight ...) for a diffusers UNet's
           load_lora_adapter(folder, prefix=None, use_safetensors=True)
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arrays import is_finite
from ..errors import ConfigError, FormatError
from ..files.container import write_container
from ..files.writing import replacing
from .families import lora_keys, of_text_encoders
from .stated import DIFFUSERS, FOLDED

FORMATS = ("kohya", "diffusers", "peft")
ADAPTER, OF_DIFFUSERS = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"
# What does not load a format, to be said when one is written.
NOT_LOADED_BY = {
    "diffusers": "ComfyUI and A1111 do not load this format; write kohya for them.",
    "peft": "ComfyUI and A1111 do not load this format; write kohya for them.",
}


def kohya_tensors(lora: Mapping[str, tuple[Tensor, Tensor]], alpha: float) -> dict[str, Tensor]:
    """{key: tensor} in kohya's spelling, which is also what ComfyUI's LORA_MODEL sockets carry."""
    tensors, keys = {}, lora_keys(lora)
    for name, (a, b) in lora.items():
        key = keys[name]
        tensors[f"{key}.lora_down.weight"] = a.contiguous()
        tensors[f"{key}.lora_up.weight"] = b.contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
    return tensors


def save_lora(
    lora: Mapping[str, tuple[Tensor, Tensor]],
    path: str | os.PathLike[str],
    *,
    format: str = "kohya",
    alpha: float,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write one LoRA, {module: (A [r, in], B [out, r])}; returns the file, or for peft the folder.

    Every module's update is alpha / r * B A with its own rank r. peft writes a folder of the name
    given; if that ends in adapter_model.safetensors, the folder that it names. A diffusers file has
    no place for alpha that every release reads, so alpha / r is multiplied into B and the file means
    itself at a scale of 1; `load_lora` undoes it.

    Raises ConfigError for an unknown format or an alpha of zero.
    """
    if format not in FORMATS:
        raise ConfigError(f"LoRA files are written as {', '.join(FORMATS)}. Got {format!r}.")
    if not math.isfinite(alpha) or alpha == 0:
        raise ConfigError(f"The alpha of a LoRA is a finite number other than 0. Got {alpha}.")
    lora = _checked(lora)
    texts = {"format": "pt", **(metadata or {})}
    path = Path(path)
    if format == "kohya":
        ranks = _ranks(lora)
        texts.update(
            ss_network_dim=str(_usual(ranks)),
            ss_network_alpha=str(float(alpha)),
            ss_network_module="networks.lora",
        )
        write_container(path, kohya_tensors(lora, alpha), metadata=texts)
    elif format == "diffusers":
        _write_diffusers(lora, path, alpha, texts)
    else:
        path = path.parent if path.name == ADAPTER else path
        _write_peft(lora, path, alpha, texts)
    return path


def _checked(lora: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    if not lora or any(a.ndim != 2 or b.ndim != 2 for a, b in lora.values()):
        raise ConfigError(
            "A LoRA file holds one LoRA, {module: (A [r, in], B [out, r])}; pick one of the batch."
        )
    odd = [n for n, (a, b) in lora.items() if len(a) != b.shape[1] or len(a) == 0]
    if odd:
        a, b = lora[odd[0]]
        raise ConfigError(
            f"{odd[0]} is of two ranks: A {list(a.shape)}, B {list(b.shape)}; expected A [r, in] and "
            "B [out, r]."
        )
    found = {n: (a.detach().cpu().float(), b.detach().cpu().float()) for n, (a, b) in lora.items()}
    if not all(is_finite(t) for pair in found.values() for t in pair):
        raise FormatError("This LoRA holds NaN or infinite numbers and is not written.")
    return found


def _write_diffusers(
    lora: Mapping[str, tuple[Tensor, Tensor]], path: Path, alpha: float, texts: dict[str, str]
) -> None:
    folded = {n: (a, b * (alpha / len(a))) for n, (a, b) in lora.items()}
    ranks = _ranks(lora)
    if len(set(ranks.values())) == 1:  # of several, no one number would undo it
        texts[FOLDED] = repr(alpha / _usual(ranks))
    # Scale 1 in every module: alpha is the rank.
    config = _adapter_config(ranks, {n: float(r) for n, r in ranks.items()})
    # Names of text encoders say which one they are of.
    texts_only = of_text_encoders(lora)
    prefix, component = ("", "text_encoder.") if texts_only else ("unet.", "unet.")
    texts[DIFFUSERS] = json.dumps({component + k: v for k, v in config.items()}, sort_keys=True)
    write_container(path, _peft_tensors(folded, prefix), metadata=texts)


def _write_peft(
    lora: Mapping[str, tuple[Tensor, Tensor]], folder: Path, alpha: float, texts: dict[str, str]
) -> None:
    if of_text_encoders(lora):
        raise ConfigError(
            "A PEFT adapter is of one model, and this LoRA is of text encoders. Write kohya or diffusers."
        )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(
            f"{folder} is a file; a PEFT adapter is a folder with {ADAPTER} and adapter_config.json. "
            "Name another."
        )
    ranks = _ranks(lora)
    config = _adapter_config(ranks, dict.fromkeys(ranks, float(alpha)))
    for name, prefix in ((ADAPTER, "base_model.model."), (OF_DIFFUSERS, "")):
        said = {f"{prefix}{key}": value for key, value in config.items()}
        metadata = {**texts, DIFFUSERS: json.dumps(said, sort_keys=True)}
        write_container(folder / name, _peft_tensors(lora, prefix), metadata=metadata)
    text = json.dumps({**config, "bias": "none", "lora_dropout": 0.0}, indent=2) + "\n"
    with replacing(folder / "adapter_config.json") as f:
        f.write(text.encode())


def _peft_tensors(lora: Mapping[str, tuple[Tensor, Tensor]], prefix: str) -> dict[str, Tensor]:
    tensors = {}
    for name, (a, b) in lora.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = a
        tensors[f"{prefix}{name}.lora_B.weight"] = b
    return tensors


def _adapter_config(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """PEFT's LoraConfig of modules with these ranks and alphas."""
    rank, alpha = _usual(ranks), _usual(alphas)
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {n: r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {n: a for n, a in alphas.items() if a != alpha},
        "target_modules": sorted(ranks),
    }


def _ranks(lora: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, int]:
    return {n: len(a) for n, (a, _) in lora.items()}


def _usual(numbers: Mapping[str, Any]) -> Any:
    return Counter(numbers.values()).most_common(1)[0][0]
