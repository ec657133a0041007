"""Apply Decoded LoRA against the host's own Load LoRA, whole prompts in one real server, in turns.

    PYTHONPATH=. python benchmarks/apply_speed.py -o benchmarks/results/apply_speed.json

SD 1.5 at full size with random weights, on the CPU, a space of 1,000 components. Every prompt brings another person:
one way decodes it and patches it in, the other loads the same LoRA from a file. COMFYUI_PATH and COMFYUI_PYTHON name
the host, as for the tests.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from publish import publish
from space_speed import write_space

import w2wpp
from tests.host.graphs import Graph
from tests.host.server import PROBE, Host, lay_out, serving

SPACE = "random.safetensors"


def prompt(way: str, person: int, steps: int, size: int) -> dict[str, Any]:
    """A whole prompt that paints a person, with the identity applied one way or the other."""
    graph = Graph()
    base = graph.add("Probe_SD15", dtype="float32", inpaint=False)
    if way == "apply":
        space = graph.add("W2WPP_LoadSpace", space=SPACE)
        drawn = graph.add(
            "W2WPP_SampleIdentity", space=[space, 0], seed=person, truncation=1.0, count=1
        )
        model = graph.add(
            "W2WPP_ApplyDecodedLora", model=[base, 0], identity=[drawn, 0], strength=1.0
        )
    else:
        model = graph.add(
            "LoraLoaderModelOnly",
            model=[base, 0],
            lora_name=f"{person}.safetensors",
            strength_model=1.0,
        )
    latent = graph.add("EmptyLatentImage", width=size, height=size, batch_size=1)
    sampled = graph.add(
        "KSampler", model=[model, 0], positive=[base, 1], negative=[base, 1], latent_image=[latent, 0],
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


def measure(rounds: int, steps: int, size: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {"apply": [], "stock": []}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        lay_out(base, PROBE)
        path = base / "models" / "w2wpp" / SPACE
        write_space(path, 1000)
        loras = base / "models" / "loras"
        loras.mkdir(parents=True, exist_ok=True)
        space = w2wpp.load_space(path)
        for person in range(rounds + 1):
            identity = space.sample(1, generator=torch.Generator().manual_seed(person))
            lora = space.layout.unpack(identity.vectors(space)[0])
            w2wpp.save_lora(lora, loras / f"{person}.safetensors", alpha=space.layout.alpha)
        with serving(base) as host:
            for person in range(rounds + 1):
                for way in times if person % 2 else reversed(times):
                    taken = seconds(host, prompt(way, person, steps, size))
                    if person:  # the first prompts build the model and read the space
                        times[way].append(taken)
    ratios = [a / s for a, s in zip(times["apply"], times["stock"])]
    return {
        "seconds": times,
        "apply_over_stock": statistics.median(ratios),
        "apply_over_stock_low_high": [min(ratios), max(ratios)],
        "sampler_steps": steps,
        "pixels": size,
    }


def table(result: dict[str, Any]) -> str:
    low, high = result["apply_over_stock_low_high"]
    apply, stock = (statistics.median(result["seconds"][way]) for way in ("apply", "stock"))
    return "\n".join(
        [
            f"| {result['sampler_steps']} sampler steps at {result['pixels']} x {result['pixels']} | measured | goal |",
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
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--size", type=int, default=128)
    args = parser.parse_args()
    result = measure(args.rounds, args.steps, args.size)
    publish(result, table(result), args.output)


if __name__ == "__main__":
    main()
