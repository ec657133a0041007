"""The list of what ships: ``models/README.md``, written from the files themselves."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ...files.container import open_container
from ..stages import commands_for

FILES = {
    "avatar-base.safetensors": "the diffusion model of 32x32 avatars",
    "avatar-vae.safetensors": "the autoencoder of the second edition, 128x128; the rest is in the making",
    "avatar-reader.safetensors": "of the second edition: finds a face, reads identity and words",
    "avatar-judge.safetensors": "of the second edition: a reader of another make, which only ever scores",
    "avatar-embedder.safetensors": "reads identity and words from a picture",
    "avatars.safetensors": "the default space (w2w++)",
    "avatars-pca.safetensors": "the linear space of the same size (w2w)",
    "avatars-heldout.safetensors": "LoRAs of held-out people, for `w2wpp evaluate`",
}
HEAD = """# What ships

Weights only. All of it was trained by the commands below from nothing but a seed: no pretrained
weights, no photographs, no data of real people. Licence: Apache-2.0, as the code. This page is
written by `w2wpp avatars list`. Training again does not give the same bytes.

| file | what | bytes | made by | sha256 |
|---|---|---|---|---|
"""


def catalogue(models: Path) -> str:
    """The page for the files in ``models``."""
    lines = []
    for name, what in FILES.items():
        path = models / name
        open_container(path)  # a damaged file must not be listed
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        size = f"{path.stat().st_size:,}"
        made_by = ", ".join(f"`w2wpp {command}`" for command in commands_for(f"models/{name}"))
        lines.append(f"| `{name}` | {what} | {size} | {made_by} | `{digest}` |")
    total = sum((models / name).stat().st_size for name in FILES)
    return HEAD + "\n".join(lines) + f"\n\nTogether {total / 1e6:.1f} MB.\n"
