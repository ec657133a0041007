"""Where the trainings of people keep what they need to go on, and where their LoRAs go."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import folder_paths
from torch import Tensor

from ...w2wpp import ConfigError, Layout, save_lora
from ...w2wpp.errors import W2WError
from ...w2wpp.files.container import peek_metadata
from ...w2wpp.files.names import portable_name
from .folders import CATEGORY, ENDING, space_place

RUN, VECTOR = (
    "w2wpp.training",
    "w2wpp.vector",
)  # in a LoRA's metadata: which training, and which weights


def people_folder(name: str) -> Path:
    """The folder of a training with this name, in models/w2wpp/."""
    if not name.strip():
        raise ConfigError("A training needs a name: write one into 'save_as'.")
    return space_place(name).with_suffix("")


def save_loras(
    names: Sequence[str], vectors: Tensor, layout: Layout, title: str, facts: Mapping[str, str]
) -> str:
    """Write everybody's LoRA [N, P] into models/loras/ under the name of the training; where that is, as text.

    Files that are as they should be stay untouched. Raises ConfigError where a file of something else is in the way.
    """
    folder = Path(folder_paths.get_folder_paths("loras")[0], title)
    paths = [folder / f"{portable_name(name, '')}{ENDING}" for name in names]
    known = [_said(path) for path in paths]
    for path, metadata in zip(paths, known):
        if metadata is not None and metadata.get(RUN) != facts["training"]:
            raise ConfigError(
                f"models/loras/{title}/{path.name} is there already, and is not of this training. Move it away, or "
                "choose another name in 'save_as'; the training itself is kept."
            )
    for path, metadata, w in zip(paths, known, vectors):
        digest = hashlib.sha256(w.contiguous().numpy().tobytes()).hexdigest()[:32]
        if metadata is not None and metadata.get(VECTOR) == digest:
            continue
        texts = {
            RUN: facts["training"],
            VECTOR: digest,
            "w2wpp.base_model": layout.base_model,
            "w2wpp.trigger_prompt": facts["trigger_prompt"],
        }
        metadata = {k: v for k, v in texts.items() if v}
        save_lora(layout.unpack(w), path, alpha=layout.alpha, metadata=metadata)
    return (
        f"LoRAs in models/loras/{title}/, the data set in models/{CATEGORY}/{title}/dataset{ENDING}"
    )


def _said(path: Path) -> dict[str, str] | None:
    """What a LoRA file that is there says of itself; None for none."""
    if not os.path.lexists(path):
        return None
    try:
        return peek_metadata(path)
    except W2WError:
        return {}
