"""What a folder has of the official weights2weights files: whole, cut off, still on their way, missing."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import FormatError
from ..files.kinds import SEEN, kind_of_bytes
from ..files.opened import OpenedFile
from ..files.torchfile import load_torch

SOURCE = "https://huggingface.co/snap-research/weights2weights"
NEEDED = {"mean.pt": 400_000, "std.pt": 400_000, "V.pt": 3_986_000_000}  # bytes, about
OPTIONAL = {
    "proj_1000pc.pt": (260_000_000, "how real people are spread"),
    "weight_dimensions.pt": (10_000, "the order of the weights"),
}
# What browsers and download managers put behind the name of a file that is not whole yet.
ON_THEIR_WAY = (".part", ".crdownload", ".download", ".aria2", ".incomplete", ".partial", ".tmp")


@dataclass(frozen=True)
class Download:
    """One of the official files, as far as it is there."""

    name: str
    expected: int  # bytes, about
    purpose: str  # of a file that can be missing
    size: int | None  # bytes on the disk; None: nothing is there
    trouble: str  # why it can't be used; nothing for one that can, or is not there at all

    @property
    def is_whole(self) -> bool:
        """Whether it can be read."""
        return self.size is not None and not self.trouble

    @property
    def blocks(self) -> bool:
        """Whether nothing can be imported as long as it is so."""
        return bool(self.trouble) or (self.size is None and not self.purpose)

    def __str__(self) -> str:
        about = f"about {_megabytes(self.expected)}"
        if self.size is None:
            return f"{self.name}: missing ({about})" + (
                f"; not needed, tells {self.purpose}" if self.purpose else ""
            )
        if self.is_whole:
            return f"{self.name}: whole ({_megabytes(self.size)})"
        return f"{self.name}: {_megabytes(self.size)} of {about}, {self.trouble}"


def is_w2w_folder(names: Iterable[str]) -> bool:
    """Whether files of these names are official ones, or some of them."""
    found = {_final_name(name) for name in names}
    return "V.pt" in found or {"mean.pt", "std.pt"} <= found


def downloads(folder: str | os.PathLike[str]) -> list[Download]:
    """Every official file that an import reads, in the state in which a folder has it."""
    folder = Path(folder)
    there = {entry.name: entry for entry in folder.iterdir()}
    found = []
    for name in (*NEEDED, *OPTIONAL):
        expected, purpose = OPTIONAL.get(name, (NEEDED.get(name, 0), ""))
        size, trouble = None, ""
        if name in there:
            size, trouble = _size(there[name]), _trouble(there[name])
        coming = [p for n, p in sorted(there.items()) if n != name and _final_name(n) == name]
        # Some write into the file itself, from several ends, and keep a list beside it.
        if coming and (size is None or trouble or coming[0].suffix == ".aria2"):
            size = max(_size(p) for p in (*coming, there.get(name, coming[0])))
            trouble = f"still being downloaded or broken off ({coming[0].name})"
        found.append(Download(name, expected, purpose, size, trouble))
    return found


def require_whole(folder: str | os.PathLike[str], title: str) -> None:
    """Raise FormatError, file by file, unless all is there that an import needs and can be read."""
    found = downloads(folder)
    if any(d.blocks for d in found):
        lines = "".join(f"\n  {d}" for d in found)
        raise FormatError(
            f"The official files in {title} are not complete:{lines}\nGet what is missing or cut off from the folder "
            f"'files' of {SOURCE} into this folder, remove what was broken off, then queue again."
        )


def _final_name(name: str) -> str:
    """The name that a file will have when its download has ended."""
    for ending in ON_THEIR_WAY:
        name = name.removesuffix(ending)
    return name


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a link to nowhere
        return 0


def _trouble(path: Path) -> str:
    try:
        with OpenedFile(path) as file:
            head = file.read(0, SEEN)
        if head[:2] != b"PK" and head[:1] != b"\x80":
            kind = kind_of_bytes(head)
            if kind:
                return f"it is {kind}" if not kind.startswith(("empty", "only")) else kind
        load_torch(path)
    except FormatError as e:
        reason = str(e)
        return "cut off" if "truncated" in reason else reason.removeprefix(f"{path} ")
    return ""


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 10_000_000 else f"{size / 1e6:,.2f} MB"
