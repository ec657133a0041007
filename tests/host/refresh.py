"""Rewrite what is taken from the running nodes: the English texts and the thumbnails of the example workflows.

Run from the repository's root as ``python -m tests.host.refresh``, where the host tests run.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .conftest import read_workflow, runnable_names, workflow_names
from .server import PROBE, REPO, Result, find_host, lay_out, serving

ENGLISH = REPO / "locales" / "en" / "nodeDefs.json"


def english(object_info: dict[str, Any]) -> dict[str, Any]:
    """The texts of this pack's nodes, as the front end looks them up."""
    return {
        name: _texts(info)
        for name, info in sorted(object_info.items())
        if name.startswith("W2WPP_")
    }


def _texts(info: dict[str, Any]) -> dict[str, Any]:
    inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    outputs = zip(info["output_name"], info["output_tooltips"])
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": {
            name: {"name": name, "tooltip": options["tooltip"]}
            for name, (_, options) in inputs.items()
        },
        "outputs": {
            str(i): {"name": name, "tooltip": tooltip} for i, (name, tooltip) in enumerate(outputs)
        },
    }


def main() -> None:
    from .browser import open_page, open_template, photograph, press_run, show, trouble

    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        lay_out(base, PROBE)
        _pretend_downloads(base)
        with serving(base) as host, open_page() as page:
            texts = english(host.json("/object_info"))
            ENGLISH.write_text(json.dumps(texts, indent=2) + "\n", encoding="utf-8")
            for name in workflow_names():
                thumbnail = REPO / "example_workflows" / f"{name}.jpg"
                open_template(page, host, name, as_graph=True)
                if name in runnable_names():
                    entry = press_run(page, host)
                if found := trouble(page):
                    raise SystemExit(f"{name}: {found}")
                if name not in runnable_names():
                    photograph(page, thumbnail)
                elif any(node["type"] == "W2WPP_Explore" for node in read_workflow(name)["nodes"]):
                    show(page, ".w2wpp-faces", thumbnail)
                else:
                    _save(Result(entry["outputs"], host.output).pictures()[0], thumbnail)


def _save(picture: np.ndarray, path: Path) -> None:
    """A result [H, W, 3] as a thumbnail: faces are what makes somebody open a workflow."""
    width = 1200 if picture.shape[1] > picture.shape[0] else 800
    height = round(width * picture.shape[0] / picture.shape[1])
    big = Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)
    big.save(path, quality=85, optimize=True)


def _pretend_downloads(base: Path) -> None:
    """Empty files for the workflows that are only opened: what a user has who followed their notes."""
    for name in ("checkpoints/v1-5-pruned-emaonly-fp16.safetensors", "w2wpp/w2w.safetensors"):
        path = base / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    shutil.copy(find_host()[0] / "input" / "example.png", base / "input")


if __name__ == "__main__":
    main()
