"""The layout that LoRA files of one training have, read from one of them."""

from __future__ import annotations

import os

from ..errors import LayoutMismatch
from .families import UNKNOWN, Shape, recognise
from .files import load_lora
from .layout import SD15, Layout, Module


def layout_of_file(path: str | os.PathLike[str], base_model: str = "") -> Layout:
    """The layout of a LoRA file: its modules sorted by name, with their rank and alpha.

    Raises LayoutMismatch for a file whose modules are of several ranks or alphas, or no plain LoRAs. The base model is
    told by the modules where they tell it, and else as it is given.
    """
    file = load_lora(path)
    lora = file.lora
    kinds = {(len(a), file.alphas[name]) for name, (a, _) in lora.items()}
    if len(kinds) != 1 or len(lora) != len(file.updates):
        raise LayoutMismatch(
            f"{path} does not have plain LoRAs of one rank and one alpha in all of its {len(file.updates)} modules, so "
            "that its numbers are no coordinates. W2W++ Space from LoRAs takes such files."
        )
    ((rank, alpha),) = kinds
    modules = tuple(Module(n, a.shape[1], len(b)) for n, (a, b) in sorted(lora.items()))
    if (modules, rank, alpha) == (SD15.modules, SD15.rank, SD15.alpha):
        return SD15
    family = recognise({m.name: Shape(m.in_features, m.out_features) for m in modules})
    if family == UNKNOWN:
        family = base_model or UNKNOWN
    return Layout(family, family, modules, rank, alpha)
