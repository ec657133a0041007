"""PyTorch's own files (.pt): opened without unpickling objects, and read without holding them whole."""

from __future__ import annotations

import io
import mmap
import os
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arrays import is_finite
from ..errors import FormatError
from .kinds import SEEN, kind_of_bytes
from .opened import OpenedFile

# Floating-point numbers, and what NumPy holds them as; those that it does not know by their bits.
NUMPY = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.float16: np.float16,
    torch.bfloat16: np.int16,
    torch.float8_e4m3fn: np.uint8,
    torch.float8_e5m2: np.uint8,
}
BITS = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
MAPPED_BYTES = 64 * 2**20  # of a file in memory at a time
ADVICE = {
    "identity_df.pt": "It is a pickled pandas table: open it where you trust it and write "
    "pandas.read_pickle('identity_df.pt').to_csv('identity_df.csv'), then pass --labels identity_df.csv."
}


def load_torch(path: str | os.PathLike[str]) -> Any:
    """What a .pt file holds, ordinary tensors and plain containers only, mapped where the file allows it."""
    with OpenedFile(path) as file:
        return _load(file)


def _load(file: OpenedFile) -> Any:
    path, head = file.path, file.read(0, SEEN)
    is_zip, is_pickle = head[:2] == b"PK", head[:1] == b"\x80"
    kind = kind_of_bytes(head)
    if kind and not (is_zip or is_pickle) and file.size > 1:
        raise FormatError(f"{path} is not a PyTorch file but {kind}.")
    try:
        if is_zip:
            _check_archive(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # By its name, which mapping needs; the checks before and after hold it to the file.
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        file.check()
    except FormatError:
        raise
    except Exception as e:  # a damaged file can fail anywhere in the reader
        # Told by name, so that nothing here imports a module that could run what is in a file.
        refused = type(e).__name__ == "UnpicklingError" and "truncated" not in str(e)
        if not refused or not (is_zip or is_pickle):
            raise _damaged(path, e) from e
        advice = ADVICE.get(path.name, "Save its tensors alone, as a tensor or a state dict.")
        raise FormatError(
            f"{path} holds pickled Python objects, which could run any code and are not opened. {advice}"
        ) from e
    _check_tensors(path, data)
    return data


def load_tensor(path: str | os.PathLike[str], *, ndim: int, or_flat: bool = False) -> Tensor:
    """A file that is one floating-point tensor of so many dimensions; small ones, read at once.

    With `or_flat` one of a single dimension is taken as the only row of a matrix.

    Raises FormatError for any other file, and for NaN and infinity.
    """
    tensor = load_torch(path)
    if or_flat and isinstance(tensor, Tensor) and tensor.ndim == 1:
        tensor = tensor[None]
    _require(path, tensor, ndim)
    tensor = tensor.detach().float().clone()
    if not is_finite(tensor):
        raise FormatError(f"{path} holds NaN or infinite numbers. Download or copy it again.")
    return tensor


@dataclass(frozen=True)
class Matrix:
    """A matrix [rows, columns] in a .pt file, of which only the parts asked for come into memory.

    A file that stays mapped counts as memory of the process, so every part is mapped anew.
    """

    file: OpenedFile
    shape: tuple[int, int]
    dtype: torch.dtype
    strides: tuple[int, int]  # in numbers
    offset: int  # of the first number, in bytes of the file

    @property
    def path(self) -> Path:
        """Where the file is, for messages."""
        return self.file.path

    def rows(self, columns: int) -> Iterator[tuple[slice, Tensor]]:
        """(rows, values [n, columns]) from top to bottom, the first `columns` columns of them."""
        step = max(1, MAPPED_BYTES // (self.shape[1] * self.dtype.itemsize))
        for start in range(0, self.shape[0], step):
            where = slice(start, min(start + step, self.shape[0]))
            yield where, self.part(where, slice(0, columns))

    def columns(self, where: slice, seen: Callable[[float], None] = lambda share: None) -> Tensor:
        """Some columns as rows, [n, rows] in half precision; `seen` gets the share of them that was read."""
        out = torch.empty(where.stop - where.start, self.shape[0], dtype=torch.float16)
        if self.strides[0] == 1:  # columns lie in one piece
            step = max(1, MAPPED_BYTES // (self.shape[0] * self.dtype.itemsize))
            for start in range(where.start, where.stop, step):
                some = slice(start, min(start + step, where.stop))
                part = self.part(slice(0, self.shape[0]), some)
                out[start - where.start : some.stop - where.start] = part.T
                seen((some.stop - where.start) / len(out))
            return out
        step = max(1, MAPPED_BYTES // (self.shape[1] * self.dtype.itemsize))
        for start in range(0, self.shape[0], step):
            rows = slice(start, min(start + step, self.shape[0]))
            out[:, rows] = self.part(rows, where).T
            seen(rows.stop / self.shape[0])
        return out

    def part(self, rows: slice, columns: slice) -> Tensor:
        """Values [n, m], checked to be finite.

        Raises FormatError where the file ends early or holds NaN or infinity.
        """
        first = rows.start * self.strides[0] + columns.start * self.strides[1]
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        last = sum((n - 1) * stride for n, stride in zip(shape, self.strides))
        size = self.dtype.itemsize
        begin = self.offset + first * size
        if begin + (last + 1) * size > self.file.size:
            raise FormatError(f"{self.path} is truncated. Download or copy it again.")
        steps = (self.strides[0] * size, self.strides[1] * size)
        with self.file.mapped() as view:
            values = _copied(view, NUMPY[self.dtype], begin, shape, steps)
        found = torch.from_numpy(values)
        if self.dtype in BITS:
            found = found.view(self.dtype).float()
        if not is_finite(found):
            raise FormatError(
                f"{self.path} holds NaN or infinite numbers. Download or copy it again."
            )
        return found


def _copied(
    view: mmap.mmap, dtype: Any, offset: int, shape: tuple[int, int], steps: tuple[int, int]
) -> np.ndarray:
    """An array of its own; what points into the file is gone when this returns."""
    return np.array(np.ndarray(shape, dtype, buffer=view, offset=offset, strides=steps))


def open_matrix(path: str | os.PathLike[str]) -> Matrix:
    """A .pt file that is one matrix of floating-point numbers, checked, not read.

    Raises FormatError for any other file.
    """
    file = OpenedFile(path)
    tensor = _load(file)
    _require(path, tensor, 2)
    found = _record(file, tensor.untyped_storage().nbytes())
    start = found + tensor.storage_offset() * tensor.dtype.itemsize
    rows, columns = tensor.shape
    matrix = Matrix(file, (rows, columns), tensor.dtype, tensor.stride(), start)
    # The mapped tensor has the same first number, or the place was not found.
    first = tensor[:1, :1].detach()
    if not torch.equal(matrix.part(slice(0, 1), slice(0, 1)).double(), first.double()):
        raise FormatError(f"{path} is not laid out as PyTorch writes it. Save the tensor again.")
    return matrix


class _Stream(io.RawIOBase):
    """An opened file as Python's own readers want it."""

    def __init__(self, file: OpenedFile) -> None:
        self._file, self._place = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._file.size}[whence]
        self._place = max(0, start + offset)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(self._place, len(buffer))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def _records(file: OpenedFile) -> list[zipfile.ZipInfo]:
    with zipfile.ZipFile(_Stream(file)) as archive:
        return archive.infolist()


def _check_archive(file: OpenedFile) -> None:
    """PyTorch stores its records as they are: one that unpacks to more than the file is a trap."""
    records = _records(file)
    packed = any(r.compress_type != zipfile.ZIP_STORED for r in records)
    if packed or sum(r.file_size for r in records) > file.size:
        raise FormatError(
            f"{file.path} is a compressed archive and not as PyTorch writes it. Save it again with torch.save."
        )


def _check_tensors(path: Path, data: Any) -> None:
    """Refuse tensors that are not plain numbers in memory, wherever they stand in what was loaded."""
    rest, seen = [data], set()
    while rest:
        value = rest.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            _check_plain(path, value)
        elif isinstance(value, dict):
            rest += value.values()
        elif isinstance(value, (list, tuple)):
            rest += value


def _check_plain(path: Path, tensor: Tensor) -> None:
    what = ""
    if tensor.layout != torch.strided or tensor.is_nested:
        what = "a sparse or nested tensor"
    elif tensor.is_quantized:
        what = "a quantised tensor"
    elif tensor.device.type != "cpu":
        what = f"a tensor without numbers (on '{tensor.device.type}')"
    elif tensor.numel() * tensor.dtype.itemsize > tensor.untyped_storage().nbytes():
        what = f"a tensor {list(tensor.shape)} of which the file holds only a part"
    if what:
        raise FormatError(
            f"{path} holds {what}, which is not read. Save an ordinary one: tensor.contiguous(), dense."
        )


def _damaged(path: Path, e: Exception) -> FormatError:
    return FormatError(
        f"{path} is truncated or no PyTorch file ({type(e).__name__}). Download or copy it again."
    )


def _record(file: OpenedFile, size: int) -> int:
    """Where the only stored tensor of an archive begins, in bytes of the file."""
    again = (
        f"{file.path} is not laid out as PyTorch writes one tensor. Save it again with torch.save."
    )
    if file.read(0, 2) != b"PK":
        raise FormatError(again)
    parts = [r for r in _records(file) if "/data/" in r.filename and r.file_size == size]
    lengths = file.read(parts[0].header_offset + 26, 4) if len(parts) == 1 else b""
    if len(lengths) < 4:
        raise FormatError(again)
    name, extra = struct.unpack("<HH", lengths)  # of the name and of the extra field
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
