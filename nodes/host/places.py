"""Files and folders anywhere in the host's own folders, by the paths that a user writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import folder_paths

from ...w2wpp.errors import ConfigError
from ...w2wpp.imports.downloads import NEEDED, OPTIONAL, is_w2w_folder
from .folders import CATEGORY, category_folders
from .official import DEEPEST

CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin")
EXPORT = "adapter_model.safetensors"  # what diffusers calls a LoRA, in a folder of its own
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def place_of(text: str) -> Path:
    """The file or folder of a path such as models/w2wpp/w2w, input/vae.pt or an absolute one. Raises ConfigError for
    one that is not there or not in a folder of the host's."""
    written = text.strip().replace("\\", "/")
    first, _, rest = written.partition("/")
    bases = _bases()
    tried = [base / rest for base in bases.get(first, ())] or [Path(written)]
    try:
        found = next((p for p in tried if os.path.lexists(p)), None)
        inside = found is not None and any(
            Path(os.path.realpath(found)).is_relative_to(os.path.realpath(root))
            for root in (*_roots(), *(b for some in bases.values() for b in some))
        )
    except (OSError, ValueError):  # no path at all
        found, inside = None, False
    if found is None or not written:
        raise ConfigError(
            f"There is no file or folder {text[:120]!r}. A path begins with models/, input/ or output/, as in "
            "models/w2wpp/w2w, or is absolute."
        )
    if not inside:
        raise ConfigError(
            f"{text[:120]!r} lies outside of ComfyUI's folders. Put it into models/w2wpp/ or input/, or name its "
            "folder in extra_model_paths.yaml."
        )
    return found


def importable() -> list[str]:
    """Paths, as `place_of` takes them, of what may be official files, checkpoints of the original w2w++, or LoRAs that
    diffusers exported, in models/w2wpp/ and in the input folder."""
    roots = [(f"models/{CATEGORY}", root) for root in category_folders()]
    found: dict[str, None] = {}
    for title, root in (*roots, ("input", folder_paths.get_input_directory())):
        for folder, names in _below(Path(root)):
            where = f"{title}/{folder.as_posix()}".removesuffix("/.")
            official = is_w2w_folder(names)
            if official or EXPORT in names:
                found[where] = None
            others = set(names) - (NEEDED.keys() | OPTIONAL.keys() if official else set())
            for name in sorted(others):
                if name.endswith(CHECKPOINTS):
                    found[f"{where}/{name}"] = None
    return sorted(found)


def people_folders() -> list[str]:
    """Paths, as `place_of` takes them, of the folders in the input folder that have folders of pictures in them."""
    root = Path(folder_paths.get_input_directory())
    parents = {
        folder.parent.as_posix()
        for folder, names in _below(root)
        if folder.parts and any(name.lower().endswith(PICTURES) for name in names)
    }
    return sorted(f"input/{p}".removesuffix("/.") for p in parents)


def _below(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """(folder relative to the root, names of the files in it)."""
    for folder, inner, names in os.walk(root, followlinks=True):
        relative = Path(folder).relative_to(root)
        inner[:] = sorted(n for n in inner if not n.startswith("."))
        if len(relative.parts) >= DEEPEST:
            inner.clear()
        yield relative, names


def _bases() -> dict[str, list[Path]]:
    """What the first word of a path may be, and where it leads."""
    return {
        "models": [Path(folder_paths.models_dir), *_elsewhere()],
        "input": [Path(folder_paths.get_input_directory())],
        "output": [Path(folder_paths.get_output_directory())],
    }


def _elsewhere() -> list[Path]:
    """Parents of this category's folders that extra_model_paths.yaml names, so that models/w2wpp/ is any of them."""
    return [Path(f).parent for f in category_folders() if Path(f).name == CATEGORY]


def _roots() -> list[str]:
    """All folders of models that the host knows, wherever they are."""
    return [f for folders, *_ in folder_paths.folder_names_and_paths.values() for f in folders]
