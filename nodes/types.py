"""What travels on the wires, and the frame that every node shares."""

from dataclasses import dataclass
from inspect import signature

from comfy_api.latest import io

from ..w2wpp import Identity, Space

SpaceSocket = io.Custom("W2W_SPACE")  # carries a Space
IdentitySocket = io.Custom("W2W_IDENTITY")  # carries People
LoraSocket = io.Custom("LORA_MODEL")  # the host's own: a LoRA as a state dict in kohya's spelling


@dataclass(frozen=True)
class People:
    """One identity or several, with the space that they are points of.

    The space rides along so that a graph needs one wire from the sampling to the painting, and so that an identity
    can't be decoded by a space that it does not belong to.
    """

    identity: Identity
    space: Space

    def __len__(self) -> int:
        return len(self.identity)


def schema(*, search_aliases: list[str], **fields) -> io.Schema:
    """A node's schema in the W2W++ category; hosts too old for search aliases go without."""
    if "search_aliases" in io.Schema.__dataclass_fields__:
        fields["search_aliases"] = search_aliases
    return io.Schema(category="W2W++", **fields)


def advanced() -> dict[str, bool]:
    """Arguments of an input that is folded away at first; hosts too old for that show it."""
    return {"advanced": True} if "advanced" in signature(io.Int.Input).parameters else {}
