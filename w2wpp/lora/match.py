"""A LoRA of any kind meets a layout: its updates in the layout's modules, what is outside and what is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LayoutMismatch
from .base_model import SD1, UNKNOWN, is_sd15
from .files import LoraFile, Update
from .layout import Layout, Lora, Module
from .products import Delta, Product

Base = (
    Callable[[str], Tensor] | Mapping[str, Tensor]
)  # a module's weight in the base model, by name


@dataclass(frozen=True, eq=False)
class Match:
    """What a LoRA changes in the modules of a layout."""

    layout: Layout
    deltas: Mapping[str, Delta]  # in the layout's order, each with its whole scale
    ignored: tuple[str, ...]  # the LoRA's modules that the layout does not have
    missing: tuple[str, ...]  # the layout's that the LoRA does not have: taken as no update
    plain: frozenset[str]  # modules that are one pair of matrices

    def square(self) -> float:
        """|Delta|^2 over the layout's modules."""
        return sum(delta.square() for delta in self.deltas.values())

    def balanced(self) -> tuple[Lora, float]:
        """Factors of the layout's rank, A and B of equal lengths, and the share of |Delta|^2 lost to it."""
        lora, lost, total = {}, 0.0, 0.0
        root, rank = self.layout.scale**0.5, self.layout.rank
        for module in self.layout.modules:
            delta = self.deltas.get(module.name)
            square = delta.square() if delta is not None else 0.0
            if delta is not None and square > 0:
                a, b, missed = delta.best(rank)
                lora[module.name] = (a / root, b / root)
                total, lost = total + square, lost + missed
            else:
                lora[module.name] = _nothing(module, rank)
        return lora, lost / total if total > 0 else 0.0

    def own(self) -> Tensor | None:
        """The LoRA packed as it is, [P], if it is of the layout's rank and complete."""
        lora = {}
        for name, delta in self.deltas.items():
            if not isinstance(delta, Product) or name not in self.plain:
                return None
            if len(delta.a) != self.layout.rank or not bool(delta.a.any()):
                return None
            lora[name] = (delta.a, delta.b / self.layout.scale)
        return None if self.missing else self.layout.pack(lora)

    def error(self, w: Tensor) -> float:
        """|Delta' - Delta| / |Delta| for the LoRA of a vector w [P]; a missing module's Delta is zero."""
        missed = total = 0.0
        for name, (a, b) in self.layout.unpack(w).items():
            b = b * self.layout.scale
            delta = self.deltas.get(name)
            missed += Product(a, b).square() if delta is None else delta.square_from(a, b)
            total += 0.0 if delta is None else delta.square()
        return (missed / total) ** 0.5 if total > 0 else float(missed > 0)


def match_modules(
    file: LoraFile, layout: Layout, *, base: Base | None = None, assume_family: bool = False
) -> Match:
    """The updates of a LoRA in a layout's modules.

    Raises for a LoRA of another base model; for one that does not tell its base model apart from
    others, unless the caller knows it; and for updates that need the base model's weights (DoRA)
    where `base` is not given.
    """
    _require_family(file, layout, assume_family)
    deltas, plain = {}, set()
    for module in layout.modules:
        update = file.updates.get(module.name)
        if update is None:
            continue
        delta = _delta(file, layout, module, update, base)
        if isinstance(delta, Product) and len(delta.a) == 0:
            continue  # rank 0
        deltas[module.name] = delta
        if update.is_plain:
            plain.add(module.name)
    if not any(module.name in file.updates for module in layout.modules):
        raise LayoutMismatch(
            f"{file.name} has none of the {len(layout.modules)} modules of the layout '{layout.name}' "
            f"(its first: {next(iter(file.updates))}). Use a LoRA for {layout.base_model}."
        )
    names = {module.name for module in layout.modules}
    ignored = tuple(sorted(file.updates.keys() - names))
    missing = tuple(m.name for m in layout.modules if m.name not in deltas)
    return Match(layout, deltas, ignored, missing, frozenset(plain))


def _delta(
    file: LoraFile, layout: Layout, module: Module, update: Update, base: Base | None
) -> Delta:
    wanted = (module.out_features, module.in_features)
    if update.shape:
        _require_shape(file, layout, module, update.shape)
    weight = None
    if update.needs_base and base is not None:
        weight = base[module.name] if isinstance(base, Mapping) else base(module.name)
    delta = update.delta(weight)
    if delta.shape != wanted:
        _require_shape(file, layout, module, delta.shape)
    return delta


def _require_shape(file: LoraFile, layout: Layout, module: Module, shape: tuple[int, ...]) -> None:
    if len(shape) < 2:
        raise LayoutMismatch(f"{file.name}: {module.name} is {list(shape)}, expected a matrix.")
    if shape != (module.out_features, module.in_features):
        kernel = f" with a kernel of {' x '.join(map(str, shape[2:]))}" if shape[2:] else ""
        raise LayoutMismatch(
            f"{file.name}: {module.name} maps {shape[1]} to {shape[0]} numbers{kernel}, the layout "
            f"'{layout.name}' expects {module.in_features} to {module.out_features}. It was trained "
            "on another base model; use one of the same family."
        )


def _require_family(file: LoraFile, layout: Layout, assume_family: bool) -> None:
    if not is_sd15(layout):
        return
    family = file.family
    if family.name == SD1:
        return
    if family.name != UNKNOWN:
        raise LayoutMismatch(
            f"{file.name} was trained on {family.name}, not on {SD1} ({family.why}). Use a LoRA for "
            f"{layout.base_model}."
        )
    if not assume_family:
        raise LayoutMismatch(
            f"{file.name} does not tell which base model it was trained on: {family.why}. If it is "
            f"{SD1}, say so: connect such a MODEL to W2W++ Encode LoRA, or pass --base-model "
            f"{layout.base_model}."
        )


def _nothing(module: Module, rank: int) -> tuple[Tensor, Tensor]:
    return (
        torch.zeros(rank, module.in_features, dtype=torch.float64),
        torch.zeros(module.out_features, rank, dtype=torch.float64),
    )
