"""`w2wpp fit-start`: pictures of people whose LoRAs are known, and of others, to a start network in a space file.

The table is a CSV file. Its columns `picture` (a path, relative to the table) and `person` (the LoRA file that shows
the same person, by name or stem; may be empty) come first; all others are labels: traits, or any embedding of the
face. A picture without a person needs labels. Without label columns the network learns the latents themselves, from
the people who have a LoRA.

Pictures painted with identities of the space (`--painted`, columns `picture`, `identity`, `index`) correct the answers
by how strongly latents show; without them, `--scale` can lengthen answers by hand. Without a table the network learns
from such paintings alone: no labels, no photographs (`fit_paintings`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, DataError
from ..files.pictures import square_picture
from ..files.tables import picture_lines
from ..files.text import finite_number
from ..identity import load_identity, require_same_space
from ..metrics import pooled_r2
from ..space import Space
from ..spacefile import load_space, save_start
from ..start_network import StartNetwork
from .compute import Compute
from .dataset import VectorDataset, load_dataset
from .directions import encode_rows
from .fit_paintings import PaintedPeople, PaintingsTraining, fit_paintings
from .fit_start import (
    LabelMap,
    StartTraining,
    picture_bank,
    shrinkage,
    start_from_reader,
    to_bank,
    train_reader,
)
from .gather import name_hash, row_numbers

COLUMNS = ("picture", "person")
LEAST_READ = 0.3  # slope below which a reader is too poor for its answers to be stretched
PAINTED = ("picture", "identity", "index")


@dataclass(frozen=True, eq=False)
class PictureTable:
    """n pictures, the data set's row that shows the same person (-1: none), and L labels of each."""

    pictures: tuple[Path, ...]
    row: Tensor  # [n] int64
    labels: Tensor | None  # [n, L]


@dataclass(frozen=True, eq=False)
class Paintings:
    """n pictures, and the latent that each was painted with."""

    pictures: tuple[Path, ...]
    z: Tensor  # [n, d]


def fit_start_table(
    space_path: str | os.PathLike[str],
    table_path: str | os.PathLike[str],
    data_path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    config: StartTraining,
    painted: str | os.PathLike[str] | None = None,
    scale: float = 1.0,
    compute: Compute | None = None,
    callback: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train a start network and write it into a copy of a space file, or into the file itself.

    Returns what was learned from, and how well held-out pictures are answered if there are any.

    Raises DataError for tables that do not fit the space, ConfigError for a scale of zero.
    """
    if not scale > 0:
        raise ConfigError(f"The scale is positive. Got {scale:g}.")
    space, dataset = load_space(space_path), load_dataset(data_path)
    table = read_table(Path(table_path), dataset)
    paintings = read_painted(Path(painted), space) if painted else None
    z = encode_rows(space, dataset)  # [N, d]
    known = ~dataset.heldout  # [N]
    labels, of_row = _labels(table, z)
    seen = (table.row < 0) | known[table.row]
    with_lora = torch.nonzero(known & _shown(table, len(z))).flatten()
    if len(with_lora) < 2:
        raise DataError(
            f"{table_path} shows {len(with_lora)} of the people who may be learned from; a start network needs more, "
            "hundreds if possible."
        )
    middle, std = labels[seen].mean(0), labels[seen].std(0)
    if not bool((std > 1e-9).all()):
        raise DataError(f"{table_path}: a label is the same for everybody; leave it out.")
    labels, of_row = (labels - middle) / std, (of_row - middle) / std
    bank = _bank(table.pictures, config.size)
    shown = None if paintings is None else _bank(paintings.pictures, config.size)
    pictures = picture_bank(bank[seen], labels[seen])
    reader = train_reader(pictures, labels.shape[1], config, compute=compute, callback=callback)
    answer = LabelMap.fit(of_row[with_lora], z[with_lora], penalty=config.penalty)
    if paintings is not None and shown is not None:
        answer = answer.calibrated(paintings.z, _answers(reader, shown))
    held = torch.nonzero(~seen).flatten()
    share = shrinkage(labels[held], _answers(reader, bank[held])) if len(held) else 1.0
    if share > LEAST_READ:
        answer = answer.stretched(share)
    start = start_from_reader(reader, answer, scale=scale)
    save_start(space_path, output, start)
    report: dict[str, Any] = {
        "pictures": len(table.pictures),
        "people_with_lora": len(with_lora),
        "labels": 0 if table.labels is None else labels.shape[1],
        "paintings": 0 if paintings is None else len(paintings.pictures),
        "training": asdict(config),
    }
    if len(held):
        answers, truth = _answers(start, bank[held]), z[table.row[held]]
        report |= {
            "reader_slope": round(share, 4),
            "heldout_pictures": len(held),
            "heldout_latent_r2": round(pooled_r2(truth, answers, z[known].mean(0)), 4),
            "heldout_cosine": round(float(F.cosine_similarity(truth, answers).mean()), 4),
        }
    return report


def fit_start_paintings(
    space_path: str | os.PathLike[str],
    painted: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    config: PaintingsTraining,
    compute: Compute | None = None,
    callback: Callable[[int, int, str], None] = lambda done, of, line: None,
) -> dict[str, Any]:
    """Train a start network from paintings of the space's own identities alone, into a copy of a space file or itself.

    Of everybody as many paintings count as there are of the person with the fewest. Returns what was learned from, and
    how well people are answered whose paintings were kept apart.
    """
    space = load_space(space_path)
    people = painted_people(painted, space, config.size)
    start, frame, report = fit_paintings(people, config, compute=compute, callback=callback)
    save_start(space_path, output, start, frame=frame)
    return report


def painted_people(painted: str | os.PathLike[str], space: Space, size: int) -> PaintedPeople:
    """The paintings of a table by person, `size` pixels per side; of everybody as many as of who has fewest."""
    paintings = read_painted(Path(painted), space)
    rows: dict[bytes, list[int]] = {}
    for i, z in enumerate(paintings.z):
        rows.setdefault(z.numpy().tobytes(), []).append(i)
    fewest = min(map(len, rows.values()))
    chosen = [i for own in rows.values() for i in own[:fewest]]
    bank = _bank([paintings.pictures[i] for i in chosen], size)
    firsts = torch.tensor([own[0] for own in rows.values()])
    return PaintedPeople(paintings.z[firsts], bank.unflatten(0, (len(rows), fewest)))


def read_table(path: Path, dataset: VectorDataset) -> PictureTable:
    """Check everything that can be checked before a picture is opened. Raises DataError naming the line."""
    number = row_numbers(dataset.provenance, len(dataset))
    pictures, rows, values = [], [], []
    for where, picture, (person, *labels) in picture_lines(path, COLUMNS):
        row = _row_of(person, number)
        if person and row < 0:
            raise DataError(
                f"{where}: the data set has no LoRA {person!r}. Leave the person empty if there is none."
            )
        if not person and not labels:
            raise DataError(f"{where}: a picture without a person needs labels.")
        values.append([finite_number(v, where) for v in labels])
        pictures.append(picture)
        rows.append(row)
    found = torch.tensor(values)
    return PictureTable(tuple(pictures), torch.tensor(rows), found if found.shape[1] else None)


def read_painted(path: Path, space: Space) -> Paintings:
    """Paintings of identities of the space. Raises DataError naming the line."""
    pictures, z, files = [], [], {}
    for where, picture, (name, index, *_) in picture_lines(path, PAINTED):
        if name not in files:
            files[name] = load_identity(path.parent / name)
            require_same_space(files[name].space_fingerprint, space.fingerprint, space.name)
        if not index.isdecimal() or int(index) >= len(files[name]):
            raise DataError(f"{where}: {name} holds {len(files[name])} identities. Got {index!r}.")
        pictures.append(picture)
        z.append(files[name].z[int(index)])
    return Paintings(tuple(pictures), torch.stack(z))


def _bank(pictures: Sequence[Path], size: int) -> Tensor:
    return torch.cat([to_bank(square_picture(path, size)) for path in pictures])


@torch.no_grad()
def _answers(network: StartNetwork, bank: Tensor) -> Tensor:
    return torch.cat([network(part.float() / 127) for part in bank.split(256)])


def _labels(table: PictureTable, z: Tensor) -> tuple[Tensor, Tensor]:
    """Labels of every picture [n, L], and of every row of the data set [N, L] as its pictures have them on average."""
    if table.labels is None:
        return z[table.row], z
    known = table.row >= 0
    rows, labels = table.row[known], table.labels[known]
    sums = torch.zeros(len(z), labels.shape[1]).index_add_(0, rows, labels)
    times = torch.bincount(rows, minlength=len(z))[:, None].clamp_min(1)
    return table.labels, sums / times


def _shown(table: PictureTable, count: int) -> Tensor:
    """Which rows of the data set [N] have a picture."""
    return torch.bincount(table.row[table.row >= 0], minlength=count) > 0


def _row_of(person: str, number: Mapping[str, int]) -> int:
    """The row of the LoRA that a table calls by its name or its stem; -1 if there is none."""
    if not person:
        return -1
    hashes = (name_hash(person), name_hash(Path(person).stem))
    return next((number[h] for h in hashes if h in number), -1)
