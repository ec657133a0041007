"""`w2wpp evaluate`: the scores of spaces, or of every way from a picture to a LoRA, written down."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...files.text import read_json
from ...plots import plot_curves
from ...training.compute import Compute
from ..places import World
from ..records import hardware, save_result
from ..stages import BASE, EMBEDDER, SHIPPED
from . import evaluation, inversion_benchmark

MOST_PEOPLE = 160  # that ways of inversion are scored on


def report_spaces(
    paths: Sequence[Path],
    world: World,
    *,
    data: Path,
    people: int,
    sampled: int,
    workers: int,
    compute: Compute | None = None,
    output: Path | None = None,
    callback: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Reconstruction, samples and walks of space files; figures, a table and plots if there is an output."""
    protocol = evaluation.Protocol(
        base=world.at(BASE),
        embedder=world.at(EMBEDDER),
        dataset=data,
        people=people,
        sampled=sampled,
        compute=compute or Compute(),
    )
    started, paths = time.monotonic(), list(paths)
    rows = evaluation.evaluate_spaces(paths, protocol, workers=workers, callback=callback)
    result = {
        "guidance": protocol.guidance,
        "compute": protocol.compute.to_json(),
        "rows": rows,
        "hardware": hardware(),
        "seconds": round(time.monotonic() - started),
    }
    callback(evaluation.table(rows))
    if output:
        save_result(output, result, evaluation.table(rows))
        protocol.compute.run(evaluation.draw, paths, protocol, output.with_suffix(""))
    return result


def report_inversion(
    further: Sequence[Path],
    world: World,
    *,
    data: Path,
    people: int,
    rows: Sequence[str] = (),
    workers: int,
    compute: Compute | None = None,
    output: Path | None = None,
    callback: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Ways of inversion in the shipped spaces and others; rows that are not scored stay as the output has them."""
    shipped = [world.at(name) for name in SHIPPED]
    material = inversion_benchmark.Material(
        world.at(BASE),
        world.at(EMBEDDER),
        data,
        {path.stem: path for path in [*shipped, *further]},
        min(people or MOST_PEOPLE, MOST_PEOPLE),
        compute or Compute(),
    )
    output = output or world.at("results/inversion.json")
    before = read_json(output) if rows and output.exists() else {}

    def save(result: dict[str, Any]) -> None:
        result = inversion_benchmark.merged(before, result)
        save_result(output, result, inversion_benchmark.table(result))
        plot_curves(dict(inversion_benchmark.curves(result)), output.with_suffix(".png"))

    return inversion_benchmark.run_benchmark(
        material, only=rows, workers=workers, callback=callback, save=save
    )
