"""Spaces of identities, from files."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from .. import w2wpp
from ..w2wpp.attributes import extended
from .host import attributes, folders, official, tensors
from .host.progress import steps_shown, tell
from .types import SpaceSocket, schema

DEFAULT_SPACE = "avatars.safetensors"


class LoadSpace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = folders.space_names()
        return schema(
            node_id="W2WPP_LoadSpace",
            display_name="W2W++ Load Space",
            description="Opens a space of identities: every point in it is a person, written as LoRA weights.",
            search_aliases=[
                "face",
                "character",
                "w2w",
                "identity space",
                "new face",
                "random face",
                "weights2weights",
            ],
            inputs=[
                io.Combo.Input(
                    "space",
                    options=names,
                    default=DEFAULT_SPACE if DEFAULT_SPACE in names else None,
                    tooltip="A space shipped with this pack, or one of your own from models/w2wpp/. A folder of "
                    "official weights2weights files is imported at its first use.",
                )
            ],
            outputs=[
                SpaceSocket.Output(
                    display_name="space",
                    tooltip="The opened space. Its weights are read from the file when they are first needed.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, space: str | None = None):
        return folders.refusal(folders.space_path, space)

    @classmethod
    def fingerprint_inputs(cls, space: str = ""):
        added = attributes.attributes_stamp(folders.space_header(space).fingerprint)
        return f"{folders.space_stamp(space)} {added}"

    @classmethod
    def execute(cls, space: str) -> io.NodeOutput:
        node, path = cls.hidden.unique_id, folders.space_path(space)
        dropped, done = folders.official_folder(space), ""
        with tensors.ordinary_tensors():
            if dropped is not None:
                done = official.import_folder(
                    dropped,
                    Path(path),
                    f"models/w2wpp/{space.removesuffix(official.TITLE)}",
                    say=partial(tell, node),
                    progress=partial(steps_shown, node),
                )
            opened = w2wpp.load_space(path)
            tell(node, f"{done}\nlicence: {opened.licence or 'not stated'}".strip())
            return io.NodeOutput(extended(opened, attributes.attributes_of(opened)))


class SpaceInfo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="W2WPP_SpaceInfo",
            display_name="W2W++ Space Info",
            description="Tells what a space is: its model and prompt, its licence, its attributes, how it was trained.",
            search_aliases=[
                "space licence",
                "list attributes",
                "trigger prompt",
                "weights2weights",
            ],
            inputs=[SpaceSocket.Input("space", tooltip="The space, from W2W++ Load Space.")],
            outputs=[
                io.String.Output(display_name="text", tooltip="All of it as text."),
                io.String.Output(
                    display_name="trigger_prompt",
                    tooltip="The words that call the person up in a prompt, for a text encoder.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, space) -> io.NodeOutput:
        text = describe(space)
        return io.NodeOutput(text, space.trigger_prompt, ui=ui.PreviewText(text))


def describe(space: w2wpp.Space) -> str:
    layout = space.layout
    facts = {
        "name": f"{space.name} {space.version}".strip(),
        "licence": space.licence or "not stated",
        "base model": space.provenance.get("base_model", space.base_model),
        "trigger prompt": space.trigger_prompt or "not stated",
        "attributes": ", ".join(sorted(space.directions)) or "none",
        "LoRA": f"{len(layout.modules)} modules of rank {layout.rank}, alpha {layout.alpha:g}, {layout.size:,} numbers",
        "latents": f"{space.latent_size}, by the codec {space.codec.name} over {space.basis.n_components} components",
        "fingerprint": space.fingerprint,
        **{f"training: {name}": value for name, value in _figures(space.training_report)},
    }
    return "\n".join(f"{name}: {value}" for name, value in facts.items())


def _figures(report: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The single figures of a training report, without its settings and its curves."""
    for name, value in report.items():
        if isinstance(value, Mapping) and name not in ("settings", "codec"):
            yield from _figures(value, f"{prefix}{name} ")
        elif isinstance(value, str | int | float):
            yield f"{prefix}{name}", value
