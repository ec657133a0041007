"""What a file holds of one module, and what every kind of update answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Protocol

from torch import Tensor

from ...errors import FormatError
from ..products import Delta, Product
from ..source import Source, read_numbers


@dataclass(frozen=True)
class Scale:
    """alpha over the rank; over its root where the adapter says rank-stabilised (Kalajdzievski 2023)."""

    alpha: float | None = None  # None: the file names none, which is a scale of 1
    root: bool = False
    rank: int | None = None  # the configuration's, for kinds whose tensors do not show it

    def of(self, rank: int) -> float:
        """What B A is multiplied by."""
        if self.alpha is None or rank == 0:
            return 1.0
        return self.alpha / (sqrt(rank) if self.root else rank)


@dataclass(frozen=True, eq=False)
class Parts:
    """The tensors of one module by part; only headers are known until one is read."""

    module: str
    keys: Mapping[str, str]  # {part: key in the file}
    source: Source
    scale: Scale

    def __contains__(self, part: str) -> bool:
        return part in self.keys

    def shape(self, part: str) -> tuple[int, ...]:
        """Of a tensor, by the header."""
        return tuple(self.source.entries[self.need(part)].shape)

    def read(self, part: str) -> Tensor:
        """A tensor in single precision, finite."""
        return read_numbers(self.source, self.need(part))

    def matrix(self, part: str) -> Tensor:
        """[rows, everything else]."""
        return self.read(part).flatten(1)

    def need(self, part: str) -> str:
        """The key of a part; raises if the file does not have it."""
        if part not in self.keys:
            raise self.error(f"lacks its part '{part}'. Download or copy it again.")
        return self.keys[part]

    def error(self, text: str) -> FormatError:
        """That names the file and the module."""
        return FormatError(f"{self.source.path}: {self.module} {text}")


class Kind(Protocol):
    """One way of writing an update. A registry lists them all; a module of a file is of one."""

    @property
    def name(self) -> str:
        """As trainers call it."""
        ...

    @property
    def parts(self) -> frozenset[str]:
        """Those that only this kind has."""
        ...

    def shape(self, parts: Parts) -> tuple[int, ...]:
        """(out, in, *kernel) of the weight, told by headers alone; checks that the parts fit."""
        ...

    def product_rank(self, parts: Parts) -> int | None:
        """The rank of the product that `delta` gives, told by headers; None where it gives a whole matrix."""
        ...

    def delta(self, parts: Parts) -> Delta:
        """The update with its scale, kernels flattened into the inputs."""
        ...


def scaled(a: Tensor, b: Tensor, scale: float) -> Product:
    """scale * b a of a [r, in] and b [out, r] -> [out, in]."""
    return Product(a, b if scale == 1.0 else b * scale)
