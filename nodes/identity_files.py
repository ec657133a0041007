"""Identities as files: saved where the host saves, loaded from where it loads."""

import torch
from comfy_api.latest import io, ui

from .. import w2wpp
from ..w2wpp.identity import MOST_PICTURES
from .host import folders, tensors
from .types import IdentitySocket, People, SavedFacesWidget, SpaceSocket, schema, space_title

NOTHING_YET = "none saved yet"
THUMBNAIL = 128  # pixels of the longer side


class SaveIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="W2WPP_SaveIdentity",
            display_name="W2W++ Save Identity",
            description="Writes people to a file in the output folder, a few kilobytes, for W2W++ Load Identity.",
            search_aliases=["keep face", "export identity", "save character", "weights2weights"],
            inputs=[
                IdentitySocket.Input("identity", tooltip="Who to save: one person or several."),
                io.String.Input(
                    "filename_prefix",
                    default="identity",
                    tooltip="Name of the file in output/w2wpp/, which gets a number behind it and never replaces "
                    "another. Folders (friends/anna) and %date% parts such as %year% work as in Save Image.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="What they look like: a small copy is kept in the file, for W2W++ Load Identity to show.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="file",
                    tooltip="The file that was written, as W2W++ Load Identity lists it.",
                )
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, identity, filename_prefix: str, image=None) -> io.NodeOutput:
        with tensors.ordinary_tensors():
            pictures = None if image is None else _small(image)
            label = folders.save_new_identity(identity.identity, filename_prefix, pictures)
        return io.NodeOutput(label, ui=ui.PreviewText(f"saved {label}"))


class LoadIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="W2WPP_LoadIdentity",
            display_name="W2W++ Load Identity",
            description="Brings saved people back, together with the space that they were made in.",
            search_aliases=[
                "load face",
                "character",
                "import identity",
                "load character",
                "weights2weights",
            ],
            inputs=[
                SpaceSocket.Input(
                    "space", tooltip="The space that they were made in, from W2W++ Load Space."
                ),
                io.Combo.Input(
                    "file",
                    options=list(folders.identity_files()) or [NOTHING_YET],
                    tooltip="An identity file from output/w2wpp/, input/ or models/w2wpp/. Press R to see new ones.",
                ),
                SavedFacesWidget.Input(
                    "saved",
                    optional=True,
                    tooltip="The saved people, by the pictures that were saved with them. Click one to load them.",
                ),
            ],
            outputs=[
                IdentitySocket.Output(
                    display_name="identity", tooltip="The people in the file, with their space."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None):
        return folders.refusal(folders.identity_path, file)

    @classmethod
    def fingerprint_inputs(cls, file: str = "", space=None, saved=None):
        return folders.file_stamp(folders.identity_path(file))

    @classmethod
    def execute(cls, space, file: str, saved=None) -> io.NodeOutput:
        with tensors.ordinary_tensors():
            identity = w2wpp.load_identity(folders.identity_path(file))
        if identity.space_fingerprint != space.fingerprint:
            raise w2wpp.SpaceMismatch(_other_space(file, identity, space))
        return io.NodeOutput(People(identity, space))


def _other_space(file: str, identity: w2wpp.Identity, space: w2wpp.Space) -> str:
    """What to say of people who were made in another space than the connected one."""
    own = identity.space_fingerprint
    names = [n for n in folders.space_names() if folders.space_header(n).fingerprint == own]
    text = (
        f"{file} was not made in the space that is connected to W2W++ Load Identity, {space_title(space)}: the same "
        "numbers mean another face there."
    )
    if names:
        return f"{text} Choose {names[0]} in W2W++ Load Space."
    made_in = identity.provenance.get("space")
    where = (
        f"called '{made_in}'"
        if isinstance(made_in, str) and made_in
        else "of which the name is not known"
    )
    return f"{text} Its space, {where}, is not installed; put its file into models/w2wpp/."


def _small(image: torch.Tensor) -> torch.Tensor:
    """Pictures [n, h, w, 3] of bytes of IMAGE [n, H, W, C], none larger than a thumbnail."""
    pictures = image[:MOST_PICTURES, ..., :3].float().clone().movedim(-1, 1)
    scale = min(1.0, THUMBNAIL / max(pictures.shape[-2:]))
    size = [max(1, round(side * scale)) for side in pictures.shape[-2:]]
    small = torch.nn.functional.interpolate(pictures, size, mode="area")
    return (small.movedim(1, -1).clamp(0, 1) * 255).round().to("cpu", torch.uint8).contiguous()
