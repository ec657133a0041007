"""Command-line verbs on files of others."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..encode import encode_lora
from ..imports.identity import read_numbers
from ..imports.original import read_vae
from ..imports.w2w import open_w2w
from ..imports.w2w_space import w2w_directions, write_w2w_space
from ..spacefile import load_space, save_space
from .identities import is_stated, saved
from .layouts import find_layout


def register(verbs: Any) -> None:
    """Add the verbs of this file to the parser."""
    p = verbs.add_parser("import-w2w", help="official weights2weights files to a linear space")
    p.add_argument("folder", metavar="DIR", help="with mean.pt, std.pt and V.pt")
    p.add_argument("--components", type=int, help="how many of V's columns (default: all)")
    p.add_argument("--labels", metavar="CSV", help="attributes of the people of proj_1000pc.pt")
    p.add_argument("--attributes", nargs="+", metavar="NAME", help="of the table (default: all)")
    p.add_argument("--against", nargs="+", metavar="NAME", help="edits stay clear of these")
    p.add_argument("--layout", default="sd15", help="sd15, or a space or data set that has it")
    p.add_argument("--name", default="weights2weights", help="stored in the space file")
    p.add_argument("-o", "--output", required=True, metavar="SPACE")
    p.set_defaults(run=import_w2w)

    p = verbs.add_parser("import-identity", help="a saved identity of the official code")
    p.add_argument("source", metavar="W2WMODEL.pt", help="or a folder that diffusers exported")
    p.add_argument("--space", required=True)
    p.add_argument("--residual", action="store_true", help="keep what the latents can't express")
    p.add_argument("--base-model", metavar="FAMILY", help="as in encode")
    p.add_argument("-o", "--output", required=True, metavar="ID")
    p.set_defaults(run=import_identity)

    p = verbs.add_parser("import-vae", help="a checkpoint of one of the original w2w++ VAEs")
    p.add_argument("checkpoint", metavar="CKPT")
    p.add_argument("--layout", default="sd15", help="sd15, or a space or data set that has it")
    p.add_argument("--name", default="", help="stored in the space file")
    p.add_argument("-o", "--output", required=True, metavar="SPACE")
    p.set_defaults(run=import_vae)


def import_w2w(args: argparse.Namespace) -> dict[str, Any]:
    """`w2wpp import-w2w`"""
    layout = find_layout(args.layout)
    source = open_w2w(args.folder, components=args.components, layout=layout)
    found = None
    if args.labels:
        found = w2w_directions(source, args.labels, only=args.attributes, against=args.against)
    config = write_w2w_space(source, args.output, name=args.name, directions=found)
    facts = config["provenance"]
    return {
        "space": args.output,
        "fingerprint": config["fingerprint"],
        "parameters": layout.size,
        "components": source.components,
        "prior": source.prior,
        "negative_stds": facts["negative_stds"],
        "directions": list(found.names) if found else [],
        "licence": facts["licence"],
        "trigger_prompt": facts["trigger_prompt"],
    }


def import_identity(args: argparse.Namespace) -> dict[str, Any]:
    """`w2wpp import-identity`"""
    space = load_space(args.space)
    path = Path(args.source)
    if path.suffix == ".pt":
        identity, facts = read_numbers(path, space, residual=args.residual)
        return {**saved(identity, args.output), **facts}
    family = is_stated(args.base_model, space.layout)
    identity, report = encode_lora(space, path, residual=args.residual, assume_family=family)
    return {**saved(identity, args.output), **report.to_json()}


def import_vae(args: argparse.Namespace) -> dict[str, Any]:
    """`w2wpp import-vae`"""
    name = args.name or Path(args.checkpoint).stem
    space = read_vae(args.checkpoint, layout=find_layout(args.layout), name=name)
    save_space(space, args.output)
    return {
        "space": args.output,
        "fingerprint": space.fingerprint,
        "parameters": space.layout.size,
        "codec": space.codec.name,
        "latent_size": space.latent_size,
        "licence": space.licence,
        "trigger_prompt": space.trigger_prompt,
    }
