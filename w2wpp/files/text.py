"""Text that files carry: JSON and tables, as strict as the numbers that are read from them must be."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from typing import Any

from ..errors import FormatError
from .kinds import SEEN, kind_of_bytes
from .opened import OpenedFile

MOST_TEXT = 1 << 28  # bytes of a table or a JSON file
LARGEST = 3.4e38  # of single precision
DEEPEST = 64  # tables within tables; what is written here has about eight


def parse_json(text: str | bytes, what: str) -> Any:
    """JSON without NaN, infinities and half characters; `what` names it in messages.

    Raises FormatError for anything else.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        data = json.loads(text, parse_float=_finite, parse_constant=_refuse_constant)
        if "\\ud" in text or "\\uD" in text:  # the only way to half a character
            json.dumps(data, ensure_ascii=False).encode("utf-8")
        _check_depth(data)
        return data
    except (
        ValueError,
        RecursionError,
    ) as e:  # ValueError: also whole numbers of thousands of digits
        reason = "it is nested too deeply" if isinstance(e, RecursionError) else str(e)
        raise FormatError(f"{what} is not JSON: {reason}.") from e


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds."""
    return parse_json(_read(path), str(path))


def read_csv(path: str | os.PathLike[str]) -> list[list[str]]:
    """The lines of a CSV file that are not empty. Raises FormatError for a file that is no table in UTF-8."""
    raw = _read(path)
    try:
        text = raw.decode("utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds NUL characters")
        return [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    except (ValueError, csv.Error) as e:
        kind = kind_of_bytes(raw[:SEEN])
        is_what = f" but {kind}" if kind and kind != "a text file" else ""
        raise FormatError(f"{path} is not a CSV table in UTF-8{is_what} ({e}).") from e


def finite_number(text: str, where: str) -> float:
    """A number of a table; raises for text, NaN and what single precision has no number for."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= LARGEST:
        raise FormatError(f"{where}: these are not all finite numbers. Got {text[:40]!r}.")
    return value


def _read(path: str | os.PathLike[str]) -> bytes:
    with OpenedFile(path) as file:
        if file.size > MOST_TEXT:
            raise FormatError(f"{path} has {file.size:,} bytes, too many for a file of text.")
        return file.read(0, file.size)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _check_depth(data: Any) -> None:
    level = [data]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise RecursionError


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a finite number")
