"""Teaching a space to guess people from their pictures, with nothing but the user's own model."""

import json
from dataclasses import replace
from pathlib import Path

from comfy_api.latest import io, ui
from PIL import Image

from .. import w2wpp
from ..w2wpp.errors import ConfigError
from ..w2wpp.sight import known_by
from ..w2wpp.training.fit_locator import LocatorTraining
from ..w2wpp.training.fit_paintings import PaintingsTraining, fewest_people, fit_paintings
from ..w2wpp.training.start_table import painted_people
from .host import folders, tensors
from .host.compute import host_compute
from .host.paintings import Painter, draw_people, paint_people
from .host.progress import Watch
from .host.vision import HostVision
from .inputs import guidance, name_of_result, side_of_pictures, steps_of_sampling
from .types import SpaceSocket, advanced, schema, seed_of_people

OTHER_SCENES = ("scene_2", "scene_3", "scene_4")
LEAST_SEEN = 128  # pixels per side of paintings that a vision model looks at


class TrainStartNetwork(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="W2WPP_TrainStartNetwork",
            display_name="W2W++ Train Start Network",
            description="Teaches a space to guess a person from their picture, to find faces in it, and to tell when "
            "it can't. It paints people of the space with your model and learns from that; no photographs, no labels.",
            search_aliases=[
                "photo to identity",
                "face inversion",
                "hypernetwork",
                "amortised start",
                "weights2weights",
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that the space was learned on. It stays as it is."
                ),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.Conditioning.Input(
                    "scene_1",
                    tooltip="A prompt that people are painted with, with the space's trigger words.",
                ),
                SpaceSocket.Input("space", tooltip="The space to teach, from W2W++ Load Space."),
                io.Int.Input(
                    "people",
                    default=1000,
                    min=64,
                    max=100000,
                    tooltip="How many people are painted, each in every scene and at least twice. The more, the better "
                    "the guess; a few hundred are a beginning.",
                ),
                name_of_result(
                    "Name of a file in models/w2wpp/ for the space with its start network. Leave empty to "
                    "pass it on without saving.",
                ),
                seed_of_people("Who is painted, and how the network begins."),
                *(
                    io.Conditioning.Input(
                        name,
                        optional=True,
                        tooltip="Another prompt: other light, background or expression teaches what of a picture is "
                        "not the person.",
                    )
                    for name in OTHER_SCENES
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What the paintings should not be like. With it they are painted with guidance, which "
                    "takes twice as long.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="A pretrained vision model, from Load CLIP Vision: people are then read by what it sees in "
                    "their heads, instead of by a network that learns to see. W2W++ Invert from Image then wants the "
                    "same model.",
                ),
                steps_of_sampling(
                    "Sampling steps of each painting.",
                    "paint_steps",
                    default=12,
                    most=200,
                    optional=True,
                ),
                guidance(
                    "Guidance of the paintings, where a negative prompt is connected.",
                    optional=True,
                ),
                side_of_pictures(
                    "Side of the paintings in pixels. 0 uses the model's own size, up to 512.",
                    "paint_size",
                    optional=True,
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=1000000,
                    optional=True,
                    tooltip="Training steps of the network that reads and of the one that finds faces. 0 uses the "
                    "recommended number.",
                    **advanced(),
                ),
                io.Int.Input(
                    "look_size",
                    default=64,
                    min=16,
                    max=256,
                    step=8,
                    optional=True,
                    tooltip="Side of the pictures in pixels that the network sees. Larger sees more and learns "
                    "slower. With clip_vision at least 128.",
                    **advanced(),
                ),
            ],
            outputs=[
                SpaceSocket.Output(
                    display_name="space", tooltip="The same space, with its start network."
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="What was painted and learned, and how well people are guessed who were kept apart.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        vae,
        scene_1,
        space,
        people: int,
        save_as: str,
        seed: int,
        scene_2=None,
        scene_3=None,
        scene_4=None,
        negative=None,
        clip_vision=None,
        paint_steps: int = 12,
        cfg: float = 2.0,
        paint_size: int = 0,
        steps: int = 0,
        look_size: int = 64,
    ) -> io.NodeOutput:
        target = None
        if save_as.strip():
            target = folders.new_space_file(save_as, over=space.fingerprint)
        scenes = [scene for scene in (scene_1, scene_2, scene_3, scene_4) if scene is not None]
        vision = None if clip_vision is None else HostVision(clip_vision)
        training = _training(seed, steps, look_size)
        least = fewest_people(space.latent_size, training)
        if people < least:
            raise ConfigError(
                f"This space has {space.latent_size} latents: it learns from {least} people at least. Got {people}."
            )
        if vision is not None:  # what is wrong with it shows before anything is painted
            with tensors.ordinary_tensors():
                known_by(vision)
        painter = Painter(model, vae, scenes, negative, paint_size, paint_steps, cfg, seed)
        watch = Watch(model, cls.hidden.unique_id)
        table = paint_people(painter, space, draw_people(space, people, seed), _painting(watch))
        with tensors.trainable():
            pixels = look_size if vision is None else max(look_size, LEAST_SEEN)
            learned = painted_people(table, space, pixels)
            start, frame, report = fit_paintings(
                learned, training, vision=vision, compute=host_compute(), callback=_learning(watch)
            )
            taught = space.with_(start=start, frame=frame)
            text = _report(report, table.parent)
            if target is not None:
                w2wpp.save_space(taught, target)
                text += f"\nsaved as {target.name}"
        return io.NodeOutput(taught, text, ui=ui.PreviewText(text))


def _training(seed: int, steps: int, size: int) -> PaintingsTraining:
    usual, locating = PaintingsTraining(), LocatorTraining()
    seed %= 2**31
    locator = replace(locating, seed=seed + 1, size=size, steps=steps or locating.steps)
    return replace(usual, seed=seed, size=size, steps=steps or usual.steps, locator=locator)


def _painting(watch: Watch):
    def told(done: int, of: int, line: str, picture: Image.Image | None) -> None:
        watch.show(done, of, line)
        if picture is not None:
            watch.draw(picture, done, of)

    return told


def _learning(watch: Watch):
    def told(done: int, of: int, line: str) -> None:
        if done % 10 == 0 or done == of:
            watch.show(done, of, f"{line} of {of}")

    return told


def _report(report: dict, folder: Path) -> str:
    lines = [
        f"Learned from {report['paintings']} paintings, in output/w2wpp/{folder.name}"
        + (f", seen by {report['vision']}" if report["vision"] else ""),
        f"{report['coordinates']} coordinates of the latents show in them; the strongest are told by "
        f"{report['told_by_pictures'][0]:.0%}, the weakest by {report['told_by_pictures'][-1]:.0%}",
        f"People kept apart ({report['kept_apart']}): cosine {report['cosine_of_one']:.3f} from one painting, "
        f"{report['cosine_of_all']:.3f} from all of theirs",
        f"Frame: {json.dumps(report['frame'])}",
    ]
    return "\n".join(lines)
