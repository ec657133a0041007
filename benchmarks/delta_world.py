"""PCA of updates against PCA of factors, in the miniature world: the ID score of rebuilt people.

    python benchmarks/delta_world.py -o benchmarks/results/delta_world.json

Of the 200 people who ship as `avatars-heldout`, 150 are learned from and 40 others are rebuilt and painted. The common
set is as it was trained, with one seed, so that numbers of A and B can be compared. The mixed set has the same updates
as strangers would hand them in: every module of every file in a random gauge, and stored at rank 1, 2 or 4. Factor PCA
takes it either as the best rank 1 (as mergers do), or turned towards the first file (as `w2wpp dataset` does).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from publish import publish
from torch import Tensor

from w2wpp.avatars.world.studio import Studio, open_studio
from w2wpp.basis import Basis
from w2wpp.encode import encode_lora
from w2wpp.encode_delta import as_member
from w2wpp.lora.collection import members_of
from w2wpp.lora.delta import Factors, cut
from w2wpp.lora.gauge import towards
from w2wpp.lora.layout import Layout
from w2wpp.metrics import estimate, id_scores
from w2wpp.training.dataset import VectorDataset, load_dataset
from w2wpp.training.fit_basis import fit_basis
from w2wpp.training.fit_delta import CollectionSettings, fit_delta

MODELS = Path(__file__).resolve().parents[1] / "models"
LEARNED, SCORED = 150, 40
SIZES = (16, 32, 64)


def updates_of(layout: Layout, w: Tensor) -> dict[str, Factors]:
    return {n: Factors(a, b, layout.scale) for n, (a, b) in layout.unpack(w).items()}


def as_strangers_do(update: Mapping[str, Factors], g: torch.Generator) -> dict[str, Factors]:
    """The same update at a random rank and in a random gauge, module by module."""
    rank = (1, 2, 4)[int(torch.randint(3, (), generator=g))]
    found = {}
    for name, f in update.items():
        m = torch.randn(rank, rank, generator=g)
        u, _, vt = torch.linalg.svd(m)
        m = u @ torch.diag(torch.exp(0.5 * torch.randn(rank, generator=g))) @ vt
        down = torch.zeros(rank, f.down.shape[1])
        up = torch.zeros(f.up.shape[0], rank)
        down[:1], up[:, :1] = f.down, f.up
        found[name] = Factors(torch.linalg.solve(m, down), up @ m, f.scale)
    return found


def best_rank_one(
    layout: Layout, update: Mapping[str, Factors]
) -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    for name, f in update.items():
        short, _ = cut(f, 1)
        found[name] = (short.down, short.up / layout.scale)
    return found


def factor_basis(layout: Layout, vectors: Tensor, metric: str) -> Basis:
    rows = torch.arange(len(vectors))
    nobody = torch.zeros(len(vectors), dtype=torch.bool)
    return fit_basis(VectorDataset(layout, vectors, rows, nobody), max(SIZES), metric=metric)


def rebuilt_by_factors(
    basis: Basis, layout: Layout, truth: Tensor, gauge: str, first: Tensor
) -> dict[int, Tensor]:
    """Held-out vectors through the first d components, brought into the basis's gauge before."""
    if gauge == "balanced":
        w = torch.stack([layout.pack(best_rank_one(layout, updates_of(layout, t))) for t in truth])
    elif gauge == "first":
        balanced = (best_rank_one(layout, updates_of(layout, t)) for t in truth)
        w = torch.stack([towards(b, layout, first) for b in balanced])
    else:
        w = truth
    parts = (basis.truncated(d) for d in SIZES)
    return {d: part.lift(part.project(w)) for d, part in zip(SIZES, parts)}


def rebuilt_by_updates(
    learned: Mapping[str, Mapping[str, Factors]], layout: Layout, truth: Tensor
) -> dict[int, Tensor]:
    found = {}
    held = members_of({f"held {i}": updates_of(layout, w) for i, w in enumerate(truth)})
    for d in SIZES:
        space, _ = fit_delta(members_of(learned), CollectionSettings(rank=1, components=d))
        loras = [
            space.layout.unpack(encode_lora(space, as_member(m))[0].vectors(space)[0]) for m in held
        ]
        # Under the names and in the order of the avatars' own layout.
        found[d] = torch.stack(
            [layout.pack({n: (a, b / layout.scale) for n, (a, b) in x.items()}) for x in loras]
        )
    return found


def scores(studio: Studio, layout: Layout, vectors: Tensor, labels: Tensor) -> Tensor:
    shots = studio.photograph(vectors, layout)
    return id_scores(shots.embeddings, labels)


def measure() -> dict[str, Any]:
    dataset = load_dataset(MODELS / "avatars-heldout.safetensors")
    layout = dataset.layout
    assert dataset.labels is not None
    rows = dataset.heldout_rows
    train, test = rows[:LEARNED], rows[LEARNED : LEARNED + SCORED]
    vectors, truth = dataset.vectors(train), dataset.vectors(test)
    labels = dataset.labels[test]
    studio = open_studio(
        MODELS / "avatar-base.safetensors", MODELS / "avatar-embedder.safetensors", pictures=2
    )
    g = torch.Generator().manual_seed(1)
    common = {f"{i:03d}": updates_of(layout, w) for i, w in enumerate(vectors)}
    mixed = {name: as_strangers_do(u, g) for name, u in common.items()}
    balanced = [best_rank_one(layout, u) for u in mixed.values()]
    # Strangers' signs: those of the best rank 1 are as the first number happens to be.
    aligned = torch.stack([towards(b, layout, layout.pack(balanced[0])) for b in balanced])
    as_is = torch.stack([layout.pack(b) for b in balanced])
    first = layout.pack(balanced[0])
    ways = {}
    for metric in ("parameter", "update"):
        for title, learned, gauge in (
            ("common set", vectors, "own"),
            ("best rank 1, mixed set", as_is, "balanced"),
            ("towards the first, mixed set", aligned, "first"),
        ):
            basis = factor_basis(layout, learned, metric)
            rebuilt = rebuilt_by_factors(basis, layout, truth, gauge, first)
            ways[f"factors, metric {metric}, {title}"] = rebuilt
    ways["updates, common set"] = rebuilt_by_updates(common, layout, truth)
    ways["updates, mixed set"] = rebuilt_by_updates(mixed, layout, truth)
    own = scores(studio, layout, truth, labels)
    found = {
        name: {d: scores(studio, layout, w, labels) for d, w in by_size.items()}
        for name, by_size in ways.items()
    }
    return {
        "learned": LEARNED,
        "scored": SCORED,
        "own": estimate(own).to_json(),
        "id": {
            name: {d: estimate(s).to_json() for d, s in row.items()} for name, row in found.items()
        },
        "gain": {
            f"updates over {name}": {
                d: estimate(found[f"updates, {name.rsplit(', ', 1)[1]}"][d] - s).to_json()
                for d, s in row.items()
            }
            for name, row in found.items()
            if name.startswith("factors")
        },
    }


def table(result: dict[str, Any]) -> str:
    head = "".join(f" d = {d} |" for d in SIZES)
    lines = [
        f"| ID score, {result['scored']} people, own LoRA {result['own']['mean']:.3f} |{head}",
        "|---|" + "---|" * len(SIZES),
    ]
    for name, row in result["id"].items():
        lines.append(f"| {name} |" + "".join(f" {row[d]['mean']:.3f} |" for d in SIZES))
    for name, row in result["gain"].items():
        cells = "".join(
            f" {r['mean']:+.3f} ({r['low']:+.3f} to {r['high']:+.3f}) |" for r in row.values()
        )
        lines.append(f"| paired: {name} |{cells}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    result = measure()
    publish(result, table(result), args.output)


if __name__ == "__main__":
    main()
