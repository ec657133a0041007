"""What the verbs of the miniature world do: read, run, write, and say what was written."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..files.text import read_json
from ..files.writing import write_text
from ..plots import plot_curves
from ..spacefile import load_space, save_directions
from ..training.dataset import VectorDataset, load_dataset
from ..training.directions import report, space_directions
from .build import spaces, start
from .build.catalogue import catalogue
from .build.dreambooth import DreamBooth
from .build.loras import LoraSet, build_loras
from .build.train_base import BaseTraining, launch_base
from .build.train_embedder import EmbedderTraining, measure_embedder, train_embedder
from .measure import directions, evaluation, inversion_benchmark
from .measure.demo import make_demo
from .measure.gate import gate_table, judge_world
from .measure.portrait import invert_file, say
from .places import MODELS, RESULTS
from .world.base import save_base
from .world.embedder import save_embedder
from .world.studio import Studio, open_studio

READABLE = 0.1  # R2 on held-out people below which latents do not tell an attribute


def run_demo(args: Namespace) -> dict[str, Any]:
    return make_demo(args.output, models=MODELS, seed=args.seed, truncation=args.truncation)


def run_invert(args: Namespace) -> dict[str, Any]:
    return invert_file(
        args.space,
        args.image,
        args.output,
        base_path=MODELS / "avatar-base.safetensors",
        method=args.method,
        mask_path=args.mask,
        seed=args.seed,
        callback=say(_log),
        checkpoint=args.checkpoint,
    )


def run_base(args: Namespace) -> dict[str, Any]:
    started, config = time.monotonic(), BaseTraining()
    trained = launch_base(
        config, processes=args.processes, checkpoint=args.work / "base.ckpt", callback=_log
    )
    save_base(trained, args.output, _provenance("base", asdict(config), started))
    return {"written": str(args.output), "seconds": round(time.monotonic() - started)}


def run_embedder(args: Namespace) -> dict[str, Any]:
    started, config = time.monotonic(), EmbedderTraining()
    trained = train_embedder(config, checkpoint=args.work / "embedder.ckpt", callback=_log)
    figures = measure_embedder(trained)
    provenance = _provenance("embedder", asdict(config), started)
    save_embedder(trained, args.output, {**provenance, "figures": figures})
    return {"written": str(args.output), **figures}


def run_loras(args: Namespace) -> dict[str, Any]:
    started, config = time.monotonic(), LoraSet(training=DreamBooth(conditions=args.conditions))
    if args.people:
        config = replace(config, people=args.people)
    folder = _lora_folder(args, args.conditions)
    dataset = build_loras(
        MODELS / "avatar-base.safetensors", config, folder, workers=args.workers, callback=_log
    )
    return {
        "written": str(folder / "dataset.safetensors"),
        "people": len(dataset),
        "parameters": dataset.layout.size,
        "seconds": round(time.monotonic() - started),
    }


def run_gate(args: Namespace) -> dict[str, Any]:
    dataset = _dataset(args)
    result = judge_world(_studio(), dataset, components=spaces.components_of(dataset))
    result["hardware"] = _hardware()
    _write_json(args.output, result)
    write_text(args.output.with_suffix(".md"), gate_table(result) + "\n")
    _log(gate_table(result))
    return result


def run_spaces(args: Namespace) -> dict[str, Any]:
    folder = args.output or args.work / "spaces"
    written = spaces.train_spaces(_dataset(args), folder, callback=_log)
    if args.ship:
        written += spaces.ship(_dataset(args), folder, MODELS)
    return {"written": [str(path) for path in written]}


def run_evaluate(args: Namespace) -> dict[str, Any]:
    if args.inversion:
        return _evaluate_inversion(args)
    if not args.space:
        raise ConfigError("Name the spaces to evaluate, or ask for --inversion.")
    protocol = evaluation.Protocol(
        base=MODELS / "avatar-base.safetensors",
        embedder=MODELS / "avatar-embedder.safetensors",
        dataset=args.data,
        people=args.people,
        sampled=args.sampled,
    )
    started = time.monotonic()
    rows = evaluation.evaluate_spaces(args.space, protocol, workers=args.workers, callback=_log)
    result = {
        "guidance": protocol.guidance,
        "rows": rows,
        "hardware": _hardware(),
        "seconds": round(time.monotonic() - started),
    }
    _log(evaluation.table(rows))
    if args.output:
        _write_json(args.output, result)
        write_text(args.output.with_suffix(".md"), evaluation.table(rows) + "\n")
        evaluation.draw(args.space, protocol, args.output.with_suffix(""))
    return result


def _evaluate_inversion(args: Namespace) -> dict[str, Any]:
    shipped = [MODELS / f"{name}.safetensors" for name in ("avatars", "avatars-pca")]
    material = inversion_benchmark.Material(
        MODELS / "avatar-base.safetensors",
        MODELS / "avatar-embedder.safetensors",
        args.data,
        {path.stem: path for path in [*shipped, *args.space]},
        min(args.people or 160, 160),
    )
    output = args.output or RESULTS / "inversion.json"
    before = read_json(output) if args.rows and output.exists() else {}

    def save(result: dict[str, Any]) -> None:
        result = inversion_benchmark.merged(before, result)
        _write_json(output, {**result, "hardware": _hardware()})
        text = inversion_benchmark.table(result) + "\n"
        write_text(output.with_suffix(".md"), text)
        plot_curves(dict(inversion_benchmark.curves(result)), output.with_suffix(".png"))

    return inversion_benchmark.run_benchmark(
        material, only=args.rows, workers=args.workers, callback=_log, save=save
    )


def run_directions(args: Namespace) -> dict[str, Any]:
    started, dataset = time.monotonic(), _dataset(args)
    paths = args.space or [MODELS / "avatars.safetensors", MODELS / "avatars-pca.safetensors"]
    studio = replace(_studio(), pictures=1)
    tables, results = [], {}
    for path in paths:
        space = load_space(path)
        found = space_directions(space, dataset)
        names = [n for n, r2 in zip(found.names, found.r2.tolist()) if r2 >= READABLE]
        debiased = space_directions(space, dataset, only=names)
        naive = space_directions(space, dataset, only=names, debias=False)
        crowd = directions.people(space, dataset, args.people, studio.seed)
        rows = directions.measure_directions(space, debiased, naive, studio, crowd, callback=_log)
        results[path.stem] = {"rows": rows, "readings": report(found, True)}
        tables.append(f"## {path.stem}\n\n{directions.table(rows)}\n")
        if args.ship:
            kept = {n: v for n, v in debiased.as_mapping().items() if rows[n]["passes"]}
            save_directions(path, path, kept, report(debiased, True))
    result = {
        "people": args.people,
        "strengths": directions.STRENGTHS,
        "spaces": results,
        "hardware": _hardware(),
        "seconds": round(time.monotonic() - started),
    }
    _write_json(args.output, result)
    write_text(args.output.with_suffix(".md"), "\n".join(tables))
    return {"written": str(args.output)}


def run_start(args: Namespace) -> dict[str, Any]:
    dataset, network = _dataset(args), start.reader(args.work, _log)
    shipped = [MODELS / f"{name}.safetensors" for name in ("avatars", "avatars-pca")]
    paths = [*args.space, *(shipped if args.ship else [])]
    return {"written": [str(start.add_start(path, network, dataset, _studio())) for path in paths]}


def run_list(args: Namespace) -> dict[str, Any]:
    path = MODELS / "README.md"
    write_text(path, catalogue(MODELS))
    return {"written": str(path)}


def _dataset(args: Namespace) -> VectorDataset:
    return load_dataset(args.data or _lora_folder(args, "common") / "dataset.safetensors")


def _lora_folder(args: Namespace, conditions: str) -> Path:
    return Path(args.work) / f"loras-{conditions}"


def _studio() -> Studio:
    return open_studio(MODELS / "avatar-base.safetensors", MODELS / "avatar-embedder.safetensors")


def _provenance(stage: str, config: dict[str, Any], started: float) -> dict[str, Any]:
    return {
        "made_by": f"w2wpp avatars {stage}",
        "training": config,
        "seconds": round(time.monotonic() - started),
        "hardware": _hardware(),
    }


def _hardware() -> str:
    return f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}"


def _write_json(path: Path, result: dict[str, Any]) -> None:
    write_text(path, json.dumps(result, indent=1) + "\n")


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
