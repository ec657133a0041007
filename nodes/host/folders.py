"""The host's folders: which spaces, identities and LoRAs there are, and where new files go."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import folder_paths
from safetensors import SafetensorError, safe_open

import nodes  # the host's, not this package

from ...w2wpp import load_space
from ...w2wpp.errors import ConfigError, W2WError

PACK = Path(__file__).parents[2]
BUNDLED = PACK / "models"
CATEGORY = "w2wpp"  # the folder under the host's models/, and its name in extra_model_paths.yaml
PATTERN = "*.safetensors"
SD15_HELP = (
    "A space for Stable Diffusion 1.5 is made from the official weights2weights files, for non-commercial use: "
    "download the folder 'files' of https://huggingface.co/snap-research/weights2weights and run "
    "'w2wpp import-w2w files -o models/w2wpp/w2w.safetensors'."
)


def register_folders() -> None:
    """Look for spaces in models/w2wpp/ and wherever extra_model_paths.yaml says, then among those the pack ships."""
    own = os.path.join(folder_paths.models_dir, CATEGORY)
    with contextlib.suppress(OSError):  # a read-only models folder still leaves the bundled spaces
        os.makedirs(own, exist_ok=True)
    known, _ = folder_paths.folder_names_and_paths.get(CATEGORY, ([], set()))
    folders = list(dict.fromkeys([*known, own, str(BUNDLED)]))
    folder_paths.folder_names_and_paths[CATEGORY] = (folders, {".safetensors"})


def register_help() -> None:
    """Serve the help pages where the front end looks: under the pack's folder name up to its first dot.

    The host itself serves them under the whole name, which differs for a release unzipped as "w2wpp-0.1.0".
    """
    nodes.EXTENSION_WEB_DIRS.setdefault(PACK.name.partition(".")[0], str(PACK / "web"))


def space_names() -> list[str]:
    """Names of the files that hold spaces, or may: one that can't be read stays, so that loading it says why."""
    return [name for name, path in _model_files().items() if _may_hold_space(path)]


def space_path(name: str) -> str:
    if name not in space_names():
        raise ConfigError(
            f"There is no space {name!r} in models/{CATEGORY}/. Installed are: {', '.join(space_names()) or 'none'}. "
            f"{SD15_HELP} Then press R to refresh the lists."
        )
    return _model_files()[name]


def space_header(name: str) -> SpaceHeader:
    path = space_path(name)
    return _space_header(path, file_stamp(path))


def attribute_names() -> list[str]:
    """The attributes that at least one of the installed spaces can edit."""
    return sorted({a for name in space_names() for a in space_header(name).attributes})


def lora_names() -> list[str]:
    return folder_paths.get_filename_list("loras")


def lora_path(name: str) -> str:
    if name not in lora_names():
        raise ConfigError(
            f"There is no LoRA {name!r} in models/loras/. Press R to refresh the list."
        )
    return folder_paths.get_full_path_or_raise("loras", name)


def identity_files() -> dict[str, str]:
    """Paths of the identity files that can be loaded, by the name that a user sees."""
    saved, given = _output_folder(), Path(folder_paths.get_input_directory())
    found = {
        f"{path.relative_to(saved).as_posix()} [output]": path for path in saved.rglob(PATTERN)
    }
    found |= {f"{path.name} [input]": path for path in given.glob(PATTERN)}
    roots = (saved.resolve(), given.resolve())
    inside = {n: str(p) for n, p in found.items() if any(map(p.resolve().is_relative_to, roots))}
    inside |= {f"{name} [models]": path for name, path in _model_files().items()}
    return {name: inside[name] for name in sorted(inside) if _holds_identity(inside[name])}


def identity_path(name: str) -> str:
    files = identity_files()
    if name not in files:
        raise ConfigError(
            f"There is no identity file {name!r}. Save one with W2W++ Save Identity, or put one into input/, "
            f"output/{CATEGORY}/ or models/{CATEGORY}/, then press R to refresh the list."
        )
    return files[name]


def new_identity_file(prefix: str) -> tuple[Path, str]:
    """A path in the output folder where nothing is yet, and its name as `identity_files` will list it."""
    root = _output_folder()
    prefix = prefix.strip().replace("\\", "/") or "identity"
    if PureWindowsPath(prefix).drive or not (root / prefix).resolve().is_relative_to(
        root.resolve()
    ):
        raise ConfigError(
            f"Identities are saved in the output folder only; the prefix {prefix!r} leads out of it."
        )
    folder, name, number, _, _ = folder_paths.get_save_image_path(prefix, str(root))
    while (path := Path(folder, f"{name}_{number:05}_.safetensors")).exists():
        number += 1
    return path, f"{path.relative_to(root).as_posix()} [output]"


def _model_files() -> dict[str, str]:
    names = folder_paths.get_filename_list(CATEGORY)
    paths = {name: folder_paths.get_full_path(CATEGORY, name) for name in names}
    return {name: path for name, path in paths.items() if path}  # a link may lead nowhere


def _output_folder() -> Path:
    return Path(folder_paths.get_output_directory(), CATEGORY)


def refusal(find: Callable[[str], object], value: str | None) -> bool | str:
    """What a node's validate_inputs answers: why the value is not there, or True. A linked value comes later."""
    try:
        if value is not None:
            find(value)
    except W2WError as e:
        return str(e)
    return True


def file_stamp(path: str | Path) -> str:
    """Changes whenever the file does."""
    status = os.stat(path)
    return f"{status.st_mtime_ns}-{status.st_size}"


def _may_hold_space(path: str) -> bool:
    return _stored_format(path, file_stamp(path)) in ("w2wpp.space", None)


def _holds_identity(path: str) -> bool:
    return _stored_format(path, file_stamp(path)) == "w2wpp.identity"


@dataclass(frozen=True)
class SpaceHeader:
    """What the lists need to know of a space."""

    fingerprint: str = ""
    attributes: tuple[str, ...] = ()


@functools.lru_cache(maxsize=1024)
def _space_header(path: str, stamp: str) -> SpaceHeader:
    """Nothing of a space that can't be read. ``stamp`` keys the cache."""
    try:
        space = load_space(path)
    except W2WError:
        return SpaceHeader()
    return SpaceHeader(space.fingerprint, tuple(space.directions))


@functools.lru_cache(maxsize=1024)
def _stored_format(path: str, stamp: str) -> str | None:
    """What a safetensors file says it is; None where it says nothing. ``stamp`` keys the cache."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format")
    except (OSError, SafetensorError):
        return None
