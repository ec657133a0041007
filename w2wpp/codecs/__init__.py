"""Codecs by name. A new one is its file and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from .base import Codec, Posterior
from .curved import Curved
from .original import Original
from .original_residual import OriginalResidual
from .pca import PCA
from .tokens import Tokens
from .vae_mlp import MLPVAE
from .vae_skip import SkipVAE

DEEPEST, WIDEST = 100, 2**24  # layers and units; far beyond what anybody trains
CODECS: dict[str, Any] = {
    c.name: c for c in (PCA, Curved, SkipVAE, MLPVAE, Original, OriginalResidual, Tokens)
}
OLDER_NAMES = {c.stored_name: name for name, c in CODECS.items() if c.stored_name}


def build_codec(config: Mapping[str, Any]) -> Codec:
    """A codec with fresh weights from its configuration.

    Raises ConfigError for a name or an option that is not known.
    """
    options = dict(config)
    name = options.pop("name", None)
    name = OLDER_NAMES.get(name, name)
    if not isinstance(name, str) or name not in CODECS:
        raise ConfigError(f"Unknown codec {name!r}; this release has {', '.join(CODECS)}.")
    _check_options(options)
    try:
        return CODECS[name](**options)
    except ConfigError:
        raise
    except (TypeError, ValueError, RuntimeError) as e:
        given = ", ".join(f"{k} = {v!r}" for k, v in options.items())
        raise ConfigError(f"The codec '{name}' can't be made with {given}: {e}.") from e


def _check_options(options: Mapping[str, Any]) -> None:
    """Sizes and shares that no codec has are refused here, before anything is allocated for them."""
    sizes = [options[key] for key in ("coefficient_size", "latent_size") if key in options]
    for key in ("hidden", "inner"):
        widths = options.get(key, ())
        if not isinstance(widths, (list, tuple)) or len(widths) > DEEPEST:
            raise ConfigError(f"'{key}' of a codec is a list of at most {DEEPEST} widths.")
        sizes += widths
    if not all(type(n) is int and 1 <= n <= WIDEST for n in sizes):
        raise ConfigError(
            f"The sizes of a codec are whole numbers from 1 to {WIDEST}. Got {sizes}."
        )
    dropout = options.get("dropout", 0.0)
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ConfigError(f"The dropout of a codec lies in [0, 1). Got {dropout!r}.")


__all__ = ["CODECS", "OLDER_NAMES", "Codec", "Posterior", "build_codec"]
