"""The host's folders: which spaces, identities and LoRAs there are, and where new files go."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import folder_paths
from torch import Tensor

import nodes  # the host's, not this package

from ...w2wpp import Identity, load_space, save_identity
from ...w2wpp.errors import ConfigError, W2WError, WriteError
from ...w2wpp.files.container import peek_metadata
from ...w2wpp.files.names import portable_name
from ...w2wpp.files.writing import is_leftover
from ...w2wpp.imports.downloads import SOURCE
from . import official

PACK = Path(__file__).parents[2]
BUNDLED = PACK / "models"
EXAMPLES = BUNDLED / "example_loras"
EXAMPLE_LORAS = "eight avatars (shipped)"
CATEGORY = "w2wpp"  # the folder under the host's models/, and its name in extra_model_paths.yaml
ENDING = ".safetensors"
SD15_HELP = (
    "A space for Stable Diffusion 1.5 is made from the official weights2weights files, for non-commercial use: "
    f"download the folder 'files' of {SOURCE} into models/{CATEGORY}/, call it 'w2w', and choose 'w2w{official.TITLE}'."
)
SPACE, IDENTITY = "w2wpp.space", "w2wpp.identity"  # what files say that they are


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
    """Names of the files that hold spaces, or may: one that can't be read stays, so that loading it says why. Then
    the folders of official files, which are imported when they are first used."""
    return [*_space_files(), *official.official_folders(category_folders())]


def _space_files() -> list[str]:
    return [name for name, path in model_files().items() if stored_format(path) in (SPACE, None)]


def official_folder(name: str) -> Path | None:
    """The folder of official files that a name stands for, as `space_names` lists it or as its space will be called."""
    return None if name in _space_files() else official.folder_of(name, category_folders())


def category_folders() -> list[str]:
    """Where the user's own spaces are looked for."""
    return [f for f in folder_paths.get_folder_paths(CATEGORY) if f != str(BUNDLED)]


def space_path(name: str) -> str:
    """The path of a space by the name that the node shows; that of a folder of official files need not be there yet.
    Raises an error that names what there is."""
    files = _space_files()
    imported = None if name in files else official.space_of(name, category_folders())
    if imported is not None:
        return str(imported)
    if name not in files:
        raise ConfigError(
            f"There is no space {name!r} in models/{CATEGORY}/. Installed are: {', '.join(space_names()) or 'none'}. "
            f"{SD15_HELP} Then press R to refresh the lists."
        )
    return model_files()[name]


def space_stamp(name: str) -> str:
    """Changes whenever a space does, but not when a folder of official files is imported."""
    folder = official_folder(name)
    return file_stamp(space_path(name) if folder is None else folder / "V.pt")


def space_header(name: str) -> SpaceHeader:
    """What a space file says of itself, without reading its tensors."""
    path = space_path(name)
    return _space_header(path, file_stamp(path))


def space_headers() -> list[SpaceHeader]:
    """Of all installed spaces that can be read."""
    spaces = [path for path in model_files().values() if stored_format(path) == SPACE]
    return [_space_header(path, file_stamp(path)) for path in spaces]


def lora_names() -> list[str]:
    """The LoRA files that the host knows."""
    return _listed("loras")


def lora_path(name: str) -> str:
    """The path of a LoRA by its name in the host's folders."""
    path = _place("loras", name) if name in lora_names() else None
    if path is None:
        raise ConfigError(
            f"There is no LoRA {name!r} in models/loras/. Press R to refresh the list."
        )
    return path


def lora_folders() -> list[str]:
    """The example LoRAs that ship, and the folders in models/loras/ that hold files, the whole of it included."""
    parents = {p.as_posix() for name in lora_names() for p in _slashed(name).parents}
    return [EXAMPLE_LORAS, *sorted(parents)]


def loras_in(folder: str) -> dict[str, Path]:
    """{name: path} of the LoRA files in a folder that `lora_folders` lists, and in its subfolders."""
    if folder == EXAMPLE_LORAS:
        return {path.name: path for path in sorted(EXAMPLES.glob("*" + ENDING))}
    if folder not in lora_folders():
        raise ConfigError(
            f"There is no folder {folder!r} with LoRAs in models/loras/. Press R to refresh the list."
        )
    inside = {
        _slashed(n).as_posix(): n
        for n in lora_names()
        if PurePosixPath(folder) in _slashed(n).parents
    }
    return {name: Path(lora_path(inside[name])) for name in sorted(inside)}


def space_place(name: str) -> Path:
    """Where a space of this name lies among the user's own, whether there is one or not."""
    root = Path(folder_paths.models_dir, CATEGORY)
    if _leads_out(root, name):
        raise ConfigError(
            f"Spaces are saved in models/{CATEGORY}/ only; the name {name[:60]!r} leads out of it."
        )
    return root / (portable_name(name.removesuffix(ENDING), "my LoRAs") + ENDING)


def new_space_file(name: str, *, over: str = "") -> Path:
    """Where a space of this name is saved; only a space that was made of LoRAs is replaced, or one with the same
    coordinates as the fingerprint `over`."""
    root, path = Path(folder_paths.models_dir, CATEGORY), space_place(name)
    if os.path.lexists(path) and not _is_of_loras(path) and not _is_of(path, over):
        raise ConfigError(
            f"models/{CATEGORY}/{path.relative_to(root).as_posix()} is there already, and is no space made of LoRAs. "
            "Choose another name."
        )
    return path


def _is_of(path: Path, fingerprint: str) -> bool:
    with contextlib.suppress(W2WError):
        return load_space(path).fingerprint == fingerprint
    return False


def _is_of_loras(path: Path) -> bool:
    with contextlib.suppress(W2WError):
        return "made_from" in load_space(path).provenance
    return False


def _slashed(name: str) -> PurePosixPath:
    return PurePosixPath(name.replace("\\", "/"))


def identity_files() -> dict[str, str]:
    """Paths of the identity files that can be loaded, by the name that a user sees.

    What can't be read at all is listed where only identities lie, in the output folder, so that loading it says why.
    """
    saved, given = _output_folder(), Path(folder_paths.get_input_directory())
    found = {f"{name} [output]": path for name, path in _files_inside(saved)}
    found = {n: p for n, p in found.items() if stored_format(p) in (IDENTITY, None)}
    others = {f"{name} [input]": path for name, path in _files_inside(given, deep=False)}
    others |= {f"{name} [models]": path for name, path in model_files().items()}
    found |= {name: path for name, path in others.items() if stored_format(path) == IDENTITY}
    return dict(sorted(found.items()))


def identity_path(name: str) -> str:
    """The path of an identity by the name that the node shows."""
    files = identity_files()
    if name not in files:
        raise ConfigError(
            f"There is no identity file {name!r}. Save one with W2W++ Save Identity, or put one into input/, "
            f"output/{CATEGORY}/ or models/{CATEGORY}/, then press R to refresh the list."
        )
    return files[name]


def save_new_identity(identity: Identity, prefix: str, pictures: Tensor | None = None) -> str:
    """Write to a file in the output folder that was not there; returns its name as `identity_files` will list it."""
    root = _output_folder()
    if _leads_out(root, prefix):
        raise ConfigError(
            f"Identities are saved in the output folder only; the prefix {prefix[:60]!r} leads out of it."
        )
    try:
        folder, name, number, _, _ = folder_paths.get_save_image_path(
            portable_name(prefix, "identity"), str(root)
        )
    except OSError as e:  # such as a file where the folder should be
        raise WriteError(f"Identities can't be saved under {prefix!r}: {e.strerror}.") from e
    while True:
        path = Path(folder, f"{name}_{number:05}_.safetensors")
        try:
            save_identity(identity, path, pictures, new=True)
            return f"{path.relative_to(root).as_posix()} [output]"
        except FileExistsError:  # also when somebody else was quicker
            number += 1


def _leads_out(root: Path, prefix: str) -> bool:
    parts = prefix.strip().replace("\\", "/")
    try:
        return bool(PureWindowsPath(parts).drive) or not _is_inside(root / parts, [root])
    except ValueError:  # no path at all; `portable_name` says why
        return False


def model_files() -> dict[str, str]:
    """Paths of all files in the folders of this pack's category, by the name that a user sees."""
    paths = {name: _place(CATEGORY, name) for name in _listed(CATEGORY)}
    return {name: path for name, path in paths.items() if path}


def _listed(category: str) -> list[str]:
    try:
        names = folder_paths.get_filename_list(category)
    except OSError:  # the host remembers a folder that is gone
        folder_paths.filename_list_cache.pop(category, None)
        names = folder_paths.get_filename_list(category)
    return [name for name in names if not _is_left_over(name)]


def _place(category: str, name: str) -> str | None:
    """Where a listed file lies. The host itself does not tell of links that lead nowhere, and of what is no file."""
    places = [os.path.join(folder, name) for folder in folder_paths.get_folder_paths(category)]
    return next((place for place in places if os.path.lexists(place)), None)


def _files_inside(root: Path, *, deep: bool = True) -> Iterator[tuple[str, str]]:
    """(name relative to the folder, path) of what is called *.safetensors in it and really lies in a folder of ours."""
    roots = [_output_folder(), Path(folder_paths.get_input_directory())]
    for folder, inner, names in os.walk(root):
        if not deep:
            inner.clear()
        for name in names:
            path = os.path.join(folder, name)
            relative = Path(os.path.relpath(path, root)).as_posix()
            if name.endswith(ENDING) and not _is_left_over(relative) and _is_inside(path, roots):
                yield relative, path


def _is_inside(path: str | Path, roots: Iterable[Path]) -> bool:
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(os.path.realpath(root)) for root in roots)


def _is_left_over(name: str) -> bool:
    """Whether a file is what a killed writer left behind, or lies in its folder."""
    return any(map(is_leftover, Path(name).parts))


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
    """Changes whenever the file does; nothing where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ""
    return f"{status.st_mtime_ns}-{status.st_size}"


def stored_format(path: str) -> str | None:
    """What a safetensors file says it is; None where it says nothing or can't be read."""
    return _stored_format(path, file_stamp(path))


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
    """``stamp`` keys the cache."""
    try:
        return peek_metadata(path).get("format")
    except W2WError:
        return None
