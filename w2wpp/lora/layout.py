"""Layouts: which LoRA weights make up a vector, and in which order.

A layout is the receipt of flattening. `pack` turns the matrices of one or many LoRAs into vectors
of P numbers and `unpack` is its inverse; both go through the same frozen list of modules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..arrays import Array, as_tensor
from ..errors import ConfigError, LayoutMismatch, ShapeError, reading

LARGEST = 2**31  # no layer has so many features
Lora = dict[str, tuple[Tensor, Tensor]]  # {module: (A [r, in], B [out, r])}, or with a leading N


@dataclass(frozen=True)
class Module:
    """One adapted linear layer, by its dotted diffusers name."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Layout:
    """An ordered list of modules that share rank and alpha; a delta is (alpha / rank) * B @ A."""

    name: str
    base_model: str  # family of the base model: "sd15", "avatar", ...
    modules: tuple[Module, ...]
    rank: int = 1
    alpha: float = 1.0

    def __post_init__(self) -> None:
        numbers = [self.rank, *(n for m in self.modules for n in (m.in_features, m.out_features))]
        whole = all(type(n) is int and 1 <= n < LARGEST for n in numbers)
        if (
            not whole
            or not self.modules
            or len({m.name for m in self.modules}) != len(self.modules)
        ):
            raise ConfigError(
                f"Layout '{self.name}' must list distinct modules with positive whole sizes and a "
                "positive whole rank."
            )
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(
                f"Layout '{self.name}' needs a finite, positive alpha. Got {self.alpha!r}."
            )

    def __repr__(self) -> str:
        modules = f"{len(self.modules)} modules"
        sizes = f"rank={self.rank}, alpha={self.alpha:g}, P={self.size}"
        return f"Layout({self.name!r}, for {self.base_model}, {modules}, {sizes})"

    @cached_property
    def size(self) -> int:
        """P, the length of a vector."""
        return sum(self.rank * (m.in_features + m.out_features) for m in self.modules)

    @property
    def scale(self) -> float:
        """alpha / rank: what B @ A is multiplied by."""
        return self.alpha / self.rank

    @cached_property
    def layers(self) -> int | None:
        """Resnets per block of the UNet, which LDM names count by: up blocks have one attention more."""
        up = re.compile(r"up_blocks\.\d+\.attentions\.(\d+)\.")
        found = [int(m[1]) for m in map(up.match, (module.name for module in self.modules)) if m]
        return max(found) or None if found else None

    def slices(self) -> Iterator[tuple[Module, slice, slice]]:
        """Where A (down) and B (up) of each module stand in a vector."""
        start = 0
        for m in self.modules:
            middle = start + self.rank * m.in_features
            stop = middle + self.rank * m.out_features
            yield m, slice(start, middle), slice(middle, stop)
            start = stop

    def pack(self, lora: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        """{module: (A [r, in], B [out, r])} -> w [P]; with a leading N on each matrix, w [N, P]."""
        self._check(lora)
        parts = [t.flatten(-2) for m in self.modules for t in lora[m.name]]
        return torch.cat(parts, dim=-1)

    def unpack(self, w: Array) -> Lora:
        """w [P] or [N, P] -> {module: (A [(N,) r, in], B [(N,) out, r])}, as views.

        Raises ShapeError for another width.
        """
        w = as_tensor(w, "vectors [P] or [N, P]")
        if w.ndim not in (1, 2) or w.shape[-1] != self.size:
            raise ShapeError(
                f"Layout '{self.name}' unpacks vectors [P] or [N, P] with P = {self.size}. Got "
                f"{list(w.shape)}."
            )
        sizes = [self.rank * n for m in self.modules for n in (m.in_features, m.out_features)]
        parts = iter(w.split(sizes, dim=-1))  # one view of the whole: its gradient is one too
        return {
            m.name: (
                next(parts).unflatten(-1, (self.rank, m.in_features)),
                next(parts).unflatten(-1, (m.out_features, self.rank)),
            )
            for m in self.modules
        }

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        modules = [[m.name, m.in_features, m.out_features] for m in self.modules]
        return {
            "name": self.name,
            "base_model": self.base_model,
            "rank": self.rank,
            "alpha": float(self.alpha),
            "modules": modules,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layout:
        """A layout of a file's JSON. Raises FormatError for anything else."""
        with reading("A layout with name, base_model, rank, alpha and modules as [name, in, out]"):
            modules = tuple(Module(str(n), i, o) for n, i, o in data["modules"])
            name, base_model = str(data["name"]), str(data["base_model"])
            return cls(name, base_model, modules, data["rank"], float(data["alpha"]))

    def _check(self, lora: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        names = {m.name for m in self.modules}
        missing, unknown = sorted(names - lora.keys()), sorted(lora.keys() - names)
        if missing or unknown:
            example = f"first missing: {missing[0]}" if missing else f"first unknown: {unknown[0]}"
            raise LayoutMismatch(
                f"Layout '{self.name}' holds {len(names)} modules; this LoRA lacks {len(missing)} "
                "of them "
                f"and has {len(unknown)} others ({example}). Use a LoRA trained on exactly these "
                "modules."
            )
        lead = lora[self.modules[0].name][0].shape[:-2]
        for m in self.modules:
            a, b = lora[m.name]
            want_a, want_b = (*lead, self.rank, m.in_features), (*lead, m.out_features, self.rank)
            if tuple(a.shape) != want_a or tuple(b.shape) != want_b or len(lead) > 1:
                raise LayoutMismatch(
                    f"Layout '{self.name}' expects A [(N,) {self.rank}, {m.in_features}] and "
                    f"B [(N,) {m.out_features}, {self.rank}] for {m.name}, the same N for every "
                    "module. "
                    f"Got A {list(a.shape)} and B {list(b.shape)}."
                )


def transformer_layout(
    name: str,
    base_model: str,
    blocks: Sequence[tuple[str, int]],
    *,
    context_dim: int,
    targets: Sequence[str] = ("to_q", "to_v"),
    rank: int = 1,
    alpha: float = 1.0,
) -> Layout:
    """The attention projections of transformer blocks, given as (dotted prefix, channels).

    Targets are among to_q, to_k, to_v and to_out.0; the keys and values of `attn2` read the
    context. Modules are sorted by name as strings, which is the order that PEFT's files and the w2w
    data have.
    """
    modules = []
    for prefix, channels in blocks:
        for attention in ("attn1", "attn2"):
            for target in targets:
                reads_context = attention == "attn2" and target in ("to_k", "to_v")
                size_in = context_dim if reads_context else channels
                modules.append(Module(f"{prefix}.{attention}.{target}", size_in, channels))
    return Layout(name, base_model, tuple(sorted(modules, key=lambda m: m.name)), rank, alpha)


def _sd15_blocks() -> list[tuple[str, int]]:
    down = [(f"down_blocks.{i}", 2, c) for i, c in enumerate((320, 640, 1280))]
    up = [(f"up_blocks.{i}", 3, c) for i, c in enumerate((1280, 640, 320), start=1)]
    levels = [*down, ("mid_block", 1, 1280), *up]
    return [
        (f"{level}.attentions.{i}.transformer_blocks.0", channels)
        for level, count, channels in levels
        for i in range(count)
    ]


# The identity LoRAs of weights2weights (Dravid et al. 2024): rank 1, alpha 27, q and v of all 32
# attentions of the SD 1.5 UNet. 64 modules, P = 99,648.
SD15 = transformer_layout("sd15", "sd15", _sd15_blocks(), context_dim=768, rank=1, alpha=27.0)
