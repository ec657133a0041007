"""Folders of official weights2weights files that somebody put among the models: listed as they are, imported at the
first use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ...w2wpp import ConfigError, load_space, open_w2w, write_w2w_space
from ...w2wpp.errors import ResourceError, W2WError
from ...w2wpp.files.container import partial_of
from ...w2wpp.imports.downloads import is_w2w_folder, require_whole
from ...w2wpp.imports.w2w import W2WFolder
from ...w2wpp.imports.w2w_space import space_size, w2w_directions

TITLE = " (official files)"  # what the names of such folders end with in lists
DEEPEST = 4  # folders below those of the category that are searched
ENDING = ".safetensors"

Progress = Callable[[int, int], None]


def official_folders(roots: list[str]) -> dict[str, Path]:
    """The folders that hold official files, or some of them, by the names that a user sees."""
    found = {}
    for root in map(Path, roots):
        for folder in _below(root):
            relative = folder.relative_to(root).as_posix()
            name = "weights2weights" if relative == "." else relative
            found.setdefault(name + TITLE, folder)
    return dict(sorted(found.items()))


def folder_of(name: str, roots: list[str]) -> Path | None:
    """The folder that is meant by a name in the list, or by that of its space before it is imported."""
    return official_folders(roots).get(name.removesuffix(TITLE).removesuffix(ENDING) + TITLE)


def space_of(name: str, roots: list[str]) -> Path | None:
    """Where the space of such a folder is, or will be once it is imported: beside it. The folder may be gone by then.
    None for other names."""
    folder, file = folder_of(name, roots), name.removesuffix(TITLE).removesuffix(ENDING) + ENDING
    for root in map(Path, roots):
        if folder is not None and folder.is_relative_to(root):
            return root / file
        if folder is None and name.endswith(TITLE) and (root / file).is_file():
            return root / file
    return None


def import_folder(
    folder: Path,
    target: Path,
    title: str,
    *,
    components: int = 0,
    labels: Path | None = None,
    say: Callable[[str], None],
    progress: Callable[[str], Progress],
) -> str:
    """Write the space of a folder, unless it was before; what became of it, as text.

    `components` 0 takes as many as there are coefficients of real people for. `say` is told what it costs before it
    begins; `progress(what)` gives the callback that is told how far it is, and may raise to stop it. What was done by
    then is kept.
    """
    require_whole(folder, title)
    source = open_w2w(folder)
    source = source.first(components or source.known)
    if target.exists():
        return _require_same(source, target, title)
    cost = _cost(source, target)
    say(cost)
    directions = None if labels is None else w2w_directions(source, labels)
    write_w2w_space(
        source,
        target,
        name=target.stem,
        directions=directions,
        progress=progress(f"{cost}\ncomponent"),
    )
    return f"imported {title} as {target.name}"


def _require_same(source: W2WFolder, target: Path, title: str) -> str:
    """Raise unless a file that is there is the space of these files already."""
    try:
        space = load_space(target)
    except W2WError as e:
        raise ConfigError(f"{title} can't be imported, because its place is taken: {e}") from e
    if space.provenance.get("source") != source.fingerprint:
        raise ConfigError(
            f"{title} can't be imported as {target.name}: a file of that name is there already and was made of "
            "something else. Rename one of them."
        )
    return f"{title} was imported before, as {target.name}"


def _cost(source: W2WFolder, target: Path) -> str:
    """What an import takes; raises where that is more than there is."""
    size, place = space_size(source), target.parent
    there = partial_of(target)
    done = there.stat().st_size if there.exists() else 0
    free = shutil.disk_usage(place).free
    text = (
        f"{source.components:,} of {source.v.shape[1]:,} components take {_readable(size)} in {place}, "
        f"where {_readable(free)} are free"
    )
    if size - done > free:
        raise ResourceError(
            f"Importing {source.folder.name}: {text}. Make room, or take fewer components with W2W++ Import Files."
        )
    return f"importing {source.folder.name}: {text}" + (
        ", going on where it was stopped" if done else ""
    )


def _below(root: Path) -> Iterator[Path]:
    seen = set()
    for folder, inner, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link in a circle
            inner.clear()
            continue
        seen.add(real)
        if len(Path(folder).relative_to(root).parts) >= DEEPEST:
            inner.clear()
        if is_w2w_folder(names):
            yield Path(folder)


def _readable(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1_000_000_000 else f"{size / 1e6:,.0f} MB"
