"""`w2wpp fit-start`: pictures of people whose LoRAs are known, and of others, to a start network in a space file.

The table is a CSV file. Its columns `picture` (a path, relative to the table) and `person` (the LoRA file that shows
the same person, by name or stem; may be empty) come first; all others are labels: traits, or any embedding of the
face. A picture without a person needs labels. Without label columns the network learns the latents themselves, from
the people who have a LoRA.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, DataError, FormatError
from ..metrics import pooled_r2
from ..pictures import open_picture, pixels
from ..spacefile import load_space, save_space
from .dataset import VectorDataset, load_dataset
from .directions import encode_rows
from .fit_start import (
    StartTraining,
    picture_bank,
    start_from_reader,
    to_bank,
    train_reader,
)

COLUMNS = ["picture", "person"]


@dataclass(frozen=True, eq=False)
class PictureTable:
    """n pictures, the data set's row that shows the same person (-1: none), and L labels of each."""

    pictures: tuple[Path, ...]
    row: Tensor  # [n] int64
    labels: Tensor | None  # [n, L]


def register(verbs: Any) -> None:
    p = verbs.add_parser("fit-start", help="train the network that starts inversions in a space")
    p.add_argument("space", metavar="SPACE")
    p.add_argument("table", metavar="CSV", help="columns picture, person, and labels if there are")
    p.add_argument("--data", required=True, help="the data set of the LoRAs that the space is from")
    p.add_argument("--steps", type=int, default=StartTraining.steps)
    p.add_argument("--size", type=int, default=64, help="pictures are scaled to this (default 64)")
    p.add_argument("--width", type=int, default=StartTraining.width, help="channels")
    p.add_argument("--seed", type=int, default=StartTraining.seed)
    p.add_argument(
        "--scale", type=float, default=1.0, help="above 1: answers further from the mean person"
    )
    p.add_argument("-o", "--output", metavar="SPACE", help="default: into the file it came from")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    config = StartTraining(seed=args.seed, steps=args.steps, size=args.size, width=args.width)
    if not args.scale > 0:
        raise ConfigError(f"--scale is positive. Got {args.scale:g}.")
    space, dataset = load_space(args.space), load_dataset(args.data)
    table = read_table(Path(args.table), dataset)
    z = encode_rows(space, dataset)  # [N, d]
    known = torch.nonzero(~dataset.heldout).flatten()  # [n'] rows that may be learned from
    labels, of_row = _labels(table, z, len(dataset))
    seen = (table.row < 0) | torch.isin(table.row, known)
    with_lora = known[torch.isin(known, table.row)]
    if len(with_lora) < 2:
        raise DataError(
            f"{args.table} shows {len(with_lora)} of the people who may be learned from; a start network needs more, "
            "hundreds if possible."
        )
    middle, spread = labels[seen].mean(0), labels[seen].std(0)
    if not bool((spread > 1e-9).all()):
        raise DataError(f"{args.table}: a label is the same for everybody; leave it out.")
    bank = torch.cat([to_bank(read_picture(path, config.size)) for path in table.pictures])
    reader = train_reader(
        picture_bank(bank[seen], (labels[seen] - middle) / spread),
        labels.shape[1],
        config,
        callback=lambda line: print(line, file=sys.stderr, flush=True),
    )
    start = start_from_reader(
        reader,
        (of_row[with_lora] - middle) / spread,
        z[with_lora],
        penalty=config.penalty,
        scale=args.scale,
    )
    output = args.output or args.space
    save_space(replace(space, start=start), output)
    report = {
        "space": str(output),
        "pictures": len(table.pictures),
        "people_with_lora": len(with_lora),
        "labels": 0 if table.labels is None else labels.shape[1],
        "training": asdict(config),
    }
    held = torch.nonzero((table.row >= 0) & ~seen).flatten()
    if len(held):
        with torch.no_grad():
            answers = torch.cat([start(bank[part].float() / 127) for part in held.split(256)])
        truth = z[table.row[held]]
        report["heldout_pictures"] = len(held)
        report["heldout_latent_r2"] = round(pooled_r2(truth, answers, z[known].mean(0)), 4)
        report["heldout_cosine"] = round(float(F.cosine_similarity(truth, answers).mean()), 4)
    return report


def read_table(path: Path, dataset: VectorDataset) -> PictureTable:
    """Check everything that can be checked before a picture is opened."""
    with path.open(newline="", encoding="utf-8-sig") as f:
        lines = [line for line in csv.reader(f) if line]
    if not lines or lines[0][:2] != COLUMNS or len(lines) < 2:
        raise FormatError(
            f"{path} needs a header 'picture,person' (labels after it) and a line for each picture. Got "
            f"{','.join(lines[0][:4]) if lines else 'an empty file'!r}."
        )
    width = len(lines[0])
    number = _row_numbers(dataset)
    pictures, rows, values = [], [], []
    for i, line in enumerate(lines[1:], 2):
        if len(line) != width:
            raise FormatError(f"{path}, line {i}: {len(line)} fields, the header has {width}.")
        picture = path.parent / line[0]
        if not picture.is_file():
            raise DataError(f"{path}, line {i}: there is no picture {line[0]!r}.")
        if line[1] and line[1] not in number:
            raise DataError(
                f"{path}, line {i}: the data set has no LoRA {line[1]!r}. Leave the person empty if there is none."
            )
        if not line[1] and width == 2:
            raise DataError(f"{path}, line {i}: a picture without a person needs labels.")
        try:
            values.append([float(v) for v in line[2:]])
        except ValueError as e:
            raise FormatError(f"{path}, line {i}: the labels are not all numbers.") from e
        pictures.append(picture)
        rows.append(number[line[1]] if line[1] else -1)
    labels = torch.tensor(values) if width > 2 else None
    if labels is not None and not bool(torch.isfinite(labels).all()):
        raise DataError(f"{path}: the labels hold NaN or infinite numbers.")
    return PictureTable(tuple(pictures), torch.tensor(rows), labels)


def read_picture(path: Path, size: int) -> Tensor:
    """The middle square of a picture file, [1, 3, size, size] in [-1, 1]."""
    picture = open_picture(path)
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side)).resize((size, size))
    return pixels(square)


def _labels(table: PictureTable, z: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Labels of every picture [n, L], and of every row of the data set [N, L] as its pictures have them on average."""
    if table.labels is None:
        return z[table.row], z
    known = table.row >= 0
    rows, labels = table.row[known], table.labels[known]
    sums = torch.zeros(count, labels.shape[1]).index_add_(0, rows, labels)
    times = torch.bincount(rows, minlength=count)[:, None].clamp_min(1)
    return table.labels, sums / times


def _row_numbers(dataset: VectorDataset) -> Mapping[str, int]:
    """Rows of a data set by the name and by the stem of their LoRA files, by number where it names no files."""
    files = dataset.provenance.get("files", [str(i) for i in range(len(dataset))])
    stems = {Path(name).stem: i for i, name in enumerate(files)}
    return {**stems, **{name: i for i, name in enumerate(files)}}
