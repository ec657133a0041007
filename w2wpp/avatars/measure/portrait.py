"""`w2wpp invert`: a picture file of an avatar to an identity file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import ConfigError
from ...files.pictures import open_picture, pixels
from ...identity import save_identity
from ...inversion import Callback, Progress
from ...spacefile import load_space
from ..world.base import load_base
from ..world.renderer import IMAGE_SIZE
from .inversion import invert_pictures


def invert_file(
    space_path: Path,
    picture_path: Path,
    output: Path,
    *,
    base_path: Path,
    method: str,
    mask_path: Path | None = None,
    seed: int = 0,
    callback: Callback | None = None,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Find the person of a picture file, write them to ``output``, and say what it took.

    A mask file is white where the picture counts. With a checkpoint an interrupted call goes on where it was.
    """
    picture = read_picture(picture_path)
    mask = None
    if mask_path is not None:
        mask = read_picture(mask_path).mean(1, keepdim=True) / 2 + 0.5  # white counts
    solution = invert_pictures(
        load_base(base_path),
        load_space(space_path),
        picture,
        method,
        mask=mask,
        seed=seed,
        callback=callback,
        checkpoint=checkpoint,
    )
    how = {**solution.identity.provenance, "picture": picture_path.name, "method": method}
    save_identity(replace(solution.identity, provenance=how), output)
    return {
        "identity": str(output),
        "evaluations": solution.evaluations,
        "loss": solution.loss,
        "stop_reason": solution.stop_reason,
    }


def read_picture(path: Path) -> Tensor:
    """A picture file as [1, 3, 32, 32] in [-1, 1]."""
    picture = open_picture(path)
    if picture.size != (IMAGE_SIZE, IMAGE_SIZE):
        raise ConfigError(
            f"The avatars' pictures are {IMAGE_SIZE} x {IMAGE_SIZE}. Got {picture.width} x "
            f"{picture.height} in {path}; scale it down first."
        )
    return pixels(picture)


def say(log: Any) -> Any:
    """A callback that logs each step."""

    def callback(progress: Progress) -> None:
        log(f"{progress.stage} step {progress.step}/{progress.steps} loss {progress.loss:.5f}")

    return callback
