"""Tables of labels and of pictures: CSV files with a header line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DataError, FormatError
from .text import finite_number, read_csv


@dataclass(frozen=True, eq=False)
class LabelTable:
    """n lines of A labels each: what the first column says, and the names of the others."""

    path: Path
    keys: tuple[str, ...]  # of the first column
    names: tuple[str, ...]  # of the labels
    values: Tensor  # [n, A]

    def of(self, *keys: str) -> Tensor:
        """Labels [A] of the first of these keys that has a line; raises DataError if none has."""
        line = {key: i for i, key in enumerate(self.keys)}
        found = next((line[key] for key in keys if key in line), None)
        if found is None:
            raise DataError(f"{self.path} has no line for {keys[0]}.")
        return self.values[found]


def read_labels(path: str | os.PathLike[str]) -> LabelTable:
    """A table whose first column names somebody and whose others are numbers.

    Raises FormatError for any other table, naming the line.
    """
    path = Path(path)
    table = read_csv(path)
    if len(table) < 2 or len(table[0]) < 2:
        raise FormatError(f"{path} needs a header line and a column of names before the labels.")
    header, lines = table[0], table[1:]
    values = [
        [finite_number(value, f"{path}, line {i}: the labels of {line[0]}") for value in line[1:]]
        for i, line in enumerate(lines, 2)
    ]
    for i, (line, row) in enumerate(zip(lines, values), 2):
        if len(row) != len(header) - 1:
            raise FormatError(
                f"{path}, line {i}: {line[0]} has {len(row)} labels, the header {len(header) - 1}."
            )
    keys = tuple(line[0] for line in lines)
    return LabelTable(path, keys, tuple(header[1:]), torch.tensor(values))


def picture_lines(
    path: str | os.PathLike[str], columns: tuple[str, ...]
) -> Iterator[tuple[str, Path, list[str]]]:
    """(where, picture, other fields) of each line of a table whose header begins with these columns.

    The first column is a picture's path, relative to the table. Pictures are looked for and not opened.

    Raises FormatError for another header or line, DataError for a picture that is not there.
    """
    path, lines = Path(path), read_csv(path)
    if len(lines) < 2 or tuple(lines[0][: len(columns)]) != columns:
        got = ",".join(lines[0][: len(columns) + 1]) if lines else "an empty file"
        raise FormatError(
            f"{path} needs a header that starts with '{','.join(columns)}' and a line for each picture. Got {got!r}."
        )
    for i, line in enumerate(lines[1:], 2):
        where = f"{path}, line {i}"
        if len(line) != len(lines[0]):
            raise FormatError(f"{where}: {len(line)} fields, the header has {len(lines[0])}.")
        picture = path.parent / line[0]
        if not picture.is_file():
            raise DataError(f"{where}: there is no picture {line[0]!r}.")
        yield where, picture, line[1:]
