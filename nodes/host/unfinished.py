"""What a training keeps while it runs, so that it goes on after Cancel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import folder_paths

from ...w2wpp import __version__
from ...w2wpp.training.checkpoint import OtherRun, forget
from .fingerprints import fingerprint
from .folders import space_place

T = TypeVar("T")


class Unfinished:
    """Checkpoints of one run of a node, each named by all that decides what is computed.

    They lie beside the space that the run is to give; without a name for it, in the host's temporary folder, which
    lasts until the host is started again.
    """

    def __init__(self, save_as: str) -> None:
        named = bool(save_as.strip())
        temporary = Path(folder_paths.get_temp_directory(), "w2wpp")
        self._home = space_place(save_as).with_suffix("") if named else temporary
        self._files: list[Path] = []
        self.taken_up = False  # whether something was there from a run that was stopped

    def run(self, stage: str, what: list[Any], compute: Callable[[Path], T]) -> T:
        """What `compute` gives, with a file to keep its work in; `what` decides the result."""
        path = self._home / f"{stage}-{fingerprint(__version__, what)[:12]}.unfinished"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._files.append(path)
        taken_up = path.exists()
        try:
            found = compute(path)
        except OtherRun:  # numbers that differ in rounding since then
            forget(path)
            taken_up = False
            found = compute(path)
        self.taken_up |= taken_up
        return found

    def done(self) -> None:
        """Delete all of it: the result is safe."""
        for path in self._files:
            forget(path)
        with contextlib.suppress(OSError):  # not empty: the people themselves lie there
            self._home.rmdir()
