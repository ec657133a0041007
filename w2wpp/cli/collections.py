"""Command-line verbs on collections of LoRA files: a space of them, and how they compare."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from ..lora.members import Member
from ..spacefile import save_space, space_bytes
from ..training.collection_report import map_positions
from ..training.fit_delta import (
    CollectionSettings,
    Comparison,
    compare_members,
    fit_delta,
    lora_files,
    open_members,
)

Verbs = Any  # argparse's collection of subparsers has no public type


def register(verbs: Verbs) -> None:
    """Add the verbs of this file to the parser."""
    p = verbs.add_parser(
        "space", help="make a space of LoRA files, of any rank, trainer and base model"
    )
    p.add_argument("loras", nargs="+", metavar="LORA_DIR", help="folders, or files")
    p.add_argument(
        "--rank", type=int, help="of the LoRAs that come out (default: the files' largest)"
    )
    p.add_argument("--components", type=int, help="how many to keep (default: all)")
    p.add_argument(
        "--cut", type=int, metavar="R", help="keep R ranks of each file, for a smaller space"
    )
    p.add_argument(
        "--weight",
        action="append",
        default=[],
        metavar="NAME=W",
        help="of a file in the mean; again for others",
    )
    p.add_argument("--name", help="of the space (default: the output's)")
    p.add_argument("--licence", default="", help="of what is mixed, stored in the file")
    p.add_argument("--trigger-prompt", default="", help="words that call up what the LoRAs share")
    p.add_argument(
        "--keep-names", action="store_true", help="write the files' names into the space"
    )
    _add_common(p)
    p.add_argument("-o", "--output", required=True, metavar="SPACE")
    p.set_defaults(run=space)

    p = verbs.add_parser(
        "compare", help="how much LoRA files are alike, whatever their rank and gauge"
    )
    p.add_argument("loras", nargs="+", metavar="LORA", help="files, or folders")
    _add_common(p)
    p.set_defaults(run=compare)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text-encoders",
        action="store_true",
        help="what the files change in text encoders, apart from the model, with coefficients of its own",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="where they are compared: auto (a GPU if there is one), cpu, cuda or cuda:N",
    )


def space(args: argparse.Namespace) -> dict[str, Any]:
    """`w2wpp space`"""
    members, refused = _members(args)
    settings = CollectionSettings(
        rank=args.rank,
        components=args.components,
        cut_to=args.cut,
        name=args.name or Path(args.output).stem,
        licence=args.licence,
        trigger_prompt=args.trigger_prompt,
        keep_names=args.keep_names,
    )
    weights = dict(_weight(text) for text in args.weight)
    made, report = fit_delta(
        members, settings, weights=weights, refused=refused, progress=_tell, device=args.device
    )
    size = space_bytes(made)
    print(
        f"writing {args.output}: {len(report.names)} LoRAs in half precision, {size / 1e6:,.1f} MB",
        file=sys.stderr,
    )
    save_space(made, args.output)
    facts = {
        "space": args.output,
        "bytes": Path(args.output).stat().st_size,
        "rank": made.layout.rank,
    }
    return {
        **facts,
        "latent_size": made.latent_size,
        "fingerprint": made.fingerprint,
        **report.to_json(),
    }


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """`w2wpp compare`"""
    members, refused = _members(args)
    if len(members) < 2:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused)
        raise DataError(f"Comparing takes at least two LoRAs. Got {len(members)}. {reasons}")
    found = compare_members(members, refused=refused, progress=_tell, device=args.device)
    return comparison_json(found)


def comparison_json(found: Comparison) -> dict[str, Any]:
    """What `w2wpp compare` prints: cosines, positions on a map, copies and outliers."""
    positions = map_positions(found.gram)
    return {
        "family": found.family,
        "names": list(found.names),
        "cosines": {
            name: [round(v, 4) for v in row]
            for name, row in zip(found.names, found.cosines.tolist())
        },
        "norms": {n: float(f"{v:.4g}") for n, v in zip(found.names, found.norms.tolist())},
        "map": {
            n: [float(f"{v:.4g}") for v in row] for n, row in zip(found.names, positions.tolist())
        },
        "nearest": [[a, b, round(c, 4)] for a, b, c in found.pairs],
        "copies": [[a, b, round(c, 3)] for a, b, c in found.copies],
        "outliers": [list(row) for row in found.outliers],
        "did_not_fit": [list(row) for row in found.refused],
    }


def _members(args: argparse.Namespace) -> tuple[list[Member], list[tuple[str, str]]]:
    return open_members(lora_files(args.loras), text_encoders=args.text_encoders)


def _weight(text: str) -> tuple[str, float]:
    name, _, weight = text.rpartition("=")
    try:
        return name, float(weight)
    except ValueError as e:
        raise ConfigError(f"A weight is written NAME=W, as in anna=2. Got {text!r}.") from e


def _tell(done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(f"\rcomparing module {done} of {of}", end="" if done < of else "\n", file=sys.stderr)
