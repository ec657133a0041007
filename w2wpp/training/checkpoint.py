"""Checkpoints of a training run, in the same kind of file as everything else (no pickle)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import ConfigError, FormatError
from ..files.container import open_container, write_container

FORMAT = "w2wpp.checkpoint"


def save_checkpoint(
    path: str | os.PathLike[str],
    run: str,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
) -> None:
    write_container(path, tensors, format=FORMAT, config={"run": run, "numbers": dict(numbers)})


def load_checkpoint(
    path: str | os.PathLike[str], run: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, numbers) of a run; refuses the checkpoint of another one."""
    with open_container(path, FORMAT) as file:
        if file.config.get("run") != run:
            raise ConfigError(
                f"{path} is the checkpoint of a training with other settings or data. Delete it or "
                "name another file."
            )
        numbers = file.config.get("numbers")
        if not isinstance(numbers, dict):
            raise FormatError(f"{path}: this checkpoint lacks its numbers. Delete it.")
        return {name: file.read(name) for name in file.entries}, numbers
