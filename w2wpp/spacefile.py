"""Space files: one safetensors that holds weights, standardisation, layout, architecture, version
and provenance.

    metadata          format "w2wpp.space", format_version "1" or "2", config (JSON: layout, basis, codec, provenance,
                      fingerprint; start and frame if there are any)
    basis.*           mean, std [P]; components [K, P] half precision; singular_values [K]   (none for an affine
                      basis; of a delta basis, version 2: gram [N, N], gram_blocks, ranks, scales [M, N], weights [N],
                      mixing [K, N], singular_values [K], module_weights [M] where they are not one, and
                      delta.<module>.down [R, in] and .up [R, out], half precision, all members side by side)
    codec.*           the codec's parameters, under their own names
    prior.*           mean, std [d]
    direction.<name>  [d]
    start.*           the start network's parameters, half precision

A space is opened lazily: the header is read and checked, tensors stay in the file until they are
used.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .basis import WEIGHTED, AffineBasis, Basis
from .bundle import shipped_folder
from .codecs import Codec, build_codec
from .delta_basis import DeltaBasis
from .errors import ConfigError, FormatError, MissingFileError, SpaceMismatch, reading
from .files.container import Container, Streamed, open_container, write_container
from .flow import Flow
from .lora.layout import Layout
from .placement import Frame
from .space import Space, SpaceBasis, compact, fingerprint_of
from .start_network import StartNetwork, build_start

FORMAT = "w2wpp.space"
# Version 2 has a flow, without which latents would decode to other people, or a delta basis: releases that know
# neither must refuse it.
VERSIONS = ("1", "2")
COPY_BYTES = 64 * 2**20
FLOATS = (torch.float16, torch.float32)


def save_space(space: Space, path: str | os.PathLike[str]) -> None:
    """Write a space, atomically."""
    directions = {f"direction.{n}": compact(t.detach().cpu()) for n, t in space.directions.items()}
    config = {
        **space.architecture(),
        "provenance": dict(space.provenance),
        "fingerprint": space.fingerprint,
    }
    start: dict[str, Tensor] = {}
    if space.start is not None:
        config["start"] = space.start.config
        start = _start_tensors(space.start)
    if space.frame is not None:
        config["frame"] = space.frame.to_json()
    tensors: dict[str, Tensor | Streamed] = {**space.tensors(), **directions, **start}
    version = "1" if space.flow is None else "2"
    if isinstance(space.basis, DeltaBasis):
        tensors.update(space.basis.bulk())
        version = "2"
    write_container(path, tensors, format=FORMAT, version=version, config=config)


def space_bytes(space: Space) -> int:
    """How large a space's file will be, without its header."""
    small = sum(t.numel() * t.element_size() for t in space.tensors().values())
    return small + (space.basis.bulk_bytes() if isinstance(space.basis, DeltaBasis) else 0)


def load_space(path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> Space:
    """Open a space; costs its header and the few numbers of its prior, until something is computed.

    With a device, its tensors are there, as after `Space.to`. Raises FormatError for a file that is no space of a
    version that this release knows, and MissingFileError (also a FileNotFoundError), with the names of what ships,
    where there is none.
    """
    try:
        space = _open_space(path)
    except MissingFileError as e:
        if os.path.islink(path):
            raise
        names = ", ".join(sorted(p.name for p in shipped_folder("models").glob("*.safetensors")))
        raise MissingFileError(
            f"There is no file {path}. The files that ship are in {shipped_folder('models')}: {names or 'none'}."
        ) from e
    return space if device is None else space.to(device)


def _open_space(path: str | os.PathLike[str]) -> Space:
    file = open_container(path, FORMAT, versions=VERSIONS)
    with reading(f"{path}: the configuration of this space"):
        return _space(file)


def _space(file: Container) -> Space:
    layout = Layout.from_json(file.config["layout"])
    basis = _basis(file, file.config["basis"], layout)
    codec = _codec(file, file.config["codec"])
    provenance, fingerprint = file.config["provenance"], file.config["fingerprint"]
    if not isinstance(provenance, dict) or not isinstance(fingerprint, str) or not fingerprint:
        raise ConfigError("it does not say where it is from, or lacks a fingerprint.")
    d = (codec.latent_size,)
    found = [n for n in file.entries if n.startswith("direction.")]
    for name in ("prior.mean", "prior.std", *found):
        file.require(name, d, *FLOATS)
    space = Space(
        layout,
        basis,
        codec,
        _single(file, "prior.mean"),
        _single(file, "prior.std"),
        provenance,
        {name.removeprefix("direction."): _single(file, name) for name in found},
        _start(file, file.config["start"]) if "start" in file.config else None,
        _flow(file, file.config["flow"]) if "flow" in file.config else None,
        Frame.from_json(file.config["frame"]) if "frame" in file.config else None,
    )
    return space.known_as(fingerprint)


def save_directions(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    directions: Mapping[str, Tensor],
    report: Mapping[str, Any],
) -> None:
    """A copy of a space file with attribute directions [d] added or replaced, under provenance["directions"].

    Everything else stays as it is, byte by byte, also what this release does not know.

    Raises ConfigError for directions of another size.
    """
    latent_size = load_space(source).latent_size
    wrong = [n for n, t in directions.items() if tuple(t.shape) != (latent_size,)]
    if wrong or not all(bool(torch.isfinite(t).all()) for t in directions.values()):
        raise ConfigError(f"Directions of this space are [{latent_size}], finite: {wrong}.")
    file = open_container(source, FORMAT, versions=VERSIONS)
    provenance = {**file.config["provenance"], "directions": dict(report)}
    found = {f"direction.{n}": compact(t.detach().cpu()) for n, t in directions.items()}
    _rewrite(file, path, found, {"provenance": provenance})


def save_start(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    start: StartNetwork,
    *,
    frame: Frame | None = None,
) -> None:
    """A copy of a space file with a start network, in place of the one it may have, and with the frame if one is given.

    The rest stays byte by byte. Raises ConfigError for a network of another size.
    """
    latent_size = load_space(source).latent_size
    if start.latent_size != latent_size:
        raise ConfigError(
            f"The latents of this space have {latent_size} dimensions, those of the start network {start.latent_size}."
        )
    file = open_container(source, FORMAT, versions=VERSIONS)
    facts: dict[str, Any] = {"start": start.config}
    if frame is not None:
        facts["frame"] = frame.to_json()
    _rewrite(file, path, _start_tensors(start), facts, instead_of="start.")


def same_coordinates(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> bool:
    """Whether latents mean the same people in two space files."""
    one, other = (open_container(path, FORMAT, versions=VERSIONS) for path in (a, b))
    return bool(one.config.get("fingerprint") == other.config.get("fingerprint"))


def extras(path: str | os.PathLike[str]) -> list[str]:
    """What a space file holds that only means something in its own coordinates: directions, a start network."""
    names = open_container(path, FORMAT, versions=VERSIONS).entries
    kinds = {"directions": "direction.", "a start network": "start."}
    return [kind for kind, prefix in kinds.items() if any(n.startswith(prefix) for n in names)]


def _rewrite(
    file: Container,
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    instead_of: str | None = None,
) -> None:
    """A copy of a file, piece by piece, with some tensors and parts of the configuration added or replaced.

    Tensors whose names begin with `instead_of` are left out.
    """
    stay = [n for n in file.entries if instead_of is None or not n.startswith(instead_of)]
    own = ("format", "format_version", "config")
    write_container(
        path,
        {**{n: copied(file, n) for n in stay}, **tensors},
        format=FORMAT,
        version=file.metadata["format_version"],
        config={**file.config, **config},
        metadata={k: v for k, v in file.metadata.items() if k not in own},
    )


def _start_tensors(start: StartNetwork) -> dict[str, Tensor]:
    """As files hold them: under their names, in half precision."""
    return {f"start.{n}": t.detach().cpu().half() for n, t in start.state_dict().items()}


def find_space(fingerprint: str, folders: Iterable[Path] = ()) -> Path:
    """The space file with a fingerprint, among the shipped ones and in other folders; reads headers only.

    Raises SpaceMismatch if none has it.
    """
    for folder in (*folders, shipped_folder("models")):
        for path in sorted(folder.glob("*.safetensors")):
            with contextlib.suppress(FormatError):
                with open_container(path, FORMAT, versions=VERSIONS) as file:
                    if file.config.get("fingerprint") == fingerprint:
                        return path
    raise SpaceMismatch(
        f"None of the space files nearby has the fingerprint {fingerprint[:8]} that this identity was made in. "
        "Name the space file."
    )


def _basis(file: Container, config: Mapping[str, Any], layout: Layout) -> SpaceBasis:
    if config["kind"] == AffineBasis.kind:
        return AffineBasis(config["size"], shift=config["shift"], scale=config["scale"])
    if config["kind"] == DeltaBasis.kind:
        return DeltaBasis.from_container(file, layout, config)
    if config["kind"] not in (Basis.kind, WEIGHTED):
        raise ConfigError(f"unknown basis {config['kind']!r}.")
    return Basis.from_container(file, layout, config)


def _codec(file: Container, config: Mapping[str, Any]) -> Codec:
    """The architecture without memory behind it, and the promise to read the weights."""
    _check_budget(file, config)
    with torch.device("meta"):
        codec = build_codec(config)
    expected = codec.state_dict()
    stored = {n.removeprefix("codec.") for n in file.entries if n.startswith("codec.")}
    if stored != set(expected):
        odd = sorted(stored ^ set(expected))
        raise FormatError(
            f"{file.path}: the codec's weights do not match its architecture, e.g. '{odd[0]}'."
        )
    for name, t in expected.items():
        file.require(f"codec.{name}", tuple(t.shape), *FLOATS)
    codec.read_later(lambda: {name: _single(file, f"codec.{name}") for name in expected})
    return codec


def _start(file: Container, config: Mapping[str, Any]) -> StartNetwork:
    """The start network; its weights are few, and read at once."""
    with torch.device("meta"):
        network = build_start(config)
    expected = network.state_dict()
    for name, t in expected.items():
        file.require(f"start.{name}", tuple(t.shape), *FLOATS)
    weights = {name: _single(file, f"start.{name}") for name in expected}
    network.load_state_dict(weights, assign=True)
    return network.requires_grad_(False).eval()


def _flow(file: Container, config: Mapping[str, Any]) -> Flow:
    """The map between latents and N(0, I), read at once."""
    sizes: dict[str, Any] = {name: config.get(name) for name in ("size", "rounds", "knots")}
    if config.get("kind") != Flow.kind or not all(type(n) is int for n in sizes.values()):
        raise FormatError(f"{file.path}: this release does not know the flow {dict(config)}.")
    with torch.device("meta"):
        flow = Flow(**sizes)
    for name, t in flow.state_dict().items():
        file.require(f"prior.flow.{name}", tuple(t.shape), *FLOATS)
    weights = {name: _single(file, f"prior.flow.{name}") for name in flow.state_dict()}
    rising = [bool((weights[name].diff(dim=2) > 0).all()) for name in ("x", "y")]
    if not all(rising) or not bool((weights["slope"] > 0).all()):
        raise FormatError(f"{file.path}: the splines of this flow are not increasing.")
    flow.load_state_dict(weights, assign=True)
    return flow.requires_grad_(False).eval()


def _check_budget(file: Container, config: Mapping[str, Any]) -> None:
    """Refuse sizes that the file can't back, before modules are built for them."""
    sizes = [config["coefficient_size"], config["latent_size"], *config.get("hidden", [])]
    held = sum(math.prod(e.shape) for n, e in file.entries.items() if n.startswith("codec."))
    if config.get("hidden") and max(sizes) > held:
        raise ConfigError(f"the codec claims sizes {sizes} but holds {held} numbers.")


def file_fingerprint(file: Container) -> str:
    """The fingerprint of the space in a file, as `Space.fingerprint`, without holding its tensors."""
    parts_of_it = ("layout", "basis", "codec", "flow")
    architecture = {key: file.config[key] for key in parts_of_it if key in file.config}
    parts = (
        (name, entry.dtype, entry.shape, _pieces(file, name))
        for name, entry in sorted(file.entries.items())
        if name.startswith(("basis.", "codec.", "prior."))
    )
    return fingerprint_of(architecture, parts)


def copied(file: Container, name: str) -> Tensor | Streamed:
    """A tensor as it stands in a file, in pieces of bounded size."""
    entry = file.entries[name]
    if not entry.shape or not entry.shape[0]:
        return file.read(name, finite=False)
    return Streamed(entry.dtype, entry.shape, _pieces(file, name))


def _pieces(file: Container, name: str) -> Iterator[Tensor]:
    entry = file.entries[name]
    if not entry.shape:
        yield file.read(name, finite=False)
        return
    rows = max(1, COPY_BYTES * entry.shape[0] // max(1, entry.stop - entry.start))
    for start in range(0, entry.shape[0], rows):
        yield file.read_rows(name, start, start + rows, finite=False)


@torch.inference_mode(False)  # or what is read there could not take part in gradients
def _single(file: Container, name: str) -> Tensor:
    return file.read(name).float()
