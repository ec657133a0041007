"""Checkpoints of a training run, in the same kind of file as everything else (no pickle)."""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ConfigError, FormatError
from ..files.container import open_container, write_container

FORMAT = "w2wpp.checkpoint"
EVERY = 30.0  # seconds between two saves of a long computation


class OtherRun(ConfigError):
    """A checkpoint is not of the run that it was to continue."""


def save_checkpoint(
    path: str | os.PathLike[str],
    run: str,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
) -> None:
    """Write a run's tensors and numbers, atomically, with the digest of its settings and data."""
    write_container(path, tensors, format=FORMAT, config={"run": run, "numbers": dict(numbers)})


def load_checkpoint(
    path: str | os.PathLike[str], run: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, numbers) of a run; refuses the checkpoint of another one."""
    with open_container(path, FORMAT) as file:
        if file.config.get("run") != run:
            raise OtherRun(
                f"{path} is the checkpoint of a training with other settings or data. Delete it or "
                "name another file."
            )
        numbers = file.config.get("numbers")
        if not isinstance(numbers, dict):
            raise FormatError(f"{path}: this checkpoint lacks its numbers. Delete it.")
        return {name: file.read(name) for name in file.entries}, numbers


State = tuple[Mapping[str, Tensor], Mapping[str, Any]]


class Saved:
    """The file of a long computation, if there is to be one: what it held, and what it is to hold."""

    def __init__(self, path: str | os.PathLike[str] | None, run: str) -> None:
        self.path, self.run = None if path is None else Path(path), run
        exists = self.path is not None and self.path.exists()
        self.tensors, self.numbers = load_checkpoint(self.path, run) if exists else ({}, {})  # type: ignore[arg-type]
        self._last = time.monotonic()

    def keep(self, state: Callable[[], State]) -> None:
        """Save what `state` gives, unless the last save was moments ago."""
        if time.monotonic() - self._last >= EVERY:
            self.write(state)

    def write(self, state: Callable[[], State]) -> None:
        """Save what `state` gives now."""
        if self.path is not None:
            save_checkpoint(self.path, self.run, *state())
            self._last = time.monotonic()


def forget(path: str | os.PathLike[str]) -> None:
    """Delete the checkpoints of a computation whose result is safe, those of other ranks too."""
    path = Path(path)
    for found in (path, *path.parent.glob(f"{glob.escape(path.name)}.rank*")):
        found.unlink(missing_ok=True)
