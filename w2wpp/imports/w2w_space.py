"""A space file from official weights2weights files, written without ever holding V."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..basis import Basis
from ..codecs import build_codec
from ..errors import DataError, FormatError
from ..files.container import Container, Streamed, partial_of, write_resumably
from ..files.tables import LabelTable, read_labels
from ..files.text import read_csv
from ..files.torchfile import ADVICE
from ..lora.layout import Layout
from ..space import compact
from ..spacefile import FORMAT, file_fingerprint
from ..training.coefficients import Coefficients
from ..training.dataset import holdout_by_identity
from ..training.directions import Directions, Moments, fit_from_moments, report
from .w2w import Progress, W2WFolder, provenance


def write_w2w_space(
    source: W2WFolder,
    path: str | os.PathLike[str],
    *,
    name: str,
    directions: Directions | None = None,
    progress: Progress = lambda done, of: None,
) -> dict[str, Any]:
    """Write the linear space; returns its configuration.

    The fingerprint stands in the header, before the numbers that it is made of, and is put in last. What was written
    stays in `path.partial` if `progress(components done, all)` raises or the process is killed, and is taken up by the
    next call for the same files.
    """
    facts = provenance(source, name)
    if directions is not None:
        facts["directions"] = dict(report(directions, True))
    config = {**_architecture(source), "provenance": facts, "fingerprint": "0" * 32}

    def seal(file: Container) -> dict[str, Any]:
        config["fingerprint"] = file_fingerprint(file)
        return config

    tensors, last = _tensors(source, directions), "basis.components"
    try:
        write_resumably(
            path,
            tensors,
            last,
            lambda start: source.chunks(start, progress),
            format=FORMAT,
            config=config,
            seal=seal,
        )
    except FormatError:  # of the source: there is nothing to take up
        partial_of(path).unlink(missing_ok=True)
        raise
    return config


def space_size(source: W2WFolder) -> int:
    """Bytes that a space of these files takes on the disk, but for its header."""
    tensors = _tensors(source, None).values()
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors)


def w2w_basis(source: W2WFolder, progress: Progress = lambda done, of: None) -> Basis:
    """The basis in memory (in half precision), for training."""
    components = torch.cat(list(source.chunks(0, progress)))
    return Basis(source.mean, source.std, components, source.scale)


def w2w_coefficients(source: W2WFolder) -> Coefficients:
    """Whitened coefficients [N, K] of the real identities, which is all that training needs.

    The files say nothing of single persons, so every row counts as one. What lies outside of the
    components is known on average only: standardised parameters have variance 1 each.

    Raises FormatError without proj_1000pc.pt, DataError for more components than it holds.
    """
    matrix = source.coefficients
    if matrix is None:
        raise FormatError(
            f"{source.folder} has no proj_1000pc.pt, the coefficients that a space is trained on. "
            "Download it beside V.pt."
        )
    if source.components > matrix.shape[1]:
        raise DataError(
            f"proj_1000pc.pt holds {matrix.shape[1]} components; train on at most so many "
            f"(--components). Got {source.components}."
        )
    values = torch.empty(matrix.shape[0], source.components)
    for rows, k in matrix.rows(source.components):
        values[rows] = k.float() / source.scale
    varying = int((source.std != 0).sum())
    rest = max(0.0, varying - float(source.scale.double().square().sum()))
    n = len(values)
    facts = {"source": "official weights2weights files", "rows": n, "prior": source.prior}
    return Coefficients(
        source.layout,
        values,
        torch.full((n,), rest),
        torch.arange(n),
        torch.zeros(n, dtype=torch.bool),
        facts,
    )


def w2w_directions(
    source: W2WFolder,
    labels: str | os.PathLike[str],
    *,
    only: Sequence[str] | None = None,
    against: Sequence[str] | None = None,
) -> Directions:
    """Directions from a table with a line for every row of proj_1000pc.pt, in the same order.

    Raises FormatError without proj_1000pc.pt or for another table, DataError for a column that is not there.
    """
    matrix = source.coefficients
    if matrix is None:
        raise FormatError(
            f"{source.folder} has no proj_1000pc.pt; without coefficients of labelled people there "
            "are no edit directions. Download it beside V.pt, or leave out --labels."
        )
    found_labels = _labels(labels, matrix.shape[0])
    table, names = found_labels.values, found_labels.names
    if only is not None:
        missing = [name for name in only if name not in names]
        if missing:
            raise DataError(f"{labels} has no column {missing[0]}; it has {', '.join(names)}.")
        table, names = table[:, [names.index(name) for name in only]], tuple(only)
    known = min(source.components, matrix.shape[1])
    sums = Moments(known, len(names))
    scale = source.scale[:known]
    for rows, k in matrix.rows(known):
        sums.add((k.float() - source.center[:known]) / scale, table[rows])
    found = fit_from_moments(sums, names, against=against)
    wide = torch.nn.functional.pad(found.vectors, (0, source.components - known))
    return Directions(found.names, wide, found.r2, found.own)


def _labels(path: str | os.PathLike[str], rows: int) -> LabelTable:
    """A table with a line for each of the rows."""
    path = Path(path)
    if path.suffix == ".pt":
        raise FormatError(f"{path} is not read as a table. {ADVICE['identity_df.pt']}")
    table = read_labels(path)
    if len(table.keys) != rows:
        raise FormatError(
            f"{path} has {len(table.keys)} lines, proj_1000pc.pt {rows} rows; they must be the same "
            "people in the same order."
        )
    return table


PERSON = ("identity", "person", "identity_id", "person_id", "celeb_id", "celebrity")  # columns


def read_people(path: str | os.PathLike[str], rows: int) -> Tensor | None:
    """Which person each row [N] is, from a table with a line a row: by a column that is called
    identity or person, or else by its first column, if names repeat there. None: the table does not say.

    Raises FormatError for a table of other rows, or a line without a person.
    """
    table = read_csv(path)
    if len(table) - 1 != rows:
        raise FormatError(
            f"{path} has {max(0, len(table) - 1)} lines, proj_1000pc.pt {rows} rows; they must be the "
            "same people in the same order."
        )
    header = [name.strip().lower() for name in table[0]]
    named = [header.index(name) for name in PERSON if name in header]
    column = named[0] if named else 0
    if any(len(line) <= column for line in table[1:]):
        raise FormatError(f"{path}: not every line names its person.")
    names = [line[column].strip() for line in table[1:]]
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    if not named and len(number) == rows:
        return None
    return torch.tensor([number[name] for name in names])


def hold_out(
    c: Coefficients, share: float, *, labels: str | os.PathLike[str] | None = None, seed: int = 0
) -> tuple[Coefficients, dict[str, Any]]:
    """A share of the persons behind official files kept out of what is trained on, and how they were told
    apart. The basis itself was made from all of them."""
    people = None if labels is None else read_people(labels, len(c.values))
    identity = c.identity if people is None else people
    generator = torch.Generator().manual_seed(seed)
    heldout = holdout_by_identity(identity, share, generator=generator)
    by = "row" if people is None else "identity"
    how = {"by": by, "share": share, "rows": int(heldout.sum())}
    facts = {**c.provenance, "heldout": how}
    return replace(c, identity=identity, heldout=heldout, provenance=facts), how


def _architecture(source: W2WFolder) -> dict[str, Any]:
    k = source.components
    with torch.device("meta"):
        codec = build_codec({"name": "pca", "coefficient_size": k, "latent_size": k})
    layout: Layout = source.layout
    basis = {"kind": Basis.kind, "size": layout.size, "rank": k}
    return {"layout": layout.to_json(), "basis": basis, "codec": codec.config}


def _tensors(source: W2WFolder, directions: Directions | None) -> dict[str, Tensor | Streamed]:
    shape = (source.components, source.layout.size)
    tensors: dict[str, Tensor | Streamed] = {
        "basis.mean": compact(source.mean),
        "basis.std": compact(source.std),
        "basis.singular_values": compact(source.scale),
        "basis.components": Streamed(torch.float16, shape, source.chunks()),
        "prior.mean": compact(source.center / source.scale),
        "prior.std": compact(torch.ones(source.components)),
    }
    for name, vector in _named(directions):
        tensors[f"direction.{name}"] = compact(vector)
    return tensors


def _named(directions: Directions | None) -> Iterator[tuple[str, Tensor]]:
    if directions is not None:
        yield from directions.as_mapping().items()
