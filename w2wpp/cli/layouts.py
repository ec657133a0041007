"""What `--layout` names."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError, reading
from ..files.container import open_container
from ..files.text import parse_json, read_json
from ..lora.layout import SD15, Layout

LAYOUTS = {"sd15": SD15}


def find_layout(name: str) -> Layout:
    """The layout that `--layout` names: a built-in one, or that of a space, data set or JSON file."""
    if name in LAYOUTS:
        return LAYOUTS[name]
    path = Path(name)
    if path.suffix == ".json":
        with reading(f"{path}: the layout"):
            return Layout.from_json(read_json(path))
    with open_container(path) as file:
        config = parse_json(file.metadata.get("config", "{}"), f"{path}: its configuration")
    if not isinstance(config, dict) or "layout" not in config:
        raise ConfigError(
            f"{path} holds no layout; name {', '.join(LAYOUTS)}, a space or a data set."
        )
    with reading(f"{path}: its layout"):
        return Layout.from_json(config["layout"])
