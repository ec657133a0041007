"""Choosing a person by looking: a grid of faces to click on, and to breed more from."""

import math

import torch
from comfy_api.latest import io

from .. import w2wpp
from ..w2wpp import family as families
from ..w2wpp.attributes import Attributes, attribute_name, extended
from ..w2wpp.errors import W2WError
from ..w2wpp.training.marks import direction_from_marks
from .host import attributes, crowd, folders, tensors
from .host.fingerprints import fingerprint
from .host.progress import announce
from .inputs import guidance, seed_of_pictures, side_of_pictures, steps_of_sampling
from .sheet import draw_sheet
from .types import (
    FacesWidget,
    IdentitySocket,
    People,
    SpaceSocket,
    one_person,
    schema,
    seed_of_people,
)


class Explore(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="W2WPP_Explore",
            display_name="W2W++ Explore",
            description="Choose a new person by looking: paints a grid of faces, and a click takes one. From there it "
            "breeds more like them, crosses two, goes back, and turns marked faces into a new attribute.",
            search_aliases=[
                "face",
                "character",
                "consistent character",
                "choose face",
                "face generator",
                "ip adapter alternative",
                "weights2weights",
            ],
            inputs=[
                SpaceSocket.Input(
                    "space", tooltip="The space to look around in, from W2W++ Load Space."
                ),
                io.Model.Input(
                    "model", tooltip="The model that the space was learned on. It stays as it is."
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt that everybody is painted with, with the space's trigger words.",
                ),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                seed_of_people(
                    "Who is in the first grid. One seed, one family of faces, on every machine; another one begins "
                    "anew."
                ),
                io.Int.Input(
                    "count",
                    default=16,
                    min=1,
                    max=64,
                    tooltip="How many faces a grid shows. More or fewer leaves everybody who they are.",
                ),
                io.Float.Input(
                    "truncation",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How far from the average person new faces are: 0 is the average, 1 as varied as the "
                    "people that the space was learned from, more than 1 is caricature.",
                ),
                io.Float.Input(
                    "radius",
                    default=0.4,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How different 'more like this' may be: 0 is the same person, 1 a stranger.",
                ),
                io.Int.Input(
                    "chosen",
                    default=0,
                    min=0,
                    max=63,
                    tooltip="The number of the chosen face, as a click sets it: 0 is the first.",
                ),
                io.String.Input(
                    "attribute",
                    default="",
                    tooltip="A name for what the faces marked + have in common and those marked - have not. It is "
                    "kept beside the space, for W2W++ Sliders and W2W++ Edit Identity. Without a name marks do "
                    "nothing.",
                ),
                io.String.Input(
                    "family",
                    default="",
                    tooltip="What was bred from whom, locked and marked, as the buttons write it. Empty is the first "
                    "grid.",
                ),
                io.Boolean.Input(
                    "run_on_click",
                    default=True,
                    tooltip="Whether a click on a face also runs the workflow, so that its picture follows.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What the faces should not be like. With it they are painted with guidance, which takes "
                    "twice as long.",
                ),
                IdentitySocket.Input(
                    "around",
                    optional=True,
                    tooltip="Somebody to start from, such as an inverted portrait: the first grid shows them and, "
                    "within the radius, people like them.",
                ),
                steps_of_sampling(
                    "Steps of the sampler for each face. Few are enough to choose by.",
                ),
                guidance(
                    "How strongly the faces follow the prompt, if a negative one is connected.",
                ),
                seed_of_pictures(
                    "Seed of the noise that all faces are painted from. It decides the picture, not the "
                    "person.",
                ),
                side_of_pictures(
                    "Side of a face in pixels. 0 takes the size that the model paints at, up to 384.",
                    "size",
                    most=1024,
                ),
                FacesWidget.Input(
                    "faces",
                    optional=True,
                    tooltip="The faces: click one to choose it. The buttons below breed more from it.",
                ),
            ],
            outputs=[
                IdentitySocket.Output(display_name="identity", tooltip="The chosen person."),
                IdentitySocket.Output(
                    display_name="candidates", tooltip="Everybody in the grid, in its order."
                ),
                io.Image.Output(
                    display_name="grid", tooltip="The grid as one picture, with the faces' numbers."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, family: str | None = None, attribute: str | None = None):
        known = folders.refusal(families.read_family, family)
        return folders.refusal(_name, attribute) if known is True else known

    @classmethod
    def execute(
        cls,
        space,
        model,
        positive,
        vae,
        seed: int,
        count: int,
        truncation: float,
        radius: float,
        chosen: int,
        attribute: str,
        family: str,
        run_on_click: bool,
        steps: int,
        cfg: float,
        picture_seed: int,
        size: int,
        negative=None,
        around=None,
        faces=None,
    ) -> io.NodeOutput:
        if chosen >= count:
            raise w2wpp.ConfigError(
                f"There is no face number {chosen}: the grid shows {count}, from 0 to {count - 1}. Click on one of "
                "them."
            )
        tree = families.read_family(family)
        somebody = (
            None if around is None else one_person(around, "around", "W2W++ Explore").identity
        )
        node = cls.hidden.unique_id
        shown = {"generation": tree.at, "seed": str(seed), "truncation": truncation}
        with tensors.ordinary_tensors():
            people = families.people_of(
                tree, space, seed=seed, truncation=truncation, radius=radius, around=somebody
            )
            grid = people.grid(count)
            space, told = _with_attribute(space, people, tree, attribute, count, seed)
        studio = crowd.Studio(model, vae, positive, negative, size, steps, cfg, picture_seed)
        pictures, keys = crowd.paint_faces(
            grid, space, studio, lambda painted: announce(node, {**shown, "keys": painted})
        )
        sheet = draw_sheet(
            pictures, [str(i) for i in range(count)], columns=math.ceil(count**0.5), chosen=chosen
        )
        ui = {"w2wpp": [{**shown, "keys": keys, "told": told}]}
        return io.NodeOutput(People(grid[chosen], space), People(grid, space), sheet, ui=ui)


def _name(text: str) -> str:
    return attribute_name(text) if text.strip() else ""


def _with_attribute(
    space: w2wpp.Space,
    people: families.People,
    tree: families.Family,
    text: str,
    count: int,
    seed: int,
) -> tuple[w2wpp.Space, str]:
    """The space with the attribute that the marks make, which is kept beside it, and what is to be said of it."""
    name = _name(text)
    if not name or not tree.plus:
        return space, ""
    plus, minus = people.marked(count)
    origin = {"of": [tree.id, seed], "marks": fingerprint(plus.z, minus.z)}
    kept = attributes.attributes_of(space)
    before = kept.made.get(name, {})
    if {key: before.get(key) for key in origin} == origin:  # nobody was marked since
        return _having(
            space, name, kept.directions[name]
        ), f"'{name}' is an attribute of this space."
    others = {n: d for n, d in space.directions.items() if n != name}
    try:
        found = direction_from_marks(plus.z, minus.z, others)
    except W2WError as e:
        raise type(e)(f"The attribute {name!r} can't be made: {e}") from e
    file = attributes.keep_attribute(space, name, found.direction, {**found.report(), **origin})
    return _having(space, name, found.direction), f"'{name}': {found}. Kept in {file}."


def _having(space: w2wpp.Space, name: str, direction: torch.Tensor) -> w2wpp.Space:
    made = Attributes(space.fingerprint).with_one(name, direction, {})
    return extended(space, made, over=True)
