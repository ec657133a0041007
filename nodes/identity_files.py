"""Identities as files: saved where the host saves, loaded from where it loads."""

from comfy_api.latest import io, ui

from .. import w2wpp
from ..w2wpp.errors import W2WError
from ..w2wpp.identity import require_same_space
from .host import folders, tensors
from .types import IdentitySocket, People, SpaceSocket, schema

NOTHING_YET = "none saved yet"


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
    def execute(cls, identity, filename_prefix: str) -> io.NodeOutput:
        label = folders.save_new_identity(identity.identity, filename_prefix)
        return io.NodeOutput(label, ui=ui.PreviewText(f"saved {label}"))


class LoadIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="W2WPP_LoadIdentity",
            display_name="W2W++ Load Identity",
            description="Brings saved people back, together with the space that they were made in.",
            search_aliases=["load face", "import identity", "load character", "weights2weights"],
            inputs=[
                SpaceSocket.Input(
                    "space", tooltip="The space that they were made in, from W2W++ Load Space."
                ),
                io.Combo.Input(
                    "file",
                    options=list(folders.identity_files()) or [NOTHING_YET],
                    tooltip="An identity file from output/w2wpp/, input/ or models/w2wpp/. Press R to see new ones.",
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
    def fingerprint_inputs(cls, file: str = "", space=None):
        return folders.file_stamp(folders.identity_path(file))

    @classmethod
    def execute(cls, space, file: str) -> io.NodeOutput:
        with tensors.ordinary_tensors():
            identity = w2wpp.load_identity(folders.identity_path(file))
        try:
            require_same_space(identity.space_fingerprint, space.fingerprint, space.name)
        except W2WError as e:
            raise type(e)(f"{file}: {e}{_its_space(identity.space_fingerprint)}") from e
        return io.NodeOutput(People(identity, space))


def _its_space(fingerprint: str) -> str:
    """Where the right space is, if it is installed, as another sentence."""
    names = [n for n in folders.space_names() if folders.space_header(n).fingerprint == fingerprint]
    return f" It is installed as {names[0]}." if names else ""
