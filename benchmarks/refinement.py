"""What refinement adds to a start: ways after the start network's guess, on people whom no recipe was chosen on.

    python benchmarks/refinement.py --people 100 -o benchmarks/results/refinement.json
    python benchmarks/refinement.py --tuning            # on the 40 held-out people that recipes may be chosen on

One picture of each person is inverted in the shipped space by every way; their LoRAs are painted in the same scenes and
read by the embedder. What counts is the difference to the start alone, paired by person, and what it cost: evaluations
of the UNet for each person. A way earns its evaluations if its interval lies above zero.

- **start**: the start network's answer, 0 evaluations.
- **adam**: the default refinement; **shown E**: the same, with steps only along directions whose energy is at least E
  of the strongest one's (`Recipe.shown`).
- **read again N**: the start is painted, read and moved by the difference, N times (`Recipe.rereads`).
- **average ...**: from the average person, 100 evaluations, everywhere and along what shows.

--space names another space with a start network, such as one that W2W++ Train Start Network taught.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from publish import publish
from torch import Tensor

import w2wpp
from w2wpp.avatars.measure.inversion import AvatarDenoiser, portraits
from w2wpp.avatars.measure.inversion_benchmark import TUNING
from w2wpp.avatars.world.painter import noise_schedule
from w2wpp.avatars.world.studio import Studio, open_studio
from w2wpp.inversion import FROM_AVERAGE, FROM_GUESS, Recipe, session
from w2wpp.metrics import estimate, id_scores
from w2wpp.training.dataset import load_dataset

GROUP = 25  # people that are inverted side by side


@dataclass(frozen=True)
class World:
    """What the miniature world has to give, whatever its edition."""

    studio: Studio
    schedule: w2wpp.NoiseSchedule
    encode: Callable[[Tensor], Tensor]  # pictures to latents
    decode: Callable[[Tensor], Tensor]  # and back


def open_world() -> World:
    """The one that ships, whose latents are its pictures."""
    studio = open_studio(
        w2wpp.shipped("avatar-base.safetensors"), w2wpp.shipped("avatar-embedder.safetensors")
    )
    return World(studio, noise_schedule(studio.base), lambda t: t, lambda t: t.clamp(-1, 1))


def ways() -> dict[str, Recipe]:
    """The start alone first."""
    adam = FROM_GUESS["adam"]
    start, average = replace(adam, steps=0), replace(FROM_AVERAGE["adam"], steps=100)
    found = {"start": start, "adam": adam}
    found |= {f"adam, shown {e:g}": replace(adam, shown=e) for e in (0.3, 0.1, 0.03)}
    found |= {f"read again {n}": replace(start, rereads=n) for n in (1, 2, 4)}
    found["read again 1, then adam, shown 0.1"] = replace(adam, rereads=1, shown=0.1)
    found["average, adam"] = average
    found |= {f"average, adam, shown {e:g}": replace(average, shown=e) for e in (0.1, 0.03)}
    return found


def invert(
    world: World, space: w2wpp.Space, recipe: Recipe, pictures: Tensor
) -> tuple[Tensor, int]:
    """Vectors [N, P] of people from a picture each [N, 3, H, W], and evaluations of each."""
    made = session(space, world.encode(pictures)[:, None], recipe, faces=pictures[:, None])
    denoise = AvatarDenoiser(world.studio.base, space.layout)
    solution = made.solve(denoise, world.schedule, decode=world.decode)
    with torch.no_grad():
        return solution.identity.vectors(space), solution.evaluations


def measure(space: w2wpp.Space, data: Path, people: int, tuning: bool) -> dict[str, Any]:
    world, dataset = open_world(), load_dataset(data)
    held = dataset.heldout_rows
    rows = held[:TUNING][:people] if tuning else held[TUNING : TUNING + people]
    assert dataset.labels is not None, "the data set of avatars has their traits"
    identity = dataset.labels[rows]
    own = id_scores(
        world.studio.photograph(dataset.vectors(rows), dataset.layout).embeddings, identity
    )
    scores: dict[str, Tensor] = {}
    table_rows: dict[str, Any] = {}
    for name, recipe in ways().items():
        started, parts, spent = time.process_time(), [], 0
        for some, who in zip(rows.split(GROUP), identity.split(GROUP)):
            vectors, spent = invert(world, space, recipe, portraits(who, some))
            parts.append(vectors)
        seconds = (time.process_time() - started) / len(rows)
        seen = world.studio.photograph(torch.cat(parts), dataset.layout).embeddings
        scores[name] = id_scores(seen, identity)
        table_rows[name] = {
            "id_score": estimate(scores[name]).to_json(),
            "of_own": float(scores[name].mean() / own.mean()),
            "above_start": estimate(scores[name] - scores["start"]).to_json(),
            "evaluations": spent,
            "seconds": round(seconds, 3),
        }
        print(f"{name}: {scores[name].mean():.4f}, {spent} evaluations", flush=True)
    return {
        "space": space.name,
        "people": len(rows),
        "tuning": tuning,
        "own": estimate(own).to_json(),
        "rows": table_rows,
    }


def table(result: dict[str, Any]) -> str:
    whom = "people that recipes may be chosen on" if result["tuning"] else "people"
    lines = [
        f"| {result['people']} {whom}, space {result['space']} | ID score | of own LoRA | above the start alone | NFE "
        "| seconds |",
        "|---" * 6 + "|",
    ]
    for name, row in result["rows"].items():
        score, gain = row["id_score"], row["above_start"]
        lines.append(
            f"| {name} | {score['mean']:.3f} | {row['of_own']:.3f} | {gain['mean']:+.4f} ({gain['low']:+.4f} to "
            f"{gain['high']:+.4f}) | {row['evaluations']} | {row['seconds']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--space", type=Path, default=w2wpp.shipped("avatars.safetensors"))
    parser.add_argument(
        "--data", type=Path, default=w2wpp.shipped("avatars-heldout.safetensors"), help="LoRAs"
    )
    parser.add_argument("--people", type=int, default=100)
    parser.add_argument("--tuning", action="store_true")
    args = parser.parse_args()
    result = measure(w2wpp.load_space(args.space), args.data, args.people, args.tuning)
    publish(result, table(result), args.output)


if __name__ == "__main__":
    main()
