"""Spaces of identities, from files."""

from comfy_api.latest import io

from .. import w2wpp
from . import host
from .types import SpaceSocket, schema

DEFAULT_SPACE = "avatars.safetensors"


class LoadSpace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = host.space_names()
        return schema(
            node_id="W2WPP_LoadSpace",
            display_name="W2W++ Load Space",
            description="Opens a space of identities: every point in it is a person, written as LoRA weights.",
            search_aliases=["weights2weights", "w2w", "identity space", "new face", "random face"],
            inputs=[
                io.Combo.Input(
                    "space",
                    options=names,
                    default=DEFAULT_SPACE if DEFAULT_SPACE in names else None,
                    tooltip="A space shipped with this pack, or one of your own from models/w2wpp/.",
                )
            ],
            outputs=[
                SpaceSocket.Output(
                    display_name="space",
                    tooltip="The opened space. Its weights are read from the file when they are first needed.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, space: str = ""):
        return host.file_stamp(host.space_path(space))

    @classmethod
    def execute(cls, space: str) -> io.NodeOutput:
        return io.NodeOutput(w2wpp.load_space(host.space_path(space)))
