"""LoRA files: the spellings that are in use, read into one and written from one.

kohya      lora_unet_<module with underscores>.lora_down.weight | .lora_up.weight | .alpha
peft       base_model.model.<module>.lora_A[.<adapter>].weight | .lora_B[.<adapter>].weight
diffusers  unet.<module>.lora_A.weight | .lora_B.weight
older      [unet.]<module>.processor.to_q_lora.down.weight | .up.weight, also
<module>.lora.down.weight
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError, FormatError, LayoutMismatch
from ..files.container import Container, open_container, write_container
from .families import lora_key
from .layout import Layout, Lora

FORMATS = ("kohya", "diffusers", "peft")
FOLDED = "w2wpp.folded_scale"  # metadata: what B was multiplied by, so that reading can undo it

_KOHYA = re.compile(r"lora_unet_(?P<module>.+)\.(?P<part>lora_down\.weight|lora_up\.weight|alpha)")
_PEFT = re.compile(
    r"(?:base_model\.model\.)?(?:unet\.)?(?P<module>.+?)\.(?P<part>lora_A|lora_B)(?:\.(?!weight$)[^.]+)?(?:\.weight)?"
)
_OLDER = re.compile(
    r"(?:unet\.)?(?P<module>.+?)(?:\.processor)?(?:\.(?P<to>to_q|to_k|to_v|to_out)_lora|\.lora(?:_linear_layer)?)"
    r"\.(?P<part>down|up)\.weight"
)
_IS_DOWN = {"lora_down.weight": True, "lora_A": True, "down": True}

# Names of diffusers' UNets that hold an underscore themselves; kohya's files turn every dot into
# one.
_COMPOUND = (
    "down_blocks up_blocks mid_block transformer_blocks conv_in conv_out conv_shortcut "
    "conv_norm_out proj_in proj_out "
    "to_q to_k to_v to_out time_emb_proj time_embedding add_embedding linear_1 linear_2"
).split()


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A LoRA as read: single-precision matrices by dotted diffusers name, and the file's remarks."""

    lora: Lora
    alphas: dict[str, float]  # per module; the rank where the file names none
    metadata: dict[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()  # tensors of other kinds: text encoder, convolutions, DoRA scales
    path: str = ""

    def scaled(self, name: str, layout: Layout) -> tuple[Tensor, Tensor]:
        """A and B of a module, with B taking up what the file scales otherwise than the layout."""
        a, b = self.lora[name]
        factor = self.alphas[name] / a.shape[0] / layout.scale
        return a, b if factor == 1.0 else b * factor

    def vector(self, layout: Layout) -> Tensor:
        """w [P] in a layout. If the file scales otherwise, B takes it up and the delta is equal."""
        try:
            return layout.pack({name: self.scaled(name, layout) for name in self.lora})
        except LayoutMismatch as e:
            raise LayoutMismatch(f"{self.path}: {e}" if self.path else str(e)) from e


def kohya_tensors(lora: Mapping[str, tuple[Tensor, Tensor]], alpha: float) -> dict[str, Tensor]:
    """{key: tensor} in kohya's spelling, which is also what ComfyUI's LORA_MODEL sockets carry."""
    tensors = {}
    for name, (a, b) in lora.items():
        key = lora_key(name)
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
) -> None:
    """Write one LoRA, {module: (A [r, in], B [out, r])}.

    kohya is read everywhere (ComfyUI, kohya's tools, diffusers). A peft file named
    adapter_model.safetensors gets its adapter_config.json beside it. A diffusers file has no place
    for alpha that every release reads, so alpha / rank is multiplied into B there; `load_lora`
    undoes it.
    """
    if not lora or any(a.ndim != 2 or b.ndim != 2 for a, b in lora.values()):
        raise ConfigError(
            "A LoRA file holds one LoRA, {module: (A [r, in], B [out, r])}; pick one of the batch."
        )
    lora = {n: (a.detach().cpu().float(), b.detach().cpu().float()) for n, (a, b) in lora.items()}
    if not all(bool(torch.isfinite(t).all()) for pair in lora.values() for t in pair):
        raise FormatError("This LoRA holds NaN or infinite numbers and is not written.")
    rank = next(iter(lora.values()))[0].shape[0]
    texts = {"format": "pt", **(metadata or {})}
    if format == "kohya":
        tensors = kohya_tensors(lora, alpha)
        texts.update(
            ss_network_dim=str(rank), ss_network_alpha=str(alpha), ss_network_module="networks.lora"
        )
    elif format == "diffusers":
        texts[FOLDED] = repr(alpha / rank)
        tensors = _peft_tensors({n: (a, b * (alpha / rank)) for n, (a, b) in lora.items()}, "unet.")
    elif format == "peft":
        texts["lora_alpha"] = repr(float(alpha))
        tensors = _peft_tensors(lora, "base_model.model.")
    else:
        raise ConfigError(f"LoRA files are written as {', '.join(FORMATS)}. Got {format!r}.")
    write_container(path, tensors, metadata=texts)
    if format == "peft" and Path(path).name == "adapter_model.safetensors":
        _write_adapter_config(Path(path).parent, lora, rank, alpha)


def load_lora(path: str | os.PathLike[str]) -> LoraFile:
    """Read a LoRA of the UNet in any of the spellings above."""
    return _read(open_container(path))


def lora_of_tensors(tensors: Mapping[str, Tensor], name: str = "this LoRA") -> LoraFile:
    """The same from {key: tensor} in memory, such as ComfyUI's LORA_MODEL sockets carry."""
    return replace(_read(_InMemory(Path(name), tensors)), path="")


@dataclass(frozen=True)
class _InMemory:
    """Tensors at hand, with what is asked of a Container."""

    path: Path  # a name for messages
    entries: Mapping[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    def read(self, key: str) -> Tensor:
        tensor = self.entries[key].detach().cpu()
        if not bool(torch.isfinite(tensor).all()):
            raise FormatError(f"{self.path}: the tensor '{key}' holds NaN or infinite numbers.")
        return tensor


def _read(file: Container | _InMemory) -> LoraFile:
    path = file.path
    halves: dict[str, dict[bool, str]] = {}
    alpha_keys: dict[str, str] = {}
    unread = []
    for key, entry in file.entries.items():
        module, part = parse_key(key)
        if part == "alpha":
            alpha_keys[module] = key
        elif not part or len(entry.shape) not in (2, 4) or any(n != 1 for n in entry.shape[2:]):
            unread.append(key)
        elif _IS_DOWN.get(part, False) in halves.setdefault(module, {}):
            raise FormatError(
                f"{path}: {module} appears twice; the file holds more than one LoRA. Split it "
                "first."
            )
        else:
            halves[module][_IS_DOWN.get(part, False)] = key
    if not halves:
        raise FormatError(
            f"{path} holds no LoRA of a UNet in a known spelling (first key: "
            f"{next(iter(file.entries), 'none')})."
        )
    lora = {module: _pair(file, module, keys) for module, keys in sorted(halves.items())}
    default = _stated_alpha(file)
    alphas = {}
    for module, (a, _) in lora.items():
        stored = alpha_keys.get(module)
        alphas[module] = _alpha(file, stored) if stored else default or float(a.shape[0])
    folded = _stated_number(file, FOLDED) or 1.0
    if folded != 1.0:
        lora = {n: (a, b / folded) for n, (a, b) in lora.items()}
        alphas = {n: alpha * folded for n, alpha in alphas.items()}
    return LoraFile(lora, alphas, dict(file.metadata), tuple(sorted(unread)), str(path))


def dotted_name(kohya: str) -> str:
    """down_blocks_0_attentions_1_... -> down_blocks.0.attentions.1...., for the names that diffusers' UNets have."""
    name = kohya.replace("_", ".")
    for word in _COMPOUND:
        name = re.sub(rf"(?<![^.]){re.escape(word.replace('_', '.'))}(?![^.])", word, name)
    return name


def parse_key(key: str) -> tuple[str, str]:
    """(dotted module, part), or two empty strings."""
    if m := _KOHYA.fullmatch(key):
        return dotted_name(m["module"]), m["part"]
    if key.startswith(("lora_", "text_encoder")):
        return "", ""
    if m := _PEFT.fullmatch(key):
        return m["module"], m["part"]
    if m := _OLDER.fullmatch(key):
        target = {"to_out": ".to_out.0"}.get(m["to"], f".{m['to']}") if m["to"] else ""
        return m["module"] + target, m["part"]
    return "", ""


def _pair(
    file: Container | _InMemory, module: str, keys: Mapping[bool, str]
) -> tuple[Tensor, Tensor]:
    if len(keys) < 2:
        raise FormatError(
            f"{file.path}: {module} has only one of its two matrices. Get the file again."
        )
    a, b = (file.read(keys[is_down]).float().flatten(1) for is_down in (True, False))
    if a.shape[0] != b.shape[1] or a.shape[0] == 0:
        raise FormatError(
            f"{file.path}: the ranks of {module} differ: A {list(a.shape)}, B {list(b.shape)}."
        )
    return a, b


def _stated_alpha(file: Container | _InMemory) -> float | None:
    """The alpha that the file's metadata or PEFT's configuration beside it names, for files without .alpha tensors."""
    if stated := _stated_number(file, "lora_alpha"):
        return stated
    beside = file.path.parent / "adapter_config.json"
    if file.path.name != "adapter_model.safetensors" or not beside.is_file():
        return None
    try:
        return float(json.loads(beside.read_text(encoding="utf-8"))["lora_alpha"])
    except (ValueError, KeyError, TypeError) as e:
        raise FormatError(f"{beside} does not state lora_alpha as a number.") from e


def _alpha(file: Container | _InMemory, key: str) -> float:
    tensor = file.read(key)
    if tensor.numel() != 1:
        raise FormatError(f"{file.path}: {key} must be one number. Got {list(tensor.shape)}.")
    return float(tensor)


def _stated_number(file: Container | _InMemory, key: str) -> float | None:
    try:
        number = float(file.metadata[key]) if key in file.metadata else None
    except ValueError:
        number = math.nan
    if number is not None and not (math.isfinite(number) and number != 0):
        raise FormatError(
            f"{file.path}: its metadata say {key} = {file.metadata[key]!r}, not a number."
        )
    return number


def _peft_tensors(lora: Mapping[str, tuple[Tensor, Tensor]], prefix: str) -> dict[str, Tensor]:
    tensors = {}
    for name, (a, b) in lora.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = a
        tensors[f"{prefix}{name}.lora_B.weight"] = b
    return tensors


def _write_adapter_config(folder: Path, lora: Lora, rank: int, alpha: float) -> None:
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(lora),
        "bias": "none",
        "lora_dropout": 0.0,
    }
    (folder / "adapter_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )
