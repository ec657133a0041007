"""Command-line verbs from LoRA files to a trained space."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..basis import AffineBasis, AnyBasis
from ..codecs import CODECS
from ..codecs import OLDER_NAMES as OLDER_CODECS
from ..commands import command
from ..delta_basis import DeltaBasis
from ..errors import ConfigError, FormatError
from ..files.container import open_container
from ..files.tables import read_labels
from ..imports.w2w import LICENCE, TRIGGER_PROMPT, open_w2w
from ..imports.w2w_space import hold_out, w2w_basis, w2w_coefficients
from ..space import SpaceBasis
from ..spacefile import load_space, save_directions, save_space
from ..training import compute
from ..training.checkpoint import forget
from ..training.coefficients import (
    Coefficients,
    load_coefficients,
    project_dataset,
    save_coefficients,
)
from ..training.collection_directions import METHODS, collection_directions
from ..training.compute import Compute
from ..training.config import VaeTraining, original_training
from ..training.dataset import VectorDataset, load_dataset
from ..training.directions import report as directions_report
from ..training.directions import space_directions
from ..training.fit_basis import ITERATIONS, STANDARDISE, TOLERANCE, fit_coefficients
from ..training.fit_curved import CurvedTraining, fit_curved
from ..training.fit_delta import collection_coefficients
from ..training.fit_flow import with_flow
from ..training.fit_locator import LocatorTraining
from ..training.fit_paintings import PaintingsTraining
from ..training.fit_start import StartTraining
from ..training.fit_vae import fit_vae, linear_space
from ..training.gather import Losses, gather_loras, public
from ..training.ranks import among_ranks, current_ranks
from ..training.report import without_curves
from ..training.run import Progress
from ..training.schedules import OLDER_NAMES as OLDER_SCHEDULES
from ..training.schedules import SCHEDULES
from ..training.sketch import NAME as FUNCTIONAL
from ..training.sketch import functional_metric, load_sketch
from ..training.start_table import fit_start_paintings, fit_start_table
from ..training.synthetic import STATEMENT, write_synthetic
from ..weight_metric import METRICS, Metric
from .identities import is_stated
from .layouts import find_layout
from .printing import log
from .renamed import renamed

HELP = {  # options of `train` that set a field of VaeTraining of the same name
    "latent": "latent size d; for pca the number of components kept",
    "epochs": "at most",
    "batch": "rows per step, 0 for all (default 128, a 32nd of sets above 8,192 rows, at most 2,048)",
    "lr": "learning rate",
    "weight_decay": "on matrices",
    "dropout": "in the residual networks of vae-skip",
    "input_noise": "std of noise on the coefficients",
    "beta": "final weight of the KL term",
    "warmup": "epochs of KL annealing",
    "adversarial": "weight of a discriminator between true and made rows",
    "free_bits": "nats per latent unit without cost",
    "validation": "share of the training persons for early stopping",
    "patience": "epochs without a better value, 0 for no early stop",
    "seed": "of everything random",
}


HELDOUT = 0.1  # of the persons behind official files


def register(verbs: Any) -> None:
    """Add the verbs of this file to the parser."""
    p = verbs.add_parser("dataset", help="gather LoRA files into a data set of vectors")
    p.add_argument("folders", nargs="+", metavar="LORA_DIR")
    p.add_argument("--layout", default="sd15", help="sd15, or a space or data set that has it")
    p.add_argument(
        "--identity",
        choices=("file", "folder"),
        default="file",
        help="whether each file or each folder is one person",
    )
    p.add_argument("--heldout", type=float, default=0.2, help="share of the persons (default 0.2)")
    p.add_argument("--seed", type=int, default=0, help="which persons are held out")
    p.add_argument(
        "--labels",
        metavar="CSV",
        help="first column: the file's name or stem, or that of the folder that names the person",
    )
    p.add_argument(
        "--gauge",
        default="keep",
        metavar="keep|first|SPACE",
        help="keep the files' own; or bring every LoRA, of any rank, into that of the first file or of a space",
    )
    p.add_argument("--workers", type=int, default=1, help="processes that read (default 1)")
    p.add_argument("--half", action="store_true", help="in half precision: half the file")
    p.add_argument(
        "--min-energy",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="of its update that every LoRA must keep in the layout's rank (default 0.5)",
    )
    p.add_argument(
        "--max-missing",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="of the layout's modules that a LoRA may lack (default 0.25)",
    )
    p.add_argument(
        "--base-model",
        metavar="FAMILY",
        help="sd15: the family of LoRAs that do not tell theirs (those without attn2.to_k and to_v)",
    )
    p.add_argument("-o", "--output", required=True, metavar="DATA")
    p.set_defaults(run=dataset)

    p = verbs.add_parser(
        "synthesize", help="a synthetic twin of a data set, to try sizes and measure speed with"
    )
    p.add_argument("--rows", type=int, required=True, help="LoRAs; w2w has 64,974")
    p.add_argument("--layout", default="sd15", help="sd15, or a space or data set that has it")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--heldout", type=float, default=0.1, help="share of the persons (default 0.1)")
    p.add_argument("--half", action="store_true", help="in half precision: half the file")
    p.add_argument("-o", "--output", required=True, metavar="DATA")
    p.set_defaults(run=synthesize)

    p = verbs.add_parser("fit-basis", help="principal components of a data set, streamed")
    p.add_argument("data", metavar="DATA")
    p.add_argument("--components", type=int, required=True)
    p.add_argument(
        "--metric",
        choices=(*METRICS, FUNCTIONAL),
        help="what counts: parameter (each number by its std, as in w2w), raw numbers, the update of "
        "the model's matrices (the default), or functional: what the model paints, by its --sketch",
    )
    p.add_argument("--sketch", metavar="FILE", help="of the model, for --metric functional")
    p.add_argument("--standardise", choices=STANDARDISE, help=argparse.SUPPRESS)  # older name
    p.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="share of the captured variance that an iteration may lose on large sets "
        f"(default {TOLERANCE})",
    )
    p.add_argument("--iterations", type=int, default=ITERATIONS, help="at most, on large sets")
    p.add_argument("--checkpoint", metavar="FILE", help="saved there; taken up again if it exists")
    compute.add_options(p)
    p.add_argument("-o", "--output", required=True, metavar="BASIS")
    p.set_defaults(run=among_ranks(basis))

    p = verbs.add_parser("train", help="train a space on a basis and its coefficients")
    p.add_argument(
        "basis",
        metavar="BASIS",
        help="from fit-basis, a space of LoRAs (from space), or a folder of official w2w files; for --codec "
        "original a data set",
    )
    p.add_argument(
        "--components",
        type=int,
        help="of a folder of official files (default: all that have coefficients)",
    )
    p.add_argument(
        "--codec", type=renamed(OLDER_CODECS), choices=sorted(CODECS), default=VaeTraining.codec
    )
    p.add_argument(
        "--kl", type=renamed(OLDER_SCHEDULES), choices=sorted(SCHEDULES), help="KL annealing"
    )
    p.add_argument("--hidden", type=int, nargs="*", help="widths of the networks")
    types = {f.name: int if f.name == "batch" else type(f.default) for f in fields(VaeTraining)}
    for name, text in HELP.items():
        default = "" if name == "batch" else f" (default {getattr(VaeTraining, name)})"
        p.add_argument(f"--{name.replace('_', '-')}", type=types[name], help=text + default)
    p.add_argument(
        "--prior",
        choices=("gaussian", "flow"),
        default="gaussian",
        help="flow: learn how people are spread; what is sampled stays N(0, I) (default gaussian)",
    )
    p.add_argument("--layout", default="sd15", help="of official w2w files (default sd15)")
    p.add_argument(
        "--heldout",
        type=float,
        metavar="SHARE",
        help=f"of a folder of official files: share of the persons to keep out (default {HELDOUT})",
    )
    p.add_argument(
        "--labels",
        metavar="CSV",
        help="of a folder of official files: says which rows are one person",
    )
    p.add_argument("--checkpoint", metavar="FILE", help="saved there; taken up again if it exists")
    compute.add_options(p)
    for fact in ("name", "space-version", "licence", "trigger-prompt"):
        p.add_argument(f"--{fact}", default="", help="stored in the space file")
    p.add_argument("-o", "--output", required=True, metavar="SPACE")
    p.set_defaults(run=among_ranks(train))
    _register_directions(verbs)
    _register_fit_start(verbs)


def _register_directions(verbs: Any) -> None:
    p = verbs.add_parser("directions", help="give a space attribute directions to edit along")
    p.add_argument("space", metavar="SPACE")
    p.add_argument(
        "data",
        metavar="DATA",
        help="a data set with labels; for a space of collected LoRAs a table (CSV) that names them",
    )
    p.add_argument(
        "--method",
        choices=METHODS,
        default="means",
        help="with a table: the difference of means, or logistic for what is there or not (default: means)",
    )
    p.add_argument("--only", nargs="+", metavar="NAME", help="these attributes (default: all)")
    p.add_argument(
        "--against", nargs="+", metavar="NAME", help="stay clear of these (default: all)"
    )
    p.add_argument("--naive", action="store_true", help="plain least squares, without de-biasing")
    p.add_argument("-o", "--output", required=True, metavar="SPACE")
    p.set_defaults(run=directions)


def _register_fit_start(verbs: Any) -> None:
    p = verbs.add_parser("fit-start", help="train the network that starts inversions in a space")
    p.add_argument("space", metavar="SPACE")
    p.add_argument(
        "table",
        nargs="?",
        metavar="CSV",
        help="columns picture, person, and labels if there are; without it, from --painted alone",
    )
    p.add_argument("--data", help="with CSV: the data set of the LoRAs that the space is from")
    p.add_argument(
        "--painted",
        metavar="CSV",
        help="columns picture, identity, index: pictures painted with the index-th identity of a file",
    )
    p.add_argument(
        "--steps",
        type=int,
        help=f"default {StartTraining.steps}, from paintings alone {PaintingsTraining.steps}",
    )
    p.add_argument("--size", type=int, default=64, help="pictures are scaled to this (default 64)")
    p.add_argument("--width", type=int, default=StartTraining.width, help="channels")
    p.add_argument("--seed", type=int, default=StartTraining.seed)
    p.add_argument("--batch", type=int, default=64, help="from paintings alone (default 64)")
    p.add_argument(
        "--augmented",
        type=float,
        default=StartTraining.augmented,
        metavar="SHARE",
        help="with CSV: how many pictures are moved, recoloured, compressed and covered while the network learns, so "
        f"that it reads photographs as they come (default {StartTraining.augmented})",
    )
    p.add_argument(
        "--scale", type=float, default=1.0, help="above 1: answers further from the mean person"
    )
    compute.add_options(p)
    p.add_argument("-o", "--output", metavar="SPACE", help="default: into the file it came from")
    p.set_defaults(run=fit_start)


def fit_start(args: argparse.Namespace) -> dict[str, Any]:
    """`w2wpp fit-start`"""
    output = args.output or args.space
    if args.table is None:
        return {"space": str(output), **_fit_start_alone(args, output)}
    if args.data is None:
        raise ConfigError(
            f"{args.table} names people: name the data set of their LoRAs with --data."
        )
    config = StartTraining(
        seed=args.seed,
        steps=StartTraining.steps if args.steps is None else args.steps,
        size=args.size,
        width=args.width,
        augmented=args.augmented,
    )
    report = fit_start_table(
        args.space,
        args.table,
        args.data,
        output,
        config=config,
        painted=args.painted,
        scale=args.scale,
        compute=(
            Compute.mixed(args.device)
            if args.precision == "auto"
            else Compute.pick(args.device, args.precision)
        ),
        callback=log,
    )
    return {"space": str(output), **report}


def _fit_start_alone(args: argparse.Namespace, output: str) -> dict[str, Any]:
    if args.painted is None:
        raise ConfigError(
            "A start network learns from a table of pictures (CSV and --data), or from paintings of the space's own "
            "identities (--painted)."
        )
    sizes = {"size": args.size, "width": args.width}
    steps = PaintingsTraining.steps if args.steps is None else args.steps
    locator = LocatorTraining(seed=args.seed + 1, steps=steps, batch=args.batch, **sizes)
    config = PaintingsTraining(
        seed=args.seed, steps=steps, batch=args.batch, locator=locator, **sizes
    )

    def told(done: int, of: int, line: str) -> None:
        if done % 100 == 0 or done == of:
            log(f"{line} of {of}")

    compute = Compute.pick(args.device, "fp32" if args.precision == "auto" else args.precision)
    return fit_start_paintings(
        args.space, args.painted, output, config=config, compute=compute, callback=told
    )


def directions(args: argparse.Namespace) -> dict[str, Any]:
    """`w2wpp directions`"""
    space = load_space(args.space)
    options = {"only": args.only, "debias": not args.naive, "against": args.against}
    if isinstance(space.basis, DeltaBasis):
        table = read_labels(args.data)
        found = collection_directions(space, table, method=args.method, **options)
        facts = directions_report(found, not args.naive, args.method)
    else:
        found = space_directions(space, load_dataset(args.data), **options)
        facts = directions_report(found, not args.naive)
    save_directions(args.space, args.output, found.as_mapping(), facts)
    return {"space": args.output, "fingerprint": space.fingerprint, "directions": facts}


def dataset(args: argparse.Namespace) -> dict[str, Any]:
    """`w2wpp dataset`"""
    layout, losses = find_layout(args.layout), Losses()
    written = gather_loras(
        args.folders,
        args.output,
        layout,
        person_is=args.identity,
        heldout=args.heldout,
        seed=args.seed,
        labels=args.labels,
        gauge=args.gauge,
        min_energy=args.min_energy,
        max_missing=args.max_missing,
        assume_family=is_stated(args.base_model, layout),
        losses=losses,
        workers=args.workers,
        precision="half" if args.half else "single",
        callback=log,
    )
    return {
        "data": args.output,
        "rows": len(written),
        "parameters": layout.size,
        "persons": len(written.identity.unique()),
        "heldout_rows": len(written.heldout_rows),
        "labels": list(written.label_names),
        **losses.summary(),
    }


def synthesize(args: argparse.Namespace) -> dict[str, Any]:
    """`w2wpp synthesize`"""
    written = write_synthetic(
        args.output,
        args.rows,
        find_layout(args.layout),
        seed=args.seed,
        heldout=args.heldout,
        precision="half" if args.half else "single",
        callback=log,
    )
    return {
        "data": args.output,
        "rows": len(written),
        "parameters": written.layout.size,
        "persons": int(written.identity[-1]) + 1,
        "heldout_rows": len(written.heldout_rows),
        "source": STATEMENT,
    }


def _basis_metric(args: argparse.Namespace, data: VectorDataset) -> str | Metric | None:
    if (args.metric == FUNCTIONAL) != bool(args.sketch):
        raise ConfigError(
            "--metric functional and --sketch FILE belong together: the metric comes from a model, and the sketch is "
            "what is known of it."
        )
    if not args.sketch:
        return args.metric
    return functional_metric(data, load_sketch(args.sketch, data.layout))


def basis(args: argparse.Namespace) -> dict[str, Any]:
    """`w2wpp fit-basis`"""
    ranks = current_ranks()
    data = load_dataset(args.data)
    fitted = fit_coefficients(
        data,
        args.components,
        metric=_basis_metric(args, data),
        standardise=args.standardise,
        tolerance=args.tolerance,
        max_iterations=args.iterations,
        compute=Compute.pick(args.device, args.precision),
        ranks=ranks,
        checkpoint=args.checkpoint,
        callback=log if ranks.is_writer else lambda line: None,
    )
    if not ranks.is_writer:
        return {}
    if not fitted.report.get("converged", True):
        log(
            f"the iteration was cut short: about {fitted.report['variance_lost']:.1e} of the captured variance is "
            "missing. Raise --iterations or --tolerance."
        )
    save_coefficients(args.output, fitted.coefficients, fitted.basis, fitted.report)
    if args.checkpoint:
        forget(args.checkpoint)
    r2 = linear_space(fitted.coefficients, fitted.basis).training_report["weight_r2"]
    sizes = {
        "rows": len(data),
        "parameters": fitted.basis.size,
        "components": fitted.basis.n_components,
    }
    return {"basis": args.output, **sizes, "weight_r2": r2, "fit": fitted.report}


def train(args: argparse.Namespace) -> dict[str, Any]:
    """`w2wpp train`"""
    ranks = current_ranks()
    where = Compute.pick(args.device, args.precision)
    coefficients, fitted = _training_input(args)
    facts = {
        "name": args.name or Path(args.output).stem,
        "version": args.space_version,
        "licence": args.licence,
        "trigger_prompt": args.trigger_prompt,
        "data": public(coefficients.provenance),
    }
    if args.codec == "pca":
        space = linear_space(coefficients, fitted, provenance=facts)
    elif args.codec == "curved":
        space = fit_curved(coefficients, fitted, _curved_settings(args), provenance=facts)
    else:
        space = fit_vae(
            coefficients,
            fitted,
            _settings(args),
            callback=_progress_bar() if ranks.is_writer else None,
            checkpoint=args.checkpoint,
            provenance=facts,
            compute=where,
            ranks=ranks,
        )
    if not ranks.is_writer:
        return {}
    if args.prior == "flow":
        space = with_flow(space, coefficients)
    save_space(space, args.output)
    report = without_curves(space.training_report)
    flow = {"flow": space.provenance["flow"]} if args.prior == "flow" else {}
    return {"space": args.output, "fingerprint": space.fingerprint, "training": report, **flow}


def _training_input(args: argparse.Namespace) -> tuple[Coefficients, SpaceBasis]:
    if Path(args.basis).is_dir():
        return _w2w_input(args)
    if args.heldout is not None or args.labels:
        raise ConfigError(
            "--heldout and --labels are for a folder of official files; who is held out of a data set "
            f"was said when it was made ('{command('dataset --heldout')}')."
        )
    kind = open_container(args.basis).metadata.get("format")
    if kind == "w2wpp.dataset":
        if args.codec != "original":
            line = command("fit-basis")
            raise FormatError(f"{args.basis} is a data set; run '{line}' on it first.")
        data = load_dataset(args.basis)
        affine = AffineBasis(data.layout.size, scale=10.0)
        return project_dataset(data, affine), affine
    if kind == "w2wpp.space":
        collected = load_space(args.basis)
        rows = collection_coefficients(collected)
        updates = collected.basis
        assert isinstance(updates, DeltaBasis)  # or there would be no coefficients of a collection
        if args.codec == "pca" and args.latent is not None:
            rows = rows.truncated(args.latent, updates.singular_values)
            updates = updates.truncated(args.latent)
        return rows, updates
    coefficients, fitted = load_coefficients(args.basis)
    if args.codec == "pca" and args.latent is not None:
        cut = fitted.truncated(args.latent)
        return coefficients.truncated(args.latent, fitted.singular_values), cut
    return coefficients, fitted


def _w2w_input(args: argparse.Namespace) -> tuple[Coefficients, AnyBasis]:
    """Official files: V.pt and the coefficients of the real identities, whose licence the space inherits."""
    if args.codec == "original":
        raise ConfigError(
            "The original codec learns from raw vectors, which official files do not hold."
        )
    args.licence, args.trigger_prompt = (
        args.licence or LICENCE,
        args.trigger_prompt or TRIGGER_PROMPT,
    )
    most = args.latent if args.codec == "pca" and args.latent else args.components
    source = open_w2w(args.basis, layout=find_layout(args.layout))
    source = source.first(most or source.known)
    c, how = hold_out(
        w2w_coefficients(source),
        HELDOUT if args.heldout is None else args.heldout,
        labels=args.labels,
        seed=args.seed or 0,
    )
    if how["by"] == "row" and how["rows"]:
        log(
            "rows are all that is known of these people: held-out rows may be of persons who have other rows in "
            "the training. --labels names a table with a column 'identity'."
        )
    return c, w2w_basis(source)


def _settings(args: argparse.Namespace) -> VaeTraining:
    changes = {name: getattr(args, name) for name in HELP if getattr(args, name) is not None}
    if args.kl is not None:
        changes["kl"] = args.kl
    if args.hidden is not None:
        changes["hidden"] = tuple(args.hidden)
    if args.codec == "original":
        return original_training(**changes)
    return VaeTraining(codec=args.codec, **changes)


def _curved_settings(args: argparse.Namespace) -> CurvedTraining:
    """What of a VAE's options means something to a map with one optimum; others are refused."""
    known = {"latent": args.latent, "seed": args.seed}
    others = {name: getattr(args, name) for name in HELP if name not in known}
    if given := [n for n, v in {**others, "kl": args.kl}.items() if v is not None]:
        raise ConfigError(
            f"--codec curved has nothing to set by --{given[0].replace('_', '-')}: it is a least-squares fit whose "
            "width and penalty are found on people who take no part. It takes --latent, --hidden M and --seed."
        )
    if args.hidden is not None:
        if len(args.hidden) != 1:
            raise ConfigError(
                f"--hidden of --codec curved is one number, of centres. Got {args.hidden}."
            )
        known["centres"] = args.hidden[0]
    return CurvedTraining(**{name: v for name, v in known.items() if v is not None})


def _progress_bar() -> Callable[[Progress], None]:
    """A bar on standard error where tqdm is there, a line every 25 epochs where it is not."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return _print_line
    bars: dict[str, Any] = {}

    def show(p: Progress) -> None:
        if p.stage not in bars:
            bars[p.stage] = tqdm(desc=p.stage, total=p.epochs, unit="epoch", file=sys.stderr)
        bar = bars[p.stage]
        bar.update(p.epoch - bar.n)
        bar.set_postfix(loss=f"{p.loss:.4f}", kl=f"{p.kl:.1f}", best=f"{p.best:.4f}")

    return show


def _print_line(p: Progress) -> None:
    if p.epoch % 25 == 0 or p.epoch == p.epochs:
        print(f"{p.stage} epoch {p.epoch}: loss {p.loss:.4f}, best {p.best:.4f}", file=sys.stderr)
