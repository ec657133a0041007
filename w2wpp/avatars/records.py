"""What is written down beside figures and weights: how they came about, on what machine."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..files.writing import write_text


def hardware() -> str:
    """The machine in a line."""
    return f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}"


def provenance(stage: str, config: Mapping[str, Any], started: float) -> dict[str, Any]:
    """What a trained file says of its making, begun at ``started`` of the monotonic clock."""
    return {
        "made_by": f"w2wpp avatars {stage}",
        "training": dict(config),
        "seconds": round(time.monotonic() - started),
        "hardware": hardware(),
    }


def save_result(path: Path, result: Mapping[str, Any], table: str) -> None:
    """Figures as JSON, and the table of them in Markdown beside it."""
    write_text(path, json.dumps({**result, "hardware": hardware()}, indent=1) + "\n")
    write_text(path.with_suffix(".md"), table.rstrip("\n") + "\n")


def cell(value: Any) -> str:
    """A figure in a table: nothing for None, half of the interval behind an estimate as JSON has it."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return f"{value['mean']:.3f} +- {(value['high'] - value['low']) / 2:.3f}"
    return str(value) if isinstance(value, int) else f"{value:.3f}"
