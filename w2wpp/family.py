"""A family of people: drawn from a space, bred from one another by choosing, each named by generation and cell.

The whole of it is a short text and a seed, so it can be kept in a workflow and grows into the same people on every
machine: all numbers come from `standard_normal`, row by row, and no person depends on how many are looked at.

    {"v": 1, "at": 1, "g": [{"k": "new"}, {"k": "like", "p": 0, "of": [5], "r": 0.4, "keep": [5]}],
     "plus": [[0, 5]], "minus": [], "id": "k7f3"}

A generation ("g") is new people ("new"), people like one of an earlier generation ("like"), or a cross of two of
them ("cross"). "p" is that generation, "of" the cells of the parents in it, "r" the radius, "keep" the cells that
stay who they were there, "lock" those that the next one keeps; "at" is the generation that is looked at, "id" what
tells one exploration from another.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError, DataError, FormatError, ShapeError
from .files.text import parse_json
from .identity import Identity, require_same_space
from .noise import standard_normal
from .space import Space

KINDS = {"new": 0, "like": 1, "cross": 2}  # and how many parents they have
MOST_CELLS = 256
MOST_GENERATIONS = 1000
Place = tuple[int, int]  # generation, cell


@dataclass(frozen=True)
class Generation:
    """How the people of one grid come about."""

    kind: str = "new"
    parent: int | None = None  # the generation that it was bred from
    of: tuple[int, ...] = ()  # cells of the parents in it
    radius: float | None = None  # None: whatever the reader says
    keep: tuple[int, ...] = ()  # cells that stay who they are in `parent`
    lock: tuple[int, ...] = ()  # cells that what is bred from here will keep


@dataclass(frozen=True)
class Family:
    """Generations in the order in which they were bred, and which of their people are marked."""

    generations: tuple[Generation, ...] = (Generation(),)
    at: int = 0
    plus: tuple[Place, ...] = ()
    minus: tuple[Place, ...] = ()
    id: str = ""

    def path(self) -> list[int]:
        """The generations from the first to the one that is looked at."""
        steps: list[int] = []
        here: int | None = self.at
        while here is not None:
            steps.insert(0, here)
            here = self.generations[here].parent
        return steps

    def origin(self, place: Place) -> Place:
        """Where somebody came up first: people who are kept have a place in several generations."""
        g, cell = place
        while cell in (here := self.generations[g]).keep:
            assert here.parent is not None
            g = here.parent
        return g, cell

    def bred(
        self, kind: str, of: Sequence[int] = (), *, radius: float, keep: Sequence[int] = ()
    ) -> Family:
        """The family with one more generation, bred from the one that is looked at."""
        lock = self.generations[self.at].lock
        kept = sorted({*keep, *lock})
        new = Generation(kind, self.at, tuple(of), radius, tuple(kept), lock)
        grown = replace(self, generations=(*self.generations, new), at=len(self.generations))
        return read_family(write_family(grown))


def read_family(text: str) -> Family:
    """A family from its text; the empty text is a single generation of new people.

    Raises FormatError for a text that is no family tree, or one of a later version.
    """
    if not text.strip():
        return Family()
    data = parse_json(text, "The family tree")
    try:
        if data["v"] != 1:
            raise FormatError(
                f"The family tree is of version {data['v']!r}; this release reads version 1. Update the pack."
            )
        generations = tuple(_generation(g, number) for number, g in enumerate(data["g"]))
        at = _whole(data["at"], len(generations))
        plus, minus = (
            tuple((_whole(g, len(generations)), _cell(c)) for g, c in data.get(sign, ()))
            for sign in ("plus", "minus")
        )
        name = data.get("id", "")
        if not isinstance(name, str) or len(name) > 64:
            raise ValueError("its 'id' is a short text")
    except (KeyError, TypeError, ValueError, IndexError) as e:
        if isinstance(e, FormatError):
            raise
        raise FormatError(
            f"The family tree cannot be read ({type(e).__name__}: {e}). Empty it to begin anew."
        ) from e
    if set(plus) & set(minus):
        raise FormatError("The family tree marks somebody with + and - at once. Take one back.")
    return Family(generations, at, plus, minus, name)


def write_family(family: Family) -> str:
    """The shortest text of a family."""
    data: dict[str, Any] = {"v": 1, "at": family.at, "g": [_written(g) for g in family.generations]}
    data |= {"plus": family.plus, "minus": family.minus}
    if family.id:
        data["id"] = family.id
    return json.dumps(data, separators=(",", ":"))


def people_of(
    family: Family,
    space: Space,
    *,
    seed: int,
    truncation: float = 1.0,
    radius: float = 0.4,
    around: Identity | None = None,
) -> People:
    """Everybody in a family. `around` is somebody whom the first generation is bred around, within `radius`.

    Raises ConfigError for a truncation or radius out of range, ShapeError where `around` is not one person.
    """
    if around is not None:
        require_same_space(around.space_fingerprint, space.fingerprint, space.name)
        if len(around) != 1:
            raise ShapeError(f"A family starts around one person. Got {len(around)}.")
    if not 0.0 <= truncation < math.inf or not 0.0 <= radius <= 1.0:
        raise ConfigError(
            "The truncation of a family is zero or positive and its radius between 0 and 1. Got "
            f"{truncation} and {radius}."
        )
    return People(family, space, seed, truncation, radius, around)


class People:
    """The latents of a family, computed as they are asked for."""

    def __init__(
        self,
        family: Family,
        space: Space,
        seed: int,
        truncation: float,
        radius: float,
        around: Identity | None,
    ) -> None:
        self._family, self._space, self._seed = family, space, seed
        self._truncation, self._radius, self._around = truncation, radius, around
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def grid(self, count: int, generation: int | None = None) -> Identity:
        """The first `count` people of a generation, of the one that is looked at by default."""
        at = self._family.at if generation is None else generation
        z, share = self._rows(at, count)
        how = {"generation": at, "path": self._family.path() if generation is None else [at]}
        return self._identity(z[:count], share[:count], how)

    def at(self, places: Sequence[Place]) -> Identity:
        """People by generation and cell."""
        found = [tuple(t[c] for t in self._rows(g, c + 1)) for g, c in places]
        z, share = (torch.stack(part) for part in zip(*found))
        return self._identity(z, share, {"places": [list(p) for p in places]})

    def marked(self, count: int) -> tuple[Identity, Identity]:
        """Those marked with + and with -; without any - everybody else of the grids [`count`] with a + in them.

        Raises DataError if nobody, or everybody, has a +.
        """
        family = self._family
        plus = list(dict.fromkeys(map(family.origin, family.plus)))
        minus = list(dict.fromkeys(map(family.origin, family.minus)))
        if not plus:
            raise DataError("Nobody is marked with +. Mark the faces that have the attribute.")
        if not minus:
            shown = [(g, c) for g in sorted({g for g, _ in family.plus}) for c in range(count)]
            minus = [p for p in dict.fromkeys(map(family.origin, shown)) if p not in plus]
        if not minus:
            raise DataError("Everybody is marked with +. Mark those only that have the attribute.")
        return self.at(plus), self.at(minus)

    def _identity(self, z: Tensor, share: Tensor, how: Mapping[str, Any]) -> Identity:
        around = self._around
        about = {
            "made_by": "explore",
            "seed": self._seed,
            "truncation": self._truncation,
            "space": self._space.name,
            **how,
        }
        residual = None
        if around is not None:
            about["parents"] = [dict(around.provenance)]
            if around.residual is not None:
                residual = share[:, None] * around.residual
        return Identity(z, self._space.fingerprint, residual, about)

    def _rows(self, number: int, count: int) -> tuple[Tensor, Tensor]:
        """Latents [n, d] of a generation, n at least `count`, and how much of `around` is in each [n]."""
        known = self._known.get(number)
        if known is None or len(known[0]) < count:
            # In the order of breeding, because a long line of parents is deeper than Python recurses.
            for g, n in reversed(self._wanted(number, count)):
                if g not in self._known or len(self._known[g][0]) < n:
                    self._known[g] = self._bred(g, n)
        return self._known[number]

    def _wanted(self, number: int, count: int) -> list[tuple[int, int]]:
        """This generation and its ancestors, each with how many of its people it takes."""
        wanted = []
        here: int | None = number
        while here is not None:
            g = self._family.generations[here]
            wanted.append((here, count))
            keep = [c for c in g.keep if c < count]
            count, here = max([1, *(c + 1 for c in (*g.of, *keep))]), g.parent
        return wanted

    def _bred(self, number: int, count: int) -> tuple[Tensor, Tensor]:
        g = self._family.generations[number]
        z, share = self._children(number, g, count)
        if g.parent is not None:
            before, shares = self._known[g.parent]
            for cell in g.keep:
                if cell < count:
                    z[cell], share[cell] = before[cell], shares[cell]
        return z, share

    def _children(self, number: int, g: Generation, count: int) -> tuple[Tensor, Tensor]:
        noise = standard_normal(count, self._space.latent_size, generator=self._generator(number))
        radius = self._radius if g.radius is None else g.radius
        fresh, none = noise * self._truncation, torch.zeros(count)
        if g.kind == "new":
            if number or self._around is None:
                return fresh, none
            near = _near(self._around.z.to(fresh), fresh, radius)
            near[0] = self._around.z[0]
            share = torch.full((count,), _staying(radius))
            share[0] = 1.0
            return near, share
        assert g.parent is not None
        before, shares = self._known[g.parent]
        if g.kind == "like":
            (parent,) = g.of
            return (
                _near(before[parent][None], fresh, radius),
                torch.full((count,), float(shares[parent]) * _staying(radius)),
            )
        one, other = g.of
        # Uniform crossover: the latents are independent of one another among people, so a child that takes each of
        # them from either parent is as likely a person as they are.
        z = torch.where(noise > 0, before[one], before[other])
        return z, torch.full((count,), float(shares[one] + shares[other]) / 2)

    def _generator(self, number: int) -> torch.Generator:
        """The first generation is what `Space.sample` draws; the others have seeds of their own."""
        seed = self._seed
        if number:
            digest = hashlib.sha256(f"w2wpp.family {self._seed} {number}".encode()).digest()
            seed = int.from_bytes(digest[:8], "big") >> 1
        return torch.Generator().manual_seed(seed)


def _staying(radius: float) -> float:
    return math.sqrt(1.0 - radius * radius)


def _near(parent: Tensor, fresh: Tensor, radius: float) -> Tensor:
    """sqrt(1 - r^2) parent + r fresh: at 0 the parent, at 1 a stranger, and as likely a person as both in between
    (the preconditioned Crank-Nicolson proposal, Cotter et al. 2013)."""
    return _staying(radius) * parent + radius * fresh


def _generation(data: Mapping[str, Any], number: int) -> Generation:
    kind = data["k"]
    if number >= MOST_GENERATIONS:
        raise ValueError(f"it has more than {MOST_GENERATIONS} generations")
    if kind not in KINDS:
        raise ValueError(f"no generation is {kind!r}")
    parent = data.get("p")
    if (parent is None) != (number == 0):
        raise ValueError(f"generation {number} needs an earlier one to come from")
    of, keep, lock = (tuple(map(_cell, data.get(key, ()))) for key in ("of", "keep", "lock"))
    if len(of) != KINDS[kind] or (parent is None and (of or keep)):
        raise ValueError(f"generation {number} has {len(of)} parents, {kind!r} takes {KINDS[kind]}")
    radius = data.get("r")
    if radius is not None and not (_is_number(radius) and 0.0 <= radius <= 1.0):
        raise ValueError(f"a radius lies between 0 and 1, not at {radius!r}")
    if radius is None and kind == "like":
        raise ValueError(f"generation {number} has no radius")
    return Generation(
        kind,
        None if parent is None else _whole(parent, number),
        of,
        None if radius is None else float(radius),
        keep,
        lock,
    )


def _written(g: Generation) -> dict[str, Any]:
    data: dict[str, Any] = {"k": g.kind}
    if g.parent is not None:
        data["p"] = g.parent
    if g.radius is not None:
        data["r"] = g.radius
    parts = {"of": g.of, "keep": g.keep, "lock": g.lock}
    return data | {key: list(cells) for key, cells in parts.items() if cells}


def _cell(value: Any) -> int:
    return _whole(value, MOST_CELLS)


def _whole(value: Any, below: int) -> int:
    if type(value) is not int or not 0 <= value < below:
        raise ValueError(f"{value!r} is no whole number from 0 to {below - 1}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
