"""Every candidate space side by side in the miniature world: benchmarks/results/spaces.json, its tables and plots.

    python benchmarks/spaces.py --harder world/loras-own/dataset.safetensors --workers 2

The LoRAs come from `w2wpp avatars loras`, the harder ones from `w2wpp avatars loras --conditions own`. Spaces and
scores are kept in the work folder: an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from w2wpp.avatars.measure.comparison import Amounts, compare, full_plan, harder_plan
from w2wpp.avatars.measure.comparison_report import report, table, write
from w2wpp.avatars.measure.model import model_of
from w2wpp.avatars.places import RESULTS, WORK, World
from w2wpp.avatars.stages import BASE, DATASET, EMBEDDER
from w2wpp.avatars.world.studio import open_studio
from w2wpp.training.dataset import load_dataset


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=World().at(DATASET))
    parser.add_argument("--harder", type=Path, help="LoRAs of people under conditions of their own")
    parser.add_argument(
        "--work", type=Path, default=WORK / "comparison", help="kept spaces and scores"
    )
    parser.add_argument("--people", type=int, default=Amounts.people, help="rebuilt, held out")
    parser.add_argument("--crowd", type=int, default=Amounts.crowd, help="drawn from each space")
    parser.add_argument(
        "--workers", type=int, default=1, help="single-threaded processes that paint"
    )
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "spaces.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    amounts = Amounts(people=args.people, crowd=args.crowd)
    world = World()
    studio = open_studio(world.at(BASE), world.at(EMBEDDER))

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    found = {}
    for name, path, plan in (
        ("main", args.data, full_plan()),
        ("harder", args.harder, harder_plan()),
    ):
        if path is not None:
            dataset = load_dataset(path)
            model = model_of(studio, dataset.layout)
            folder = args.work / name
            found[name] = compare(
                studio,
                dataset,
                model,
                folder,
                plan,
                amounts=amounts,
                workers=args.workers,
                callback=say,
            )
    result = report(
        found["main"], load_dataset(args.data), harder=found.get("harder"), amounts=amounts
    )
    written = write(result, args.output)
    print(table(result["rows"]))
    say(f"written: {', '.join(map(str, written))}; {result['core_minutes']} core-minutes")


if __name__ == "__main__":
    main()
