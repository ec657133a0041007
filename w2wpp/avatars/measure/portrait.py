"""`w2wpp invert`: a picture file of an avatar to an identity file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...files.pictures import open_picture, picture_layers, pixels
from ...identity import save_identity
from ...inversion import Callback, Progress, session
from ...inversion.framing import Framing
from ...inversion.verdict import judge, repainted
from ...spacefile import load_space
from ..world.base import load_base
from ..world.painter import noise_schedule
from ..world.renderer import IMAGE_SIZE
from .inversion import AvatarDenoiser


def invert_file(
    space_path: Path,
    picture_path: Path,
    output: Path,
    *,
    base_path: Path,
    method: str,
    mask_path: Path | None = None,
    seed: int = 0,
    crop: bool = True,
    strict: bool = False,
    callback: Callback | None = None,
    checkpoint: Path | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Find the person of a picture file, write them to ``output``, and say what it took and how far to trust it.

    A mask file is white where the person is. With a checkpoint an interrupted call goes on where it was. Strict refuses
    what should not be trusted, after writing it. The base computes on the device.
    """
    space, base = load_space(space_path), load_base(base_path).to(device)
    picture, opacity = picture_layers(picture_path)
    mask = None
    if mask_path is not None:
        mask = picture_layers(mask_path)[0].mean(1, keepdim=True) / 2 + 0.5  # white counts
    locator = space.start if space.start is not None and space.start.locates else None
    framed = Framing(space.frame, locator, crop=crop)(picture, IMAGE_SIZE, mask=mask, alpha=opacity)
    made = session(
        space,
        framed.pictures,
        method,
        faces=framed.pictures,
        mask=framed.weights if framed.weighted else None,
        seed=seed,
    )
    denoise, schedule = AvatarDenoiser(base, space.layout), noise_schedule(base)
    solution = made.solve(denoise, schedule, callback=callback, checkpoint=checkpoint)
    (gain,) = made.gain(denoise, schedule, solution.identity)
    likeness = None
    if space.start is not None:
        person = solution.identity
        painted = made.painted(denoise, schedule, person.z, person.residual)
        likeness = repainted(space.start, framed, painted)
    verdict = judge(space.start, framed, gain=gain, repaint=likeness)
    how = {**solution.identity.provenance, "picture": picture_path.name, "method": method}
    save_identity(replace(solution.identity, provenance=how), output)
    if strict:
        verdict.require()
    return {
        "identity": str(output),
        "evaluations": solution.evaluations,
        "loss": solution.loss,
        "stop_reason": solution.stop_reason,
        "verdict": verdict.to_json(),
        "framing": {
            "how": list(framed.how),
            "placement": [[round(n, 4) for n in row] for row in framed.placement.tolist()],
            "remarks": list(framed.remarks),
        },
    }


def read_picture(path: Path) -> Tensor:
    """The picture file of an avatar as it is, [1, 3, 32, 32] in [-1, 1]."""
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
