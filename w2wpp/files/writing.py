"""Writing a file so that nobody ever meets half of it, whatever happens meanwhile.

Everything goes to a temporary file in the folder of the target, is brought to the disk, and takes
the target's name in one step. A link keeps pointing and what it points to is replaced; folders,
devices and pipes are refused. A temporary file is locked as long as its writer lives, so what a
killed one left behind can be told, and the next writer into the folder removes it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import ConfigError, W2WError, WriteError
from .kinds import kind_of_mode

try:
    import fcntl
except ImportError:  # Windows, where an open file can't be removed anyway
    fcntl = None  # type: ignore[assignment]

OLD = 3600.0  # seconds without a change after which what is left of a writer is litter
PATIENCE = 2.0  # seconds that a reader on Windows may keep the target open

# Names of a fixed length, so that they fit wherever the target's name does.
_OURS = re.compile(r"\.w2wpp-[0-9a-f]{12}\.part")
# What releases up to 0.1 left: a file beside its target, and a folder with a draft in it.
_EARLIER = re.compile(r"\..+\.[a-z0-9_]{8}\.part")
_EARLIER_FOLDER = re.compile(r"\.import-[a-z0-9_]{8}")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, new: bool = False) -> Iterator[BinaryIO]:
    """A file to write to, which becomes the target when the block ends well, and nothing otherwise.

    With `new` it never replaces anything: a name that is taken raises FileExistsError.
    """
    target = writable_target(path)
    with _said_for(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent)
        temporary, file = _create(target)
    try:
        with _said_for(path), file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if new:
            _take_free_name(temporary, target)
        else:
            with _said_for(path):
                _take_place(temporary, target)
        _sync_folder(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """A text file in UTF-8, whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def writable_target(path: str | os.PathLike[str]) -> Path:
    """The file that writing to a path would replace; raises if it is something else than a file."""
    text = os.fspath(path)
    if not text or text.endswith(("/", os.sep)) or os.path.basename(text) in (".", ".."):
        raise ConfigError(f"{text!r} names a folder, expected the name of a file to write.")
    try:
        target = Path(os.path.realpath(text) if os.path.islink(text) else text)
        status = os.stat(target)
    except FileNotFoundError:
        return target
    except ValueError as e:
        raise ConfigError(f"{text!r} can't be the name of a file: {e}.") from e
    except OSError as e:
        raise WriteError(f"{text} can't be written: {e.strerror}.") from e
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(
            f"{text} is {kind_of_mode(status.st_mode)} and is not replaced. Name a file."
        )
    return target


def remove_leftovers(folder: Path) -> None:
    """Remove what writers left in a folder that were killed a while ago."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if is_leftover(entry.name):
                with contextlib.suppress(OSError):
                    _remove_if_dead(entry)


def is_leftover(name: str) -> bool:
    """Whether something with this name is a writer's temporary file or folder, at work or left behind."""
    return any(p.fullmatch(name) for p in (_OURS, _EARLIER, _EARLIER_FOLDER))


def _create(target: Path) -> tuple[Path, BinaryIO]:
    """A new temporary file beside the target, with the target's permissions, locked."""
    temporary = target.parent / f".w2wpp-{secrets.token_hex(6)}.part"
    file = open(temporary, "wb", opener=_opener)
    if fcntl is not None:
        with contextlib.suppress(OSError):  # not every network drive can lock
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with contextlib.suppress(OSError):
        os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode))
    return temporary, file


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_EXCL, 0o666)


def _take_place(temporary: Path, target: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            os.replace(temporary, target)
            return
        except PermissionError:
            if os.name != "nt" or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _take_free_name(temporary: Path, target: Path) -> None:
    """Give a file its name only if nothing has it."""
    if os.name == "nt":
        os.rename(temporary, target)  # which never replaces there
        return
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError as e:  # a drive without hard links
        if os.path.lexists(target):
            raise FileExistsError(e.errno, "File exists", os.fspath(target)) from e
        os.replace(temporary, target)
    else:
        os.unlink(temporary)


def _sync_folder(folder: Path) -> None:
    """Bring the new name to the disk too, where the system lets folders be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_if_dead(entry: os.DirEntry[str]) -> None:
    if entry.is_dir(follow_symlinks=False):
        _remove_folder(entry)
    elif entry.is_file(follow_symlinks=False) and _is_old(entry) and _is_unlocked(entry.path):
        os.unlink(entry.path)


def _remove_folder(entry: os.DirEntry[str]) -> None:
    """A draft's folder, if nothing else is in it and nobody works on it."""
    with os.scandir(entry.path) as inside:
        drafts = list(inside)
    known = all(d.name == "draft.safetensors" or is_leftover(d.name) for d in drafts)
    if known and all(d.is_file(follow_symlinks=False) and _is_old(d) for d in drafts):
        if drafts or _is_old(entry):
            for draft in drafts:
                os.unlink(draft.path)
            os.rmdir(entry.path)


def _is_old(entry: os.DirEntry[str]) -> bool:
    return time.time() - entry.stat(follow_symlinks=False).st_mtime > OLD


def _is_unlocked(path: str) -> bool:
    """Whether the writer of a temporary file is gone."""
    if fcntl is None:
        return True  # or removing it will fail
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # no locks here: its age has to do
    finally:
        os.close(handle)
    return True


@contextlib.contextmanager
def _said_for(path: str | os.PathLike[str]) -> Iterator[None]:
    """What the system says of a write, as a sentence with the file in it."""
    try:
        yield
    except W2WError:
        raise
    except OSError as e:
        raise WriteError(
            f"{os.fspath(path)} could not be written: {e.strerror or e}. What was there before is as it was."
        ) from e
