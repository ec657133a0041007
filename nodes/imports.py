"""Files of others: the official ones of weights2weights, checkpoints of the original w2w++, saved identities."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from .. import w2wpp
from ..w2wpp.files.torchfile import load_torch
from ..w2wpp.imports.downloads import NEEDED, OPTIONAL, is_w2w_folder
from ..w2wpp.imports.identity import read_numbers
from .host import folders, official, places, tensors
from .host.blocking import nothing_because
from .host.progress import steps_shown, tell
from .inputs import name_of_result
from .types import IdentitySocket, People, SpaceSocket, advanced, schema

NO_FILE = "none"
TITLE = "W2W++ Import Files"


class ImportFiles(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="W2WPP_ImportFiles",
            display_name=TITLE,
            description="Takes in what weights2weights and the original w2w++ wrote: official files and VAE "
            "checkpoints become spaces, saved identities become people of a space.",
            search_aliases=[
                "import w2w",
                "official files",
                "w2wmodel.pt",
                "vae checkpoint",
                "weights2weights",
            ],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[NO_FILE, *places.importable()],
                    default=NO_FILE,
                    tooltip="What to import, from models/w2wpp/ or input/: a folder with mean.pt, std.pt and V.pt, a "
                    "w2w++ checkpoint, a w2wmodel.pt, or a folder that diffusers exported. Press R to see new ones.",
                ),
                io.String.Input(
                    "path",
                    default="",
                    tooltip="Something else in a folder of ComfyUI's, such as output/old/vae.pt. Takes the place of "
                    "'file'.",
                ),
                name_of_result(
                    "Name of the space in models/w2wpp/, for W2W++ Load Space. Empty uses the name of what is "
                    "imported. People are not saved; W2W++ Save Identity does that.",
                ),
                SpaceSocket.Input(
                    "space",
                    optional=True,
                    tooltip="The space that saved identities are people of. For a checkpoint, a space whose LoRAs it "
                    "was trained on; without one those of Stable Diffusion 1.5.",
                ),
                io.Int.Input(
                    "components",
                    default=0,
                    min=0,
                    max=10000,
                    tooltip="How many of the components in V.pt to take, 0.2 MB each. 0 takes those whose spread among "
                    "real people is known, the first 1,000 in the published files.",
                    **advanced(),
                ),
                io.String.Input(
                    "labels",
                    default="",
                    tooltip="A table (.csv) with a line for every row of proj_1000pc.pt and a column for every "
                    "attribute, by its path: the space gets sliders for them.",
                    **advanced(),
                ),
                io.Boolean.Input(
                    "keep_residual",
                    default=False,
                    tooltip="Of identities, also keep what the space's latents can't express, as far as its components "
                    "reach.",
                    **advanced(),
                ),
            ],
            outputs=[
                SpaceSocket.Output(
                    display_name="space", tooltip="The space that was made, or the connected one."
                ),
                IdentitySocket.Output(
                    display_name="identity",
                    tooltip="The people that were saved in the file. Nothing if it was a space.",
                ),
                io.String.Output(
                    display_name="report", tooltip="What was imported, and its licence."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None, path: str | None = None):
        if file is None or path is None:
            return True
        return folders.refusal(lambda _: _chosen(file, path), "")

    @classmethod
    def fingerprint_inputs(cls, file: str = NO_FILE, path: str = "", labels: str = "", **_: Any):
        return " ".join(_stamp(place) for place in _meant(file, path, labels))

    @classmethod
    def execute(
        cls, file, path, save_as, components, labels, keep_residual, space=None
    ) -> io.NodeOutput:
        place = _chosen(file, path)
        with tensors.ordinary_tensors():
            if place.is_dir() and is_w2w_folder(p.name for p in place.iterdir()):
                table = places.place_of(labels) if labels.strip() else None
                found, text = _official(place, save_as, components, table, cls.hidden.unique_id)
                people = None
            else:
                found, people, text = _from_file(place, save_as, space, keep_residual)
        text += f"\nlicence: {found.licence or 'not stated'}"
        given = nothing_because(f"{place.name} is a space: there are no people in it.")
        return io.NodeOutput(
            found, given if people is None else people, text, ui=ui.PreviewText(text)
        )


def _chosen(file: str, path: str) -> Path:
    """The file or folder that is meant; of an official file, the folder it belongs to."""
    text = path.strip() or (file if file != NO_FILE else "")
    if not text:
        raise w2wpp.ConfigError(
            f"{TITLE} needs something to import: put it into models/w2wpp/ or input/, press R, and choose it in "
            "'file', or write its path into 'path'."
        )
    place = places.place_of(text)
    siblings = [p.name for p in place.parent.iterdir()]
    official_file = place.name in (*NEEDED, *OPTIONAL) and is_w2w_folder(siblings)
    return place.parent if official_file else place


def _meant(file: str, path: str, labels: str) -> list[Path]:
    return [_chosen(file, path), *([places.place_of(labels)] if labels.strip() else [])]


def _stamp(place: Path) -> str:
    inside = sorted(place.iterdir()) if place.is_dir() else [place]
    return " ".join(f"{p.name} {folders.file_stamp(p)}" for p in inside)


def _official(
    folder: Path, save_as: str, components: int, labels: Path | None, node: str
) -> tuple[w2wpp.Space, str]:
    target = folders.space_place(save_as.strip() or folder.name)
    text = official.import_folder(
        folder,
        target,
        folder.name,
        components=components,
        labels=labels,
        say=partial(tell, node),
        progress=partial(steps_shown, node),
    )
    return w2wpp.load_space(target), text


def _from_file(
    place: Path, save_as: str, space: w2wpp.Space | None, residual: bool
) -> tuple[w2wpp.Space, People | None, str]:
    """(space, people or None, what was imported) of a checkpoint, of coefficients, or of a LoRA."""
    export = place.is_dir() or place.suffix == folders.ENDING
    data = None if export else load_torch(place)
    if isinstance(data, Mapping):
        return _vae(place, save_as, space), None, f"imported the VAE of {place.name}"
    if not export and not isinstance(data, Tensor):
        raise w2wpp.FormatError(
            f"{place.name} holds a {type(data).__name__}, expected a checkpoint of a VAE or the coefficients of people."
        )
    if space is None:
        raise w2wpp.ConfigError(
            f"{place.name} holds people: connect the space that they belong to to 'space' of {TITLE}."
        )
    if export:
        if folders.stored_format(str(place)) in (folders.SPACE, folders.IDENTITY):
            raise w2wpp.ConfigError(
                f"{place.name} is a file of this pack already: W2W++ Load Space and W2W++ Load Identity open those in "
                "models/w2wpp/."
            )
        identity, report = w2wpp.encode_lora(space, place, residual=residual)
        return space, People(identity, space), str(report)
    identity, facts = read_numbers(place, space, residual=residual)
    text = f"{len(identity)} people from the {facts['numbers']} in {place.name}"
    if beyond := facts.get("energy_beyond_the_space"):
        text += f"; {beyond:.1%} of them lies beyond the components of the space"
    return space, People(identity, space), text


def _vae(place: Path, save_as: str, space: w2wpp.Space | None) -> w2wpp.Space:
    target = folders.space_place(save_as.strip() or place.stem)
    layout = w2wpp.SD15 if space is None else space.layout
    found = w2wpp.read_vae(place, layout=layout, name=target.stem)
    if not target.exists():
        w2wpp.save_space(found, target)
    elif w2wpp.load_space(target).fingerprint != found.fingerprint:
        raise w2wpp.ConfigError(
            f"models/w2wpp/{target.name} is there already, and is another space. Choose another name in 'save_as' of "
            f"{TITLE}."
        )
    return w2wpp.load_space(target)
