"""Apply Decoded LoRA against the host's own Load LoRA, whole prompts in one real server, in turns.

    PYTHONPATH=. python benchmarks/apply_speed.py -o benchmarks/results/apply_speed.json
    PYTHONPATH=. python benchmarks/apply_speed.py --model sdxl --steps 4 --rounds 2 \\
        -o benchmarks/results/apply_speed_sdxl.json   # 13 GB of memory

Random weights, on the CPU. SD 1.5 at full size has a space of 1,000 components. SDXL (whole, kept in half precision and
computed in single, as the host does with checkpoints there; or reduced in depth and width: a try) has the full module
set of its LoRAs (reduced: six weights) in a collection of eight of rank 16, mixed.
Every prompt brings another person: one way decodes it and patches it in, the other loads the same LoRA from a file.
COMFYUI_PATH and COMFYUI_PYTHON name the host, as for the tests.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from delta_speed import sdxl_modules
from publish import publish
from space_speed import write_space

import w2wpp
from tests.host.graphs import Graph
from tests.host.server import PROBE, Host, lay_out, serving
from tests.host.weights import INVERTED
from w2wpp.delta_basis import DeltaBasis
from w2wpp.lora.collection import members_of
from w2wpp.lora.delta import Factors
from w2wpp.mixtures import sample_mixtures
from w2wpp.training.fit_delta import fit_delta

SPACE = "random.safetensors"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": ("Probe_SD15", {"dtype": "float32", "inpaint": False}),
    "sdxl": ("Probe_SDXL", {"dtype": "float16"}),
    "sdxl-reduced": ("Probe_ReducedModel", {"family": "SDXL"}),
}
FILES, RANK = 8, 16  # of a collection


def prompt(model: str, way: str, person: int, steps: int, size: int) -> dict[str, Any]:
    """A whole prompt that paints a person, with the identity applied one way or the other."""
    graph = Graph()
    node, given = MODELS[model]
    base = graph.add(node, **given)
    if way == "apply":
        space = graph.add("W2WPP_LoadSpace", space=SPACE)
        drawn = graph.add(
            "W2WPP_SampleIdentity",
            space=[space, 0],
            seed=person,
            truncation=1.0,
            count=1,
            mixture=model != "sd15",
        )
        patched = graph.add(
            "W2WPP_ApplyDecodedLora", model=[base, 0], identity=[drawn, 0], strength=1.0
        )
    else:
        patched = graph.add(
            "LoraLoaderModelOnly",
            model=[base, 0],
            lora_name=f"{person}.safetensors",
            strength_model=1.0,
        )
    latent = graph.add("EmptyLatentImage", width=size, height=size, batch_size=1)
    sampled = graph.add(
        "KSampler", model=[patched, 0], positive=[base, 1], negative=[base, 1], latent_image=[latent, 0],
        seed=0, steps=steps, cfg=2.0, sampler_name="dpmpp_2m", scheduler="normal", denoise=1.0,
    )  # fmt: skip
    graph.add("SaveLatent", samples=[sampled, 0], filename_prefix=f"{way}-{person}")
    return graph.nodes


def seconds(host: Host, graph: dict[str, Any]) -> float:
    """From the start of a prompt to its success, as the server logs it."""
    entry = host.wait(host.post("/prompt", {"prompt": graph})["prompt_id"])
    stamps = {kind: details["timestamp"] for kind, details in entry["status"]["messages"]}
    if "execution_success" not in stamps:
        raise RuntimeError(json.dumps(entry["status"]["messages"][-1]))
    return (stamps["execution_success"] - stamps["execution_start"]) / 1000


def write_collection_space(model: str, path: Path) -> None:
    """A space of random LoRAs for the weights of SDXL, whole or reduced."""
    modules = sdxl_modules()
    if model == "sdxl-reduced":
        modules = {name: (out, math.prod(rest)) for name, (out, *rest) in INVERTED["SDXL"].items()}
    g = torch.Generator().manual_seed(0)
    loras = {
        str(i): {
            name: Factors(
                torch.randn(RANK, size_in, generator=g) / size_in**0.5,
                0.1 * torch.randn(size_out, RANK, generator=g),
                1 / RANK,
            )
            for name, (size_out, size_in) in modules.items()
        }
        for i in range(FILES)
    }
    space, _ = fit_delta(members_of(loras))
    path.parent.mkdir(parents=True, exist_ok=True)
    w2wpp.save_space(space, path)


def drawn(space: w2wpp.Space, person: int) -> w2wpp.Identity:
    """The person whom the node draws with this seed."""
    generator = torch.Generator().manual_seed(person)
    if isinstance(space.basis, DeltaBasis):
        return sample_mixtures(space, 1, generator=generator)
    return space.sample(1, generator=generator)


def measure(model: str, rounds: int, steps: int, size: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {"apply": [], "stock": []}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        lay_out(base, PROBE)
        path = base / "models" / "w2wpp" / SPACE
        if model == "sd15":
            write_space(path, 1000)
        else:
            write_collection_space(model, path)
        loras = base / "models" / "loras"
        loras.mkdir(parents=True, exist_ok=True)
        space = w2wpp.load_space(path)
        for person in range(rounds + 1):
            lora = space.layout.unpack(drawn(space, person).vectors(space)[0])
            w2wpp.save_lora(lora, loras / f"{person}.safetensors", alpha=space.layout.alpha)
        with serving(base) as host:
            for person in range(rounds + 1):
                for way in times if person % 2 else reversed(times):
                    taken = seconds(host, prompt(model, way, person, steps, size))
                    if person:  # the first prompts build the model and read the space
                        times[way].append(taken)
    ratios = [a / s for a, s in zip(times["apply"], times["stock"])]
    return {
        "model": model,
        "seconds": times,
        "apply_over_stock": statistics.median(ratios),
        "apply_over_stock_low_high": [min(ratios), max(ratios)],
        "sampler_steps": steps,
        "pixels": size,
    }


def table(result: dict[str, Any]) -> str:
    low, high = result["apply_over_stock_low_high"]
    size = f"{result['pixels']} x {result['pixels']}"
    apply, stock = (statistics.median(result["seconds"][way]) for way in ("apply", "stock"))
    return "\n".join(
        [
            f"| {result['model']}, {result['sampler_steps']} sampler steps at {size} | measured | goal |",
            "|---|---|---|",
            f"| whole prompt with Apply Decoded LoRA | {apply:.2f} s | |",
            f"| whole prompt with the host's Load LoRA | {stock:.2f} s | |",
            "| ratio, median of pairs (lowest to highest) | "
            f"{result['apply_over_stock']:.3f} ({low:.3f} to {high:.3f}) | at most 1.05 |",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--model", choices=list(MODELS), default="sd15")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--size", type=int, default=128)
    args = parser.parse_args()
    result = measure(args.model, args.rounds, args.steps, args.size)
    publish(result, table(result), args.output)


if __name__ == "__main__":
    main()
