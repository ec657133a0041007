"""The command line of the miniature world: ``w2wpp demo``, ``w2wpp evaluate`` and ``w2wpp avatars STAGE``.

Everything that ``models/`` ships comes out of the stages, in this order: base, embedder, loras, gate, spaces.
This file only parses; what needs diffusers is imported when a verb runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..avatars.places import MODELS, RESULTS
from ..inversion import METHODS


def register(verbs: Any) -> None:
    """Add the verbs to the parser of ``w2wpp``."""
    _register_demo(verbs)
    _register_evaluate(verbs)
    _register_invert(verbs)
    avatars = verbs.add_parser("avatars", help="build the miniature world, stage by stage")
    stages = avatars.add_subparsers(dest="stage", required=True, metavar="STAGE")

    base = _stage(stages, "base", "train the base model")
    base.add_argument("--processes", type=int, default=2, help="share each batch among these")
    base.add_argument("-o", "--output", type=Path, default=MODELS / "avatar-base.safetensors")

    embedder = _stage(stages, "embedder", "train the embedder that gives ID scores")
    embedder.add_argument(
        "-o", "--output", type=Path, default=MODELS / "avatar-embedder.safetensors"
    )

    loras = _stage(stages, "loras", "fine-tune a LoRA for every person")
    loras.add_argument("--people", type=int, help="how many (default 1000, a fifth held out)")
    loras.add_argument("--conditions", choices=("common", "own"), default="common")
    loras.add_argument("--workers", type=int, default=2, help="single-threaded processes")

    gate = _stage(stages, "gate", "measure whether a space could learn from the LoRAs")
    gate.add_argument("--data", type=Path, help="data set (default: the one in the work folder)")
    gate.add_argument("-o", "--output", type=Path, default=RESULTS / "world.json")

    spaces = _stage(stages, "spaces", "train every space that the evaluation compares")
    spaces.add_argument("--data", type=Path, help="data set (default: the one in the work folder)")
    spaces.add_argument(
        "-o", "--output", type=Path, help="folder (default: spaces/ in the work folder)"
    )
    spaces.add_argument(
        "--ship", action="store_true", help="also write the shipped ones to models/"
    )

    directions = _stage(stages, "directions", "find and measure attribute directions")
    directions.add_argument(
        "--space", nargs="+", type=Path, metavar="SPACE", help="default: both that ship"
    )
    directions.add_argument("--data", type=Path, help="data set with labels (default: as above)")
    directions.add_argument("--people", type=int, default=32, help="half held out, half drawn")
    directions.add_argument("--ship", action="store_true", help="store what passes in the spaces")
    directions.add_argument("-o", "--output", type=Path, default=RESULTS / "directions.json")

    start = _stage(stages, "start", "train the network that starts inversions, into space files")
    start.add_argument(
        "--space", nargs="+", type=Path, metavar="SPACE", default=[], help="files to write it into"
    )
    start.add_argument("--data", type=Path, help="data set with labels (default: as above)")
    start.add_argument("--ship", action="store_true", help="also into both spaces of models/")

    _stage(stages, "list", "write models/README.md: sizes and checksums of what ships")


def _register_demo(verbs: Any) -> None:
    parser = verbs.add_parser("demo", help="sample, interpolate, export and paint with what ships")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("demo"), help="folder for the results"
    )
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--truncation", type=float, default=0.9, help="below 1: closer to the mean")
    parser.set_defaults(run=_later("demo"))


def _register_evaluate(verbs: Any) -> None:
    parser = verbs.add_parser("evaluate", help="score spaces of the miniature world")
    parser.add_argument("space", nargs="*", type=Path, metavar="SPACE")
    parser.add_argument(
        "--inversion",
        action="store_true",
        help="instead: every way from one picture to a LoRA; SPACE are further ones beside what ships",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        default=[],
        help="only these rows of --inversion; others stay as the output file has them",
    )
    parser.add_argument("--data", type=Path, default=MODELS / "avatars-heldout.safetensors")
    parser.add_argument(
        "--people", type=int, default=100, help="held-out people to score, 0 for all"
    )
    parser.add_argument("--sampled", type=int, default=100, help="identities drawn from each space")
    parser.add_argument("--workers", type=int, default=1, help="single-threaded processes")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="JSON; a table and plots are written beside it",
    )
    parser.set_defaults(run=_later("evaluate"))


def _register_invert(verbs: Any) -> None:
    parser = verbs.add_parser("invert", help="a picture of an avatar to an identity")
    parser.add_argument("space", type=Path, metavar="SPACE")
    parser.add_argument("image", type=Path, metavar="IMAGE", help="32 x 32")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="ID")
    parser.add_argument("--method", choices=METHODS, default="adam")
    parser.add_argument("--mask", type=Path, help="32 x 32, white where the picture counts")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="saved there; taken up again if it exists"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_later("invert"))


def _stage(stages: Any, name: str, text: str) -> Any:
    parser = stages.add_parser(name, help=text)
    parser.add_argument(
        "--work", type=Path, default=Path("world"), help="folder for checkpoints and data"
    )
    parser.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    parser.set_defaults(run=_later(name))
    return parser


def _later(name: str) -> Callable[[argparse.Namespace], dict[str, Any]]:
    """The function ``name`` of ``stages``, imported when it is called."""

    def run(args: argparse.Namespace) -> dict[str, Any]:
        from ..avatars import stages

        result: dict[str, Any] = getattr(stages, f"run_{name}")(args)
        return result

    return run
