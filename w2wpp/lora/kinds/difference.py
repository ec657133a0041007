"""The whole difference of a weight, as ComfyUI's Extract and Save Lora and LyCORIS' full training write it."""

from __future__ import annotations

from ..products import Dense
from .parts import Parts


class Difference:
    """W' - W itself."""

    name = "full difference"
    parts = frozenset({"diff"})

    def shape(self, parts: Parts) -> tuple[int, ...]:
        found = parts.shape("diff")
        return (*found[:2], *(found[2:] if any(n != 1 for n in found[2:]) else ()))

    def product_rank(self, parts: Parts) -> None:
        return None

    def delta(self, parts: Parts) -> Dense:
        return Dense(parts.matrix("diff"))
