"""The table of pictures that are compared: CSV with the columns `picture`, `person`, `kind`, and more if wanted.

A person's name stands in every line of theirs; the kind is `photograph` or `painting`. `confidence` is what the
inversion said of a painting's person. `left`, `top`, `right`, `bottom` are the box of the face in pixels, as a face
detector gives it, for pictures that are not cropped.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError, FormatError
from ..files.tables import picture_lines
from ..files.text import finite_number, read_csv

COLUMNS = ("picture", "person", "kind")
PHOTOGRAPH, PAINTING = KINDS = ("photograph", "painting")
BOX = ("left", "top", "right", "bottom")
MORE = ("confidence", *BOX)


@dataclass(frozen=True)
class Entry:
    """A picture of somebody."""

    key: str  # the picture's path from the table
    picture: Path
    person: str
    kind: str
    confidence: float = math.nan
    box: tuple[float, float, float, float] | None = None  # of the face, in pixels


def read_entries(path: str | os.PathLike[str]) -> list[Entry]:
    """The lines of a table. Raises FormatError or DataError naming the line, or what the table lacks."""
    path = Path(path)
    lines = list(picture_lines(path, COLUMNS))
    names = read_csv(path)[0]
    unknown = sorted(set(names[len(COLUMNS) :]) - set(MORE))
    if unknown or len(set(names)) < len(names):
        raise FormatError(
            f"{path}: the columns beside {', '.join(COLUMNS)} are {', '.join(MORE)}, each once. Got {', '.join(names)}."
        )
    if 0 < len(set(BOX) & set(names)) < len(BOX):
        raise FormatError(f"{path}: the box of a face has the columns {', '.join(BOX)}, or none.")
    found = [_entry(path, names, *line) for line in lines]
    whole = {kind: {e.person for e in found if e.kind == kind} for kind in KINDS}
    if lonely := sorted(whole[PAINTING] ^ whole[PHOTOGRAPH]):
        lacks = PAINTING if lonely[0] in whole[PHOTOGRAPH] else PHOTOGRAPH
        raise DataError(
            f"{path}: everybody has photographs and paintings; {lonely[0]!r} has no {lacks}"
            + (f", and {len(lonely) - 1} others lack one kind" if len(lonely) > 1 else "")
            + "."
        )
    return found


def _entry(path: Path, names: list[str], where: str, picture: Path, fields: list[str]) -> Entry:
    person, kind, *rest = fields
    if not person or kind not in KINDS:
        raise DataError(
            f"{where}: a picture has a person and is a {' or a '.join(KINDS)}. Got {person!r}, {kind!r}."
        )
    given = {name: value for name, value in zip(names[len(COLUMNS) :], rest) if value.strip()}
    numbers = {name: finite_number(value, f"{where}, {name}") for name, value in given.items()}
    sides = [numbers[name] for name in BOX if name in numbers]
    if len(sides) not in (0, len(BOX)):
        raise DataError(f"{where}: a box has four sides. Got {len(sides)}.")
    box = None
    if sides:
        left, top, right, bottom = box = (sides[0], sides[1], sides[2], sides[3])
        if left >= right or top >= bottom:
            raise DataError(f"{where}: the box of a face is empty: {box}.")
    key = os.path.relpath(picture, path.parent).replace(os.sep, "/")
    return Entry(key, picture, person, kind, numbers.get("confidence", math.nan), box)
