"""`w2wpp dataset`: LoRA files to a data set of vectors."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..encode import aligned, vector_in
from ..errors import ConfigError, DataError
from ..files.tables import read_labels
from ..lora.files import load_lora
from ..lora.layout import Layout
from ..spacefile import load_space
from .dataset import VectorDataset, holdout_by_identity, write_dataset


def gather_loras(
    folders: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    layout: Layout,
    *,
    person_is: str = "file",
    heldout: float = 0.2,
    seed: int = 0,
    labels: str | os.PathLike[str] | None = None,
    gauge: str = "keep",
) -> VectorDataset:
    """Write the LoRA files in folders, sorted by path, as a data set.

    Each file is a person, or with ``person_is="folder"`` each folder; a share of the persons is held out. ``labels`` is
    a table by the file's name, its stem or its folder. ``gauge`` keeps the files' own, brings every LoRA, of any rank,
    into that of the "first", or into that of a space file.
    """
    paths = sorted(p for folder in folders for p in Path(folder).rglob("*.safetensors"))
    if not paths:
        raise DataError(f"No .safetensors files in {', '.join(map(str, folders))}.")
    persons = [str(p.parent if person_is == "folder" else p) for p in paths]
    number = {person: i for i, person in enumerate(dict.fromkeys(persons))}
    identity = torch.tensor([number[person] for person in persons])
    generator = torch.Generator().manual_seed(seed)
    read = _reader(paths, layout, gauge)
    table = read_labels(labels) if labels else None
    values = None
    if table is not None:
        values = torch.stack([table.of(p.name, p.stem, p.parent.name) for p in paths])
    return write_dataset(
        output,
        (read(path)[None] for path in paths),
        layout,
        identity,
        heldout=holdout_by_identity(identity, heldout, generator=generator),
        labels=values,
        label_names=table.names if table is not None else (),
        provenance={"files": [p.name for p in paths], "identity": person_is, "seed": seed},
    )


def _reader(paths: Sequence[Path], layout: Layout, gauge: str) -> Callable[[Path], Tensor]:
    """What reads the vector [P] of a file in the gauge asked for; opens what that needs, before anything is written."""
    if gauge == "keep":
        return lambda path: load_lora(path).vector(layout)
    if gauge == "first":
        first = aligned(load_lora(paths[0]), layout, None)
        return lambda path: aligned(load_lora(path), layout, first)
    space = load_space(gauge)
    if space.layout != layout:
        raise ConfigError(f"{gauge} has the layout '{space.layout.name}'; give it as --layout too.")
    return lambda path: vector_in(space, load_lora(path))
