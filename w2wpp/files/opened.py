"""A file that is opened once: every read goes through one handle, and notices that the file is another by now.

Where the system can read at a position (everywhere but on Windows) the handle stays open as long as
the object lives: a file replaced by renaming keeps its old bytes for whoever has it open, and
threads and forked processes can share it. On Windows an open handle would keep others from
replacing the file, so each read opens it anew. Both compare what they find with what was opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import FormatError, MissingFileError
from .kinds import kind_of_mode

KEEPS_OPEN = hasattr(os, "pread")
HEAD = 1 << 16  # bytes at the start that tell two versions of a file apart where its times can't
COARSE = 2.0  # seconds; no file system counts time in larger steps
PIECE = 1 << 28  # bytes asked of the system at once


class OpenedFile:
    """A regular file, its size when it was opened, and its bytes on demand."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._kept: int | None = None
        with _said_for(self.path):
            self._place = os.path.abspath(self.path)  # the working folder may change
            with contextlib.ExitStack() as unless_kept:
                handle = _open(self._place)
                unless_kept.callback(os.close, handle)
                self._remember(handle)
                if KEEPS_OPEN:
                    unless_kept.pop_all()
                    self._kept = handle

    def __enter__(self) -> OpenedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the handle; a later read opens the file again, and checks that it is the same."""
        handle, self._kept = getattr(self, "_kept", None), None
        if handle is not None:
            os.close(handle)

    def read(self, start: int, length: int) -> bytes:
        """Bytes from a position; fewer only where the file ended when it was opened."""
        buffer = bytearray(max(0, min(length, self.size - start)))
        self.read_into(start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill a buffer from a position. Raises FormatError if the file became shorter."""
        with self._handle() as handle:
            done = _fill(handle, start, buffer)
            self._check(handle)  # afterwards, so that a change during the read is seen too
        if done < len(buffer):
            raise FormatError(f"{self.path} became shorter while it was read. Open it again.")

    @contextlib.contextmanager
    def mapped(self) -> Iterator[mmap.mmap]:
        """The whole file in the address space for a while; only what is touched comes into memory."""
        with self._handle() as handle:
            self._check(handle)
            with mmap.mmap(handle, 0, access=mmap.ACCESS_READ) as view:
                yield view
            self._check(handle)

    def check(self) -> None:
        """Refuse if the file at this path is not the one that was opened any more."""
        with self._handle() as handle:
            self._check(handle)

    @contextlib.contextmanager
    def _handle(self) -> Iterator[int]:
        if self._kept is not None:
            yield self._kept
            return
        with _said_for(self.path):
            handle = _open(self._place)
        try:
            yield handle
        finally:
            os.close(handle)

    def _remember(self, handle: int) -> None:
        self._status = os.fstat(handle)
        if not stat.S_ISREG(self._status.st_mode):
            kind = kind_of_mode(self._status.st_mode)
            raise FormatError(f"{self.path} is {kind}, expected a file.")
        self.size = self._status.st_size
        self._head = _digest(handle)
        # Written so recently that one more change might leave its times as they are.
        self._fresh = abs(time.time() - self._status.st_mtime) < COARSE

    def _check(self, handle: int) -> None:
        with _said_for(self.path):
            same = self._is_same(os.fstat(handle), handle)
            with contextlib.suppress(FileNotFoundError):  # taken away: what is open stays
                same = same and self._is_same(os.stat(self._place), None)
        if not same:
            raise FormatError(
                f"{self.path} was replaced or changed since it was opened: its numbers are not those "
                "of the file that was opened any more. Open it again."
            )

    def _is_same(self, status: os.stat_result, handle: int | None) -> bool:
        """Whether a status is that of the file that was opened, by handle or (None) by its place."""
        before = self._status
        if (status.st_size, status.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            return False
        if not self._fresh and (status.st_dev, status.st_ino) == (before.st_dev, before.st_ino):
            return True
        # Times too coarse to tell, or a network drive that numbers its files anew.
        if handle is not None:
            return _digest(handle) == self._head
        again = _open(self._place)
        try:
            return _digest(again) == self._head
        finally:
            os.close(again)


def _open(path: str) -> int:
    """A handle for reading; a pipe can't make it wait."""
    flags = os.O_RDONLY
    for name in ("O_BINARY", "O_CLOEXEC", "O_NOINHERIT", "O_NONBLOCK", "O_NOCTTY"):
        flags |= getattr(os, name, 0)
    return os.open(path, flags)


def _fill(handle: int, start: int, buffer: memoryview) -> int:
    """How many bytes of the buffer there were to read."""
    done = 0
    while done < len(buffer):
        got = _read_at(handle, start + done, buffer[done : done + PIECE])
        if got == 0:
            break
        done += got
    return done


def _read_at(handle: int, start: int, part: memoryview) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(handle, [part], start)
    if hasattr(os, "pread"):
        data = os.pread(handle, len(part), start)
    else:
        os.lseek(handle, start, os.SEEK_SET)
        data = os.read(handle, len(part))
    part[: len(data)] = data
    return len(data)


def _digest(handle: int) -> bytes:
    head = bytearray(HEAD)
    got = _fill(handle, 0, memoryview(head))
    return hashlib.blake2b(bytes(head[:got]), digest_size=16).digest()


@contextlib.contextmanager
def _said_for(path: Path) -> Iterator[None]:
    """What the system says of a read, as a sentence with the file in it."""
    try:
        yield
    except FormatError:
        raise
    except FileNotFoundError as e:
        where = " It is a link to a place where nothing is." if os.path.islink(path) else ""
        raise MissingFileError(f"{path}: no such file.{where}") from e
    except (OSError, ValueError) as e:  # ValueError: a name with NUL, or with half a character
        if isinstance(e, PermissionError) and os.path.isdir(path):  # Windows opens no folders
            raise FormatError(f"{path} is a folder, expected a file.") from e
        raise FormatError(f"{path} can't be read: {getattr(e, 'strerror', None) or e}.") from e


class HeldFile(OpenedFile):
    """A small file that was read as a whole: every read comes from memory, of the one moment."""

    def __init__(self, opened: OpenedFile) -> None:
        self.path, self.size, self._kept = opened.path, opened.size, None
        self._bytes = memoryview(opened.read(0, opened.size))
        opened.close()

    def read_into(self, start: int, buffer: memoryview) -> None:
        found = self._bytes[start : start + len(buffer)]
        if len(found) < len(buffer):
            raise FormatError(f"{self.path} became shorter while it was read. Open it again.")
        buffer[:] = found

    def check(self) -> None:
        """What is held stays as it was."""
