"""Inputs that several nodes have: types, ranges and steps once; what they are for, each node says in its own words."""

from comfy_api.latest import io

from .types import advanced

MOST_SEED = 0xFFFFFFFF  # of a training; seeds of pictures and people are the host's, of 64 bits


def steps_of_sampling(
    tooltip: str,
    name: str = "steps",
    *,
    default: int = 8,
    most: int = 100,
    optional: bool = False,
) -> io.Int.Input:
    """How many steps a picture is painted in."""
    return io.Int.Input(
        name,
        default=default,
        min=1,
        max=most,
        optional=optional,
        tooltip=tooltip,
        **advanced(),
    )


def guidance(tooltip: str, *, optional: bool = False) -> io.Float.Input:
    """The scale of guidance, of use with a negative prompt only."""
    return io.Float.Input(
        "cfg",
        default=2.0,
        min=1.0,
        max=30.0,
        step=0.1,
        optional=optional,
        tooltip=tooltip,
        **advanced(),
    )


def seed_of_pictures(tooltip: str, *, optional: bool = False) -> io.Int.Input:
    """A seed of noise that stands for a picture, not for a person."""
    return io.Int.Input(
        "picture_seed",
        default=0,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        optional=optional,
        tooltip=tooltip,
        **advanced(),
    )


def side_of_pictures(
    tooltip: str, name: str, *, most: int = 2048, optional: bool = False
) -> io.Int.Input:
    """Side of a square picture in pixels; 0 leaves it to the node."""
    return io.Int.Input(
        name,
        default=0,
        min=0,
        max=most,
        step=8,
        optional=optional,
        tooltip=tooltip,
        **advanced(),
    )


def seed_of_training(tooltip: str, *, default: int = 0) -> io.Int.Input:
    """A seed that a training keeps from run to run."""
    return io.Int.Input(
        "seed",
        default=default,
        min=0,
        max=MOST_SEED,
        control_after_generate=False,
        tooltip=tooltip,
        **advanced(),
    )


def name_of_result(tooltip: str, *, default: str = "") -> io.String.Input:
    """What the node's result is saved as."""
    return io.String.Input("save_as", default=default, tooltip=tooltip)
