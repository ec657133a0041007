"""How fast and how small a space of 50 SDXL LoRAs of rank 32 is to make, and how far gauges reach into it.

    python benchmarks/delta_speed.py --folder FOLDER -o benchmarks/results/delta_speed.json

The files are synthetic: random numbers in half precision, the full module set of kohya's SDXL LoRAs (722 modules).
They take 8.5 GB in FOLDER and are removed afterwards. Reading means reading every tensor of every file through the
same reader, in turns with the making of the basis. What the system keeps of files in memory is let go of before
each, as far as it can be asked to: a user's files are on a disk. `--kept` leaves it there, so that reading is copying.
Memory is the peak of a process that does nothing else. `--every 10` is for a try: a tenth of the modules.
"""

from __future__ import annotations

import argparse
import functools
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from publish import publish
from safetensors.torch import save_file

from w2wpp.delta_basis import compute_grams
from w2wpp.encode import encode_lora
from w2wpp.files.container import open_container
from w2wpp.lora.collection import collect, members_of
from w2wpp.lora.delta import Factors
from w2wpp.training.fit_delta import collection_layout, fit_delta, lora_files, open_members

# (prefix, attentions, channels, transformer blocks in each) of the SDXL UNet.
LEVELS = (
    ("down_blocks_1", 2, 640, 2),
    ("down_blocks_2", 2, 1280, 10),
    ("mid_block", 1, 1280, 10),
    ("up_blocks_0", 3, 1280, 10),
    ("up_blocks_1", 3, 640, 2),
)


def sdxl_modules(every: int = 1) -> dict[str, tuple[int, int]]:
    """{kohya's name: (out, in)} of what kohya trains in the UNet by default, or of every so many of it."""
    found = {}
    for prefix, count, c, depth in LEVELS:
        for i in range(count):
            where = f"lora_unet_{prefix}_attentions_{i}"
            found[f"{where}_proj_in"] = found[f"{where}_proj_out"] = (c, c)
            for j in range(depth):
                block = f"{where}_transformer_blocks_{j}"
                for attention, size in (("attn1", c), ("attn2", 2048)):
                    for part in ("to_q", "to_out_0"):
                        found[f"{block}_{attention}_{part}"] = (c, c)
                    for part in ("to_k", "to_v"):
                        found[f"{block}_{attention}_{part}"] = (c, size)
                found[f"{block}_ff_net_0_proj"] = (8 * c, c)
                found[f"{block}_ff_net_2"] = (c, 4 * c)
    return dict(list(found.items())[::every])


def write_files(folder: Path, count: int, rank: int, modules: dict[str, tuple[int, int]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        path = folder / f"lora-{i:03d}.safetensors"
        if path.exists():
            continue
        g = torch.Generator().manual_seed(i)
        tensors = {}
        for key, (size_out, size_in) in modules.items():
            tensors[f"{key}.lora_down.weight"] = torch.randn(rank, size_in, generator=g).half()
            up = torch.randn(size_out, rank, generator=g).mul_(0.01)
            tensors[f"{key}.lora_up.weight"] = up.half()
            tensors[f"{key}.alpha"] = torch.tensor(float(rank) / 2)
        save_file(tensors, path)


def let_go(folder: Path) -> None:
    """Ask the system to keep nothing of the files in memory; where it can't be asked, they stay."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.glob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def read_all(folder: Path) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        with open_container(path) as file:
            for name in file.entries:
                file.read(name)


def make(folder: Path, device: str = "cpu") -> None:
    members, _ = open_members(lora_files([folder]))
    collection = collect(members)
    compute_grams(collection_layout(collection, 32), collection, device=device)


def peak(folder: Path) -> float:
    """Gigabytes at the peak of a process that makes the basis."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import delta_speed; delta_speed.told(sys.argv[2])"
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def told(folder: str) -> None:
    make(Path(folder))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def twins() -> dict[str, float]:
    """Largest difference of z between gauge twins, LoRAs of several ranks in a space of random ones."""
    g = torch.Generator().manual_seed(0)
    sizes = {f"blocks.{i}.to_q": (320, 320) for i in range(8)}

    def lora(rank: int) -> dict[str, Factors]:
        return {
            n: Factors(
                torch.randn(rank, i, generator=g), 0.05 * torch.randn(o, rank, generator=g), 0.5
            )
            for n, (o, i) in sizes.items()
        }

    common = lora(4)

    def near(rank: int) -> dict[str, Factors]:
        return {
            n: Factors(
                torch.cat([f.down, common[n].down]), torch.cat([f.up, common[n].up], 1), f.scale
            )
            for n, f in lora(rank).items()
        }

    known = {f"lora {i}": near(1 + i % 16) for i in range(24)}
    space, _ = fit_delta(members_of(known))
    worst = {}
    for rank in (1, 4, 16, 64, 128):
        gap = 0.0
        for _ in range(4):
            # Partly inside of the space, so that its latents are those of people there.
            inside, own, turned = known["lora 7"], {}, {}
            for n, f in lora(rank).items():
                down, up = torch.cat([f.down, inside[n].down]), torch.cat([f.up, inside[n].up], 1)
                own[n] = f = Factors(down, up, f.scale)
                m = torch.randn(f.rank, f.rank, generator=g, dtype=torch.float64)
                down = torch.linalg.solve(m, f.down.double())
                turned[n] = Factors(down.float(), (f.up.double() @ m).float(), f.scale)
            one, other = (encode_lora(space, x)[0].z for x in members_of({"a": own, "b": turned}))
            gap = max(gap, float((one - other).abs().max()))
        worst[f"rank {rank}"] = gap
    return worst


def table(result: dict[str, Any]) -> str:
    lines = ["| what | measured | goal |", "|---|---|---|"]
    if "seconds" in result:
        s = result["seconds"]
        lines += [
            f"| basis of {result['files']} SDXL LoRAs of rank {result['rank']}, {result['modules']} modules, "
            f"{result['gigabytes']:.1f} GB {result['from']}, on {result['device']} | {s['making']:.0f} s, "
            f"reading alone {s['reading']:.0f} s: {s['making'] / s['reading']:.1f} x | at most 3 x |",
            f"| memory at the peak | {result['peak_gigabytes']:.2f} GB | at most 2 GB |",
        ]
    gaps = ", ".join(f"{name}: {gap:.0e}" for name, gap in result["twins"].items())
    lines.append(f"| largest difference of z between gauge twins | {gaps} | at most 1e-4 |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, help="for the synthetic files; without it, only twins"
    )
    parser.add_argument("--files", type=int, default=50)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--every", type=int, default=1, help="of the modules, for a try")
    parser.add_argument("--kept", action="store_true", help="read from the system's memory")
    parser.add_argument("--device", default="cpu", help="of the products")
    parser.add_argument("--keep", action="store_true", help="leave the files where they are")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {"twins": twins()}
    if args.folder:
        modules = sdxl_modules(args.every)
        write_files(args.folder, args.files, args.rank, modules)
        paths = sorted(args.folder.glob("*.safetensors"))
        times: dict[str, list[float]] = {"reading": [], "making": []}
        for _ in range(args.rounds):
            for name, run in (
                ("reading", read_all),
                ("making", functools.partial(make, device=args.device)),
            ):
                if not args.kept:
                    let_go(args.folder)
                started = time.perf_counter()
                run(args.folder)
                times[name].append(time.perf_counter() - started)
        result |= {
            "files": len(paths),
            "rank": args.rank,
            "modules": len(modules),
            "device": args.device,
            "from": "from memory" if args.kept else "from disk",
            "gigabytes": sum(p.stat().st_size for p in paths) / 1e9,
            "seconds": {name: statistics.median(values) for name, values in times.items()},
            "peak_gigabytes": peak(args.folder),
        }
        if not args.keep:
            for path in paths:
                path.unlink()
    publish(result, table(result), args.output)


if __name__ == "__main__":
    main()
