"""Attributes that were added to a space later: a small file beside it, bound to its coordinates.

    metadata   format "w2wpp.attributes", format_version "1", config (JSON: space_fingerprint,
               space, attributes {name: how it was made})
    direction.<name> [d], single precision

The space file stays as it is, so one that ships or is shared can be extended without a copy.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError, FormatError
from .files.container import open_container, write_container
from .identity import require_same_space
from .space import Space

FORMAT = "w2wpp.attributes"
PREFIX = "direction."
LONGEST_NAME = 64


@dataclass(frozen=True, eq=False)
class Attributes:
    """Directions [d] of one space, and how each was made."""

    space_fingerprint: str
    directions: Mapping[str, Tensor] = field(default_factory=dict)
    made: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def with_one(self, name: str, direction: Tensor, how: Mapping[str, Any]) -> Attributes:
        """Another direction [d] added, or one of the same name replaced."""
        return Attributes(
            self.space_fingerprint,
            {**self.directions, name: direction},
            {**self.made, name: dict(how)},
        )


def extended(space: Space, attributes: Attributes, *, over: bool = False) -> Space:
    """The space with more attributes; those that it has stay, unless new ones go `over` them."""
    require_same_space(attributes.space_fingerprint, space.fingerprint, space.name)
    known, new = space.directions, attributes.directions
    more = replace(space, directions={**known, **new} if over else {**new, **known})
    vars(more)["fingerprint"] = space.fingerprint  # directions are no part of it
    return more


def attribute_name(text: str) -> str:
    """A name for an attribute, without the spaces around it; raises if it can't be one."""
    name = " ".join(text.split())
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise ConfigError(
            f"The name of an attribute has 1 to {LONGEST_NAME} characters that can be printed. Got {text!r}."
        )
    return name


def save_attributes(attributes: Attributes, path: str | os.PathLike[str], space: str = "") -> None:
    """Write them, atomically; `space` is the name that a reader may want to know."""
    tensors = {PREFIX + n: t.detach().cpu().float() for n, t in attributes.directions.items()}
    config = {
        "space_fingerprint": attributes.space_fingerprint,
        "space": space,
        "attributes": {n: dict(attributes.made.get(n, {})) for n in attributes.directions},
    }
    write_container(path, tensors, format=FORMAT, config=config)


def load_attributes(path: str | os.PathLike[str]) -> Attributes:
    """Read them; raises unless all are finite directions of one size."""
    with open_container(path, FORMAT) as file:
        fingerprint, made = file.config.get("space_fingerprint"), file.config.get("attributes", {})
        if not isinstance(fingerprint, str) or not isinstance(made, dict):
            raise FormatError(f"{path}: the attributes do not say which space they belong to.")
        directions = {}
        for name in sorted(file.entries):
            if name.startswith(PREFIX):
                file.require(name, (None,), torch.float32)
                directions[name.removeprefix(PREFIX)] = file.read(name)
    if len({len(t) for t in directions.values()}) > 1:
        raise FormatError(f"{path}: the attributes of one space are of one size.")
    how = {n: made[n] if isinstance(made.get(n), dict) else {} for n in directions}
    return Attributes(fingerprint, directions, how)
