"""Collections of LoRA files: a space of them, and how they compare."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io, ui

from .. import w2wpp
from ..w2wpp.lora.collection import Collection
from ..w2wpp.lora.members import Member, member_of_tensors
from ..w2wpp.mixtures import members as members_of
from ..w2wpp.spacefile import space_bytes
from ..w2wpp.training.collection_report import map_positions
from ..w2wpp.training.fit_delta import (
    CollectionSettings,
    collection_layout,
    compare_members,
    fit_delta,
    open_members,
)
from ..w2wpp.training.module_weights import module_weights
from .host import folders, tensors
from .host.denoiser import denoiser
from .host.model import noise_schedule
from .host.pictures import given_latents
from .host.plan import device_for_sums, plan_run
from .host.progress import steps_shown
from .inputs import name_of_result
from .likeness import draw_map, draw_matrix
from .types import IdentitySocket, LoraSocket, People, SpaceSocket, advanced, schema

NO_FOLDER = "none"
AT_ONCE = 4  # pictures, each with a LoRA of its own, when modules are weighed
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
                name_of_result(
                    "Name of a file in models/w2wpp/, for W2W++ Load Space. Leave empty to pass the "
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
                io.Boolean.Input(
                    "text_encoders",
                    default=False,
                    optional=True,
                    tooltip="Make the space of what the files change in the text encoders instead, with coefficients "
                    "of its own. W2W++ Apply Decoded LoRA adds such an identity to a CLIP.",
                    **advanced(),
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="With positive and latent: the model that the LoRAs are for, which then says how much a "
                    "change of each module matters. Without, every module counts alike.",
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="What the model is asked for meanwhile: one prompt.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="Pictures of what the LoRAs show, from VAE Encode; a few are enough.",
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
        cls,
        folder,
        files,
        save_as,
        rank,
        components,
        cut,
        loras: Sequence | None = None,
        text_encoders=False,
        model=None,
        positive=None,
        latent=None,
    ) -> io.NodeOutput:
        target = folders.new_space_file(_one(save_as)) if _one(save_as).strip() else None
        settings = CollectionSettings(
            rank=_one(rank) or None,
            components=_one(components) or None,
            cut_to=_one(cut) or None,
            name=target.stem if target else "my LoRAs",
        )
        probed = _Probed.of(model, positive, latent, cls.hidden.unique_id)
        with tensors.ordinary_tensors():
            members, weights, refused = _members(
                _one(folder), _one(files), loras, text_encoders=_one(text_encoders)
            )
            progress = steps_shown(cls.hidden.unique_id, "comparing module")
            space, report = fit_delta(
                members,
                settings,
                weights=weights,
                refused=refused,
                progress=progress,
                device=device_for_sums(),
                weigh=probed,
            )
            text = str(report)
            if target:
                text += f"\nsaved as {target.name}, {space_bytes(space) / 1e6:,.1f} MB"
                w2wpp.save_space(space, target)
                space = w2wpp.load_space(target)
            people = People(members_of(space), space)
        return io.NodeOutput(space, people, text, ui=ui.PreviewText(text))


@dataclass(frozen=True)
class _Probed:
    """How much each module of a collection matters to a model, under a prompt and on pictures."""

    model: Any
    positive: list
    latent: dict
    node: str

    @classmethod
    def of(cls, model: Any, positive: Any, latent: Any, node: str) -> "_Probed | None":
        """From the inputs as they came; none if nothing is connected."""
        given = {"model": _one(model), "positive": _one(positive), "latent": _one(latent)}
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == len(given):
            return None
        if missing:
            raise w2wpp.ConfigError(
                f"To weigh modules by what a model makes of them, connect {' and '.join(missing)} as well; or none of "
                f"{', '.join(given)}."
            )
        return cls(**given, node=node)

    def __call__(self, collection: Collection) -> torch.Tensor:
        layout = collection_layout(collection, int(collection.ranks.max()))
        pictures = given_latents(self.model, self.latent)
        plan = plan_run(self.model, (AT_ONCE, *pictures.shape[1:]), gradients=True)
        with denoiser(self.model, layout, self.positive, plan) as denoise:
            return module_weights(
                denoise,
                noise_schedule(self.model),
                pictures.to(plan.device),
                collection,
                layout,
                batch=plan.rows,
                generator=torch.Generator().manual_seed(0),
                callback=steps_shown(self.node, "weighing modules, row"),
            )


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
    folder: str, files: str, loras: Sequence | None, *, text_encoders: bool = False
) -> tuple[list[Member], dict[str, float], list[tuple[str, str]]]:
    """The LoRAs meant by the inputs, their weights by name, and what is no LoRA, with the reason."""
    paths = _paths(folder, files)
    given = {name: (weight, title) for name, weight, title in _lines(files)}
    members, weights, refused = [], {}, []
    for name, path in paths.items():
        weight, title = given.get(name, (1.0, ""))
        title = title or Path(name).with_suffix("").as_posix()
        opened, odd = open_members([path], [title], text_encoders=text_encoders)
        members += opened
        refused += odd
        weights |= {m.name: weight for m in opened}
    for i, lora in enumerate(loras or (), start=1):
        members.append(member_of_tensors(lora, f"connected {i}", text_encoders=text_encoders))
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
