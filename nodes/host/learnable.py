"""What is there that a space can be learned from: data sets, folders of LoRAs, official files."""

from __future__ import annotations

from pathlib import Path

from ...w2wpp.errors import ConfigError, W2WError
from ...w2wpp.files.container import peek_metadata
from ...w2wpp.lora.shared_layout import layout_of_file
from ...w2wpp.training.dataset import VectorDataset, load_dataset
from ...w2wpp.training.gather import gather_loras
from . import folders
from .official import TITLE as OFFICIAL
from .official import require_whole
from .people_files import RUN

DATASET = " (data set)"
LORAS = "loras/"


def learnable() -> list[str]:
    """Names of the data sets in models/w2wpp/, of the folders of official files there, and of the folders in
    models/loras/."""
    return [
        *(name + DATASET for name in _datasets()),
        *(name for name in folders.space_names() if name.endswith(OFFICIAL)),
        *(LORAS + name for name in folders.lora_folders() if name != folders.EXAMPLE_LORAS),
    ]


def require_learnable(name: str) -> None:
    """Raise ConfigError for a name that `learnable` does not list."""
    if name not in learnable():
        raise ConfigError(
            f"There is nothing called {name!r} to learn from. Press R to refresh the list."
        )


def stamp_of(name: str) -> str:
    """Changes whenever what is behind a name does."""
    if name.endswith(DATASET):
        return folders.file_stamp(_datasets()[name.removesuffix(DATASET)])
    if name.endswith(OFFICIAL):
        return folders.space_stamp(name)
    files = folders.loras_in(name.removeprefix(LORAS))
    return " ".join(f"{n} {folders.file_stamp(p)}" for n, p in files.items())


def official_source(name: str) -> Path | None:
    """The folder of official files behind a name, whole; None for other names."""
    folder = folders.official_folder(name) if name.endswith(OFFICIAL) else None
    if folder is not None:
        require_whole(folder, f"models/{folders.CATEGORY}/{name.removesuffix(OFFICIAL)}")
    return folder


def open_data(name: str, work: Path) -> tuple[VectorDataset, str]:
    """The data set behind a name, and what was done to the LoRAs of a folder to make one, in the folder ``work``."""
    if name.endswith(DATASET):
        return load_dataset(_datasets()[name.removesuffix(DATASET)]), ""
    paths = list(folders.loras_in(name.removeprefix(LORAS)).values())
    first = _metadata(paths[0])
    layout = layout_of_file(paths[0], first.get("w2wpp.base_model", ""))
    one_run = first.get(RUN, "") and all(_metadata(p).get(RUN) == first[RUN] for p in paths)
    gauge = "keep" if one_run else "first"
    work.mkdir(parents=True, exist_ok=True)
    data = gather_loras(
        sorted({p.parent for p in paths}),
        work / "gathered.safetensors",
        layout,
        heldout=0.0,
        gauge=gauge,
        assume_family=True,
    )
    how = (
        "of one training of W2W++ Train People, so they are taken as they are"
        if one_run
        else "of trainings that are not known, so each is turned towards the first"
    )
    return data, f"{len(data)} LoRAs, {how}"


def _datasets() -> dict[str, str]:
    """{name: path} of the data sets among the models."""
    files = folders.model_files()
    return {n: p for n, p in files.items() if folders.stored_format(p) == "w2wpp.dataset"}


def _metadata(path: Path) -> dict[str, str]:
    try:
        return peek_metadata(path)
    except W2WError:
        return {}
