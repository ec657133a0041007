"""Which model a LoRA is for, told by its modules; and one name for a module that has several.

Trainers spell modules in three ways: with dots as diffusers calls them, with dots as the original
code calls them, and either with underscores for dots. `module_name` brings a spelling to a plain
name, `join_key` makes names comparable. Names of Stable Diffusion's UNets all become those of
diffusers. Transformers keep the names of their files, because a host knows both; where a collection
has both, weights that the original code fuses (q, k and v of Flux) are split as diffusers has them,
which is exact: rows of an update B A are those rows of B.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from .delta import Factors

UNKNOWN = "unknown"
NAMES = 1 << 15  # that are remembered; a host's table of one model has some thousand
PREFIXES = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "lora_unet_", "lora_transformer_",
    "lycoris_", "transformer.", "unet.",
)  # fmt: skip
TEXT = re.compile(
    r"(lora_te|lora_prior_te|text_encoder|te\d?[._]|clip_[lgh]|t5xxl|cond_stage|text_model)"
)

# CLIP's layers, as kohya, diffusers and the host spell them, and which encoder of the model they are of.
_CLIP = re.compile(
    r"(?:lora_te(?P<kohya>\d?)_|text_encoder(?:_(?P<diffusers>\d))?\.|(?:text_encoders\.)?clip_(?P<host>[lg])\.(?:transformer\.)?)"
    r"text_model[._]encoder[._]layers[._](?P<layer>\d+)[._]"
    r"(?P<part>self_attn[._](?:q|k|v|out)_proj|mlp[._]fc[12])"
)

# Names of diffusers' models that hold an underscore themselves.
_COMPOUND = sorted(
    """down_blocks up_blocks mid_block transformer_blocks single_transformer_blocks conv_in conv_out
    conv_shortcut proj_in proj_out to_q to_k to_v to_out to_add_out add_q_proj add_k_proj add_v_proj
    time_emb_proj time_embedding add_embedding linear_1 linear_2 norm1_context ff_context proj_mlp
    img_mlp txt_mlp img_mod txt_mod context_embedder time_text_embed x_embedder timestep_embedder
    text_embedder guidance_embedder norm_out""".split(),
    key=len,
    reverse=True,
)
# As they read with a dot for every underscore.
_WRITTEN = [
    (re.compile(rf"(?<![^.]){re.escape(word.replace('_', '.'))}(?![^.])"), word)
    for word in _COMPOUND
]
_DIFFUSERS_TRANSFORMER = re.compile(
    r"(single_)?transformer_blocks[._]\d+[._]|layers[._]\d+[._]attention[._]to_"
)
_ATTENTION = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")

# The original name with underscores -> diffusers' prefix and the parts, in the order of the rows.
_FUSED: list[tuple[re.Pattern[str], str, tuple[str, ...]]] = [
    (re.compile(r"double_blocks_(\d+)_img_attn_qkv"), "transformer_blocks.{}.attn.", _ATTENTION),
    (re.compile(r"double_blocks_(\d+)_txt_attn_qkv"), "transformer_blocks.{}.attn.", _ADDED),
    (
        re.compile(r"single_blocks_(\d+)_linear1"),
        "single_transformer_blocks.{}.",
        (*(f"attn.{part}" for part in _ATTENTION), "proj_mlp"),
    ),
    (re.compile(r"joint_blocks_(\d+)_x_block_attn_qkv"), "transformer_blocks.{}.attn.", _ATTENTION),
    (re.compile(r"joint_blocks_(\d+)_x_block_attn2_qkv"), "transformer_blocks.{}.attn2.", _ATTENTION),
    (re.compile(r"joint_blocks_(\d+)_context_block_attn_qkv"), "transformer_blocks.{}.attn.", _ADDED),
    (re.compile(r"layers_(\d+)_attention_qkv"), "layers.{}.attention.", _ATTENTION),
    (re.compile(r"context_refiner_(\d+)_attention_qkv"), "context_refiner.{}.attention.", _ATTENTION),
    (re.compile(r"noise_refiner_(\d+)_attention_qkv"), "noise_refiner.{}.attention.", _ATTENTION),
]  # fmt: skip
_RENAMED = {
    r"double_blocks_(\d+)_": ("transformer_blocks.{}.", {
        "img_attn_proj": "attn.to_out.0", "txt_attn_proj": "attn.to_add_out", "img_mlp_0": "ff.net.0.proj",
        "img_mlp_2": "ff.net.2", "txt_mlp_0": "ff_context.net.0.proj", "txt_mlp_2": "ff_context.net.2",
        "img_mod_lin": "norm1.linear", "txt_mod_lin": "norm1_context.linear",
    }),
    r"single_blocks_(\d+)_": ("single_transformer_blocks.{}.", {
        "linear2": "proj_out", "modulation_lin": "norm.linear",
    }),
    r"joint_blocks_(\d+)_": ("transformer_blocks.{}.", {
        "x_block_attn_proj": "attn.to_out.0", "context_block_attn_proj": "attn.to_add_out",
        "x_block_attn2_proj": "attn2.to_out.0", "x_block_mlp_fc1": "ff.net.0.proj",
        "x_block_mlp_fc2": "ff.net.2", "context_block_mlp_fc1": "ff_context.net.0.proj",
        "context_block_mlp_fc2": "ff_context.net.2", "x_block_adaLN_modulation_1": "norm1.linear",
    }),
    r"layers_(\d+)_": ("layers.{}.", {"attention_out": "attention.to_out.0"}),
}  # fmt: skip
_RESNET = {
    "in_layers_2": "conv1", "out_layers_3": "conv2", "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}  # fmt: skip
_LONE = {
    "input_blocks_0_0": "conv_in", "out_2": "conv_out", "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2", "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
}  # fmt: skip


@functools.lru_cache(NAMES)  # every click asks for those of a whole model again
def module_name(spelled: str) -> str:
    """A module as a key of a file or of a host spells it -> its plain name, with dots where they are known."""
    if is_of_text_encoder(spelled):
        return _text_name(spelled.removeprefix("base_model.model."))
    name, before = spelled.replace(".processor.", "."), ""
    while name != before:
        before = name
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
    name = re.sub(r"\.to_out$", ".to_out.0", name)
    joined = name.replace(".", "_")
    of_unet = _unet_name(joined)
    if of_unet:
        return of_unet
    return dotted(name) if "." not in name else name


def join_key(name: str) -> str:
    """What two spellings of one module have in common."""
    return module_name(name).replace(".", "_")


def dotted(underscored: str) -> str:
    """down_blocks_0_attentions_1 -> down_blocks.0.attentions.1, for names as diffusers' models have them.

    A name of another kind stays as it is, because its own underscores can't be told from dots.
    """
    known = r"(down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding|add_embedding)(_|$)"
    if not re.match(known, underscored) and not _DIFFUSERS_TRANSFORMER.match(underscored):
        return underscored
    name = underscored.replace("_", ".")
    for written, word in _WRITTEN:
        name = written.sub(word, name)
    return name


def is_of_text_encoder(key: str) -> bool:
    """Whether a module's name is one of a text encoder."""
    return bool(TEXT.match(key.removeprefix("base_model.model.")))


def of_text_encoders(modules: Iterable[str]) -> bool:
    """Whether modules are those of text encoders, which never mix with a diffusion model's."""
    return all(map(is_of_text_encoder, modules))


def _text_name(spelled: str) -> str:
    """A text encoder's module as diffusers calls it, if it is one of CLIP; others stay as they are."""
    m = _CLIP.fullmatch(spelled)
    if m is None:
        return spelled
    second = "2" in (m["kohya"], m["diffusers"]) or m["host"] == "g"
    part = re.sub(r"^(self_attn|mlp)[._]", r"\1.", m["part"])
    encoder = "text_encoder_2" if second else "text_encoder"
    return f"{encoder}.text_model.encoder.layers.{m['layer']}.{part}"


def lora_keys(modules: Iterable[str]) -> dict[str, str]:
    """{module: key in a LoRA file, up to its last part} of one LoRA, as ComfyUI and most tools map it."""
    modules = list(modules)
    several = any(m.startswith("text_encoder_2.") for m in modules)
    return {m: _text_key(m, several) if is_of_text_encoder(m) else lora_key(m) for m in modules}


def _text_key(module: str, several: bool) -> str:
    """kohya's key of one of CLIP's modules, where a first encoder has a number only beside a second one."""
    m = _CLIP.fullmatch(module)
    if m is None:
        return module
    number = m["diffusers"] or ("1" if several else "")
    return f"lora_te{number}_" + module.partition(".")[2].replace(".", "_")


def lora_key(module: str) -> str:
    """The key of a diffusion model's module in a LoRA file, up to its last part.

    Diffusers' names of transformers are known with dots only, everything else also in kohya's way.
    """
    if _DIFFUSERS_TRANSFORMER.match(module):
        return ("transformer." if "." in module else "lycoris_") + module
    return "lora_unet_" + module.replace(".", "_")


def split(module: str, factors: Factors) -> dict[str, Factors]:
    """A module under the original code's name as diffusers' modules: rows of B, or the name alone."""
    joined = module.replace(".", "_")
    for pattern, prefix, parts in _FUSED:
        if m := pattern.fullmatch(joined):
            rows = _rows(parts, factors)
            pieces = zip(parts, factors.up.split(rows))
            names = prefix.format(m[1])
            return {names + part: Factors(factors.down, up, factors.scale) for part, up in pieces}
    for start, (prefix, names_of) in _RENAMED.items():
        m = re.match(start, joined)
        if m and joined[m.end() :] in names_of:
            return {prefix.format(m[1]) + names_of[joined[m.end() :]]: factors}
    return {module: factors}


def split_sizes(module: str, size_in: int, size_out: int) -> dict[str, tuple[int, int]]:
    """{name: (first row, last row + 1)} of what `split` makes of a module."""
    probe = Factors(torch.empty(1, size_in), torch.arange(size_out)[:, None])
    return {n: (int(f.up[0]), int(f.up[-1]) + 1) for n, f in split(module, probe).items()}


def is_original(module: str) -> bool:
    """Whether a name is the original code's, for a model that diffusers calls otherwise."""
    joined = module.replace(".", "_")
    return any(p.fullmatch(joined) for p, _, _ in _FUSED) or any(
        (m := re.match(start, joined)) and joined[m.end() :] in names
        for start, (_, names) in _RENAMED.items()
    )


def _rows(parts: tuple[str, ...], factors: Factors) -> list[int]:
    size_in, size_out = factors.down.shape[1], factors.up.shape[0]
    if len(parts) == 3:
        return [size_out // 3] * 3
    return [size_in] * 3 + [size_out - 3 * size_in]


def _unet_name(joined: str) -> str:
    """The name in diffusers' UNet of a module of the original one, or nothing."""
    if joined in _LONE:
        return _LONE[joined]
    if m := re.fullmatch(r"middle_block_([012])_(.+)", joined):
        where = "mid_block.attentions.0" if m[1] == "1" else f"mid_block.resnets.{int(m[1]) // 2}"
        return f"{where}.{_in_block(m[2])}"
    m = re.fullmatch(r"(input|output)_blocks_(\d+)_(\d)_(.+)", joined)
    if not m:
        return ""
    i, rest = int(m[2]), m[4]
    level, place = divmod(i - 1, 3) if m[1] == "input" else divmod(i, 3)
    block = f"{'down' if m[1] == 'input' else 'up'}_blocks.{level}"
    if rest == "op":
        return f"down_blocks.{i // 3 - 1}.downsamplers.0.conv"
    if rest == "conv":
        return f"{block}.upsamplers.0.conv"
    kind = "resnets" if m[3] == "0" else "attentions"
    return f"{block}.{kind}.{place}.{_in_block(rest)}"


def _in_block(rest: str) -> str:
    """What stands behind the block in an original UNet name."""
    if rest in _RESNET:
        return _RESNET[rest]
    probe = dotted("mid_block_" + rest)
    return probe.removeprefix("mid_block.")


@dataclass(frozen=True)
class Shape:
    """Of a module's update: in and out features, and the kernel of a convolution (its area is part of `size_in`)."""

    size_in: int
    size_out: int
    kernel: tuple[int, ...] = ()


def recognise(shapes: Mapping[str, Shape]) -> str:
    """The family of base models that modules of these names and shapes are of."""
    names = {name.replace(".", "_"): shape for name, shape in shapes.items()}
    if any(n.startswith("text_encoder_2_text_model") for n in names):
        return "sdxl"
    if _widths(names, r"text_encoder_text_model_.+_[qkv]_proj") == {1024}:
        return "sd2"
    if any(n.startswith(("down_blocks_", "up_blocks_", "mid_block_")) for n in names):
        return _unet_family(names)
    single = any(n.startswith(("single_blocks_", "single_transformer_blocks_")) for n in names)
    if single or any(n.startswith("double_blocks_") for n in names):
        return _flux_family(names)
    if any(n.startswith("joint_blocks_") for n in names):
        return "sd3"
    if any(n.startswith("transformer_blocks_") for n in names):
        return _mmdit_family(names)
    if any(re.match(r"blocks_\d+_(self|cross)_attn_", n) for n in names):
        return "wan"
    if any(re.match(r"layers_\d+_(attention|feed_forward)_", n) for n in names):
        width = _widths(names, r"layers_\d+_attention_(qkv|to_[qkv])")
        return "z-image" if width <= {3840} else "lumina2"
    return UNKNOWN


def _unet_family(names: Mapping[str, Shape]) -> str:
    context = _widths(names, r".+_attn2_to_[kv]")
    known = {768: "sd15", 1024: "sd2", 2048: "sdxl", 1280: "sdxl-refiner"}
    if len(context) == 1:
        return known.get(context.pop(), UNKNOWN)
    widths = _widths(
        names, r"(down|up)_blocks_\d_attentions_\d_transformer_blocks_\d+_attn1_to_[qkv]"
    )
    if widths and max(widths) < 320:
        return UNKNOWN
    deep = any(re.search(r"attentions_\d_transformer_blocks_[1-9]", n) for n in names)
    if deep:
        return "sdxl"
    if not context and any(n.startswith(("down_blocks_0_att", "up_blocks_3_att")) for n in names):
        linear = [s for n, s in names.items() if n.endswith(("_proj_in", "_proj_out"))]
        return "sd15" if linear and linear[0].kernel else "sd15 or sd2"
    return UNKNOWN


def _flux_family(names: Mapping[str, Shape]) -> str:
    doubles = _indices(names, r"double_blocks_(\d+)_")
    singles = _indices(names, r"single_blocks_(\d+)_")
    if any("individual_token_refiner" in n for n in names) or max(doubles, default=0) == 19:
        return "hunyuan-video"
    if singles and 38 <= max(singles) < 40:
        return "hunyuan-video"
    inner = r"((single_)?transformer_blocks_\d+_attn_to_q|(double|single)_blocks_\d+_(img_attn_qkv|linear1))"
    return "flux2" if 6144 in _widths(names, inner) else "flux"


def _mmdit_family(names: Mapping[str, Shape]) -> str:
    """Diffusers calls the blocks of SD 3, Flux and Qwen-Image alike."""
    if any(re.search(r"_(img|txt)_(mlp|mod)_", n) for n in names):
        return "qwen-image"
    width = _widths(names, r"transformer_blocks_\d+_attn_(to_[qkv]|add_[qkv]_proj)")
    if width and width <= {1536, 2432}:
        return "sd3"
    if width == {3072}:
        return "qwen-image" if max(_indices(names, r"transformer_blocks_(\d+)_")) > 18 else "flux"
    return UNKNOWN


def _widths(names: Mapping[str, Shape], pattern: str) -> set[int]:
    return {s.size_in for n, s in names.items() if re.fullmatch(pattern, n)}


def _indices(names: Iterable[str], pattern: str) -> list[int]:
    return [int(m[1]) for n in names if (m := re.match(pattern, n))]


def blocks(modules: Iterable[str]) -> dict[str, str]:
    """{module: block}: `up_blocks.1`, or a range such as `transformer_blocks.0-14` where there are more than twelve."""
    found: dict[str, tuple[str, int]] = {}
    counts: dict[str, int] = {}
    for name in modules:
        m = re.match(r"(text_encoder_2\.\D+?|.+?)[._](\d+)(?=[._]|$)", name)
        found[name] = (m[1], int(m[2])) if m else (name.split(".")[0], -1)
        counts[found[name][0]] = max(counts.get(found[name][0], 0), found[name][1] + 1)
    named = {}
    for name, (kind, i) in found.items():
        count = counts[kind]
        if i < 0:
            named[name] = kind
        elif count <= 12:
            named[name] = f"{kind}.{i}"
        else:
            step = -(-count // 4)
            first = i // step * step
            named[name] = f"{kind}.{first}-{min(first + step, count) - 1}"
    return named
