"""PyTorch's own files (.pt): opened without unpickling objects, and read without holding them whole."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import FormatError

NUMPY = {torch.float32: np.float32, torch.float64: np.float64, torch.float16: np.float16}
MAPPED_BYTES = 64 * 2**20  # of a file in memory at a time
ADVICE = {
    "identity_df.pt": "It is a pickled pandas table: open it where you trust it and write "
    "pandas.read_pickle('identity_df.pt').to_csv('identity_df.csv'), then pass --labels identity_df.csv."
}


def load_torch(path: str | os.PathLike[str]) -> Any:
    """What a .pt file holds, tensors and plain containers only, mapped where the file allows it."""
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"{path}: no such file.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as e:  # a damaged file can fail anywhere in the reader
        # Told by name, so that nothing here imports a module that could run what is in a file.
        refused = type(e).__name__ == "UnpicklingError" and "truncated" not in str(e)
        if not refused or not _is_pickled(path):
            raise _damaged(path, e) from e
        advice = ADVICE.get(path.name, "Save its tensors alone, as a tensor or a state dict.")
        raise FormatError(
            f"{path} holds pickled Python objects, which could run any code and are not opened. {advice}"
        ) from e


def load_tensor(path: str | os.PathLike[str], *, ndim: int) -> Tensor:
    """A file that is one floating-point tensor of so many dimensions; small ones, read at once."""
    tensor = load_torch(path)
    _require(path, tensor, ndim)
    tensor = tensor.float().clone()
    if not bool(torch.isfinite(tensor).all()):
        raise FormatError(f"{path} holds NaN or infinite numbers. Get the file again.")
    return tensor


@dataclass(frozen=True)
class Matrix:
    """A matrix [rows, columns] in a .pt file, of which only the parts asked for come into memory.

    A file that stays mapped counts as memory of the process, so every part is mapped anew.
    """

    path: Path
    shape: tuple[int, int]
    dtype: torch.dtype
    strides: tuple[int, int]  # in numbers
    offset: int  # of the first number, in bytes of the file

    def rows(self, columns: int) -> Iterator[tuple[slice, Tensor]]:
        """(rows, values [n, columns]) from top to bottom, the first `columns` columns of them."""
        step = max(1, MAPPED_BYTES // (self.shape[1] * self.dtype.itemsize))
        for start in range(0, self.shape[0], step):
            where = slice(start, min(start + step, self.shape[0]))
            yield where, self.part(where, slice(0, columns))

    def columns(self, where: slice) -> Tensor:
        """Some columns as rows, [n, rows] in half precision."""
        out = torch.empty(where.stop - where.start, self.shape[0], dtype=torch.float16)
        if self.strides[0] == 1:  # columns lie in one piece
            step = max(1, MAPPED_BYTES // (self.shape[0] * self.dtype.itemsize))
            for start in range(where.start, where.stop, step):
                some = slice(start, min(start + step, where.stop))
                part = self.part(slice(0, self.shape[0]), some)
                out[start - where.start : some.stop - where.start] = part.T
            return out
        step = max(1, MAPPED_BYTES // (self.shape[1] * self.dtype.itemsize))
        for start in range(0, self.shape[0], step):
            rows = slice(start, min(start + step, self.shape[0]))
            out[:, rows] = self.part(rows, where).T
        return out

    def part(self, rows: slice, columns: slice) -> Tensor:
        """Values [n, m], checked to be finite."""
        first = rows.start * self.strides[0] + columns.start * self.strides[1]
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        last = sum((n - 1) * stride for n, stride in zip(shape, self.strides))
        size = self.dtype.itemsize
        flat = np.memmap(
            self.path, NUMPY[self.dtype], "r", self.offset + first * size, shape=(last + 1,)
        )
        steps = tuple(stride * size for stride in self.strides)
        values = np.array(np.lib.stride_tricks.as_strided(flat, shape, steps))
        if not np.isfinite(values).all():
            raise FormatError(f"{self.path} holds NaN or infinite numbers. Get the file again.")
        return torch.from_numpy(values)


def open_matrix(path: str | os.PathLike[str]) -> Matrix:
    """A .pt file that is one matrix of floating-point numbers, checked, not read."""
    tensor = load_torch(path)
    _require(path, tensor, 2)
    found = _record(Path(path), tensor.untyped_storage().nbytes())
    start = found + tensor.storage_offset() * tensor.dtype.itemsize
    rows, columns = tensor.shape
    matrix = Matrix(Path(path), (rows, columns), tensor.dtype, tensor.stride(), start)
    # The mapped tensor has the same first number, or the place was not found.
    if rows and columns and not torch.equal(matrix.part(slice(0, 1), slice(0, 1)), tensor[:1, :1]):
        raise FormatError(f"{path} is not laid out as PyTorch writes it. Save the tensor again.")
    return matrix


def _is_zip(path: Path) -> bool:
    """Only PyTorch's newer files, which are zip archives, can be mapped."""
    with open(path, "rb") as f:
        return f.read(2) == b"PK"


def _is_pickled(path: Path) -> bool:
    """A zip archive, or a pickle of protocol 2 or later."""
    with open(path, "rb") as f:
        return f.read(2)[:1] == b"\x80" or _is_zip(path)


def _damaged(path: Path, e: Exception) -> FormatError:
    return FormatError(
        f"{path} is truncated or no PyTorch file ({type(e).__name__}). Get the file again."
    )


def _record(path: Path, size: int) -> int:
    """Where the only stored tensor of an archive begins, in bytes of the file."""
    again = f"{path} is not laid out as PyTorch writes one tensor. Save it again with torch.save."
    if not _is_zip(path):
        raise FormatError(again)
    with zipfile.ZipFile(path) as archive, open(path, "rb") as f:
        parts = [i for i in archive.infolist() if "/data/" in i.filename and i.file_size == size]
        if len(parts) != 1 or parts[0].compress_type != zipfile.ZIP_STORED:
            raise FormatError(again)
        f.seek(parts[0].header_offset + 26)  # lengths of the name and of the extra field
        name, extra = struct.unpack("<HH", f.read(4))
        return parts[0].header_offset + 30 + int(name) + int(extra)


def _require(path: str | os.PathLike[str], tensor: Any, ndim: int) -> None:
    if not isinstance(tensor, Tensor):
        raise FormatError(
            f"{path} holds a {type(tensor).__name__}, expected one tensor of {ndim} dimensions."
        )
    if tensor.ndim != ndim or tensor.dtype not in NUMPY or tensor.numel() == 0:
        raise FormatError(
            f"{path} holds a tensor {list(tensor.shape)} {tensor.dtype}, expected floating-point "
            f"numbers in {ndim} dimensions."
        )
