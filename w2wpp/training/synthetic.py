"""A synthetic twin of a data set of LoRAs: rows drawn from a generator, at any size, never stored unless asked.

It has what makes such data hard or easy to learn from, all of it planted and known: a spectrum that
falls like 1 / k, clusters of people, directions that follow others along a curve, several rows a
person, parameters of very different std, and a floor of noise without structure. It is no
substitute for LoRAs: nothing in it was trained on a picture, and it says so wherever it goes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..lora.layout import Layout
from .dataset import VectorDataset, holdout_by_identity, write_dataset
from .meter import Meter

BLOCK = 128  # rows that are drawn together; row i is the same whatever is asked for beside it
CLUSTERS = 24
CURVED = 8  # leading directions whose squares move further ones
ROWS_PER_PERSON = 2
STATEMENT = "synthetic: drawn from a generator, not trained on pictures"


@dataclass(frozen=True, eq=False)
class SyntheticRows:
    """Vectors [N, P] that are drawn when they are read; stands in for a file of them."""

    layout: Layout
    rows: int  # N
    seed: int = 0
    directions: int = 256  # r
    noise: float = 0.3  # share of the variance without structure
    _last: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        parts = []
        while start < stop:
            block, first = divmod(start, BLOCK)
            last = min(BLOCK, first + stop - start)
            parts.append(self._block(block)[first:last])
            start += last - first
        return torch.cat(parts)

    def read_columns(self, name: str, rows: Sequence[int], start: int, stop: int) -> Tensor:
        out = torch.empty(len(rows), stop - start)
        for i, row in enumerate(rows):
            out[i] = self._block(row // BLOCK)[row % BLOCK, start:stop]
        return out

    @property
    def r(self) -> int:
        """Directions in which the vectors have structure, a quarter of P at most."""
        return max(1, min(self.directions, self.layout.size // 4))

    def _block(self, block: int) -> Tensor:
        if block not in self._last:
            self._last.clear()
            self._last[block] = self._draw(block)
        return self._last[block]

    def _draw(self, block: int) -> Tensor:
        z = self._latents(block)
        generator = self._generator(2 * block + 1)
        x = z @ self._map
        x += self.noise**0.5 * torch.randn(BLOCK, self.layout.size, generator=generator)
        return x.mul_(self._std).add_(self._mean)

    def _latents(self, block: int) -> Tensor:
        """[BLOCK, r]: persons in clusters, rows of a person alike, squares of the first along the later ones."""
        generator = self._generator(2 * block + 2)
        persons = BLOCK // ROWS_PER_PERSON
        cluster = torch.randint(CLUSTERS, (persons,), generator=generator)
        centers = self._centers[cluster]
        person = 0.7**0.5 * torch.randn(persons, self.r, generator=generator) + centers
        z = person.repeat_interleave(ROWS_PER_PERSON, 0)
        z = z + 0.3 * torch.randn(BLOCK, self.r, generator=generator)
        curved = min(CURVED, self.r // 2)
        z[:, curved : 2 * curved] = (z[:, :curved].square() - 1) / 2**0.5
        return z

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed + 1) * 2_000_003 + number)

    @cached_property
    def _centers(self) -> Tensor:
        """[CLUSTERS, r]: the leading half of the directions tells clusters apart."""
        centers = 0.45 * torch.randn(CLUSTERS, self.r, generator=self._generator(-1))
        centers[:, self.r // 2 :] = 0
        return centers

    @cached_property
    def _map(self) -> Tensor:
        """[r, P]: direction k has variance proportional to 1 / k; together they have 1 - noise of each parameter's."""
        law = 1.0 / torch.arange(1, self.r + 1)
        law = (1 - self.noise) * law / law.sum()
        rows = torch.randn(self.r, self.layout.size, generator=self._generator(-2))
        return rows * law.sqrt()[:, None]

    @cached_property
    def _mean(self) -> Tensor:
        """[P] as of LoRAs from one seed: A near its common random start, B small."""
        return self._module_numbers(-3, lambda fan_in: fan_in**-0.5, lambda fan_in: 0.01)

    @cached_property
    def _std(self) -> Tensor:
        """[P]: A hardly moves from its start, B is all learned; lognormal from parameter to parameter."""
        spread = torch.randn(self.layout.size, generator=self._generator(-4)).mul_(0.4).exp_()
        scales = torch.empty(self.layout.size)
        for module, down, up in self.layout.slices():
            scales[down], scales[up] = 0.1 * module.in_features**-0.5, 0.01
        return scales * spread

    def _module_numbers(self, number: int, of_a: Any, of_b: Any) -> Tensor:
        x = torch.randn(self.layout.size, generator=self._generator(number))
        for module, down, up in self.layout.slices():
            x[down] *= of_a(module.in_features)
            x[up] *= of_b(module.in_features)
        return x


def synthetic_dataset(
    rows: int, layout: Layout, *, seed: int = 0, heldout: float = 0.1, **options: Any
) -> VectorDataset:
    """A data set [rows, P] that exists only as far as it is read; two rows a person, whole persons held out.

    Raises ConfigError for less than one row.
    """
    if rows < 1:
        raise ConfigError(f"A data set has at least one row. Got {rows}.")
    identity = torch.arange(rows) // ROWS_PER_PERSON
    source = SyntheticRows(layout, rows, seed, **options)
    flags = holdout_by_identity(identity, heldout, generator=torch.Generator().manual_seed(seed))
    facts = {"source": STATEMENT, "seed": seed, "directions": source.r, "noise": source.noise}
    return VectorDataset(layout, source, identity, flags, provenance=facts)


def write_synthetic(
    path: str | os.PathLike[str],
    rows: int,
    layout: Layout,
    *,
    precision: str = "single",
    callback: Callable[[str], object] = lambda line: None,
    **options: Any,
) -> VectorDataset:
    """The same in a file, drawn and written piece by piece; a write that was killed is taken up."""
    data = synthetic_dataset(rows, layout, **options)
    meter = Meter("rows", rows, callback)

    def pieces(start: int) -> Iterator[Tensor]:
        meter.begin(start)
        while start < rows:
            stop = min(start + BLOCK, rows)
            yield data.vectors(torch.arange(start, stop))
            start = stop
            meter(start)

    return write_dataset(
        path,
        pieces,
        layout,
        data.identity,
        heldout=data.heldout,
        provenance=data.provenance,
        precision=precision,
    )
