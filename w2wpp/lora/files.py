"""LoRA files as read: the update of every module of the UNet, whatever kind and spelling it has.

Spellings are told apart in `names`, kinds in `kinds`, scales in `stated`. Nothing of a module is
read before it is asked for, so that what lies outside of a layout costs and spoils nothing.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from ..errors import FormatError, LayoutMismatch, reading
from .base_model import Family, family_of
from .kinds import KINDS, MAGNITUDES, Kind, Parts, Scale, decomposed
from .layout import Layout, Lora
from .names import LAYERS, TEXT, UNET, layers_of, parse_key
from .products import Delta, Product
from .source import InMemory, Source, open_source, read_numbers
from .stated import FOLDED, Stated, stated_by, stated_number

# Parts that change no weight of a linear layer, and are listed as unread.
BESIDE = frozenset({"diff_b", "bias", "lora_bias", "w_norm", "b_norm"})
_KIND_OF = {part: kind for kind in KINDS for part in kind.parts}


@dataclass(frozen=True, eq=False)
class Update:
    """The change of one weight, of any kind."""

    kind: Kind
    parts: Parts
    shape: tuple[int, ...]  # (out, in, *kernel); empty if only reading it would tell

    @property
    def needs_base(self) -> bool:
        """Whether it depends on the base model's weight (DoRA)."""
        return any(part in self.parts for part in MAGNITUDES)

    @property
    def kind_name(self) -> str:
        """As trainers call it."""
        return f"{self.kind.name} with DoRA" if self.needs_base else self.kind.name

    @property
    def is_plain(self) -> bool:
        """Whether it is one pair of matrices."""
        return self.kind.name == "LoRA" and not self.needs_base and "mid" not in self.parts

    def delta(self, base: Tensor | None = None) -> Delta:
        """With its scale; `base` is the base model's weight [out, in, *kernel].

        Raises FormatError for parts that do not fit, and for DoRA without a base.
        """
        with reading(f"{self.parts.source.path}: {self.parts.module}"):
            delta = self.kind.delta(self.parts)
        if not self.needs_base:
            return delta
        if base is None:
            raise self.parts.error(
                "is trained with DoRA: how it changes a weight depends on the base model's. Connect "
                "that MODEL to W2W++ Encode LoRA, which converts it; or merge the LoRA and extract a "
                "plain one (ComfyUI: Load LoRA, ModelSubtract, Extract and Save Lora)."
            )
        whole = delta.b @ delta.a if isinstance(delta, Product) else delta.d
        with reading(f"{self.parts.source.path}: {self.parts.module}"):
            return decomposed(whole, self.parts, base.detach().cpu().float())


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A LoRA of a UNet as read, by dotted diffusers names, and the file's remarks."""

    updates: Mapping[str, Update]
    metadata: dict[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()  # tensors of other kinds: text encoder, biases, norms
    texts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # shapes, by key
    remarks: tuple[str, ...] = ()  # what had to be assumed
    path: str = ""
    folded: float = 1.0  # what B was multiplied by when the file was written

    @property
    def name(self) -> str:
        """For messages."""
        return self.path or "This LoRA"

    @cached_property
    def lora(self) -> Lora:
        """{module: (A [r, in], B [out, r])} of the modules that are one pair of matrices, read whole."""
        plain = {n: u.parts for n, u in self.updates.items() if u.is_plain}
        return {
            n: (
                p.matrix("down"),
                p.matrix("up") / self.folded if self.folded != 1.0 else p.matrix("up"),
            )
            for n, p in plain.items()
        }

    @cached_property
    def alphas(self) -> dict[str, float]:
        """Per module of `lora`: scale = alpha / rank. The rank where the file names none."""
        found = {}
        for name, update in self.updates.items():
            if update.is_plain:
                rank = update.parts.shape("down")[0]
                found[name] = update.parts.scale.of(rank) * rank * self.folded
        return found

    @cached_property
    def kinds(self) -> dict[str, int]:
        """How many modules are of which kind."""
        return dict(Counter(update.kind_name for update in self.updates.values()))

    @cached_property
    def family(self) -> Family:
        """The base model's family, as far as the file tells."""
        shapes = {n: u.shape for n, u in self.updates.items()}
        convolutions = [n for n, u in self.updates.items() if _is_convolution(u)]
        return family_of(shapes, self.metadata, convolutions=convolutions, texts=self.texts)

    def vector(self, layout: Layout) -> Tensor:
        """w [P] in a layout. If the file scales otherwise, B takes it up and the delta is equal.

        Raises LayoutMismatch for a LoRA of other modules, sizes or kinds than the layout's.
        """
        outside = sorted(self.updates.keys() - self.lora.keys())
        if outside:
            update = self.updates[outside[0]]
            raise LayoutMismatch(
                f"{self.name}: {outside[0]} is of the kind {update.kind_name}, which has no two "
                "matrices to take as they are. Bring it into the gauge of a space or of the first file."
            )
        scaled = {}
        for name, (a, b) in self.lora.items():
            factor = self.alphas[name] / max(1, a.shape[0]) / layout.scale
            scaled[name] = (a, b if factor == 1.0 else b * factor)
        try:
            return layout.pack(scaled)
        except LayoutMismatch as e:
            raise LayoutMismatch(f"{self.path}: {e}" if self.path else str(e)) from e


def load_lora(path: str | os.PathLike[str], *, layers: int | None = None) -> LoraFile:
    """Read a LoRA of the UNet in any known spelling: a file, or a folder that PEFT or diffusers wrote.

    `layers` are the resnets per block of its base model, which LDM names depend on (2 in all of
    Stable Diffusion); by default the file's modules tell. Kinds that are not taken, such as OFT, and
    DoRA, raise only when the update of such a module is asked for.
    """
    with open_source(path) as source:  # opened again by whoever reads a tensor
        return _read(source, layers)


def lora_of_tensors(
    tensors: Mapping[str, Tensor], name: str = "this LoRA", *, layers: int | None = None
) -> LoraFile:
    """The same from {key: tensor} in memory, such as ComfyUI's LORA_MODEL sockets carry."""
    return replace(_read(InMemory(Path(name), tensors), layers), path="")


def lora_of_source(source: Source, *, layers: int | None = None) -> LoraFile:
    """The same from whatever tensors come from."""
    return _read(source, layers)


def _read(source: Source, layers: int | None) -> LoraFile:
    layers = layers or layers_of(source.entries) or LAYERS
    modules: dict[str, dict[str, str]] = {}
    unread, texts = [], {}
    for key, entry in source.entries.items():
        where, module, part = parse_key(key, layers)
        if where == TEXT:
            texts[key] = tuple(entry.shape)
        if where != UNET or not part or part in BESIDE:
            unread.append(key)
        elif part in modules.setdefault(module, {}):
            raise FormatError(
                f"{source.path}: {module} appears twice ({modules[module][part]} and {key}); the file "
                "holds more than one LoRA. Split it first."
            )
        else:
            modules[module][part] = key
    stated = stated_by(source)
    updates = dict(_updates(source, modules, stated, unread))
    if all(part == "weight" for u in updates.values() for part in u.parts.keys):
        first = next(iter(source.entries), "none")
        raise FormatError(
            f"{source.path} holds no LoRA of a UNet in a known spelling (first key: {first})."
        )
    return LoraFile(
        updates,
        dict(source.metadata),
        tuple(sorted(unread)),
        texts,
        tuple(_remarks(source, updates)),
        str(source.path),
        stated_number(source, FOLDED) or 1.0,
    )


def _updates(
    source: Source, modules: Mapping[str, Mapping[str, str]], stated: Stated, unread: list[str]
) -> Iterator[tuple[str, Update]]:
    for module, keys in sorted(modules.items()):
        kinds = {_KIND_OF[part].name: _KIND_OF[part] for part in keys if part in _KIND_OF}
        parts = Parts(module, keys, source, _scale(source, keys, stated, module))
        if not kinds:  # an alpha or a magnitude of nothing
            unread.extend(keys.values())
        elif len(kinds) > 1:
            raise parts.error(
                f"is given as {' and as '.join(sorted(kinds))}, in one file; only one of them can be "
                "meant. Split the file first."
            )
        else:
            kind = next(iter(kinds.values()))
            with reading(f"{source.path}: {module}"):
                shape = kind.shape(parts)
            yield module, Update(kind, parts, shape)


def _scale(source: Source, keys: Mapping[str, str], stated: Stated, module: str) -> Scale:
    """A module's own alpha first, which is what the host reads; then what is stated for the file."""
    if "alpha" not in keys:
        return stated.of(module)
    tensor = read_numbers(source, keys["alpha"])
    if tensor.numel() != 1:
        raise FormatError(
            f"{source.path}: {keys['alpha']} must be one number. Got {list(tensor.shape)}."
        )
    return Scale(float(tensor))


def _remarks(source: Source, updates: Mapping[str, Update]) -> Iterator[str]:
    silent = [
        n for n, u in updates.items() if u.parts.scale.alpha is None and u.kind.name == "LoRA"
    ]
    peft = any(key.startswith("base_model.model.") for key in source.entries)
    if silent and peft:
        yield (
            f"no alpha is stated for {len(silent)} of {len(updates)} modules (adapter_config.json is "
            "not beside the file): a scale of 1 was assumed, alpha = rank"
        )


def _is_convolution(update: Update) -> bool:
    down = next((p for p in ("down", "diff", "lokr_w2", "hada_t1") if p in update.parts), "")
    return bool(down) and len(update.parts.shape(down)) == 4
