"""Identities from a space, between two others, or one of several."""

from functools import partial

import torch
from comfy_api.latest import io

from .. import w2wpp
from ..w2wpp.identity import MOST_STEPS
from ..w2wpp.mixtures import sample_mixtures
from .host import tensors
from .types import (
    IdentitySocket,
    People,
    SpaceSocket,
    one_person,
    same_space,
    schema,
    seed_of_people,
)


class SampleIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="W2WPP_SampleIdentity",
            display_name="W2W++ Sample Identity",
            description="Draws people who do not exist from a space. The same seed gives the same people everywhere.",
            search_aliases=[
                "face",
                "character",
                "consistent character",
                "random face",
                "new face",
                "random identity",
                "original character",
                "weights2weights",
            ],
            inputs=[
                SpaceSocket.Input(
                    "space", tooltip="The space to draw from, from W2W++ Load Space."
                ),
                seed_of_people("Who is drawn. One seed, one set of people, on every machine."),
                io.Float.Input(
                    "truncation",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How far from the average person: 0 is the average, 1 as varied as the people that the "
                    "space was learned from, more than 1 is caricature.",
                ),
                io.Int.Input(
                    "count",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="How many people to draw. Each is painted separately further down the graph.",
                ),
                io.Boolean.Input(
                    "mixture",
                    default=False,
                    optional=True,
                    tooltip="For a space of your own LoRAs: mix three of them at random, with weights that sum to one, "
                    "so that what is drawn stays within the collection.",
                ),
            ],
            outputs=[
                IdentitySocket.Output(
                    display_name="identity",
                    tooltip="The drawn people, together with their space.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, space, seed: int, truncation: float, count: int, mixture: bool = False
    ) -> io.NodeOutput:
        generator = torch.Generator().manual_seed(seed)
        draw = partial(sample_mixtures, space) if mixture else space.sample
        with tensors.ordinary_tensors():
            identity = draw(count, generator=generator, truncation=truncation)
        return io.NodeOutput(People(identity, space))


class Interpolate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="W2WPP_Interpolate",
            display_name="W2W++ Interpolate",
            description="Walks from one person to another, in even steps through their space, or past them.",
            search_aliases=["mix faces", "blend identities", "morph", "weights2weights"],
            inputs=[
                IdentitySocket.Input("identity_a", tooltip="Where the walk starts: position 0."),
                IdentitySocket.Input(
                    "identity_b",
                    tooltip="Where position 1 lies. It has to come from the same space.",
                ),
                io.Int.Input(
                    "steps",
                    default=5,
                    min=1,
                    max=64,
                    tooltip="How many people the walk gives, both ends included. 1 gives only the person at "
                    "'position'.",
                ),
                io.Float.Input(
                    "position",
                    default=1.0,
                    min=-1.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Where the walk ends: 0 is a, 0.5 halfway, 1 is b. Beyond 1 it exaggerates what sets b "
                    "apart from a, below 0 the opposite.",
                ),
                io.Combo.Input(
                    "mode",
                    options=["slerp", "lerp"],
                    default="slerp",
                    tooltip="slerp follows the arc on which likely people lie; lerp takes the straight line, which "
                    "passes closer to the average person.",
                ),
            ],
            outputs=[
                IdentitySocket.Output(
                    display_name="identity",
                    tooltip="The people along the walk, from a to the end position.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, identity_a, identity_b, steps: int, position: float, mode: str
    ) -> io.NodeOutput:
        if not 1 <= steps <= MOST_STEPS:
            raise w2wpp.ConfigError(f"A walk takes 1 to {MOST_STEPS:,} steps. Got {steps}.")
        for name, people in (("identity_a", identity_a), ("identity_b", identity_b)):
            one_person(people, name, "W2W++ Interpolate")
        same_space(identity_a, identity_b, ("identity_a", "identity_b"), "W2W++ Interpolate")
        stops = torch.linspace(0.0, position, steps).tolist() if steps > 1 else [position]
        with tensors.ordinary_tensors():
            walk = w2wpp.interpolate(
                identity_a.identity, identity_b.identity, positions=stops, mode=mode
            )
        return io.NodeOutput(People(walk, identity_a.space))


class PickIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="W2WPP_PickIdentity",
            display_name="W2W++ Pick Identity",
            description="Takes one person out of several.",
            search_aliases=["select face", "choose identity", "from batch", "weights2weights"],
            inputs=[
                IdentitySocket.Input("identity", tooltip="Several people."),
                io.Int.Input(
                    "index",
                    default=0,
                    min=0,
                    max=4095,
                    tooltip="Which of them: 0 is the first.",
                ),
            ],
            outputs=[IdentitySocket.Output(display_name="identity", tooltip="That person alone.")],
        )

    @classmethod
    def execute(cls, identity, index: int) -> io.NodeOutput:
        if not 0 <= index < len(identity):
            raise w2wpp.ConfigError(
                f"There is nobody with index {index}: the {len(identity)} people connected to W2W++ Pick Identity go "
                f"from 0 to {len(identity) - 1}."
            )
        return io.NodeOutput(People(identity.identity[index], identity.space))
