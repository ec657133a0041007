"""LoRA files of a collection: opened by their headers, their updates read module by module.

A collection may be far larger than memory, so nothing is read before it is asked for. An update of
another kind than B A is brought into that form when it is read: LoHa and LoKr are products of a higher
rank, exactly, as long as that rank is small. Others (full differences, LoHa and LoKr of high ranks)
are whole matrices; `dense` says so, and whoever makes a space of them cuts them to a rank. What depends
on the base model's weights (DoRA, OFT) does not fit: it has no update of its own.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FormatError, LayoutMismatch, reading
from .delta import Factors
from .families import (
    UNKNOWN,
    Shape,
    is_of_text_encoder,
    is_original,
    join_key,
    module_name,
    recognise,
    split_sizes,
)
from .kinds import KINDS, MAGNITUDES, Kind, Parts, Scale
from .names import split_key
from .products import Product
from .source import InMemory, open_source
from .source import Source as Tensors
from .stated import stated_by

_PART = re.compile(
    r"(?P<module>.+?)(?:\.lora_(?P<kohya>down|up)|\.lora_(?P<peft>[AB])(?:\.(?!weight$)[^.]+)?"
    r"|(?:\.lora(?:_linear_layer)?|(?P<old>_lora))\.(?P<older>down|up))(?:\.weight)?"
)
# Of the keys of other kinds, those that change no weight of a linear layer by themselves.
_BESIDE = frozenset({"diff_b", "bias", "lora_bias", "w_norm", "b_norm", "weight", "alpha"})
_KIND_OF = {part: kind for kind in KINDS for part in kind.parts}


@dataclass(frozen=True)
class Source:
    """Where one module's update stands in a file; `rows` of B if the file fuses several modules."""

    rank: int
    shape: Shape
    rows: tuple[int, int] | None = None

    @property
    def dense(self) -> bool:
        """Whether it is a whole matrix, of any rank."""
        return False

    def read(self, file: Tensors) -> Factors:
        """The update, all rows of it."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Pair(Source):
    """A and B as the file has them."""

    down: str
    up: str
    scale: float

    def read(self, file: Tensors) -> Factors:
        """The update, all rows of it."""
        return Factors(file.read(self.down).flatten(1), file.read(self.up).flatten(1), self.scale)


@dataclass(frozen=True, kw_only=True)
class Built(Source):
    """An update of another kind, by what the file holds of it."""

    kind: Kind
    parts: Parts
    product: bool

    @property
    def dense(self) -> bool:
        """Whether it is a whole matrix, of any rank."""
        return not self.product

    def read(self, file: Tensors) -> Factors:
        """The update, all rows of it; of a whole matrix, itself and the identity."""
        with reading(f"{self.parts.source.path}: {self.parts.module}"):
            delta = self.kind.delta(self.parts)
        if isinstance(delta, Product):
            return Factors(delta.a, delta.b)
        size_out, size_in = delta.d.shape
        if size_in <= size_out:
            return Factors(torch.eye(size_in), delta.d)
        return Factors(delta.d, torch.eye(size_out))


@dataclass(frozen=True, eq=False)
class Member:
    """One LoRA of a collection: its modules by name, each read when asked for."""

    name: str
    file: Tensors
    modules: Mapping[str, Source]
    apart: int = (
        0  # modules of text encoders, or of the model where those of text encoders are meant
    )
    unread: tuple[str, ...] = ()  # keys that are no update of a weight: biases, norms
    metadata: Mapping[str, str] = field(default_factory=dict)
    told: str = UNKNOWN  # the base model that the modules apart belong to

    @property
    def family(self) -> str:
        """The base model that its modules belong to."""
        found = recognise({name: s.shape for name, s in self.modules.items()})
        found = self.told if found == UNKNOWN else found
        return self.metadata.get("w2wpp.base_model", UNKNOWN) if found == UNKNOWN else found

    @property
    def largest_rank(self) -> int:
        """The largest rank of its modules."""
        return max(s.rank for s in self.modules.values())

    def read(self, module: str) -> Factors | None:
        """The update of a module; None where the LoRA has none."""
        source = self.modules.get(module)
        if source is None:
            return None
        f = source.read(self.file)
        return f if source.rows is None else replace(f, up=f.up[slice(*source.rows)])

    @property
    def dense(self) -> tuple[str, str] | None:
        """(a module that is a whole matrix, its kind), none where all are products."""
        for name, source in self.modules.items():
            if isinstance(source, Built) and source.dense:
                return name, source.kind.name
        return None

    def split(self) -> Member:
        """The same with the original code's names replaced by diffusers', fused weights by their parts."""
        modules = {}
        for name, source in self.modules.items():
            sizes = split_sizes(name, source.shape.size_in, source.shape.size_out)
            for part, (start, stop) in sizes.items():
                shape = replace(source.shape, size_out=stop - start)
                modules[part] = replace(source, shape=shape, rows=(start, stop))
        return replace(self, modules=modules)


def open_member(
    path: str | os.PathLike[str], name: str = "", *, text_encoders: bool = False
) -> Member:
    """A LoRA file, checked by its header; only the numbers alpha are read.

    Its modules are those of the diffusion model, or those of text encoders alone.
    """
    # Let go of: a collection is of more files than may be open at once.
    with open_source(path) as file:
        return _member(file, name or Path(path).stem, text_encoders)


def member_of_tensors(
    tensors: Mapping[str, Tensor], name: str = "this LoRA", *, text_encoders: bool = False
) -> Member:
    """The same of {key: tensor} in memory."""
    return _member(InMemory(Path(name), tensors), name, text_encoders)


def _member(file: Tensors, name: str, text_encoders: bool) -> Member:
    found, alphas, apart, unread = _sorted_keys(file, text_encoders)
    if not found:
        raise FormatError(_nothing_in(file, len(apart), text_encoders))
    components = ("text_encoder", "text_encoder_2") if text_encoders else ("unet",)
    stated = {c: stated_by(file, c) for c in components}
    modules: dict[str, Source] = {}
    for module, keys in found.items():
        alpha = alphas.get(join_key(module))
        of_component = stated.get(module.partition(".")[0], stated[components[0]])
        scale = of_component.of(module) if alpha is None else Scale(alpha)
        pair = keys.keys() <= {"down", "up"}
        modules[module] = (_pair if pair else _built)(file, module, keys, scale)
    spelled: dict[str, str] = {}
    for module in modules:
        if other := spelled.get(join_key(module)):
            raise FormatError(f"{file.path} holds {module} twice, also as {other}. Split it first.")
        spelled[join_key(module)] = module
    told = recognise(apart) if text_encoders else UNKNOWN
    return Member(name, file, modules, len(apart), tuple(unread), dict(file.metadata), told)


def _nothing_in(file: Tensors, apart: int, text_encoders: bool) -> str:
    first = next(iter(file.entries), "none")
    if text_encoders:
        return (
            f"{file.path} changes no text encoder in a known spelling (first key: {first}); what it changes of the "
            "diffusion model makes a space without that option."
        )
    more = f"; {apart} modules of text encoders make a space of their own" if apart else ""
    return f"{file.path} holds no LoRA of a diffusion model in a known spelling (first key: {first}){more}."


def _sorted_keys(
    file: Tensors, text_encoders: bool
) -> tuple[dict[str, dict[str, str]], dict[str, float], dict[str, Shape], list[str]]:
    """{module: {part: key}}, {joined module: alpha}, {module apart: shape as far as it is known}, other keys."""
    found: dict[str, dict[str, str]] = {}
    alphas: dict[str, float] = {}
    apart: dict[str, Shape] = {}
    unread = []
    for key, entry in file.entries.items():
        if is_of_text_encoder(key) != text_encoders:
            _set_apart(apart, key, tuple(entry.shape))
            continue
        if key.endswith(".alpha"):
            alphas[join_key(key.removesuffix(".alpha"))] = _number(file, key)
            continue
        if m := _PART.fullmatch(key):
            raw, part = m["module"], m["kohya"] or m["peft"] or m["older"]
            part = "down" if part in ("down", "A") else "up"
        else:
            raw, part = split_key(key)
        if not part or part in _BESIDE:
            unread.append(key)
            continue
        parts = found.setdefault(module_name(re.sub(r"\.to_out$", ".to_out.0", raw)), {})
        if part in parts:
            raise FormatError(
                f"{file.path}: {raw} appears twice; the file holds more than one LoRA. Split it first."
            )
        parts[part] = key
    return found, alphas, apart, unread


def _set_apart(apart: dict[str, Shape], key: str, shape: tuple[int, ...]) -> None:
    """Counts a module that is not meant, with the sizes that tell its base model where A and B have them."""
    m = _PART.fullmatch(key)
    name = module_name(m["module"] if m else key.split(".lora", 1)[0].split(".alpha", 1)[0])
    before = apart.setdefault(name, Shape(0, 0))
    if m and len(shape) >= 2:
        part = m["kohya"] or m["peft"] or m["older"]
        if part in ("down", "A"):
            apart[name] = replace(before, size_in=shape[1] * math.prod(shape[2:]), kernel=shape[2:])
        else:
            apart[name] = replace(before, size_out=shape[0])


def _built(file: Tensors, module: str, keys: Mapping[str, str], scale: Scale) -> Source:
    parts = Parts(module, keys, file, scale)
    if MAGNITUDES & keys.keys():
        raise parts.error(
            "is trained with DoRA: how it changes a weight depends on the base model's. Merge it into "
            "that model and extract a plain LoRA (ComfyUI: Load LoRA, ModelSubtract, Extract and Save "
            "Lora), or leave it out."
        )
    kinds = {_KIND_OF[part].name: _KIND_OF[part] for part in keys if part in _KIND_OF}
    if len(kinds) != 1:
        raise parts.error(
            f"is given as {' and as '.join(sorted(kinds)) or sorted(keys)}. Split the file first."
        )
    (kind,) = kinds.values()
    return source_of(kind, parts)


def source_of(kind: Kind, parts: Parts) -> Source:
    """The update that a file's parts of a module make, of any kind. Raises FormatError for kinds that are refused."""
    with reading(f"{parts.source.path}: {parts.module}"):
        sizes = kind.shape(parts)
        if not sizes:
            kind.delta(parts)  # says why it is refused
        rank = kind.product_rank(parts)
    size_out, size_in, *kernel = sizes
    size_in *= math.prod(kernel)
    shape = Shape(size_in, size_out, tuple(kernel))
    return Built(
        rank=rank or min(size_out, size_in),
        shape=shape,
        kind=kind,
        parts=parts,
        product=rank is not None,
    )


def _pair(file: Tensors, module: str, keys: Mapping[str, str], scale: Scale) -> Source:
    if len(keys) < 2:
        raise FormatError(
            f"{file.path}: {module} has only one of its two matrices. Download or copy it again."
        )
    down, up = (tuple(file.entries[keys[part]].shape) for part in ("down", "up"))
    fits = len(down) in (2, 3, 4, 5) and len(up) == len(down) and all(n == 1 for n in up[2:])
    if not fits or down[0] != up[1] or min(*down, *up) < 1:
        raise FormatError(
            f"{file.path}: the ranks of {module} differ, or it is no product: A {list(down)}, B {list(up)}."
        )
    kernel = down[2:] if len(down) > 2 else ()
    shape = Shape(down[1] * math.prod(kernel), up[0], kernel)
    rank = down[0]
    return Pair(rank=rank, shape=shape, down=keys["down"], up=keys["up"], scale=scale.of(rank))


def _number(file: Tensors, key: str) -> float:
    tensor = file.read(key)
    if tensor.numel() != 1:
        raise FormatError(f"{file.path}: {key} must be one number. Got {list(tensor.shape)}.")
    return float(tensor)


def fitted(
    member: Member, shapes: Mapping[str, Shape]
) -> tuple[Member, dict[str, list[str]], list[str]]:
    """How a member meets modules {name: shape}: {name: the member's modules for it}, and those outside.

    The names are compared without regard to spelling; what the member fuses is split (the member that
    is returned), what it has split is fused. Several of the member's modules for one are the parts of
    a fused weight, in order.
    """
    found, rest = _fitted(member, shapes)
    if any(is_original(name) for name in rest):
        parted = member.split()
        by_parts, rest_of_parts = _fitted(parted, shapes)
        if len(by_parts) > len(found):
            return parted, by_parts, rest_of_parts
    return member, found, rest


def _fitted(member: Member, shapes: Mapping[str, Shape]) -> tuple[dict[str, list[str]], list[str]]:
    wanted = {join_key(name): name for name in shapes}
    found: dict[str, list[str]] = {}
    outside = []
    for module, source in member.modules.items():
        if name := wanted.get(join_key(module)):
            _require(member, module, source.shape, shapes[name])
            found[name] = [module]
        else:
            outside.append(module)
    parts = {}
    for name, shape in shapes.items():
        if name not in found:
            for part in split_sizes(name, shape.size_in, shape.size_out):
                parts[join_key(part)] = name
    rest = []
    for module in outside:
        if name := parts.get(join_key(module)):
            found.setdefault(name, []).append(module)
        else:
            rest.append(module)
    return found, rest


def read_fitted(member: Member, name: str, shape: Shape, modules: list[str]) -> Factors | None:
    """The update of a module of a layout from a member's modules, as `fitted` found them."""
    if len(modules) == 1 and join_key(modules[0]) == join_key(name):
        return member.read(modules[0])
    sizes = split_sizes(name, shape.size_in, shape.size_out)
    rows = {join_key(part): where for part, where in sizes.items()}
    downs, ups = [], []
    for module in modules:
        f = member.read(module)
        assert f is not None
        start, stop = rows[join_key(module)]
        _require(member, module, member.modules[module].shape, Shape(shape.size_in, stop - start))
        up = torch.zeros(shape.size_out, f.rank)
        up[start:stop] = f.up.float() * f.scale
        downs.append(f.down.float())
        ups.append(up)
    return Factors(torch.cat(downs), torch.cat(ups, dim=1)) if downs else None


def _require(member: Member, module: str, got: Shape, wanted: Shape) -> None:
    if (got.size_in, got.size_out) != (wanted.size_in, wanted.size_out):
        raise LayoutMismatch(
            f"{member.name}: {module} maps {got.size_in} to {got.size_out} numbers, expected "
            f"{wanted.size_in} to {wanted.size_out}. It was trained on another base model "
            f"({member.family}); leave it out."
        )
