"""The miniature world's painter, ready to run: the base model, its prompts, its VAE and an empty picture."""

import contextlib
import functools
from typing import Any

import torch
from comfy_api.latest import io

from ..w2wpp.errors import FormatError, reading
from ..w2wpp.files.container import open_container
from .host import avatar_model, avatar_words, folders, tensors
from .types import schema

PORTRAIT_FILE = folders.PACK / "example_workflows" / "avatar_portrait.png"
BASE_FILE = folders.BUNDLED / "avatar-base.safetensors"
BASE_FORMAT = "w2wpp.avatar_base"
ANY = "any"  # shown for the empty word, which leaves the choice to the model


class LoadAvatarModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        words = _vocabulary()
        return schema(
            node_id="W2WPP_LoadAvatarModel",
            display_name="W2W++ Load Avatar Model",
            description="The small model that ships with this pack. It paints 32x32 avatars in seconds on any "
            "computer, and is what the bundled spaces were learned on.",
            search_aliases=["avatar base", "demo model", "tiny model", "weights2weights"],
            inputs=[
                io.Combo.Input(
                    "background",
                    options=words["background"],
                    tooltip="The background. 'any' leaves it to the model.",
                ),
                io.Combo.Input(
                    "smile",
                    options=words["smile"],
                    tooltip="The expression. 'any' leaves it to the model.",
                ),
                io.Combo.Input(
                    "light",
                    options=words["light"],
                    tooltip="Where the light comes from. 'any' leaves it to the model.",
                ),
                io.Int.Input(
                    "pictures",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="How many pictures of each person the empty latent asks for.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The avatar model, without any identity."
                ),
                io.Conditioning.Output(
                    display_name="positive", tooltip="The prompt: a person, with the chosen words."
                ),
                io.Conditioning.Output(
                    display_name="negative",
                    tooltip="The empty prompt, for the sampler's negative input.",
                ),
                io.Vae.Output(
                    display_name="vae",
                    tooltip="Turns the sampler's result into pictures, for VAE Decode.",
                ),
                io.Latent.Output(
                    display_name="latent",
                    tooltip="Empty pictures of the model's size, for the sampler to fill.",
                ),
                io.Clip.Output(
                    display_name="clip",
                    tooltip="The model's few words, for CLIP Text Encode and for captions of W2W++ Train People.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(
        cls, background: str = ANY, smile: str = ANY, light: str = ANY, pictures: int = 1
    ):
        return folders.file_stamp(BASE_FILE)

    @classmethod
    def execute(cls, background: str, smile: str, light: str, pictures: int) -> io.NodeOutput:
        with tensors.ordinary_tensors(), open_container(BASE_FILE, BASE_FORMAT) as file:
            config = file.config
            table = file.read("tokens").float()  # [words of all slots, context]
            names = [name for name in file.entries if name.startswith("unet.")]
            weights = {name.removeprefix("unet."): file.read(name) for name in names}
            chosen = {"person": "person", "background": background, "smile": smile, "light": light}
            return io.NodeOutput(
                avatar_model.avatar_model(config, weights),
                _conditioning(config, table, chosen),
                _conditioning(config, table, {}),
                avatar_model.pixel_vae(),
                avatar_model.empty_pictures(pictures, config["image_size"]),
                avatar_words.avatar_clip(config["vocabulary"], table),
            )


class ExamplePortrait(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="W2WPP_ExamplePortrait",
            display_name="W2W++ Example Portrait",
            description="A picture to try W2W++ Invert from Image on: an avatar whom the bundled spaces have never "
            "seen, smiling before a blue background.",
            search_aliases=["example image", "demo picture", "test portrait", "weights2weights"],
            inputs=[],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The portrait, 32x32."),
                io.Mask.Output(display_name="mask", tooltip="White where the person is."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls):
        return folders.file_stamp(PORTRAIT_FILE)

    @classmethod
    def execute(cls) -> io.NodeOutput:
        with tensors.ordinary_tensors():
            return io.NodeOutput(*tensors.read_picture(PORTRAIT_FILE))


def _conditioning(config: dict[str, Any], table: torch.Tensor, chosen: dict[str, str]) -> list:
    """CONDITIONING of one prompt [1, slots, context]: a token for each slot, the empty word where none is chosen."""
    rows, start = [], 0
    for slot, words in zip(config["slots"], config["vocabulary"]):
        word = chosen.get(slot, ANY)
        rows.append(start + words.index("" if word == ANY else word))
        start += len(words)
    return [[table[rows][None], {}]]


def _vocabulary() -> dict[str, list[str]]:
    """The choices of each slot, the empty word last; nothing to choose from without a file that can be read."""
    return {slot: [*words, ANY] for slot, words in _words(folders.file_stamp(BASE_FILE)).items()}


@functools.lru_cache(maxsize=4)
def _words(stamp: str) -> dict[str, list[str]]:
    """The words that the avatar base knows for each slot; ``stamp`` keys the cache."""
    known: dict[str, list[str]] = {"background": [], "smile": [], "light": []}
    # A list must not fail: what is wrong with the file is said when the node runs.
    with contextlib.suppress(FormatError), reading(f"{BASE_FILE}: its words"):
        with open_container(BASE_FILE, BASE_FORMAT) as file:
            slots = zip(file.config["slots"], file.config["vocabulary"])
            known |= {str(slot): [str(w) for w in words[1:]] for slot, words in slots}
    return known
