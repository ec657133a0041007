"""LoRA files of a collection: opened by their headers, their updates read module by module.

A collection may be far larger than memory, so nothing is read before it is asked for. A file that
changes weights in another way than by B A (LoHa, LoKr, full differences, DoRA) does not fit: its
updates need more than two matrices, and taking it in part would be wrong without a word.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FormatError, LayoutMismatch
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
from .kinds import Scale
from .source import InMemory, open_source
from .source import Source as Tensors
from .stated import stated_by

_PART = re.compile(
    r"(?P<module>.+?)(?:\.lora_(?P<kohya>down|up)|\.lora_(?P<peft>[AB])(?:\.(?!weight$)[^.]+)?"
    r"|(?:\.lora(?:_linear_layer)?|(?P<old>_lora))\.(?P<older>down|up))(?:\.weight)?"
)
_OTHER_KINDS = {
    "LoHa": ("hada_w1_a", "hada_w2_a"),
    "LoKr": ("lokr_w1", "lokr_w1_a", "lokr_w2"),
    "DoRA": ("dora_scale", "lora_magnitude_vector", "magnitude"),
    "OFT": ("oft_blocks", "oft_diag"),
    "full differences": ("diff", "set_weight"),
    "LoCon with a Tucker core": ("lora_mid", "lora_mid.weight"),
}


@dataclass(frozen=True)
class Source:
    """Where one module's update stands in a file; `rows` of B if the file fuses several modules."""

    down: str
    up: str
    scale: float
    rank: int
    shape: Shape
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class Member:
    """One LoRA of a collection: its modules by name, each read when asked for."""

    name: str
    file: Tensors
    modules: Mapping[str, Source]
    apart: int = 0  # modules of text encoders
    unread: tuple[str, ...] = ()  # keys that are no update of a weight: biases, norms
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """The base model that its modules belong to."""
        found = recognise({name: s.shape for name, s in self.modules.items()})
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
        up = self.file.read(source.up).flatten(1)
        if source.rows is not None:
            up = up[slice(*source.rows)]
        return Factors(self.file.read(source.down).flatten(1), up, source.scale)

    def split(self) -> Member:
        """The same with the original code's names replaced by diffusers', fused weights by their parts."""
        modules = {}
        for name, source in self.modules.items():
            sizes = split_sizes(name, source.shape.size_in, source.shape.size_out)
            for part, (start, stop) in sizes.items():
                shape = replace(source.shape, size_out=stop - start)
                modules[part] = replace(source, shape=shape, rows=(start, stop))
        return replace(self, modules=modules)


def open_member(path: str | os.PathLike[str], name: str = "") -> Member:
    """A LoRA file, checked by its header; only the numbers alpha are read."""
    # Let go of: a collection is of more files than may be open at once.
    with open_source(path) as file:
        return _member(file, name or Path(path).stem)


def member_of_tensors(tensors: Mapping[str, Tensor], name: str = "this LoRA") -> Member:
    """The same of {key: tensor} in memory."""
    return _member(InMemory(Path(name), tensors), name)


def _member(file: Tensors, name: str) -> Member:
    halves, alphas, apart, unread = _sorted_keys(file)
    if not halves:
        more = f"; {apart} modules of text encoders are not a space's business" if apart else ""
        raise FormatError(
            f"{file.path} holds no LoRA of a diffusion model in a known spelling (first key: "
            f"{next(iter(file.entries), 'none')}){more}."
        )
    stated = stated_by(file)
    modules = {}
    for module, keys in halves.items():
        alpha = alphas.get(join_key(module))
        scale = stated.of(module) if alpha is None else Scale(alpha)
        modules[module] = _source(file, module, keys, scale)
    spelled: dict[str, str] = {}
    for module in modules:
        if other := spelled.get(join_key(module)):
            raise FormatError(f"{file.path} holds {module} twice, also as {other}. Split it first.")
        spelled[join_key(module)] = module
    return Member(name, file, modules, apart, tuple(unread), dict(file.metadata))


def _sorted_keys(
    file: Tensors,
) -> tuple[dict[str, dict[bool, str]], dict[str, float], int, list[str]]:
    """{module: {is it A: key}}, {joined module: alpha}, modules of text encoders, other keys."""
    halves: dict[str, dict[bool, str]] = {}
    alphas: dict[str, float] = {}
    texts, unread = set(), []
    for key in file.entries:
        if is_of_text_encoder(key):
            texts.add(key.split(".lora", 1)[0].split(".alpha", 1)[0])
        elif key.endswith(".alpha"):
            alphas[join_key(key.removesuffix(".alpha"))] = _number(file, key)
        elif m := _PART.fullmatch(key):
            part = m["kohya"] or m["peft"] or m["older"]
            spelled = re.sub(r"\.to_out$", ".to_out.0", m["module"])
            pair = halves.setdefault(module_name(spelled), {})
            if (part in ("down", "A")) in pair:
                raise FormatError(
                    f"{file.path}: {m['module']} appears twice; the file holds more than one LoRA. "
                    "Split it first."
                )
            pair[part in ("down", "A")] = key
        else:
            _refuse_other_kinds(file.path, key)
            unread.append(key)
    return halves, alphas, len(texts), unread


def _refuse_other_kinds(path: Path, key: str) -> None:
    for kind, endings in _OTHER_KINDS.items():
        if key.endswith(tuple("." + end for end in endings)):
            raise FormatError(
                f"{path} holds {kind} ({key}), which is more than a product of two matrices. "
                "Convert it to a plain LoRA first, or leave it out."
            )


def _source(
    file: Tensors,
    module: str,
    keys: Mapping[bool, str],
    scale: Scale,
) -> Source:
    if len(keys) < 2:
        raise FormatError(
            f"{file.path}: {module} has only one of its two matrices. Download or copy it again."
        )
    down, up = (tuple(file.entries[keys[is_down]].shape) for is_down in (True, False))
    fits = len(down) in (2, 3, 4, 5) and len(up) == len(down) and all(n == 1 for n in up[2:])
    if not fits or down[0] != up[1] or min(*down, *up) < 1:
        raise FormatError(
            f"{file.path}: the ranks of {module} differ, or it is no product: A {list(down)}, B {list(up)}."
        )
    area = 1
    for n in down[2:]:
        area *= n
    kernel = down[2:] if len(down) > 2 else ()
    shape = Shape(down[1] * area, up[0], kernel)
    rank = down[0]
    return Source(keys[True], keys[False], scale.of(rank), rank, shape)


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
