"""LoRA files that look alike, read at the speed of the disk.

One run of one trainer writes thousands of files with the same tensors in the same places. How one
of them becomes a vector is worked out by the reader of every kind of LoRA; for files of plain
factors that is a rearrangement of its numbers and a factor for each. It is found by showing that
reader a file of the same description whose numbers are their own places, held against the reader's
answer for the file itself, and used for the others. A file that differs in anything the reader
could look at is left to the reader.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import W2WError
from ..files.container import Container
from ..lora.files import lora_of_source
from ..lora.layout import Layout
from ..lora.source import ADAPTERS, InMemory

# Metadata that trainers write for every file anew, and that no reader looks at.
OF_ONE_FILE = frozenset(
    "sshs_model_hash sshs_legacy_hash ss_training_started_at ss_training_finished_at ss_session_id "
    "ss_output_name ss_training_comment ss_dataset_dirs ss_tag_frequency ss_datasets ss_seed "
    "ss_num_train_images ss_num_reg_images ss_steps ss_epoch modelspec.title modelspec.date "
    "modelspec.hash_sha256 modelspec.description".split()
)
MOST = 1 << 22  # numbers whose places single precision tells apart
TYPES = {torch.float32: np.float32, torch.float16: np.float16}


@dataclass(frozen=True, eq=False)
class Plan:
    """vector = numbers[places] * factors, for the numbers of one type that make up a file."""

    places: np.ndarray  # [P]
    factors: np.ndarray | None  # [P]; None: all one
    halves: np.ndarray  # where each module's A and B begin in a vector
    fixed: tuple[tuple[int, float], ...]  # (place, value) of alphas, which factors depend on

    def apply(self, numbers: np.ndarray) -> np.ndarray | None:
        """The vector [P]; None where a matrix is all zero or an alpha is another, which the reader must see."""
        if any(numbers[place] != value for place, value in self.fixed):
            return None
        w = numbers[self.places].astype(np.float32, copy=False)
        if self.factors is not None:
            w = w * self.factors
        sums = np.add.reduceat(np.abs(w), self.halves)
        return w if np.isfinite(sums).all() and (sums > 0).all() else None


def description(file: Container) -> str | None:
    """Everything about a file but its numbers that its reading may depend on; None: not for this module."""
    types = {entry.dtype for entry in file.entries.values()}
    if len(types) != 1 or not types <= TYPES.keys():
        return None
    entries = [(n, list(e.shape), e.start - _start(file)) for n, e in file.entries.items()]
    metadata = {k: v for k, v in file.metadata.items() if k not in OF_ONE_FILE}
    folder = file.path.parent
    config = folder / "adapter_config.json"
    beside = [config.read_bytes().hex()] if config.is_file() else []
    beside += [f"{n} {n == file.path.name}" for n in ADAPTERS if (folder / n).is_file()]
    return json.dumps([str(types.pop()), entries, sorted(metadata.items()), beside])


def numbers_of(file: Container) -> np.ndarray:
    """All numbers of a file of one type, in the order in which they are stored; read at once."""
    dtype = next(iter(file.entries.values())).dtype
    count = sum(e.stop - e.start for e in file.entries.values()) // dtype.itemsize
    numbers = np.empty(count, TYPES[dtype])
    file.file.read_into(_start(file), numbers.view(np.uint8).data)
    return numbers


def find_plan(file: Container, layout: Layout, expected: Tensor) -> Plan | None:
    """How files like this one become vectors; None unless it gives `expected` [P] for this one."""
    numbers = numbers_of(file)
    single = [_place(file, e) for e in file.entries.values() if math.prod(e.shape) == 1]
    alphas = tuple((place, float(numbers[place])) for place in single)
    ones = np.ones(len(numbers))
    probes = [_vector(file, layout, probe, alphas) for probe in (ones, np.cumsum(ones))]
    if any(p is None for p in probes) or len(numbers) >= MOST:
        return None
    factors, told = (p.double().numpy() for p in probes if p is not None)
    with np.errstate(divide="ignore", invalid="ignore"):
        places = np.rint(told / factors) - 1
    if not (np.isfinite(places).all() and (places >= 0).all() and (places < len(numbers)).all()):
        return None
    places, factors = places.astype(np.int64), factors.astype(np.float32)
    halves = [s.start for _, down, up in layout.slices() for s in (down, up)]
    same = bool((factors == 1).all())
    plan = Plan(places, None if same else factors, np.array(halves), alphas)
    w = plan.apply(numbers)
    if w is None or not np.allclose(w, expected.numpy(), rtol=3e-7, atol=0):
        return None
    return plan


def _vector(
    file: Container, layout: Layout, numbers: np.ndarray, alphas: tuple[tuple[int, float], ...]
) -> Tensor | None:
    """What the reader makes of a file like this one with other numbers."""
    numbers = numbers.astype(np.float32)
    for place, value in alphas:
        numbers[place] = value
    tensors = {}
    for name, entry in file.entries.items():
        place = _place(file, entry)
        part = torch.from_numpy(numbers[place : place + math.prod(entry.shape)])
        tensors[name] = part.reshape(entry.shape)
    try:
        source = InMemory(file.path, tensors, dict(file.metadata))
        return lora_of_source(source, layers=layout.layers).vector(layout)
    except W2WError:
        return None


def _start(file: Container) -> int:
    return min(entry.start for entry in file.entries.values())


def _place(file: Container, entry: Any) -> int:
    return (entry.start - _start(file)) // entry.dtype.itemsize
