"""Codecs by name. A new one is its file and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import ConfigError
from .base import Codec, Posterior
from .original import Seed
from .original_residual import SeedResidual
from .pca import PCA
from .vae_mlp import MLPVAE
from .vae_skip import SkipVAE

CODECS: dict[str, Any] = {c.name: c for c in (PCA, SkipVAE, MLPVAE, Seed, SeedResidual)}


def build_codec(config: Mapping[str, Any], *, operations: Any = nn) -> Codec:
    """A codec with fresh weights from its configuration; `operations` makes the layers."""
    options = dict(config)
    name = options.pop("name", None)
    if name not in CODECS:
        raise ConfigError(f"Unknown codec {name!r}; this release has {', '.join(CODECS)}.")
    try:
        return CODECS[name](**options, operations=operations)
    except TypeError as e:
        raise ConfigError(f"The codec '{name}' does not take the options {sorted(options)}.") from e


__all__ = ["CODECS", "Codec", "Posterior", "build_codec"]
