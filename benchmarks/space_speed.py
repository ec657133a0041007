"""How fast and how small spaces of the full SD 1.5 size are: opening, decoding one identity, decoding many.

    python benchmarks/space_speed.py -o benchmarks/results/space_speed.json

Weights are random; only sizes matter here. What is compared is timed in turns within one run, and ratios of medians
are reported. Opening is measured in a fresh process each time: seconds and resident memory beyond the imports.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from publish import publish

from w2wpp import SD15, Basis, Space, build_codec
from w2wpp.codecs.original import Original
from w2wpp.files.container import Streamed, write_container
from w2wpp.space import compact
from w2wpp.spacefile import FORMAT, load_space

LATENT = 512  # d of the original checkpoints
OPEN = """
import resource, sys, time, torch
from w2wpp.spacefile import load_space
def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()
before, started = resident(), time.perf_counter()
space = load_space(sys.argv[1])
print(time.perf_counter() - started, resident() - before)
"""


def write_space(path: Path, components: int) -> None:
    """A space of random weights with `components` components and a skip VAE, written block by block."""
    codec = build_codec(
        {"name": "vae-skip", "coefficient_size": components, "latent_size": LATENT, "hidden": [256]}
    )
    for parameter in codec.parameters():
        torch.nn.init.normal_(parameter, std=0.01)
    generator = torch.Generator().manual_seed(0)

    def blocks() -> Iterator[torch.Tensor]:
        for _ in range(0, components, 100):
            yield torch.randn(100, SD15.size, generator=generator).div_(SD15.size**0.5).half()

    # The parts of a Space that are small, around a basis whose components never exist in memory as a whole.
    small = Space(
        SD15,
        Basis(reader=lambda name: torch.ones(1), size=SD15.size, n_components=components),
        codec,
        torch.zeros(LATENT),
        torch.ones(LATENT),
        {"name": f"random, K = {components}"},
    )
    tensors: dict[str, Any] = {
        "basis.mean": torch.zeros(SD15.size),
        "basis.std": torch.ones(SD15.size),
        "basis.components": Streamed(torch.float16, (components, SD15.size), blocks()),
        "basis.singular_values": torch.ones(components),
        "prior.mean": small.prior_mean,
        "prior.std": small.prior_std,
        **{f"codec.{name}": compact(t) for name, t in codec.state_dict().items()},
    }
    config = {**small.architecture(), "provenance": dict(small.provenance), "fingerprint": "0" * 32}
    write_container(path, tensors, format=FORMAT, config=config)


def opening(path: Path, rounds: int) -> dict[str, float]:
    """Median seconds and bytes of opening a space, each time in a new process."""
    runs = []
    for _ in range(rounds):
        done = subprocess.run(
            [sys.executable, "-c", OPEN, str(path)], capture_output=True, text=True, check=True
        )
        runs.append([float(part) for part in done.stdout.split()])
    seconds, grown = (statistics.median(column) for column in zip(*runs))
    return {
        "seconds": seconds,
        "megabytes": grown / 2**20,
        "file_megabytes": path.stat().st_size / 2**20,
    }


def side_by_side(things: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, timed in turns so that a busy moment hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in things}
    for turn in range(rounds + 1):
        for name, run in things.items():
            started = time.perf_counter()
            run()
            if turn:  # the first turn reads files and warms caches
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


@torch.inference_mode()
def decoding(path: Path, rounds: int) -> dict[str, Any]:
    space = load_space(path)
    original = Original(SD15.size, LATENT).eval()
    one, many = torch.randn(1, LATENT), torch.randn(64, LATENT)
    space.decode(one)
    kept = space.basis._single()  # what a decode has to read, in the precision that it reads
    copy = torch.empty_like(kept)
    seconds = side_by_side(
        {
            "decode_one": lambda: space.decode(one),
            "seed_architecture_one": lambda: original.decode(one) / 10,
            "copy_of_the_components": lambda: copy.copy_(kept),
            "decode_64_in_one_pass": lambda: space.decode(many),
        },
        rounds,
    )
    return {
        "seconds": seconds,
        "megabytes_read": kept.numel() * kept.element_size() / 2**20,
        "speedup_over_seed_architecture": seconds["seed_architecture_one"] / seconds["decode_one"],
        "decode_over_copy": seconds["decode_one"] / seconds["copy_of_the_components"],
        "decodes_that_64_in_one_pass_cost": seconds["decode_64_in_one_pass"]
        / seconds["decode_one"],
    }


def table(result: dict[str, Any]) -> str:
    decode = result["decode"]
    lines = ["| what | measured | goal |", "|---|---|---|"]
    for name, row in result["open"].items():
        lines.append(
            f"| open {name} ({row['file_megabytes']:.0f} MB) | {row['seconds']:.3f} s, {row['megabytes']:.1f} MB | "
            "at most 0.2 s, 50 MB |"
        )
    lines += [
        "| decode one, K = 1000, against the original architecture | "
        f"{decode['speedup_over_seed_architecture']:.2f} x as fast | at least 2 |",
        f"| decode one, against copying the {decode['megabytes_read']:.0f} MB that it reads | "
        f"{decode['decode_over_copy']:.2f} x | at most 1.3 |",
        f"| decode 64 in one pass, in decodes of one | {decode['decodes_that_64_in_one_pass_cost']:.1f} | below 64 |",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    result: dict[str, Any] = {"open": {}}
    with tempfile.TemporaryDirectory() as folder:
        for components in (1000, 10_000):
            path = Path(folder, f"k{components}.safetensors")
            write_space(path, components)
            result["open"][f"K = {components}"] = opening(path, args.rounds)
            if components == 1000:
                result["decode"] = decoding(path, args.rounds)
            path.unlink()
    publish(result, table(result), args.output)


if __name__ == "__main__":
    main()
