"""An identity as a plain LoRA file, which says where it comes from."""

from __future__ import annotations

import json
import os

from .identity import Identity, without_names
from .lora.write import save_lora
from .space import Space


def export_lora(
    identity: Identity,
    space: Space,
    path: str | os.PathLike[str],
    *,
    format: str = "kohya",
    strength: float = 1.0,
) -> float | None:
    """Write one person's LoRA; returns the share of its energy that one LoRA can keep, where that is not all of it.

    Formats are those of `save_lora`; the strength is advice, stored in the metadata.
    """
    w = identity.vectors(space)  # [1, P]
    lora, alpha = space.layout.unpack(w[0]), space.layout.alpha
    metadata = lora_metadata(space, identity, strength)
    save_lora(lora, path, format=format, alpha=alpha, metadata=metadata)
    return space.kept_energy(identity, w)


def lora_metadata(space: Space, identity: Identity, strength: float = 1.0) -> dict[str, str]:
    """What an exported LoRA says of itself."""
    facts = {
        "w2wpp.space": f"{space.name} {space.version}".strip(),
        "w2wpp.space_fingerprint": space.fingerprint,
        "w2wpp.provenance": json.dumps(without_names(identity.provenance), sort_keys=True),
        "w2wpp.licence": space.licence,
        "w2wpp.base_model": space.base_model,
        "w2wpp.trigger_prompt": space.trigger_prompt,
        "w2wpp.strength": repr(float(strength)),
    }
    return {k: v for k, v in facts.items() if v}
