"""What ships with this release: trained spaces and the miniature world's models."""

from __future__ import annotations

from pathlib import Path

from .errors import ConfigError

PACKAGE = Path(__file__).resolve().parent


def shipped_folder(name: str) -> Path:
    """The folder `models` or `example_workflows`: inside an installed package, beside it in a checkout."""
    installed = PACKAGE / name
    return installed if installed.is_dir() else PACKAGE.parent / name


def shipped(name: str = "avatars.safetensors") -> Path:
    """The path of a file that ships, the default space of avatars if none is named.

    Raises ConfigError, with the names that there are, for any other.
    """
    path = shipped_folder("models") / name
    if path.is_file():
        return path
    found = sorted(p.name for p in path.parent.glob("*.safetensors"))
    raise ConfigError(
        f"No file '{name}' ships with this installation. In {path.parent} there "
        + (f"are: {', '.join(found)}." if found else "is none; install the whole package.")
    )
