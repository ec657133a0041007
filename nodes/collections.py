"""Collections of LoRA files: a space of them, and how they compare."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from .. import w2wpp
from ..w2wpp.lora.members import Member, member_of_tensors
from ..w2wpp.mixtures import members as members_of
from ..w2wpp.spacefile import space_bytes
from ..w2wpp.training.collection_report import map_positions
from ..w2wpp.training.fit_delta import (
    CollectionSettings,
    compare_members,
    fit_delta,
    open_members,
)
from .host import folders, tensors
from .host.plan import device_for_sums
from .host.progress import steps_shown
from .likeness import draw_map, draw_matrix
from .types import IdentitySocket, LoraSocket, People, SpaceSocket, advanced, schema

NO_FOLDER = "none"
FOLDER_TIP = (
    "A folder of LoRA files in models/loras/, with its subfolders; or the examples that ship. 'none' if the files are "
    "listed below or connected."
)
FILES_TIP = (
    "LoRA files in models/loras/, one per line. After a bar comes the weight, after a second bar a name: "
    "anna.safetensors | 2 | Anna. For files in the folder, this sets their weight and name."
)


class SpaceFromLoras(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="W2WPP_SpaceFromLoras",
            display_name="W2W++ Space from LoRAs",
            description="Makes a space of the LoRAs that you have, for any base model: of any rank, trainer and "
            "spelling, as long as they are for one model. Every point of it is a mixture of them.",
            search_aliases=[
                "merge loras",
                "mix loras",
                "lora collection",
                "lora folder",
                "average loras",
                "weights2weights",
            ],
            is_input_list=True,
            inputs=[
                *_sources(),
                io.String.Input(
                    "save_as",
                    default="",
                    tooltip="Name of a file in models/w2wpp/, for W2W++ Load Space. Leave empty to pass the "
                    "space on without saving it.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="Rank of the LoRAs that the space gives. 0 uses the largest rank among the files, "
                    "and at least 32.",
                ),
                io.Int.Input(
                    "components",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="How many directions the space keeps, starting with those in which the files differ "
                    "most. 0 keeps all of them, one fewer than there are files.",
                    **advanced(),
                ),
                io.Int.Input(
                    "cut",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="Keep only this many ranks of each file, for a smaller space; the report states the "
                    "error. 0 keeps all.",
                    **advanced(),
                ),
                LoraSocket.Input(
                    "loras",
                    optional=True,
                    tooltip="LoRAs from other nodes, as many as there are; they join the files.",
                ),
            ],
            outputs=[
                SpaceSocket.Output(display_name="space", tooltip="The space of the LoRAs."),
                IdentitySocket.Output(
                    display_name="identity",
                    tooltip="The LoRAs themselves as points of the space, in the order of the report.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="What was read, what did not fit and why, which are alike, and what to expect.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, folder: Any = None, files: Any = None):
        return _refusal(folder, files)

    @classmethod
    def fingerprint_inputs(cls, folder: Any = NO_FOLDER, files: Any = "", **_: Any):
        return _stamp(_one(folder), _one(files))

    @classmethod
    def execute(
        cls, folder, files, save_as, rank, components, cut, loras: Sequence | None = None
    ) -> io.NodeOutput:
        target = folders.new_space_file(_one(save_as)) if _one(save_as).strip() else None
        settings = CollectionSettings(
            rank=_one(rank) or None,
            components=_one(components) or None,
            cut_to=_one(cut) or None,
            name=target.stem if target else "my LoRAs",
        )
        with tensors.ordinary_tensors():
            members, weights, refused = _members(_one(folder), _one(files), loras)
            progress = steps_shown(cls.hidden.unique_id, "comparing module")
            space, report = fit_delta(
                members,
                settings,
                weights=weights,
                refused=refused,
                progress=progress,
                device=device_for_sums(),
            )
            text = str(report)
            if target:
                text += f"\nsaved as {target.name}, {space_bytes(space) / 1e6:,.1f} MB"
                w2wpp.save_space(space, target)
                space = w2wpp.load_space(target)
            people = People(members_of(space), space)
        return io.NodeOutput(space, people, text, ui=ui.PreviewText(text))


class CompareLoras(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="W2WPP_CompareLoras",
            display_name="W2W++ Compare LoRAs",
            description="Shows which LoRAs are alike: what they change in the model is compared, whatever their rank, "
            "strength and trainer. Finds copies and misfits in a collection.",
            search_aliases=[
                "similar loras",
                "duplicate loras",
                "lora similarity",
                "lora map",
                "weights2weights",
            ],
            is_input_list=True,
            inputs=[
                *_sources(),
                LoraSocket.Input(
                    "loras",
                    optional=True,
                    tooltip="LoRAs from other nodes, as many as there are; they join the files.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="matrix",
                    tooltip="The cosine of every pair: 1 (red) is the same change, 0 (white) is nothing in "
                    "common, -1 (blue) is the opposite.",
                ),
                io.Image.Output(
                    display_name="map",
                    tooltip="A map of the LoRAs: the closer two are, the more alike, as far as a plane can show "
                    "it.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="The most alike pairs, copies, outliers, and what did not fit and why.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, folder: Any = None, files: Any = None):
        return _refusal(folder, files)

    @classmethod
    def fingerprint_inputs(cls, folder: Any = NO_FOLDER, files: Any = "", **_: Any):
        return _stamp(_one(folder), _one(files))

    @classmethod
    def execute(cls, folder, files, loras: Sequence | None = None) -> io.NodeOutput:
        with tensors.ordinary_tensors():
            members, _, refused = _members(_one(folder), _one(files), loras)
            progress = steps_shown(cls.hidden.unique_id, "comparing module")
            found = compare_members(
                members, refused=refused, progress=progress, device=device_for_sums()
            )
            names = list(found.names)
            matrix = draw_matrix(names, found.cosines)
            plane = draw_map(names, map_positions(found.gram))
        text = str(found)
        return io.NodeOutput(matrix, plane, text, ui=ui.PreviewText(text))


def _sources() -> list:
    options = [NO_FOLDER, *folders.lora_folders()]
    return [
        io.Combo.Input(
            "folder", options=options, default=folders.EXAMPLE_LORAS, tooltip=FOLDER_TIP
        ),
        io.String.Input("files", default="", multiline=True, tooltip=FILES_TIP),
    ]


def _members(
    folder: str, files: str, loras: Sequence | None
) -> tuple[list[Member], dict[str, float], list[tuple[str, str]]]:
    """The LoRAs meant by the inputs, their weights by name, and what is no LoRA, with the reason."""
    paths = _paths(folder, files)
    given = {name: (weight, title) for name, weight, title in _lines(files)}
    members, weights, refused = [], {}, []
    for name, path in paths.items():
        weight, title = given.get(name, (1.0, ""))
        opened, odd = open_members([path], [title or Path(name).with_suffix("").as_posix()])
        members += opened
        refused += odd
        weights |= {m.name: weight for m in opened}
    for i, lora in enumerate(loras or (), start=1):
        members.append(member_of_tensors(lora, f"connected {i}"))
    return members, weights, refused


def _lines(files: str) -> list[tuple[str, float, str]]:
    """(file, weight, name) of each line."""
    found = []
    for line in filter(None, map(str.strip, files.splitlines())):
        name, weight, title = ([part.strip() for part in line.split("|")] + ["", ""])[:3]
        try:
            found.append((name.replace("\\", "/"), float(weight or 1.0), title))
        except ValueError as e:
            raise w2wpp.ConfigError(
                f"A line is written FILE | WEIGHT | NAME, as in anna.safetensors | 2 | Anna. Got {line!r}."
            ) from e
    return found


def _refusal(folder: Any, files: Any) -> bool | str:
    """What validate_inputs answers; a linked value comes later."""
    folder, files = _one(folder), _one(files)
    return folders.refusal(lambda _: _paths(folder or NO_FOLDER, files or ""), "")


def _paths(folder: str, files: str) -> dict[str, Path]:
    """{name: path} of the folder's files and of those in the lines that the folder does not have."""
    paths = folders.loras_in(folder) if folder != NO_FOLDER else {}
    others = [name for name, _, _ in _lines(files) if name not in paths]
    return paths | {name: Path(folders.lora_path(name)) for name in others}


def _stamp(folder: str, files: str) -> str:
    """Changes whenever one of the files does."""
    paths = _paths(folder, files)
    return "\n".join(f"{name} {folders.file_stamp(path)}" for name, path in paths.items())


def _one(value: Any) -> Any:
    """The host hands over lists, of one for what a widget holds."""
    return value[0] if isinstance(value, list | tuple) and value else value
