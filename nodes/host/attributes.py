"""Attributes that were added to spaces later, in files beside them."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import folder_paths
import torch
from torch import Tensor

from ...w2wpp import Space
from ...w2wpp.attributes import Attributes, load_attributes, save_attributes
from ...w2wpp.errors import ConfigError, W2WError
from . import folders

ENDING = ".attributes.safetensors"


def attribute_names() -> list[str]:
    """The attributes that at least one of the installed spaces can edit."""
    headers = {header.fingerprint: header for header in folders.space_headers()}
    added = {name for fingerprint in headers for name in _added_to(fingerprint).directions}
    return sorted(added.union(*(header.attributes for header in headers.values())))


def attributes_of(space: Space) -> Attributes:
    """The attributes that were added to a space, from all the files beside the spaces; what does not fit it is not
    one of them."""
    found = _added_to(space.fingerprint)
    fits = {n: d for n, d in found.directions.items() if len(d) == space.latent_size}
    return Attributes(found.space_fingerprint, fits, found.made)


def attributes_stamp(fingerprint: str) -> str:
    """Changes whenever the attributes that were added to a space do."""
    return " ".join(f"{path} {folders.file_stamp(path)}" for path in sorted(_files(fingerprint)))


def keep_attribute(space: Space, name: str, direction: Tensor, how: Mapping[str, Any]) -> str:
    """Write an attribute of a space into the file beside the spaces that holds those of its own, and return its name.

    One of the same name is replaced only if it came from the same exploration, as ``how["of"]`` says.
    """
    before = attributes_of(space)
    foreign = name in before.directions and before.made[name].get("of") != how["of"]
    own = {
        a
        for h in folders.space_headers()
        if h.fingerprint == space.fingerprint
        for a in h.attributes
    }
    if foreign or name in own:
        raise ConfigError(
            f"The space '{space.name}' has an attribute {name!r} already, made from other faces. Give the new one "
            "another name in 'attribute'."
        )
    slug = re.sub(r"[^a-z0-9]+", "-", space.name.lower()).strip("-")[:40] or "space"
    file = f"{slug}-{space.fingerprint[:8]}{ENDING}"
    path = Path(folder_paths.models_dir, folders.CATEGORY, file)
    try:
        known = load_attributes(path) if path.exists() else Attributes(space.fingerprint)
    except W2WError as e:
        raise type(e)(f"{e} Move it away to add attributes to '{space.name}'.") from e
    save_attributes(known.with_one(name, direction, how), path, space.name)
    return f"models/{folders.CATEGORY}/{file}"


def _files(fingerprint: str) -> list[str]:
    paths = [path for name, path in folders.model_files().items() if name.endswith(ENDING)]
    return [path for path in paths if _read(path).space_fingerprint == fingerprint]


def _added_to(fingerprint: str) -> Attributes:
    found = Attributes(fingerprint)
    for path in _files(fingerprint):
        for name, direction in _read(path).directions.items():
            found = found.with_one(name, direction, _read(path).made[name])
    return found


def _read(path: str) -> Attributes:
    return _read_at(path, folders.file_stamp(path))


@functools.lru_cache(maxsize=64)
def _read_at(path: str, stamp: str) -> Attributes:
    """Nothing of a file that can't be read. ``stamp`` keys the cache."""
    try:
        with torch.inference_mode(False):
            return load_attributes(path)
    except (W2WError, OSError):
        return Attributes("")
