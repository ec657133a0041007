"""What every verb asks of its numbers and of the name of its output, before it does any work."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import ConfigError
from ..files.writing import writable_target

MOST = 2**31 - 1  # of anything that is counted
SEEDS = 2**64 - 1
LEAST = {  # of options that take no zero; the others have a meaning for it, or say themselves
    "n": 1,
    "steps": 1,
    "components": 1,
    "latent": 1,
    "hidden": 1,
    "workers": 1,
    "processes": 1,
    "sampled": 1,
    "size": 8,
    "width": 8,
    "embedder_size": 8,
}
FILES = (
    "labels",
    "checkpoint",
    "space",
    "layout",
    "data",
    "painted",
    "mask",
    "embedder",
    "embeddings",
)
INTO_FOLDERS = ("demo", "avatars")


def check_arguments(args: argparse.Namespace) -> None:
    """Raise for numbers that no verb can mean, and for outputs that are no file."""
    for name, value in _numbers(vars(args)):
        option = f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{option} takes a finite number. Got {value}.")
        if isinstance(value, int):
            least, most = LEAST.get(name, 0), SEEDS if name == "seed" else MOST
            if name == "seed" and not 0 <= value <= SEEDS:
                raise ConfigError(f"A seed lies between 0 and 2^64 - 1. Got {value}.")
            if not least <= value <= most:
                raise ConfigError(
                    f"{option} takes whole numbers from {least} to {most}. Got {value}."
                )
    for name in FILES:
        if getattr(args, name, None) == "":  # such as of a variable of the shell that is not set
            raise ConfigError(f"--{name} is empty, expected the name of a file.")
    output = getattr(args, "output", None)
    folder = args.verb in INTO_FOLDERS or getattr(args, "format", "") == "peft"
    if output is not None and not folder:
        writable_target(output)


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    """(name, number) of every option, also of those that take several."""
    for name, value in values.items():
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(one, (int, float)) and not isinstance(one, bool):
                yield name, one
