"""Names of LoRA tensors: many spellings in, one (module, part) out.

A key is a module's name and what the tensor is of it. Modules are called by their dotted diffusers
name here, whichever way a trainer writes them:

kohya, OneTrainer    lora_unet_<diffusers or LDM name with underscores>
LyCORIS, SimpleTuner lycoris_<diffusers name with underscores>
PEFT, diffusers      [unet.][base_model.model.][unet.]<diffusers name>
older diffusers      [unet.]<block>.processor.to_q_lora, <module>.lora
ComfyUI              diffusion_model.<LDM name>
anything             _orig_mod. and module. of compiled and parallel models anywhere in front
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

UNET, TEXT, OTHER = "unet", "text encoder", "other"
LAYERS = 2  # resnets per block of the Stable Diffusion family

# What stands behind the module's name, and what it is called here. An adapter's name may stand in
# PEFT's: lora_A.identity1.weight.
_PARTS = tuple(
    (re.compile(rf"(?P<module>.+?){pattern}"), part)
    for pattern, part in (
        (r"\.lora_down\.weight", "down"),
        (r"\.lora_up\.weight", "up"),
        (r"\.lora_mid\.weight", "mid"),
        (r"\.lora_A(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?", "down"),
        (r"\.lora_B(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?", "up"),
        (r"(?:\.lora(?:_linear_layer)?|(?<=to_[qkv])_lora|(?<=to_out)_lora)\.down\.weight", "down"),
        (r"(?:\.lora(?:_linear_layer)?|(?<=to_[qkv])_lora|(?<=to_out)_lora)\.up\.weight", "up"),
        (
            r"(?:\.lora(?:_linear_layer)?|_lora)?(?:\.(?:lora_)?(?:down|up|A|B)(?:\.weight)?)?\.alpha",
            "alpha",
        ),
        (
            r"\.(?P<part>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t[12]))(?:\.(?!weight$)[^.]+)?(?:\.weight)?",
            "",
        ),
        (r"\.lora_magnitude_vector(?:\.(?!weight$)[^.]+)?(?:\.weight)?", "magnitude"),
        (r"\.magnitude", "magnitude"),
        (r"\.(?P<part>dora_scale|diff|diff_b|set_weight|reshape_weight)", ""),
        (r"\.(?P<part>w_norm|b_norm)", ""),
        (r"\.(?P<part>oft_blocks|oft_diag|oft_[rR]|boft_[a-zA-Z]+|rescale)(?:\..+)?", ""),
        (r"\.(?P<part>[ab][12])\.weight", ""),
        (r"\.(?P<part>ia3_l|on_input)(?:\..+)?", ""),
        (r"\.lora_(?:A|B|up|down)(?:\.[^.]+)?\.bias", "lora_bias"),
        (r"\.(?P<part>scalar|weight|bias)", ""),
    )
)

# Names of UNets that hold an underscore themselves, where a file turns every dot into one.
_COMPOUND = (
    "down_blocks up_blocks mid_block transformer_blocks conv_in conv_out conv_shortcut "
    "conv_norm_out proj_in proj_out to_q to_k to_v to_out time_emb_proj time_embedding "
    "add_embedding class_embedding linear_1 linear_2 "
    "input_blocks output_blocks middle_block time_embed label_emb in_layers out_layers emb_layers "
    "skip_connection"
).split()
_WORDS = tuple(
    (re.compile(rf"(?<![^.]){re.escape(word.replace('_', '.'))}(?![^.])"), word)
    for word in _COMPOUND
)

_UNDERSCORED = ("lora_unet_", "lycoris_unet_", "lycoris_")
_DOTTED = (
    "base_model.model.",
    "lora_unet.",
    "unet.",
    "model.diffusion_model.",
    "diffusion_model.",
    "module.",
)
_TEXT = (
    "lora_te",
    "lora_prior_te",
    "lycoris_te",
    "lycoris_text",
    "text_encoder",
    "text_model",
    "te_",
    "te1.",
    "te2.",
    "te.",
    "cond_stage_model",
    "clip_",
)
_BARE = re.compile(r"(?:down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks)_")
_LDM = re.compile(r"(?:input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\.")
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_AROUND = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def split_key(key: str) -> tuple[str, str]:
    """(the module as it is spelled, the part), empty strings if unknown."""
    for pattern, part in _PARTS:
        if match := pattern.fullmatch(key):
            return match["module"], part or match["part"]
    return "", ""


@lru_cache(maxsize=65536)
def parse_key(key: str, layers: int = LAYERS) -> tuple[str, str, str]:
    """(UNET, TEXT or OTHER; the module's dotted diffusers name; the part), empty strings if unknown."""
    key = key.replace("_orig_mod.", "")
    raw, part = split_key(key)
    if part:
        return *module_name(raw, layers), part
    return (TEXT if key.startswith(_TEXT) else OTHER), "", ""


def module_name(raw: str, layers: int = LAYERS) -> tuple[str, str]:
    """(UNET, TEXT or OTHER; dotted diffusers name) of a module in any spelling."""
    if raw.startswith(_TEXT):
        return TEXT, raw
    for prefix in _UNDERSCORED:
        if raw.startswith(prefix):
            return UNET, _finished(dotted_name(raw.removeprefix(prefix)), layers)
    if _BARE.match(raw) and "." not in raw:
        return UNET, _finished(dotted_name(raw), layers)
    while stripped := next((raw.removeprefix(p) for p in _DOTTED if raw.startswith(p)), ""):
        raw = stripped
    if raw.startswith(_TEXT):
        return TEXT, raw
    return UNET, _finished(raw, layers)


def dotted_name(underscored: str) -> str:
    """down_blocks_0_attentions_1_... -> down_blocks.0.attentions.1...., for the names that UNets have."""
    name = underscored.replace("_", ".")
    for pattern, word in _WORDS:
        name = pattern.sub(word, name)
    return name


def layers_of(keys: Iterable[str]) -> int | None:
    """Resnets per block, told by where the first downsampler stands in LDM names; None if none does."""
    found = [re.search(r"input_blocks[._](\d+)[._]0[._]op[._]", key) for key in keys]
    numbers = [int(match[1]) for match in found if match]
    return min(numbers) - 1 if numbers and min(numbers) > 1 else None


def _finished(name: str, layers: int) -> str:
    if _LDM.match(name):
        name = _of_ldm(name, layers)
    name = name.replace(".processor.", ".")
    return name + ".0" if name.endswith(".to_out") else name


def _of_ldm(name: str, layers: int) -> str:
    """input_blocks.1.1... -> down_blocks.0.attentions.0....; as it is if it is none of these."""
    for start, other in _AROUND.items():
        if name == start or name.startswith(start + "."):
            return other + name.removeprefix(start)
    head, _, rest = name.partition(".")
    if head == "middle_block":
        which, _, inner = rest.partition(".")
        if which == "1":
            return f"mid_block.attentions.0.{inner}"
        return f"mid_block.resnets.{int(which) // 2}.{_resnet(inner)}" if which in "02" else name
    match = re.fullmatch(r"(\d+)\.(\d+)\.(.+)", rest)
    if not match:
        return name
    number, place, inner = int(match[1]), match[2], match[3]
    if head == "input_blocks":
        level, i = divmod(number - 1, layers + 1)
        if i == layers:
            return f"down_blocks.{level}.downsamplers.0.{inner.replace('op', 'conv', 1)}"
        block = f"down_blocks.{level}"
    else:
        level, i = divmod(number, layers + 1)
        block = f"up_blocks.{level}"
        if place == "2" or (place == "1" and inner.startswith("conv")):
            return f"{block}.upsamplers.0.{inner}"
    if place == "0":
        return f"{block}.resnets.{i}.{_resnet(inner)}"
    return f"{block}.attentions.{i}.{inner}"


def _resnet(inner: str) -> str:
    for ldm, diffusers in _RESNET.items():
        if inner == ldm or inner.startswith(ldm + "."):
            return diffusers + inner.removeprefix(ldm)
    return inner
