"""Command-line verbs on spaces, identities and LoRA files."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..edits import edit
from ..encode import encode_lora
from ..errors import ConfigError
from ..export import export_lora
from ..files.container import Container, open_container
from ..files.text import parse_json
from ..identity import Identity, concat, interpolate, load_identity, save_identity
from ..lora.files import LoraFile, load_lora
from ..lora.layout import Layout
from ..lora.source import PICKLED, adapter_file
from ..lora.write import ADAPTER, FORMATS, NOT_LOADED_BY
from ..mixtures import sample_mixtures
from ..space import Space
from ..spacefile import find_space, load_space
from ..training.gather import public
from ..training.report import without_curves

Verbs = Any  # argparse's collection of subparsers has no public type


def register(verbs: Verbs) -> None:
    """Add the verbs of this file to the parser."""
    p = verbs.add_parser("info", help="what a space, identity, data set or LoRA file holds")
    p.add_argument("file", metavar="FILE")
    p.set_defaults(run=info)

    p = verbs.add_parser("sample", help="draw new identities from a space")
    p.add_argument("space", metavar="SPACE")
    p.add_argument("--seed", type=int, required=True, help="same seed, same identity, anywhere")
    p.add_argument("-n", type=int, default=1, help="how many (default 1)")
    p.add_argument("--truncation", type=float, default=1.0, help="below 1: closer to the mean")
    p.add_argument(
        "--mixture",
        action="store_true",
        help="mix a few of the LoRAs that the space was made of, so that samples stay within the collection",
    )
    p.add_argument("-o", "--output", required=True, metavar="ID")
    p.set_defaults(run=sample)

    p = verbs.add_parser("interpolate", help="walk from one identity to another")
    p.add_argument("a", metavar="ID_A")
    p.add_argument("b", metavar="ID_B")
    p.add_argument("--steps", type=int, required=True, help="how many, both ends included")
    p.add_argument("--mode", choices=("slerp", "lerp"), default="slerp")
    p.add_argument("-o", "--output", required=True, metavar="ID")
    p.set_defaults(run=interpolate_files)

    p = verbs.add_parser("edit", help="change attributes of identities")
    p.add_argument("identity", metavar="ID")
    p.add_argument("changes", nargs="+", metavar="NAME=STRENGTH", help="in standard deviations")
    p.add_argument("--space", help="the space file; found among the shipped ones by default")
    p.add_argument("-o", "--output", required=True, metavar="ID")
    p.set_defaults(run=edit_file)

    p = verbs.add_parser("encode", help="bring LoRA files into a space")
    p.add_argument("space", metavar="SPACE")
    p.add_argument("loras", nargs="+", metavar="LORA")
    p.add_argument("--residual", action="store_true", help="keep what the latents can't express")
    p.add_argument(
        "--base-model",
        metavar="FAMILY",
        help="sd15: the family of LoRAs that do not tell theirs (those without attn2.to_k and to_v)",
    )
    p.add_argument("-o", "--output", required=True, metavar="ID")
    p.set_defaults(run=encode)

    p = verbs.add_parser("export", help="write identities as plain LoRA files")
    p.add_argument("identity", metavar="ID")
    p.add_argument("--space", help="the space file; found among the shipped ones by default")
    p.add_argument("--format", choices=FORMATS, default="kohya", help="kohya is read everywhere")
    p.add_argument("--strength", type=float, default=1.0, help="advice, stored in the metadata")
    p.add_argument("-o", "--output", required=True, metavar="LORA")
    p.set_defaults(run=export)


def info(args: argparse.Namespace) -> dict[str, Any]:
    """`w2wpp info`"""
    path = adapter_file(args.file)
    if path.suffix.lower() in PICKLED:
        return {"format": "lora", **_lora_info(path)}
    file = open_container(path)
    kind = file.metadata.get("format", "")
    known = {"w2wpp.space": _space_info, "w2wpp.identity": _identity_info}
    if kind in known:
        return {"format": kind, **known[kind](args.file)}
    if kind.startswith("w2wpp."):
        return {"format": kind, **_file_info(file)}
    return {"format": "lora", **_lora_info(path)}


def sample(args: argparse.Namespace) -> dict[str, Any]:
    """`w2wpp sample`"""
    space = load_space(args.space)
    generator = torch.Generator().manual_seed(args.seed)
    draw = partial(sample_mixtures, space) if args.mixture else space.sample
    identity = draw(args.n, generator=generator, truncation=args.truncation)
    return saved(identity, args.output)


def interpolate_files(args: argparse.Namespace) -> dict[str, Any]:
    """`w2wpp interpolate`"""
    a, b = load_identity(args.a), load_identity(args.b)
    return saved(interpolate(a, b, steps=args.steps, mode=args.mode), args.output)


def encode(args: argparse.Namespace) -> dict[str, Any]:
    """`w2wpp encode`"""
    space = load_space(args.space)
    family = is_stated(args.base_model, space.layout)
    found = [
        encode_lora(space, path, residual=args.residual, assume_family=family)
        for path in args.loras
    ]
    names = [Path(path).name for path in args.loras]
    if len(set(names)) < len(names):
        names = list(args.loras)
    identity = concat([person for person, _ in found])
    identity = replace(identity, provenance={"made_by": "encode"})
    reports = {name: report.to_json() for name, (_, report) in zip(names, found)}
    r2 = {name: report["weight_r2"] for name, report in reports.items()}
    return {**saved(identity, args.output), "weight_r2": r2, "loras": reports}


def is_stated(family: str | None, layout: Layout) -> bool:
    """Whether --base-model says that LoRAs are of the layout's family."""
    if family not in (None, layout.base_model):
        raise ConfigError(
            f"--base-model says {family!r}, the layout '{layout.name}' is for {layout.base_model!r}."
        )
    return family is not None


def edit_file(args: argparse.Namespace) -> dict[str, Any]:
    """`w2wpp edit`"""
    identity = load_identity(args.identity)
    strengths = dict(_change(text) for text in args.changes)
    edited = edit(identity, _space_of(identity, args), strengths)
    return {**saved(edited, args.output), "strengths": strengths}


def export(args: argparse.Namespace) -> dict[str, Any]:
    """`w2wpp export`"""
    identity = load_identity(args.identity)
    space = _space_of(identity, args)
    files = _numbered(Path(args.output), len(identity), args.format)
    kept = [  # one at a time: a LoRA of a large model takes memory
        export_lora(person, space, file, format=args.format, strength=args.strength)
        for person, file in zip(identity, files)
    ]
    facts = {"loras": [str(f) for f in files], "format": args.format, "space": space.name}
    if args.format in NOT_LOADED_BY:
        facts["note"] = NOT_LOADED_BY[args.format]
        print(f"w2wpp: {facts['note']}", file=sys.stderr)
    # Only a combination of other LoRAs has more ranks than one LoRA can keep.
    told = {} if None in kept else {"kept_energy": [round(k, 4) for k in kept if k is not None]}
    return {**facts, **told}


def _space_of(identity: Identity, args: argparse.Namespace) -> Space:
    """The space that was named, or the one nearby that the identity was made in."""
    nearby = [Path(args.identity).resolve().parent, Path.cwd()]
    return load_space(args.space or find_space(identity.space_fingerprint, nearby))


def _change(text: str) -> tuple[str, float]:
    name, _, strength = text.partition("=")
    try:
        return name, float(strength)
    except ValueError as e:
        raise ConfigError(
            f"A change is written NAME=STRENGTH, as in beard=1.5. Got {text!r}."
        ) from e


def saved(identity: Identity, path: str) -> dict[str, Any]:
    """Write an identity, and what a verb says of it."""
    save_identity(identity, path)
    facts = {"identity": path, "count": len(identity), "latent_size": identity.z.shape[1]}
    return {**facts, "space_fingerprint": identity.space_fingerprint}


def _numbered(path: Path, count: int, format: str) -> list[Path]:
    """face.safetensors, or face-1.safetensors and so on for several; folders for peft."""
    if path.name == ADAPTER and format == "peft":
        path = path.parent
    suffix = path.suffix if path.suffix == ".safetensors" else ""
    stem = path.name.removesuffix(suffix)
    if not suffix and format != "peft":
        suffix = ".safetensors"
    if count == 1:
        return [path.with_name(stem + suffix)] if stem else [path]
    return [path.with_name(f"{stem}-{i}{suffix}") for i in range(1, count + 1)]


def _space_info(path: str) -> dict[str, Any]:
    space = load_space(path)
    layout = space.layout
    return {
        "name": space.name,
        "version": space.version,
        "licence": space.licence,
        "base_model": space.base_model,
        "trigger_prompt": space.trigger_prompt,
        "fingerprint": space.fingerprint,
        "layout": f"{layout.name}: {len(layout.modules)} modules, P = {layout.size}",
        "rank": layout.rank,
        "alpha": layout.alpha,
        "codec": space.codec.name,
        "components": space.basis.n_components,
        "latent_size": space.latent_size,
        "directions": sorted(space.directions),
        "start": None
        if space.start is None
        else {**space.start.config, "verdict": bool(space.start.verdict)},
        "frame": None if space.frame is None else space.frame.to_json(),
        "training": without_curves(space.training_report),
        "origin": space.provenance.get("data", {}),
    }


def _identity_info(path: str) -> dict[str, Any]:
    identity = load_identity(path)
    lengths = identity.z.norm(dim=1) / identity.z.shape[1] ** 0.5
    return {
        "count": len(identity),
        "latent_size": identity.z.shape[1],
        "residual": identity.residual is not None,
        "space_fingerprint": identity.space_fingerprint,
        "std": [round(v, 3) for v in lengths.tolist()],  # 1 for a typical sample
        "provenance": dict(identity.provenance),
    }


def _lora_info(path: Path) -> dict[str, Any]:
    file = load_lora(path)
    sizes = [t.shape for parts in _matrices(file) for t in parts]
    return {
        "modules": len(file.updates),
        "kinds": file.kinds,
        "family": file.family.name or f"not told: {file.family.why}",
        "parameters": sum(math.prod(size) for size in sizes),
        "ranks": sorted({u.parts.shape("down")[0] for u in file.updates.values() if u.is_plain}),
        "alphas": sorted(set(file.alphas.values())),
        "unread_tensors": len(file.unread),
        "remarks": list(file.remarks),
        "metadata": file.metadata,
        "origin": _origin(file.metadata),
    }


def _matrices(file: LoraFile) -> Iterator[list[Any]]:
    """Headers of all tensors of every module."""
    for update in file.updates.values():
        entries = update.parts.source.entries
        yield [entries[key] for part, key in update.parts.keys.items() if part != "alpha"]


def _origin(metadata: Mapping[str, str]) -> list[str]:
    """Entries of the metadata that tell about who made a file, from what and of whom."""
    telling = ("ss_", "w2wpp.provenance", "modelspec.author", "modelspec.title", "sshs_")
    return sorted(key for key in metadata if key.startswith(telling))


def _file_info(file: Container) -> dict[str, Any]:
    tensors: Sequence[tuple[str, Any]] = sorted(file.entries.items())
    config = parse_json(file.metadata.get("config", "{}"), f"{file.path}: its configuration")
    facts = config.get("provenance", {}) if isinstance(config, dict) else {}
    return {
        "origin": public(facts) if isinstance(facts, dict) else {},
        "format_version": file.metadata.get("format_version", ""),
        "tensors": {
            n: f"{list(e.shape)} {str(e.dtype).removeprefix('torch.')}" for n, e in tensors
        },
    }
