"""Resume long runs: the state of everything that changes, flattened into one checkpoint file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import reading
from ...training import checkpoint as files

State = Mapping[str, nn.Module | torch.optim.Optimizer | torch.Generator]


def save_run(path: Path | None, state: State, *, step: int, config: Mapping[str, object]) -> None:
    """Write the state at a step; nothing without a path."""
    if path is not None:
        tensors = {
            f"{name}/{key}": value
            for name, part in state.items()
            for key, value in _tensors(part).items()
        }
        files.save_checkpoint(path, _run(config), tensors, {"step": step})


def load_run(path: Path | None, state: State, *, config: Mapping[str, object]) -> int:
    """Restore the state in place and return the step it was saved at; 0 without a checkpoint."""
    if path is None or not path.exists():
        return 0
    tensors, numbers = files.load_checkpoint(path, _run(config))
    with reading(f"{path}: this checkpoint"):
        for name, part in state.items():
            start = f"{name}/"
            mine = {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}
            _restore(part, mine)
        return int(numbers["step"])


def _run(config: Mapping[str, object]) -> str:
    return json.dumps(dict(config), sort_keys=True)


def _tensors(part: nn.Module | torch.optim.Optimizer | torch.Generator) -> dict[str, Tensor]:
    if isinstance(part, torch.Generator):
        return {"state": part.get_state()}
    if isinstance(part, nn.Module):
        return part.state_dict()
    moments = part.state_dict()["state"]
    return {
        f"{i}/{key}": torch.as_tensor(value)
        for i, entry in moments.items()
        for key, value in entry.items()
    }


def _restore(
    part: nn.Module | torch.optim.Optimizer | torch.Generator, tensors: dict[str, Tensor]
) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(tensors["state"])
    elif isinstance(part, nn.Module):
        part.load_state_dict(tensors)
    else:
        saved = part.state_dict()
        for key, value in tensors.items():
            index, name = key.split("/")
            saved["state"].setdefault(int(index), {})[name] = value
        part.load_state_dict(saved)
