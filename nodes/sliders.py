"""Several attributes of people at once, as sliders."""

import math
from typing import Any

from comfy_api.latest import io

from .. import w2wpp
from ..w2wpp.edits import readings
from .host import attributes, crowd, tensors
from .host.blocking import nothing_because
from .inputs import guidance, seed_of_pictures, steps_of_sampling
from .sheet import draw_sheet
from .types import IdentitySocket, People, SlidersWidget, schema

PLACES = 8
NONE = "none"
USUAL = 2.0  # deviations within which 95 % of people are
NO_STRIP = "Connect 'model', 'positive' and 'vae' to W2W++ Sliders: it paints its strip of before and after with them."


class Sliders(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        known = attributes.attribute_names()
        return schema(
            node_id="W2WPP_Sliders",
            display_name="W2W++ Sliders",
            description="Changes up to eight attributes of people with sliders, and shows before and after.",
            search_aliases=["attribute slider", "age slider", "edit face", "weights2weights"],
            inputs=[
                IdentitySocket.Input("identity", tooltip="Who to change: one person or several."),
                *(part for i in range(PLACES) for part in _slider(i, known)),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="For the strip of before and after: the model that the space was learned on.",
                ),
                io.Conditioning.Input(
                    "positive", optional=True, tooltip="For the strip: the prompt to paint with."
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="For the strip: the VAE that belongs to the model.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="For the strip: what it should not be like. With it the strip is painted with guidance.",
                ),
                steps_of_sampling(
                    "Steps of the sampler for a face of the strip.",
                    optional=True,
                ),
                guidance(
                    "How strongly the strip follows the prompt, if a negative one is connected.",
                    optional=True,
                ),
                seed_of_pictures(
                    "Seed of the noise that the strip is painted from.",
                    optional=True,
                ),
                SlidersWidget.Input(
                    "sliders",
                    optional=True,
                    tooltip="The sliders. The shaded part of each is where 95 % of real people are.",
                ),
            ],
            outputs=[
                IdentitySocket.Output(display_name="identity", tooltip="The same people, changed."),
                io.Image.Output(
                    display_name="strip",
                    tooltip="Everybody before and after, if model, positive and vae are connected.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(
        cls,
        attribute_1: str | None = None,
        attribute_2: str | None = None,
        attribute_3: str | None = None,
        attribute_4: str | None = None,
        attribute_5: str | None = None,
        attribute_6: str | None = None,
        attribute_7: str | None = None,
        attribute_8: str | None = None,
    ):
        return True  # the connected space knows, and an attribute may be made by a node before this one

    @classmethod
    def execute(
        cls,
        identity,
        model=None,
        positive=None,
        vae=None,
        negative=None,
        steps: int = 8,
        cfg: float = 2.0,
        picture_seed: int = 0,
        sliders=None,
        **values,
    ) -> io.NodeOutput:
        space = identity.space
        strengths: dict[str, float] = {}
        for i in range(1, PLACES + 1):
            name, value = values[f"attribute_{i}"], values[f"strength_{i}"]
            if name != NONE and value:
                strengths[name] = strengths.get(name, 0.0) + value
        with tensors.ordinary_tensors():
            changed = (
                w2wpp.edit(identity.identity, space, strengths) if strengths else identity.identity
            )
            at = readings(identity.identity, space)
        strip, keys = nothing_because(NO_STRIP), []
        if model is not None and positive is not None and vae is not None:
            studio = crowd.Studio(model, vae, positive, negative, 0, steps, cfg, picture_seed)
            strip, keys = _strip(identity.identity, changed, space, studio)
        span = {n: [-USUAL - r, USUAL - r] for n, r in at.items()}
        ui: dict[str, Any] = {"w2wpp": [{"span": span, "keys": keys}]}
        return io.NodeOutput(People(changed, space), strip, ui=ui)


def _slider(i: int, known: list[str]) -> list[Any]:
    return [
        io.Combo.Input(
            f"attribute_{i + 1}",
            options=[NONE, *known],
            default=known[i] if i < len(known) else NONE,
            tooltip="What the slider changes. The list holds the attributes of all installed spaces; those that the "
            "people's space lacks are refused.",
        ),
        io.Float.Input(
            f"strength_{i + 1}",
            default=0.0,
            min=-6.0,
            max=6.0,
            step=0.1,
            tooltip="How far, in standard deviations of the attribute among people: 0 leaves it as it is.",
        ),
    ]


def _strip(
    before: Any, after: Any, space: w2wpp.Space, studio: crowd.Studio
) -> tuple[Any, list[str]]:
    """IMAGE of everybody before and after, and the names of both faces of the first."""
    count = len(before)
    faces, keys = crowd.paint_faces(
        w2wpp.concat([before, after]), space, studio, lambda painted: None
    )
    pairs = [face for i in range(count) for face in (faces[i], faces[count + i])]
    columns = 2 * max(1, math.isqrt(count - 1) if count > 1 else 1)
    sheet = draw_sheet(pairs, ["before", "after"] * count, columns=columns)
    return sheet, [keys[0], keys[count]]
