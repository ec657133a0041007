"""An inversion that was interrupted, on disk: everything that changes, and which problem it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import FormatError
from ..files.container import open_container, write_container

FORMAT = "w2wpp.inversion"


@dataclass(frozen=True)
class Checkpoint:
    """A file, and the digest of the problem and of how it is solved: no other problem's file is taken up."""

    path: Path
    of: str

    def save(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Write where a run stands, atomically."""
        config = {"of": self.of, "numbers": dict(numbers)}
        stored = {name: t.detach().cpu() for name, t in tensors.items()}
        write_container(self.path, stored, format=FORMAT, config=config)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers as they were saved; nothing where there is no file.

        Raises FormatError for the checkpoint of another inversion.
        """
        if not self.path.exists():
            return {}, {}
        with open_container(self.path, FORMAT) as file:
            if file.config.get("of") != self.of:
                raise FormatError(
                    f"{self.path} is the checkpoint of an inversion of other pictures, or with other settings. Remove "
                    "it, name another file, or give the pictures and settings that it was made with."
                )
            numbers = file.config.get("numbers")
            if not isinstance(numbers, dict) or not numbers:
                raise FormatError(f"{self.path}: this checkpoint lacks its numbers. Remove it.")
            # A loss is infinite as long as nothing was compared.
            return {n: file.read(n, finite=n != "loss") for n in file.entries}, numbers

    def remove(self) -> None:
        """Delete the file of a run that is over."""
        self.path.unlink(missing_ok=True)


def digest(facts: Mapping[str, Any], tensors: Mapping[str, Tensor | None]) -> str:
    """32 hex digits over JSON facts and numbers."""
    shapes = {name: None if t is None else list(t.shape) for name, t in tensors.items()}
    found = hashlib.sha256(json.dumps([dict(facts), shapes], sort_keys=True).encode())
    for t in tensors.values():
        if t is not None:
            found.update(t.detach().cpu().contiguous().float().numpy().data)
    return found.hexdigest()[:32]
