"""The stages of the miniature world in their order: what each reads and what it writes.

Files are named as `World.at` has them: what ships in models/, checkpoints and data in work/, figures in results/.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..errors import ConfigError
from .places import World

BASE = "models/avatar-base.safetensors"
VAE = "models/avatar-vae.safetensors"
READER = "models/avatar-reader.safetensors"
JUDGE = "models/avatar-judge.safetensors"
EMBEDDER = "models/avatar-embedder.safetensors"
DATASET = "work/loras-common/dataset.safetensors"
SHIPPED = ("models/avatars.safetensors", "models/avatars-pca.safetensors")
HELDOUT = "models/avatars-heldout.safetensors"


@dataclass(frozen=True)
class Stage:
    """One command of `w2wpp avatars`."""

    name: str
    help: str
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    ships: tuple[str, ...] = ()  # written too, or added to, with these flags
    flags: str = "--ship"


STAGES = (
    Stage("vae", "train the autoencoder of the second edition's pictures", outputs=(VAE,)),
    Stage(
        "readers",
        "train the two readers that give ID scores in the second edition",
        outputs=(READER, JUDGE),
    ),
    Stage("base", "train the base model", outputs=(BASE,)),
    Stage("embedder", "train the embedder that gives ID scores", outputs=(EMBEDDER,)),
    Stage("loras", "fine-tune a LoRA for every person", inputs=(BASE,), outputs=(DATASET,)),
    Stage(
        "gate",
        "measure whether a space could learn from the LoRAs",
        inputs=(BASE, EMBEDDER, DATASET),
        outputs=("results/world.json", "results/world.md"),
    ),
    Stage(
        "spaces",
        "train every space that the evaluation compares",
        inputs=(BASE, EMBEDDER, DATASET),
        outputs=("work/spaces",),
        ships=(*SHIPPED, HELDOUT),
    ),
    Stage(
        "start",
        "train the network that starts inversions, into space files",
        inputs=(BASE, EMBEDDER, DATASET),
        outputs=("work/reader.safetensors",),
        ships=SHIPPED,
    ),
    Stage(
        "teach",
        "teach spaces to guess, find and judge people from paintings alone",
        inputs=(BASE, EMBEDDER, *SHIPPED),
        outputs=("work/taught",),
        ships=SHIPPED[:1],
        flags="--keep-answers --ship",
    ),
    Stage(
        "directions",
        "find and measure attribute directions",
        inputs=(BASE, EMBEDDER, DATASET, *SHIPPED),
        outputs=("results/directions.json", "results/directions.md"),
        ships=SHIPPED,
    ),
    Stage(
        "list",
        "write models/README.md: sizes and checksums of what ships",
        inputs=(BASE, EMBEDDER, *SHIPPED, HELDOUT),
        outputs=("models/README.md",),
    ),
)
NAMED = {stage.name: stage for stage in STAGES}


def require_inputs(stage: Stage, world: World, *, given: Collection[str] = ()) -> None:
    """Raise ConfigError unless the files that a stage reads are there, but for those that somebody named others for."""
    for name in stage.inputs:
        if name not in given and not world.at(name).exists():
            raise ConfigError(
                f"'w2wpp avatars {stage.name}' reads {world.at(name)}, which is not there. It comes from "
                f"{' or '.join(repr('w2wpp ' + command) for command in commands_for(name))}."
            )


def commands_for(name: str) -> tuple[str, ...]:
    """The commands that make a file, in their order."""
    made = [(s, "") for s in STAGES if name in s.outputs] + [
        (s, f" {s.flags}") for s in STAGES if name in s.ships
    ]
    return tuple(f"avatars {stage.name}{ship}" for stage, ship in made)
