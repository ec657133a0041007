"""What travels on the wires, and the frame that every node shares."""

from dataclasses import dataclass
from inspect import signature

from comfy_api.latest import io

from ..w2wpp import Identity, Space
from ..w2wpp.errors import ConfigError, SpaceMismatch

SpaceSocket = io.Custom("W2W_SPACE")  # carries a Space
IdentitySocket = io.Custom("W2W_IDENTITY")  # carries People
DatasetSocket = io.Custom("W2W_DATASET")  # carries a VectorDataset
LoraSocket = io.Custom("LORA_MODEL")  # the host's own: a LoRA as a state dict in kohya's spelling
HooksSocket = io.Custom("HOOKS")  # the host's own: what acts on a part of the picture

# Widgets of web/js/. Nothing travels through them: what is chosen stands in plain inputs beside them.
FacesWidget = io.Custom("W2WPP_FACES")
SlidersWidget = io.Custom("W2WPP_SLIDERS")
SavedFacesWidget = io.Custom("W2WPP_SAVED_FACES")


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


def seed_of_people(tooltip: str) -> io.Int.Input:
    """A seed that stands for somebody: it stays as it is after a run, where the host lets a node ask for that."""
    fixed = getattr(getattr(io, "ControlAfterGenerate", None), "fixed", True)
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        control_after_generate=fixed,
        tooltip=tooltip,
    )


def one_person(people: People, name: str, node: str) -> People:
    """The people of an input that takes one person; raises if they are several."""
    if len(people) != 1:
        raise ConfigError(
            f"'{name}' of {node} takes one person, and {len(people)} are connected. Choose one of them with W2W++ "
            "Pick Identity."
        )
    return people


def same_space(first: People, other: People, names: tuple[str, str], node: str) -> None:
    """Raises if the people of two inputs are of different spaces."""
    if first.space.fingerprint != other.space.fingerprint:
        raise SpaceMismatch(
            f"{node} takes people of one space. '{names[0]}' are of {space_title(first.space)}, '{names[1]}' of "
            f"{_told_apart(other.space, first.space)}, where the same numbers mean another face."
        )


def space_title(space: Space) -> str:
    return f"'{space.name} {space.version}'".replace(" '", "'")


def _told_apart(space: Space, other: Space) -> str:
    same = space_title(space) == space_title(other)
    return f"another space called {space_title(space)}" if same else space_title(space)


def advanced() -> dict[str, bool]:
    """Arguments of an input that is folded away at first; hosts too old for that show it."""
    return {"advanced": True} if "advanced" in signature(io.Int.Input).parameters else {}
