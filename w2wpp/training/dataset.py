"""Data sets of LoRA vectors: one safetensors file, read in chunks of rows.

metadata   format "w2wpp.dataset", format_version "1", config (JSON: layout, label_names,
provenance) vectors    [N, P] single or half precision identity   [N] int64, the person a row belongs to;
several rows may share one heldout    [N] bool, rows kept out of every fit labels     [N, A] single
precision, optional vectors.kept_energy    [N] single precision, optional: the share of its update's
energy that a row kept in the layout's rank
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..arrays import is_finite
from ..errors import ConfigError, DataError, ResourceError, reading
from ..files.container import (
    Streamed,
    open_container,
    partial_of,
    write_container,
    write_resumably,
)
from ..lora.layout import Layout

FORMAT = "w2wpp.dataset"
KEPT = "vectors.kept_energy"  # behind "vectors", because tensors are written in the order of their names
RowsFrom = Callable[[int], Iterator[Tensor]]  # chunks [n, P] from a row on
CHUNK_BYTES = 128 << 20  # of single-precision vectors held at a time
READ_BYTES = 16 << 20  # of them read at a time, into memory that is used again and again
PRECISIONS = {"single": torch.float32, "half": torch.float16}  # of vectors in files


class Rows(Protocol):
    """Where vectors are read from: a file, or anything else that has rows called "vectors"."""

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop: [stop - start, P]."""
        ...

    def read_columns(self, name: str, rows: Sequence[int], start: int, stop: int) -> Tensor:
        """Some columns of some rows: [rows, stop - start]."""
        ...


@dataclass(frozen=True, eq=False)
class VectorDataset:
    """Vectors [N, P] in memory or in a file, with one person id, one held-out flag and labels per row."""

    layout: Layout
    source: Tensor | Rows
    identity: Tensor  # [N] int64
    heldout: Tensor  # [N] bool
    labels: Tensor | None = None  # [N, A]
    label_names: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.identity)
        shapes = (
            [list(self.heldout.shape), [n]]
            if self.labels is None
            else [
                [*self.heldout.shape, *self.labels.shape],
                [n, n, len(self.label_names)],
            ]
        )
        if shapes[0] != shapes[1]:
            raise DataError(
                f"A data set of {n} rows has flags and labels of other sizes: {shapes[0]}."
            )
        check_holdout(self.identity, self.heldout)

    def __len__(self) -> int:
        """N."""
        return len(self.identity)

    @property
    def training_rows(self) -> Tensor:
        """Row numbers [n] of people to learn from."""
        return torch.nonzero(~self.heldout).flatten()

    @property
    def heldout_rows(self) -> Tensor:
        """Row numbers [n] of people who only measure."""
        return torch.nonzero(self.heldout).flatten()

    def vectors(
        self, rows: Tensor | Sequence[int] | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """w [n, P] of some rows in the order asked for, or of all; written to ``out`` [n, P] if that is given."""
        wanted = torch.arange(len(self)) if rows is None else torch.as_tensor(rows).long()
        if isinstance(self.source, Tensor):
            found = self.source[wanted].float()
            return found if out is None else out.copy_(found)
        if out is None:
            out = torch.empty(len(wanted), self.layout.size)
        at_once = max(1, READ_BYTES // (4 * self.layout.size))
        for i, (first, last) in _runs(wanted):
            for start in range(first, last, at_once):
                stop = min(start + at_once, last)
                where = slice(i + start - first, i + stop - first)
                out[where] = self.source.read_rows("vectors", start, stop)
        return out

    def columns(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """Columns start to stop of some rows, w [n, stop - start]."""
        if isinstance(self.source, Tensor):
            return self.source[rows, start:stop].float()
        return self.source.read_columns("vectors", rows.tolist(), start, stop).float()

    def chunks(
        self, rows: Tensor | None = None, *, buffers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(row numbers [n], w [n, P]) a bounded number of bytes at a time.

        With ``buffers`` so many chunks live at a time: each is overwritten that many chunks later. Fresh memory for
        every chunk costs more than reading it, because the system hands it out page by page.
        """
        wanted = torch.arange(len(self)) if rows is None else rows
        per_chunk = min(max(1, CHUNK_BYTES // (4 * self.layout.size)), max(1, len(wanted)))
        kept = [torch.empty(per_chunk, self.layout.size) for _ in range(buffers)]
        for i, part in enumerate(wanted.split(per_chunk)):
            out = kept[i % buffers][: len(part)] if kept else None
            yield part, self.vectors(part, out=out)


def load_dataset(path: str | os.PathLike[str]) -> VectorDataset:
    """Open a data set; the vectors stay in the file."""
    file = open_container(path, FORMAT)
    with reading(f"{path}: the configuration of this data set"):
        layout = Layout.from_json(file.config["layout"])
        names = tuple(str(n) for n in file.config.get("label_names", ()))
        provenance = dict(file.config.get("provenance", {}))
    n = file.require("vectors", (None, layout.size), *PRECISIONS.values()).shape[0]
    file.require("identity", (n,), torch.int64)
    file.require("heldout", (n,), torch.bool)
    labels = None
    if "labels" in file:
        file.require("labels", (n, len(names)), torch.float32)
        labels = file.read("labels")
    return VectorDataset(
        layout,
        file,
        file.read("identity"),
        file.read("heldout"),
        labels,
        names,
        provenance,
    )


def write_dataset(
    path: str | os.PathLike[str],
    vectors: Tensor | Iterable[Tensor] | RowsFrom,
    layout: Layout,
    identity: Tensor,
    *,
    heldout: Tensor | None = None,
    labels: Tensor | None = None,
    label_names: Sequence[str] = (),
    kept: Iterable[Tensor] | None = None,
    provenance: Mapping[str, Any] | None = None,
    precision: str = "single",
) -> VectorDataset:
    """Write vectors [N, P], or chunks [n, P] of them that add up to N, and open the result.

    Given as a function, `vectors(start)` yields chunks from row `start` on; then a write that was
    killed is taken up where it stood. `kept` are chunks of the share of its energy that every row
    kept on its way in, [N]; they are asked for once the vectors are through. Precision is "single"
    or "half".

    Raises ConfigError for an unknown precision, DataError for labels of another size, and what `check_holdout`
    raises.
    """
    if precision not in PRECISIONS:
        raise ConfigError(
            f"Vectors are kept in {' or '.join(PRECISIONS)} precision. Got {precision!r}."
        )
    n = len(identity)
    heldout = torch.zeros(n, dtype=torch.bool) if heldout is None else heldout.bool()
    check_holdout(identity, heldout)
    if labels is not None and list(labels.shape) != [n, len(label_names)]:
        raise DataError(f"Labels must be [{n}, {len(label_names)}]. Got {list(labels.shape)}.")
    dtype = PRECISIONS[precision]
    check_room(path, n * layout.size * dtype.itemsize)

    def chunks(start: int) -> Iterator[Tensor]:
        given = vectors(start) if callable(vectors) else vectors
        for chunk in (given,) if isinstance(given, Tensor) else given:
            yield _checked(chunk, layout.size, dtype)

    tensors: dict[str, Tensor | Streamed] = {
        "vectors": Streamed(dtype, (n, layout.size), () if callable(vectors) else chunks(0)),
        "identity": identity.long(),
        "heldout": heldout,
    }
    if labels is not None:
        tensors["labels"] = labels.float()
    if kept is not None:
        tensors[KEPT] = Streamed(torch.float32, (n,), kept)
    config = {
        "layout": layout.to_json(),
        "label_names": list(label_names),
        "provenance": dict(provenance or {}),
    }
    if callable(vectors):
        write_resumably(path, tensors, "vectors", chunks, format=FORMAT, config=config)
    else:
        write_container(Path(path), tensors, format=FORMAT, config=config)
    return load_dataset(path)


def check_room(path: str | os.PathLike[str], size: int) -> None:
    """Before hours of work: whether a file of so many bytes has room beside what is there of it.

    Raises ResourceError if not.
    """
    folder = Path(path).absolute().parent
    while not folder.exists():
        folder = folder.parent
    partial = partial_of(path)
    there = partial.stat().st_size if partial.exists() else 0
    free = shutil.disk_usage(folder).free + there
    if size > free:
        raise ResourceError(
            f"{path} will have {size / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB free. Write it to another "
            "disk, make room, or keep it in half precision (--half)."
        )


def holdout_by_identity(identity: Tensor, fraction: float, *, generator: torch.Generator) -> Tensor:
    """[N] bool: all rows of a random share of the persons. Never rows of one person on both sides.

    Raises ConfigError for a share outside [0, 1), DataError where nobody would be left.
    """
    people = identity.unique()
    if not 0 <= fraction < 1:
        raise ConfigError(f"The share of persons to hold out lies in [0, 1). Got {fraction}.")
    count = round(fraction * len(people))
    if not 0 <= count < len(people):
        raise DataError(
            f"Holding out {fraction:.0%} of {len(people)} persons leaves none to learn from."
        )
    chosen = people[torch.randperm(len(people), generator=generator)[:count]]
    return torch.isin(identity, chosen)


def check_holdout(identity: Tensor, heldout: Tensor) -> None:
    """A person on both sides of the split would make every held-out figure a lie.

    Raises DataError for such a person.
    """
    both = set(identity[heldout].tolist()) & set(identity[~heldout].tolist())
    if both:
        raise DataError(
            f"{len(both)} persons are both held out and trained on (first: {min(both)}). "
            "Split by identity, not by row."
        )


def _checked(chunk: Tensor, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    if chunk.ndim != 2 or chunk.shape[1] != size:
        raise DataError(f"Vectors of this layout are [n, {size}]. Got {list(chunk.shape)}.")
    if not is_finite(chunk):
        raise DataError("The vectors hold NaN or infinite numbers; a LoRA's training diverged.")
    if dtype == torch.float16 and bool((chunk.abs() > 65504).any()):
        raise DataError(
            "The vectors hold numbers above 65,504, too large for half precision; keep them in single precision."
        )
    return chunk


def _runs(rows: Tensor) -> Iterator[tuple[int, tuple[int, int]]]:
    """(position, (start, stop)) of consecutive rows, so that a file is read in few strokes."""
    numbers = rows.tolist()
    first = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield first, (numbers[first], numbers[i - 1] + 1)
            first = i


T = TypeVar("T")


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each made by a thread while the one before is worked on."""
    iterator = iter(items)
    end = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, iterator, end)
            yield item  # type: ignore[misc]
