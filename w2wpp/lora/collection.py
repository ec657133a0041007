"""Several LoRAs with common modules, one module of all of them at a time.

Members may lack modules (an absent update is zero) and have ranks of their own. What is read is
rounded to half precision at once, the way a space file keeps it, so that a space that was just
built and the same from its file are one. Factors are balanced by a power of two before, which costs
no precision and keeps small ones out of the range where half precision has no digits left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ..errors import DataError, LayoutMismatch
from .delta import Factors, Room, Stack, cut, square_norm, stack
from .families import UNKNOWN, Shape, is_original, join_key, recognise
from .members import Member, member_of_tensors


class Stacks(Protocol):
    """What a delta basis reads: the updates of one module after the other, all members side by side."""

    @property
    def count(self) -> int:
        """N."""

    @property
    def ranks(self) -> Tensor:
        """[M, N], zero where a member lacks a module."""

    def stack(self, module: int, room: Room | None = None) -> Stack | None:
        """Module number `module` of every member, in half precision; in `room` until the next one there."""


@dataclass(frozen=True, eq=False)
class Collection:
    """Members that share names; `cut_to` keeps only that many ranks of each update."""

    members: Sequence[Member]
    cut_to: int | None = None
    told: str = UNKNOWN  # the family as far as members tell it, where common names do not

    @property
    def count(self) -> int:
        """N."""
        return len(self.members)

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """{module: shape} of everything that a member has, sorted by name.

        Raises LayoutMismatch where two members disagree.
        """
        found: dict[str, Shape] = {}
        for member in self.members:
            for name, source in member.modules.items():
                before = found.setdefault(name, source.shape)
                if (before.size_in, before.size_out) != (
                    source.shape.size_in,
                    source.shape.size_out,
                ):
                    raise LayoutMismatch(
                        f"{member.name}: {name} maps {source.shape.size_in} to {source.shape.size_out} numbers, in "
                        f"the others {before.size_in} to {before.size_out}: they were trained on other base models."
                    )
        return dict(sorted(found.items()))

    @cached_property
    def family(self) -> str:
        """The base model that the members' modules belong to, or that all of them name."""
        found = recognise(self.shapes)
        if found != UNKNOWN:
            return found
        return self.told

    @cached_property
    def ranks(self) -> Tensor:
        """Rank of each module of each member [M, N]; 0 where a member lacks it."""
        return torch.tensor(
            [[self._rank(m, name) for m in self.members] for name in self.shapes], dtype=torch.int32
        )

    @cached_property
    def names(self) -> list[str]:
        """The M modules, sorted."""
        return list(self.shapes)

    def read(self, member: int, name: str) -> Factors | None:
        """One module of one member, as a space keeps it; None where it lacks the module."""
        return self._read(self.members[member], name)

    def factors(self, module: int) -> list[Factors | None]:
        """A module of every member; None where a member lacks it."""
        name = self.names[module]
        return [self._read(m, name) for m in self.members]

    def stack(self, module: int, room: Room | None = None) -> Stack | None:
        """A module of all members side by side, in `room` until the next one there; None if none has it."""
        return stack(self.factors(module), room)

    def lost(self) -> tuple[float, float]:
        """|dW|^2 that the cut and the rounding to half precision lose, and what there was, over all members."""
        missed = total = 0.0
        for name in self.names:
            for member in self.members:
                f = member.read(name)
                if f is not None:
                    kept = rounded(f) if self.cut_to is None else rounded(cut(f, self.cut_to)[0])
                    total += square_norm(f)
                    missed += square_norm(_difference(f, kept))
        return missed, total

    def _rank(self, member: Member, name: str) -> int:
        source = member.modules.get(name)
        if source is None:
            return 0
        return source.rank if self.cut_to is None else min(source.rank, self.cut_to)

    def _read(self, member: Member, name: str) -> Factors | None:
        f = member.read(name)
        if f is None:
            return None
        if self.cut_to is not None and self.cut_to < f.rank:
            f = cut(f, self.cut_to)[0]
        return rounded(f)


def collect(members: Sequence[Member], cut_to: int | None = None) -> Collection:
    """Members under common names: where spellings differ, they are brought together.

    Of two spellings of one module the one with dots is taken; if some have weights fused that others
    have split, all are split.

    Raises DataError for no members, or a rank below 1.
    """
    if not members:
        raise DataError("There is no LoRA to make a collection of.")
    if cut_to is not None and cut_to < 1:
        raise DataError(f"A rank to cut to is at least 1. Got {cut_to}.")
    told = {m.family for m in members} - {UNKNOWN}
    kinds = {_spelled_as(m) for m in members}
    if {"original", "diffusers"} <= kinds:
        members = [m.split() for m in members]
    chosen: dict[str, str] = {}
    for member in members:
        for name in member.modules:
            key = join_key(name)
            if key not in chosen or ("." in name and "." not in chosen[key]):
                chosen[key] = name
    renamed = [
        replace(m, modules={chosen[join_key(name)]: s for name, s in m.modules.items()})
        for m in members
    ]
    return Collection(renamed, cut_to, told.pop() if len(told) == 1 else UNKNOWN)


def _spelled_as(member: Member) -> str:
    if any(is_original(name) for name in member.modules):
        return "original"
    split_names = ("transformer_blocks", "single_transformer_blocks", "layers")
    of_diffusers = any(join_key(name).startswith(split_names) for name in member.modules)
    return "diffusers" if of_diffusers else "other"


def rounded(f: Factors) -> Factors:
    """The same update in half precision.

    What is in half precision already stays as it is, to the bit. Otherwise sizes are moved by powers
    of two, which costs nothing.
    """
    if f.down.dtype == f.up.dtype == torch.float16:
        return f
    largest_a, largest_b = float(f.down.abs().max()), float(f.up.abs().max())
    if not (largest_a > 0 and largest_b > 0):
        return Factors(f.down.half(), f.up.half(), f.scale)
    # Towards a largest entry of about one; what is moved beyond the balance goes into the scale.
    shift_a, shift_b = (-math.floor(math.log2(n)) for n in (largest_a, largest_b))
    scale = f.scale * 2.0 ** -(shift_a + shift_b)
    down, up = (
        torch.ldexp(t.float(), torch.tensor(n)).half()
        for t, n in ((f.down, shift_a), (f.up, shift_b))
    )
    return Factors(down, up, scale)


def _difference(f: Factors, g: Factors) -> Factors:
    down = torch.cat([f.down.double(), g.down.double()])
    up = torch.cat([f.up.double() * f.scale, -g.up.double() * g.scale], dim=1)
    return Factors(down, up)


def members_of(
    loras: Mapping[str, Mapping[str, Factors]], *, text_encoders: bool = False
) -> list[Member]:
    """Members made of factors in memory, {name: {module: update}}; for tests and other code."""
    found = []
    for name, update in loras.items():
        tensors = {}
        for module, f in update.items():
            tensors[f"{module}.lora_A.weight"] = f.down
            tensors[f"{module}.lora_B.weight"] = f.up
            tensors[f"{module}.alpha"] = torch.tensor(f.scale * f.rank)
        found.append(member_of_tensors(tensors, name, text_encoders=text_encoders))
    return found
