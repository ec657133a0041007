"""Which base model a LoRA was trained on, told by the modules it has, their sizes, and what is missing.

Stable Diffusion 1, 2 and XL share names and many sizes. What tells them apart:

texts   to_k and to_v of attn2 read 768 numbers in SD 1, 1024 in SD 2, 2048 in SDXL
depth   only SDXL stacks transformer_blocks, and has attention in up_blocks.0
widths  SDXL's up_blocks.1 is 640 wide, SD's 1280; SDXL has no attention in down_blocks.0 and up_blocks.3
layers  proj_in and proj_out are convolutions in SD 1, linear in the others
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from .layout import SD15, Layout

SD1, SD2, SDXL, UNKNOWN = "Stable Diffusion 1", "Stable Diffusion 2", "SDXL", ""
_TEXT_WIDTHS = {768: SD1, 1024: SD2, 2048: SDXL, 1280: "the SDXL refiner"}
_OTHERS = {
    "double_blocks": "Flux",
    "single_blocks": "Flux",
    "single_transformer_blocks": "Flux",
    "joint_blocks": "Stable Diffusion 3",
    "motion_modules": "a motion module (AnimateDiff)",
}
_METADATA = (
    (re.compile(r"sdxl|stable-diffusion-xl|sd_xl", re.I), SDXL),
    (re.compile(r"sd_?v?2|stable-diffusion-v?2", re.I), SD2),
    (re.compile(r"sd_?v?1|stable-diffusion-v?1|^sd15$", re.I), SD1),
    (re.compile(r"flux", re.I), "Flux"),
)
_STATED = ("modelspec.architecture", "ss_base_model_version", "w2wpp.base_model")
_WIDTHS = {m.name: m.out_features for m in SD15.modules if m.name.endswith("attn1.to_q")}


@dataclass(frozen=True)
class Family:
    """A base model's family and what told it."""

    name: str
    why: str


def is_sd15(layout: Layout) -> bool:
    """Whether a layout is of the true SD 1.5 UNet, and not of a smaller one that calls itself so."""
    return layout.base_model == SD15.base_model and all(
        _width(m.name) == m.out_features for m in layout.modules if ".attn" in m.name
    )


def family_of(
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str],
    *,
    convolutions: Collection[str] = (),
    texts: Mapping[str, tuple[int, ...]] | None = None,
) -> Family:
    """The family of a LoRA with modules of these shapes (out, in, *kernel).

    `convolutions` are those of them that are stored as such, `texts` the tensors of text encoders.
    What is there speaks before the metadata, unless these name another family, and both before what
    is missing.
    """
    stated = _of_metadata(metadata)
    found = _of_modules(shapes) or _of_texts(texts or {}) or _of_convolutions(convolutions)
    if found and (not stated or found.name == stated.name or found.name != SD1):
        return found
    if stated:
        return stated
    return _of_gaps(shapes)


def _of_modules(shapes: Mapping[str, tuple[int, ...]]) -> Family | None:
    firsts: dict[str, Family] = {}
    for name, shape in shapes.items():
        found = _of_module(name, shape)
        if found:
            firsts.setdefault(found.name, found)
    others = [family for name, family in firsts.items() if name != SD1]
    return others[0] if others else firsts.get(SD1)


def _of_module(name: str, shape: tuple[int, ...]) -> Family | None:
    for part, other in _OTHERS.items():
        if part in name.split("."):
            return Family(other, f"it has {name}")
    if re.search(r"\.transformer_blocks\.[1-9]", name) or name.startswith("add_embedding"):
        return Family(SDXL, f"it has {name}")
    if re.match(r"up_blocks\.0\.attentions\.", name):
        return Family(SDXL, f"it has {name}")
    if len(shape) < 2:
        return None
    if re.search(r"attn2\.to_[kv]$", name):
        known = _TEXT_WIDTHS.get(shape[1])
        if known:
            return Family(known, f"{name} reads {shape[1]} numbers")
    width = _width(name)
    if width is not None and shape[0] != width and ".attn" in name:
        return Family(SDXL, f"{name} is {shape[0]} wide, {width} in {SD1}")
    return None


def _width(name: str) -> int | None:
    """Channels of the attention block that a module belongs to in SD 1.5."""
    block = name.split(".attn")[0]
    return _WIDTHS.get(f"{block}.attn1.to_q")


def _of_texts(texts: Mapping[str, tuple[int, ...]]) -> Family | None:
    second = next((k for k in texts if k.startswith(("lora_te2", "text_encoder_2"))), None)
    if second:
        return Family(SDXL, f"it has a second text encoder ({second})")
    for key, shape in texts.items():
        down = re.search(r"(q_proj|k_proj|v_proj)\.(lora_down|lora_A|lora_linear_layer\.down)", key)
        if down and not key.startswith("lora_te1") and len(shape) == 2 and shape[1] in (768, 1024):
            return Family(_TEXT_WIDTHS[shape[1]], f"its text encoder is {shape[1]} wide")
    return None


def _of_convolutions(names: Collection[str]) -> Family | None:
    found = next((n for n in names if re.search(r"attentions\.\d+\.proj_(in|out)$", n)), None)
    return Family(SD1, f"{found} is a convolution") if found else None


def _of_metadata(metadata: Mapping[str, str]) -> Family | None:
    for key in _STATED:
        text = metadata.get(key, "")
        for pattern, name in _METADATA:
            if pattern.search(text):
                return Family(name, f"its metadata says {key} = {text!r}")
    if metadata.get("ss_v2", "").lower() == "true":
        return Family(SD2, "its metadata says ss_v2 = 'True'")
    return None


def _of_gaps(shapes: Mapping[str, tuple[int, ...]]) -> Family:
    attention = [name for name in shapes if ".attn" in name]
    outer = [n for n in attention if n.startswith(("down_blocks.0.", "up_blocks.3."))]
    if attention and not outer:
        return Family(
            UNKNOWN,
            "it has no attention in down_blocks.0 and up_blocks.3, which SDXL lacks too, and none of "
            "the weights that read the text, whose width tells the families apart",
        )
    return Family(
        UNKNOWN,
        "it has none of the weights that read the text (to_k and to_v of attn2), whose width tells "
        "Stable Diffusion 1 and 2 apart",
    )
