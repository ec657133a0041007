"""Where the LoRAs of the miniature world sit in its base model."""

from __future__ import annotations

from ...lora.layout import Layout, transformer_layout
from .base import AvatarBase

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
_BLOCKS = (
    "down_blocks.1.attentions.0",
    "mid_block.attentions.0",
    "up_blocks.0.attentions.0",
    "up_blocks.0.attentions.1",
)


def avatar_layout(
    base: AvatarBase, *, targets: tuple[str, ...] = TARGETS, rank: int = 1, alpha: float = 1.0
) -> Layout:
    """The layout of the miniature world's LoRAs: every attention of the base, in diffusers' names."""
    channels = base.config.channels[-1]
    blocks = [(f"{prefix}.transformer_blocks.0", channels) for prefix in _BLOCKS]
    return transformer_layout(
        "avatar",
        "avatar",
        blocks,
        context_dim=base.config.context_dim,
        targets=targets,
        rank=rank,
        alpha=alpha,
    )
