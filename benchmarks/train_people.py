"""LoRAs that W2W++ Train People makes from folders of pictures, against those of `w2wpp avatars loras`.

    PYTHONPATH=. python benchmarks/train_people.py -o benchmarks/results/train_people.json

Held-out avatars are photographed into a folder each, in scenes of every kind, with a caption of the scene beside every
photograph, and trained in a real server with the node's settings and as many pilots as `avatars loras` has, which tells
the scene of each photograph as well. With --plain there are no captions, and one prompt that says nothing of scenes.
Both LoRAs of a person are painted in the same scenes and read by the embedder.
COMFYUI_PATH and COMFYUI_PYTHON name the host, as for the tests.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from publish import publish
from torch import Tensor

import w2wpp
from tests.host.graphs import AvatarGraph
from tests.host.server import PROBE, lay_out, serving
from w2wpp.avatars.world.renderer import (
    BACKGROUNDS,
    LIGHTS,
    SMILES,
    Nuisance,
    render,
    sample_nuisance,
)
from w2wpp.avatars.world.studio import open_studio
from w2wpp.metrics import estimate, id_scores
from w2wpp.training.dataset import load_dataset

SECONDS = 7200  # for a training; far more than it takes
ANYTHING = {"background": "any", "smile": "any", "light": "any"}  # what the prompt says
SETTINGS = {
    "folder": "input/people", "path": "", "save_as": "benchmark", "trigger_prompt": "a person", "modules": "attention",
    "rank": 1, "alpha": 1.0, "steps": 90, "batch": 6, "learning_rate": 0.02, "seed": 2, "pilots": 32, "resolution": 0,
}  # fmt: skip


def caption(background: int, smile: int, light: int) -> str:
    """What somebody would write of a photograph."""
    return f"{SMILES[smile]}, {BACKGROUNDS[background]} background, light from the {LIGHTS[light]}"


def photograph_everybody(people: Tensor, scenes: Nuisance, folder: Path) -> None:
    """A folder of PNGs for each of people [N, 20], with captions, in scenes that are the same for everybody."""
    for i, identity in enumerate(people):
        own = folder / f"{i:03d}"
        own.mkdir(parents=True)
        pictures = render(identity.expand(len(scenes), -1), scenes)
        pixels = ((pictures + 1) * 127.5).round().clamp(0, 255).byte()
        for j, (picture, words) in enumerate(zip(pixels, scenes.words().tolist())):
            Image.fromarray(picture.movedim(0, -1).numpy()).save(own / f"{j:02d}.png")
            (own / f"{j:02d}.txt").write_text(caption(*words))


def train(people: Tensor, count: int, captions: bool) -> Tensor:
    """Vectors [N, P] that the node makes of these people in a server of its own."""
    scenes = sample_nuisance(count, generator=torch.Generator().manual_seed(5))
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        lay_out(base, PROBE)
        photograph_everybody(people, scenes, base / "input" / "people")
        with serving(base) as host:
            graph = AvatarGraph(**ANYTHING)
            model = {"model": graph.model, "vae": [graph.loader, 3], "positive": [graph.loader, 1]}
            clip = {"clip": [graph.loader, 5]} if captions else {}
            node = graph.add("W2WPP_TrainPeople", **model, **SETTINGS, **clip)
            report = host.run(graph.nodes, SECONDS).outputs[node]["text"][0]
            print(report, flush=True)
        return load_dataset(
            base / "models" / "w2wpp" / "benchmark" / "dataset.safetensors"
        ).vectors()


def measure(data: Path, people: int, count: int, plain: bool) -> dict[str, Any]:
    dataset = load_dataset(data)
    assert dataset.labels is not None, "the data set of avatars has their traits"
    rows = dataset.heldout_rows[:people]
    identity, theirs = dataset.labels[rows], dataset.vectors(rows)
    trained = train(identity, count, captions=not plain)
    studio = open_studio(
        w2wpp.shipped("avatar-base.safetensors"), w2wpp.shipped("avatar-embedder.safetensors")
    )
    scores = {
        name: id_scores(studio.photograph(vectors, dataset.layout).embeddings, identity)
        for name, vectors in (("node", trained), ("loras", theirs))
    }
    rows_of = {name: estimate(values).to_json() for name, values in scores.items()}
    rows_of["difference"] = estimate(scores["node"] - scores["loras"]).to_json()
    return {
        "people": len(rows),
        "photographs": count,
        "captions": not plain,
        "settings": SETTINGS,
        "rows": rows_of,
    }


def table(result: dict[str, Any]) -> str:
    said = "with captions" if result["captions"] else "without captions"
    names = {
        "node": f"own LoRA of W2W++ Train People, from a folder of pictures {said}",
        "loras": "own LoRA of `w2wpp avatars loras`",
        "difference": "difference, paired",
    }
    goals = {"difference": "at least -0.02"}
    lines = [
        f"| ID score of {result['people']} people, {result['photographs']} photographs each | mean (95 % interval) "
        "| goal |",
        "|---|---|---|",
    ]
    for name, what in names.items():
        row = result["rows"][name]
        lines.append(
            f"| {what} | {row['mean']:.3f} ({row['low']:.3f} to {row['high']:.3f}) | {goals.get(name, '')} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument(
        "--data",
        type=Path,
        default=w2wpp.shipped("avatars-heldout.safetensors"),
        help="LoRAs of avatars",
    )
    parser.add_argument("--people", type=int, default=32)
    parser.add_argument("--photographs", type=int, default=32)
    parser.add_argument("--plain", action="store_true", help="train without captions")
    args = parser.parse_args()
    result = measure(args.data, args.people, args.photographs, args.plain)
    publish(result, table(result), args.output)


if __name__ == "__main__":
    main()
