"""The one kind of file this project writes: safetensors whose metadata says format, version and
configuration.

The header is checked in full before a tensor is allocated, tensors are read one by one when asked
for, all through one handle, and files are written beside their target and renamed. Reading and
writing are done here rather than with the safetensors package because that one maps the file into
memory (which keeps Windows from replacing it, and ends the process where the file is cut short
meanwhile), opens it by name for every reader (so that a header and its numbers can come from two
files), writes the metadata in no fixed order (so that equal contents give different bytes) and
can't stream a tensor that does not fit in memory.
"""

from __future__ import annotations

import io
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..arrays import is_finite
from ..errors import FormatError, W2WError, WriteError
from .kinds import SEEN, kind_of_bytes
from .opened import HeldFile, OpenedFile
from .text import parse_json
from .writing import replacing, writable_target

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    # Not written here, but found in files of others.
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
HELD_BYTES = 64 << 20  # a file that may be read as a whole
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format itself
MAX_PEEK = 8_000_000  # bytes that a list of files reads of each
MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class Entry:
    """What the header says of one tensor; offsets count from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Streamed:
    """A tensor to write that exists only chunk by chunk along its first dimension."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Iterable[Tensor]


@dataclass(frozen=True)
class Container:
    """An opened file: the checked header, and tensors on demand, all of them of the file that was opened."""

    file: OpenedFile
    metadata: dict[str, str]
    entries: dict[str, Entry]
    config: dict[str, Any] = field(default_factory=dict)
    known_finite: bool = False  # checked already, see `held`

    @property
    def path(self) -> Path:
        """Where the file is, for messages."""
        return self.file.path

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def held(self) -> Container:
        """The same, read and checked as a whole at once if it is small: for files of which every tensor is
        wanted."""
        if self.file.size > HELD_BYTES:
            return self
        held = replace(self, file=HeldFile(self.file))
        return replace(held, known_finite=held._is_finite())

    def _is_finite(self) -> bool:
        """Whether all numbers are of one floating-point type and finite; False leaves each to be checked."""
        types = {entry.dtype for entry in self.entries.values()}
        if not types <= {torch.float16, torch.bfloat16, torch.float32} or len(types) != 1:
            return False
        start = min(entry.start for entry in self.entries.values())
        count = sum(math.prod(entry.shape) for entry in self.entries.values())
        numbers = torch.empty(count, dtype=types.pop())
        if count:
            self.file.read_into(start, _bytes(numbers).numpy().data)
        return is_finite(numbers)

    def require(self, name: str, shape: tuple[int | None, ...], *dtypes: torch.dtype) -> Entry:
        """The entry of a tensor that must exist with this shape (None: any) and such a dtype.

        Raises FormatError if it is missing or another.
        """
        if name not in self.entries:
            raise FormatError(
                f"{self.path}: the tensor '{name}' is missing: the file is incomplete. Write it again, "
                "or get another copy."
            )
        entry = self.entries[name]
        fits = len(entry.shape) == len(shape) and all(
            want is None or got == want for got, want in zip(entry.shape, shape)
        )
        if not fits or (dtypes and entry.dtype not in dtypes):
            wanted = "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
            raise FormatError(
                f"{self.path}: the tensor '{name}' is {list(entry.shape)} {entry.dtype}, expected "
                f"{wanted} "
                f"{' or '.join(str(d) for d in dtypes)}. Write it again, or get another copy."
            )
        return entry

    def read(self, name: str, *, finite: bool = True) -> Tensor:
        """A whole tensor as it is stored, copied. Raises FormatError for NaN and infinity if `finite`."""
        entry = self.entries[name]
        return self._read(name, entry.start, entry.shape, finite)

    def read_rows(self, name: str, start: int, stop: int, *, finite: bool = True) -> Tensor:
        """Rows [stop - start, ...] of a tensor, without touching the others."""
        entry = self.entries[name]
        row = (entry.stop - entry.start) // max(entry.shape[0], 1)
        shape = (max(0, min(stop, entry.shape[0]) - start), *entry.shape[1:])
        return self._read(name, entry.start + start * row, shape, finite)

    @torch.inference_mode(False)
    def read_columns(self, name: str, rows: Sequence[int], start: int, stop: int) -> Tensor:
        """Columns start to stop of some rows of a matrix, [len(rows), stop - start].

        Raises FormatError beyond the matrix, and for NaN and infinity.
        """
        entry = self.entries[name]
        if len(entry.shape) != 2 or not 0 <= start <= stop <= entry.shape[1]:
            raise FormatError(
                f"{self.path}: '{name}' {list(entry.shape)} has no columns {start} to {stop}."
            )
        tensor = torch.empty(len(rows), stop - start, dtype=entry.dtype)
        width, row = entry.dtype.itemsize, entry.shape[1] * entry.dtype.itemsize
        target = memoryview(_bytes(tensor).numpy().data)
        length = (stop - start) * width
        for i, number in enumerate(rows):
            if length:
                where = entry.start + number * row + start * width
                self.file.read_into(where, target[i * length : (i + 1) * length])
        if tensor.is_floating_point() and not is_finite(tensor):
            raise FormatError(f"{self.path}: the tensor '{name}' holds NaN or infinite numbers.")
        return tensor

    # A host may read inside its inference mode; weights made there could never take part in a
    # gradient later.
    @torch.inference_mode(False)
    def _read(self, name: str, start: int, shape: tuple[int, ...], finite: bool) -> Tensor:
        tensor = torch.empty(shape, dtype=self.entries[name].dtype)
        if tensor.numel() == 0:
            return tensor
        stored = _bytes(tensor)
        self.file.read_into(start, stored.numpy().data)
        if tensor.dtype == torch.bool and int(stored.max()) > 1:
            raise FormatError(f"{self.path}: the tensor '{name}' holds something other than flags.")
        unsure = finite and not self.known_finite and tensor.is_floating_point()
        if unsure and not is_finite(tensor):
            raise FormatError(f"{self.path}: the tensor '{name}' holds NaN or infinite numbers.")
        return tensor


def open_container(
    path: str | os.PathLike[str], format: str | None = None, *, versions: tuple[str, ...] = ("1",)
) -> Container:
    """Open a safetensors file and check its header; with `format`, what it is and its version.

    Raises FormatError for any other file.
    """
    file = OpenedFile(path)
    start, header = _read_header(file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(
            f"{file.path}: the metadata of a safetensors file must be a table of strings."
        )
    entries = {
        name: _entry(file.path, name, data, start, file.size) for name, data in header.items()
    }
    _check_tiling(file.path, entries, start, file.size)
    config = _config(file.path, metadata, format, versions) if format else {}
    return Container(file, metadata, entries, config)


def peek_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What a safetensors file says of itself, for lists of many files: its tensors are not looked at.

    Nothing where the header is larger than any file of ours has.
    """
    with OpenedFile(path) as file:
        length = struct.unpack("<Q", file.read(0, 8).ljust(8, b"\0"))[0]
        if length > MAX_PEEK:
            return {}
        metadata = _read_header(file)[1].get("__metadata__", {})
    if not isinstance(metadata, dict):
        return {}
    return {key: value for key, value in metadata.items() if isinstance(value, str)}


def write_container(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor | Streamed],
    *,
    format: str | None = None,
    version: str = "1",
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    seal: Callable[[Container], Mapping[str, Any]] | None = None,
    new: bool = False,
) -> None:
    """Write a safetensors file beside the target, then rename it: no reader meets half a file.

    `seal` is shown the file once all tensors are in it and returns the final configuration, in
    which only texts may differ, each as long as before: a fingerprint of what was streamed. With
    `new` a file of that name makes it raise FileExistsError.
    """
    header = _build_header(tensors, _texts(format, version, config, metadata))
    with replacing(path, new=new) as f:
        f.write(header)
        for name in sorted(tensors):
            _write_tensor(f, name, tensors[name])
        if seal is not None:
            _seal(f, f.name, len(header), seal, format, version, metadata)


def _seal(
    f: BinaryIO,
    path: str | os.PathLike[str],
    length: int,
    seal: Callable[[Container], Mapping[str, Any]],
    format: str | None,
    version: str,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Put the final configuration into the header, of `length` bytes, of a file that is otherwise written."""
    f.flush()
    with open_container(path, format, versions=(version,)) as written:
        sealed = _build_header(written.entries, _texts(format, version, seal(written), metadata))
    if len(sealed) != length:
        raise FormatError("The sealed configuration differs from the one announced in its length.")
    f.seek(0)
    f.write(sealed)


def partial_of(path: str | os.PathLike[str]) -> Path:
    """Where `write_resumably` keeps what it has of a file."""
    path = Path(path)
    return path.with_name(f"{path.name}.partial")


def write_resumably(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor | Streamed],
    last: str,
    chunks: Callable[[int], Iterable[Tensor]],
    *,
    format: str,
    version: str = "1",
    config: Mapping[str, Any] | None = None,
    seal: Callable[[Container], Mapping[str, Any]] | None = None,
) -> None:
    """As `write_container`, for a tensor `last` of very many rows: `chunks(start)` gives those from row
    `start` on. What a killed write left in `partial_of(path)` is taken up if header and tensors before `last` are the
    same, and the result is too, byte by byte.

    Raises WriteError where the disk fails, keeping what is written; FormatError if the rows are not as many as
    announced.
    """
    announced = tensors[last]
    header = _build_header(tensors, _texts(format, version, config, None))
    beginning = io.BytesIO(header)
    beginning.seek(0, io.SEEK_END)
    for name in sorted(tensors):
        if name < last:
            _write_tensor(beginning, name, tensors[name])
    partial = writable_target(partial_of(path))
    row = math.prod(announced.shape[1:]) * announced.dtype.itemsize
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "r+b" if partial.exists() else "w+b") as f:
            done = _rows_there(f, beginning.getvalue(), row, announced.shape[0])
            for chunk in chunks(done) if done < announced.shape[0] else ():
                done += len(chunk)
                f.write(_bytes(chunk.detach().to("cpu", announced.dtype).contiguous()).numpy().data)
            if done != announced.shape[0]:
                raise FormatError(
                    f"'{last}' was announced with {announced.shape[0]} rows, {done} arrived."
                )
            for name in sorted(tensors):
                if name > last:
                    _write_tensor(f, name, tensors[name])
            if seal is not None:
                _seal(f, partial, len(header), seal, format, version)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, writable_target(path))
    except OSError as e:
        if isinstance(e, W2WError):
            raise
        raise WriteError(
            f"{path} could not be written: {e.strerror or e}. What there is of it is kept in {partial.name}; "
            "make room or name another disk, and run the same command again."
        ) from e


def _rows_there(f: BinaryIO, beginning: bytes, row: int, most: int) -> int:
    """Whole rows that a partial file has behind this beginning; afterwards it ends behind them."""
    there = f.read(len(beginning)) == beginning
    size = os.fstat(f.fileno()).st_size
    rows = min(most, (size - len(beginning)) // row) if there and row else 0
    f.truncate(len(beginning) + rows * row if there else 0)
    f.seek(0, io.SEEK_END)
    if not there:
        f.write(beginning)
    return rows


def _texts(
    format: str | None,
    version: str,
    config: Mapping[str, Any] | None,
    metadata: Mapping[str, str] | None,
) -> dict[str, str]:
    """The metadata of a file to be written."""
    texts = dict(metadata or {})
    if format is not None:
        # NaN is no JSON: a report that holds one must fail here and not at the reader.
        try:
            body = json.dumps(config or {}, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as e:
            raise FormatError(f"The configuration of a '{format}' file is no JSON: {e}.") from e
        texts.update(format=format, format_version=version, config=body)
    return texts


def _read_header(file: OpenedFile) -> tuple[int, dict[str, Any]]:
    """Where the tensors begin, and what is said of them."""
    path, head = file.path, file.read(0, SEEN)
    kind = kind_of_bytes(head)
    if kind and not _may_be_length(head):
        raise FormatError(f"{path} is not a safetensors file but {kind}.")
    if len(head) < 8:
        raise FormatError(f"{path} is not a safetensors file: it has only {len(head)} bytes.")
    length = int(struct.unpack("<Q", head[:8])[0])
    if length > MAX_HEADER:
        raise FormatError(
            f"{path} is not a safetensors file: it claims a header of {length:,} bytes."
        )
    if 8 + length > file.size:
        raise FormatError(
            f"{path} is truncated: its header needs {8 + length:,} bytes, the file has {file.size:,}. "
            "Download or copy it again."
        )
    header = parse_json(file.read(8, length), f"{path} is not a safetensors file: its header")
    if not isinstance(header, dict):
        raise FormatError(f"{path} is not a safetensors file: its header is not a table.")
    return 8 + length, header


def _may_be_length(head: bytes) -> bool:
    """Whether a file that looks like another kind starts as safetensors do all the same."""
    return len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= MAX_HEADER


def _entry(path: Path, name: str, data: Any, start: int, size: int) -> Entry:
    try:
        kind, shape, (first, last) = data["dtype"], data["shape"], data["data_offsets"]
        whole = all(type(n) is int and 0 <= n < 2**63 for n in (*shape, first, last))
        known = kind in DTYPES
    except (KeyError, TypeError, ValueError) as e:
        raise FormatError(f"{path}: the header entry of '{name}' is not that of a tensor.") from e
    if not known:
        raise FormatError(
            f"{path}: the tensor '{name}' has the type {kind}, which is not supported."
        )
    if not whole or len(shape) > MAX_DIMENSIONS or math.prod(n or 1 for n in shape) >= 2**60:
        raise FormatError(f"{path}: the tensor '{name}' has the impossible shape {shape}.")
    dtype = DTYPES[kind]
    if last - first != math.prod(shape) * dtype.itemsize:
        raise FormatError(
            f"{path}: the tensor '{name}' {shape} {kind} does not fill the {last - first:,} bytes "
            "the header gives it."
        )
    if start + last > size:
        raise FormatError(
            f"{path} is truncated: '{name}' ends at byte {start + last:,}, the file has {size:,}. "
            "Download or copy it again."
        )
    return Entry(dtype, tuple(shape), start + first, start + last)


def _check_tiling(path: Path, entries: Mapping[str, Entry], start: int, size: int) -> None:
    """Tensors must fill the file with neither overlap nor gap, as safetensors itself demands."""
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.stop)):
        if entry.start != start:
            raise FormatError(
                f"{path}: its tensors overlap or leave gaps. Download or copy it again."
            )
        start = entry.stop
    if start != size:
        raise FormatError(
            f"{path}: {size - start:,} bytes follow the last tensor. Download or copy it again."
        )


def _config(
    path: Path, metadata: Mapping[str, str], format: str, versions: tuple[str, ...]
) -> dict[str, Any]:
    found, version = metadata.get("format"), metadata.get("format_version")
    if found != format:
        is_what = f"a '{found}' file" if found else "a safetensors file without a format of ours"
        raise FormatError(f"{path} is {is_what}, expected '{format}'.")
    if version not in versions:
        raise FormatError(
            f"{path} is '{format}' version {version}; this release reads {', '.join(versions)}. "
            "Update w2wpp."
        )
    config = parse_json(metadata.get("config", ""), f"{path}: its configuration")
    if not isinstance(config, dict):
        raise FormatError(f"{path}: its configuration is not a table.")
    return config


def _build_header(
    tensors: Mapping[str, Tensor | Streamed | Entry], metadata: Mapping[str, str]
) -> bytes:
    """Its length, and the table of metadata and tensors."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in sorted(tensors):
        t = tensors[name]
        if t.dtype not in DTYPE_NAMES:
            raise FormatError(f"'{name}' is of the type {t.dtype}, which is not written.")
        stop = offset + math.prod(t.shape) * t.dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    body = json.dumps(header, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    return struct.pack("<Q", len(body)) + body


def _write_tensor(f: BinaryIO, name: str, tensor: Tensor | Streamed) -> None:
    chunks = tensor.chunks if isinstance(tensor, Streamed) else (tensor,)
    rows = 0
    for chunk in chunks:
        rows += chunk.shape[0] if chunk.ndim else 1
        flat = chunk.detach().to("cpu", tensor.dtype)
        if flat.numel():
            f.write(_bytes(flat.contiguous()).numpy().data)
    if isinstance(tensor, Streamed) and rows != tensor.shape[0]:
        raise FormatError(f"'{name}' was announced with {tensor.shape[0]} rows, {rows} arrived.")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
