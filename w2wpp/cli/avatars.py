"""The command line of the miniature world: ``w2wpp demo``, ``w2wpp evaluate`` and ``w2wpp avatars STAGE``.

Everything that ``models/`` ships comes out of the stages. What needs diffusers is imported when a verb runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..avatars.places import MODELS, WORK, World
from ..avatars.stages import BASE, DATASET, NAMED, SHIPPED, STAGES, Stage, require_inputs
from ..errors import ConfigError
from ..inversion import METHODS, OLDER_NAMES
from ..training import compute
from ..training.compute import Compute
from .printing import Result, log
from .renamed import renamed

# Stages that take --device; what the others train is small, or shared by processes on the CPU.
COMPUTED = ("loras", "gate", "spaces", "start", "teach", "directions")


def register(verbs: Any) -> None:
    """Add the verbs to the parser of ``w2wpp``."""
    _register_demo(verbs)
    _register_evaluate(verbs)
    _register_invert(verbs)
    avatars = verbs.add_parser("avatars", help="build the miniature world, stage by stage")
    stages = avatars.add_subparsers(dest="stage", required=True, metavar="STAGE")

    made = {stage.name: _stage(stages, stage) for stage in STAGES}

    base = made["base"]
    base.add_argument("--processes", type=int, default=2, help="share each batch among these")

    loras = made["loras"]
    loras.add_argument("--people", type=int, help="how many (default 1000, a fifth held out)")
    loras.add_argument("--conditions", choices=("common", "own"), default="common")
    loras.add_argument("--workers", type=int, default=2, help="single-threaded processes")

    for name in COMPUTED:
        compute.add_options(made[name])
    for name in ("gate", "spaces", "start", "directions"):
        made[name].add_argument(
            "--data", type=Path, help="data set (default: the one in the work folder)"
        )
    outputs = {
        "vae": "default: the autoencoder in models/",
        "base": "default: the base in models/",
        "readers": "folder (default: models/)",
        "embedder": "default: the embedder in models/",
        "gate": "JSON (default: benchmarks/results/world.json)",
        "spaces": "folder (default: spaces/ in the work folder)",
        "teach": "folder (default: taught/ in the work folder)",
        "directions": "JSON (default: benchmarks/results/directions.json)",
    }
    for name, text in outputs.items():
        made[name].add_argument("-o", "--output", type=Path, help=text)
    shipping = {
        "spaces": "also write the shipped ones to models/",
        "start": "also into both spaces of models/",
        "teach": "also into the default space of models/",
        "directions": "store what passes in the spaces",
    }
    for name, text in shipping.items():
        made[name].add_argument("--ship", action="store_true", help=text)
    made["spaces"].add_argument(
        "--replace",
        action="store_true",
        help="ship new latents where directions and start networks of other ones would be lost",
    )
    for name, text in (
        ("start", "files to write it into"),
        ("teach", "default: both that ship"),
        ("directions", "default: both that ship"),
    ):
        made[name].add_argument(
            "--space", nargs="+", type=Path, metavar="SPACE", default=[], help=text
        )
    made["teach"].add_argument("--people", type=int, help="who are painted (default 1792)")
    made["teach"].add_argument(
        "--keep-answers",
        action="store_true",
        help="of the network that a space has: learn only where people are",
    )
    made["teach"].add_argument("--workers", type=int, default=2, help="single-threaded processes")
    made["directions"].add_argument(
        "--people", type=int, default=32, help="half held out, half drawn"
    )


def _register_demo(verbs: Any) -> None:
    parser = verbs.add_parser("demo", help="sample, interpolate, export and paint with what ships")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("demo"), help="folder for the results"
    )
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--truncation", type=float, default=0.9, help="below 1: closer to the mean")
    compute.add_options(parser)
    parser.set_defaults(run=run_demo)


def _register_evaluate(verbs: Any) -> None:
    parser = verbs.add_parser("evaluate", help="score spaces of the miniature world")
    parser.add_argument("space", nargs="*", type=Path, metavar="SPACE")
    parser.add_argument(
        "--inversion",
        action="store_true",
        help="instead: every way from one picture to a LoRA; SPACE are further ones beside what ships",
    )
    parser.add_argument(
        "--wild",
        action="store_true",
        help="instead: pictures as they come, moved, covered, wide, of nobody; SPACE is one with a start network, a "
        "second one the same with a start that learned from paintings alone",
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
    compute.add_options(parser)
    parser.set_defaults(run=run_evaluate)


def _register_invert(verbs: Any) -> None:
    parser = verbs.add_parser("invert", help="a picture of an avatar to an identity")
    parser.add_argument("space", type=Path, metavar="SPACE")
    parser.add_argument("image", type=Path, metavar="IMAGE", help="of any size")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="ID")
    parser.add_argument("--method", type=renamed(OLDER_NAMES), choices=METHODS, default="adam")
    parser.add_argument("--mask", type=Path, help="of any size, white where the person is")
    parser.add_argument(
        "--no-framing", action="store_true", help="take the middle of the picture as it is"
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="an error if the result should not be trusted; it is written all the same",
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="saved there; taken up again if it exists"
    )
    parser.add_argument("--seed", type=int, default=0)
    compute.add_options(parser)
    parser.set_defaults(run=run_invert)


def _stage(stages: Any, stage: Stage) -> Any:
    parser = stages.add_parser(stage.name, help=stage.help)
    parser.add_argument(
        "--work", type=Path, default=WORK, help="folder for checkpoints and data (default: world/)"
    )
    parser.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    parser.set_defaults(run=run_stage)
    return parser


def run_stage(args: argparse.Namespace) -> Result:
    """`w2wpp avatars STAGE`"""
    stage, world = NAMED[args.stage], World(work=args.work)
    options = {
        k: v
        for k, v in vars(args).items()
        if k not in ("verb", "stage", "work", "run", "json", "device", "precision")
    }
    where = _compute(args) if args.stage in COMPUTED else Compute()
    if args.stage == "start" and args.precision == "auto":
        options["compute"] = Compute.mixed(where.device)  # readers train alike in both precisions
    elif args.stage in COMPUTED:
        options["compute"] = where
    require_inputs(
        stage,
        world,
        given=[DATASET] * bool(options.get("data")) + list(SHIPPED) * bool(options.get("space")),
    )
    from ..avatars import making

    with where.products():
        result: Result = getattr(making, f"make_{stage.name}")(world, log, **options)
    return result


def _compute(args: argparse.Namespace) -> Compute:
    """What --device and --precision ask for, said where it is no plain CPU."""
    where = Compute.pick(args.device, args.precision)
    if where != Compute():
        log(f"on {where.device} in {where.precision}")
    return where


def run_demo(args: argparse.Namespace) -> Result:
    """`w2wpp demo`"""
    from ..avatars.measure.demo import make_demo

    where = _compute(args)
    with where.products():
        return make_demo(
            args.output,
            models=MODELS,
            seed=args.seed,
            truncation=args.truncation,
            device=where.device,
        )


def run_invert(args: argparse.Namespace) -> Result:
    """`w2wpp invert`"""
    from ..avatars.measure.portrait import invert_file, say

    where = _compute(args)
    with where.products():
        return invert_file(
            args.space,
            args.image,
            args.output,
            base_path=World().at(BASE),
            method=args.method,
            mask_path=args.mask,
            seed=args.seed,
            crop=not args.no_framing,
            strict=args.strict,
            callback=say(log),
            checkpoint=args.checkpoint,
            device=where.device,
        )


def run_evaluate(args: argparse.Namespace) -> Result:
    """`w2wpp evaluate`"""
    from ..avatars.measure.reports import report_inversion, report_spaces

    common = {"data": args.data, "people": args.people, "workers": args.workers}
    common |= {"output": args.output, "callback": log, "compute": (where := _compute(args))}
    if args.inversion:
        return report_inversion(args.space, World(), rows=args.rows, **common)
    if args.wild:
        from ..avatars.measure.wild_world import report_wild

        common.pop("workers")
        with where.products():
            return report_wild(args.space or [MODELS / "avatars.safetensors"], World(), **common)
    if not args.space:
        raise ConfigError("Name the spaces to evaluate, or ask for --inversion or --wild.")
    return report_spaces(args.space, World(), sampled=args.sampled, **common)
