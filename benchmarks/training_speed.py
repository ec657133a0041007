"""How fast and how small trainings are, side by side with what they are measured against.

    python benchmarks/training_speed.py -o benchmarks/results/training_speed.json

Data are synthetic twins (`w2wpp synthesize`). Every measurement runs in a process of its own, single-threaded, and
counts that process's CPU seconds, which a busy machine stretches less than the clock; memory is what it grows by
beyond its imports. Two processes against one go by the clock. `--rows NAME ...` measures some again; `--device cuda`
adds the row for a GPU: the data set of the true size, drawn on the spot.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from publish import publish

from w2wpp import SD15, Layout, build_codec, save_lora, transformer_layout
from w2wpp.codecs.original import Original
from w2wpp.training.compute import Compute
from w2wpp.training.config import VaeTraining
from w2wpp.training.dataset import load_dataset
from w2wpp.training.fit_basis import fit_coefficients
from w2wpp.training.fit_vae import fit_vae
from w2wpp.training.gather import row_reader
from w2wpp.training.run import Run
from w2wpp.training.synthetic import synthetic_dataset, write_synthetic

W2W_ROWS = 64_974  # people in the data of weights2weights
# A tenth of SD 1.5's size, for what grows with the number of rows.
TENTH = transformer_layout(
    "tenth",
    "sd15",
    [(f"down_blocks.{i}.attentions.0.transformer_blocks.0", 320) for i in range(4)],
    context_dim=768,
)


# --- children: one measurement a process ---------------------------------------------------------


def gram_in_memory(path: str, k: int) -> dict[str, float]:
    """What fit-basis is measured against: all vectors in memory, Gram matrix and eigh in single precision."""
    data = load_dataset(path)
    with Spent() as spent:
        x = data.vectors(data.training_rows)
        x -= x.mean(0)
        x /= x.std(0)
        values, u = torch.linalg.eigh(x @ x.T)
        v = u.flip(1)[:, :k].T @ x
        v /= v.norm(dim=1, keepdim=True)
    return {**spent.result, "captured": float(values.flip(0)[:k].sum()) / (len(x) - 1)}


def basis(path: str, k: int, **options: Any) -> dict[str, float]:
    data = load_dataset(path)
    with Spent() as spent:
        fitted = fit_coefficients(data, k, metric="parameter", **options)
    variances = fitted.basis.singular_values.double().square()
    return {
        **spent.result,
        "captured": float(variances.sum()),
        "values": fitted.basis.singular_values.tolist(),
    }  # type: ignore[dict-item]


def vae_epoch(
    rows: int, k: int, d: int, batch: int, precision: str, plain: bool
) -> dict[str, float]:
    """Seconds of an epoch: the training's, or a plain loop of the same network, loss and optimiser."""
    c, s = torch.randn(rows, k), torch.linspace(3, 0.3, k)
    training = VaeTraining(latent=d, batch=batch, validation=0.0, epochs=4)
    compute = Compute.pick("cpu", precision)
    run = Run("final", training, c, s, seed=0, compute=compute)
    step = plain_epoch(run, compute) if plain else run.advance
    seconds = []
    for _ in range(3):
        with Spent() as spent:
            step()
        seconds.append(spent.result["seconds"])
    return {"seconds": min(seconds)}


def plain_epoch(run: Run, compute: Compute) -> Callable[[], None]:
    codec = build_codec(run.codec.config)
    codec.load_state_dict(run.codec.state_dict())
    optimiser = torch.optim.AdamW(codec.parameters(), lr=2e-3, fused=True)

    def epoch() -> None:
        for rows in torch.randperm(len(run.c)).split(run.batch):
            c = run.c[rows]
            with torch.autocast("cpu", torch.bfloat16, enabled=compute.precision == "bf16"):
                posterior = codec._encode(c)
                noise = torch.randn(len(c), codec.latent_size)
                z = posterior.mean + torch.exp(0.5 * posterior.logvar) * noise
                decoded = codec._decode(z)
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
            loss = ((c - decoded.float()).square() @ run.weight).mean() + 1e-3 * kl
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()

    return epoch


def original_step(batch: int) -> dict[str, float]:
    """The original's network on raw vectors, one step of Adam, the second of two."""
    network = Original(SD15.size, 512)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-4)
    for _ in range(2):
        with Spent() as spent:
            w = torch.randn(batch, SD15.size)
            posterior = network.encode(w)
            decoded = network.decode(posterior.at(torch.randn(batch, 512)))
            loss = (decoded - w).square().mean() + 0.005 * posterior.kl().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return spent.result


def heldout(rows: int, batch: int | None) -> dict[str, float]:
    data = synthetic_dataset(rows, TENTH_OF_TENTH, heldout=0.1)
    fitted = fit_coefficients(data, 100, metric="parameter")
    training = VaeTraining(latent=16, batch=batch, epochs=40, patience=15)
    report = fit_vae(fitted.coefficients, fitted.basis, training).training_report
    return {"r2": report["weight_r2"]["heldout"], "pca": report["weight_r2_of_pca"]["heldout"]}


TENTH_OF_TENTH = transformer_layout(
    "hundredth",
    "sd15",
    [("down_blocks.0.attentions.0.transformer_blocks.0", 128)],
    context_dim=256,
)


def ranks(path: str, size: int) -> dict[str, float]:
    """Seconds by the clock of one fixed piece of work, shared by `size` processes."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, (size, path, folder), nprocs=size)
        return {"seconds": float(Path(folder, "seconds").read_text())}


def _rank(rank: int, size: int, path: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size
    )
    started = time.perf_counter()
    fit_coefficients(load_dataset(path), 256, metric="parameter", exact_limit=64, **FIXED)
    if rank == 0:
        Path(folder, "seconds").write_text(str(time.perf_counter() - started))
    torch.distributed.destroy_process_group()


def products(size: int) -> dict[str, float]:
    """Seconds by the clock of a fixed number of products that need no memory to speak of, shared as above."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_products, (size, folder), nprocs=size)
        return {"seconds": max(float(p.read_text()) for p in Path(folder).iterdir())}


def _products(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    x = torch.randn(1024, 1024)
    started = time.perf_counter()
    for _ in range(400 // size):
        x @ x
    Path(folder, str(rank)).write_text(str(time.perf_counter() - started))


FIXED = {"max_iterations": 8, "tolerance": 1e-12}  # so many iterations, whatever the data


def files(folder: str, ours: bool) -> dict[str, float]:
    """LoRA files a second, read and laid out."""
    from safetensors.torch import load_file

    paths = sorted(p for p in Path(folder).rglob("*.safetensors") if p.is_file())
    read, rates = row_reader(paths, SD15, "keep"), []
    for _ in range(3):
        with Spent() as spent:
            for path in paths:
                if ours:
                    read(path)
                else:
                    torch.cat([t.flatten() for t in load_file(path).values()])
        rates.append(len(paths) / spent.result["seconds"])
    return {"rate": max(rates)}


def on_gpu(rows: int, k: int) -> dict[str, float]:
    """The data set of the true size on the device, then a basis and a VAE to its early stop."""
    compute = Compute.pick("cuda")
    data = synthetic_dataset(rows, SD15)
    data = type(data)(SD15, data.vectors().half(), data.identity, data.heldout)
    started = time.perf_counter()
    fitted = fit_coefficients(data, k, compute=compute)
    middle = time.perf_counter()
    fit_vae(fitted.coefficients, fitted.basis, VaeTraining(latent=512), compute=compute)
    return {"basis": middle - started, "vae": time.perf_counter() - middle}


CHILDREN = {
    f.__name__: f
    for f in (
        gram_in_memory,
        basis,
        vae_epoch,
        original_step,
        heldout,
        ranks,
        products,
        files,
        on_gpu,
    )
}


class Spent:
    """CPU seconds of the block, and megabytes of peak memory beyond what the process had before."""

    def __enter__(self) -> Spent:
        self.before, self.started = _peak(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        seconds = time.process_time() - self.started
        self.result = {"seconds": seconds, "megabytes": _peak() - self.before}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(name: str, **arguments: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", name, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


# --- rows of the table ---------------------------------------------------------------------------

Row = dict[str, Any]


def row(name: str, measured: float, goal: str, sizes: str) -> Row:
    return {"name": name, "measured": float(f"{measured:.4g}"), "goal": goal, "sizes": sizes}


def stored(folder: Path, rows: int, layout: Layout, **options: Any) -> str:
    path = folder / f"{layout.name}-{rows}.safetensors"
    if not path.exists():
        write_synthetic(path, rows, layout, heldout=0.0, **options)
    return str(path)


def measure_gram(folder: Path, n: int) -> list[Row]:
    path = stored(folder, n, SD15)
    theirs, ours = child("gram_in_memory", path=path, k=256), child("basis", path=path, k=256)
    sizes = (
        f"N = {n:,}, P = 99,648, K = 256; {ours['seconds']:.0f} and {theirs['seconds']:.0f} CPU s"
    )
    return [
        row("fit-basis / Gram matrix in memory, time", ours["seconds"] / theirs["seconds"], "<= 1.15", sizes),
        row(
            "fit-basis / Gram matrix in memory, memory",
            ours["megabytes"] / theirs["megabytes"],
            "<= 0.5",
            f"{ours['megabytes']:.0f} and {theirs['megabytes']:.0f} MB",
        ),
    ]  # fmt: skip


def measure_iteration(folder: Path, n: int) -> list[Row]:
    path = stored(folder, n, TENTH)
    exact, found = (child("basis", path=path, k=256, exact_limit=limit) for limit in (8192, 64))
    ratio = torch.tensor(found["values"]) / torch.tensor(exact["values"])
    sizes = f"N = {n:,}, P = {TENTH.size:,}, K = 256"
    lost = (exact["captured"] - found["captured"]) / exact["captured"]
    return [
        row("captured variance lost by iteration, share", max(lost, 0.0), "<= 1e-4", sizes),
        row("singular values by iteration, relative error", float((ratio - 1).abs().max()), "<= 1e-3", sizes),
    ]  # fmt: skip


def measure_growth(folder: Path, n: int) -> list[Row]:
    """The whole of an iteration, for as many rows as w2w has; of N = 65k from 40k, what a doubling would be."""
    numbers, done = (n, 2 * n, 4 * n, W2W_ROWS), []
    for rows in numbers:
        path = stored(folder, rows, TENTH, precision="half")
        done.append(child("basis", path=path, k=64, exact_limit=64, **FIXED))
    found = []
    for few, many, a, b in zip(numbers, numbers[1:], done, done[1:]):
        doublings = math.log2(many / few)
        sizes = f"N = {few:,} to {many:,} on disk, P = {TENTH.size:,}, K = 64"
        for what, key, goal in (
            ("cost", "seconds", "<= 2.1"),
            ("memory", "megabytes", "<= 1.1"),
        ):
            ratio = (b[key] / a[key]) ** (1 / doublings)
            found.append(
                row(f"{what} of an iteration as N doubles to {many:,}", ratio, goal, sizes)
            )
    return found


def measure_true(folder: Path, n: int) -> list[Row]:
    """One basis of data of the true size, from disk."""
    path = stored(folder, n, SD15, precision="half")
    done = child("basis", path=path, k=256)
    sizes = f"N = {n:,}, P = 99,648, K = 256; {done['megabytes']:.0f} MB, {done['seconds'] / 60:.0f} CPU minutes"
    return [
        row("fit-basis of the true size, GB of memory", done["megabytes"] / 1024, "<= 20", sizes)
    ]


def measure_vae(folder: Path, n: int) -> list[Row]:
    rows = []
    for precision, batch in (("fp32", 128), ("fp32", 2048), ("bf16", 2048)):
        arguments = {"rows": n, "k": 1000, "d": 512, "batch": batch, "precision": precision}
        plain, ours = (child("vae_epoch", **arguments, plain=p) for p in (True, False))
        sizes = f"N = {n:,}, K = 1,000, d = 512; {ours['seconds']:.2f} CPU s"
        name = f"VAE epoch / plain loop, {precision}, batch {batch}"
        rows.append(row(name, ours["seconds"] / plain["seconds"], "<= 1.10", sizes))
        if (precision, batch) == ("fp32", 2048):
            step = child("original_step", batch=64)
            ratio = step["seconds"] * n / 64 / ours["seconds"]
            sizes = f"the same people; a step of 64 rows takes {step['seconds']:.1f} CPU s"
            rows.append(row("epoch of the original w2w++ / VAE epoch", ratio, ">= 300", sizes))
    return rows


def measure_batch(folder: Path, n: int) -> list[Row]:
    small, default = child("heldout", rows=n, batch=128), child("heldout", rows=n, batch=None)
    sizes = (
        f"N = {n:,}, batch {VaeTraining().batch_of(round(0.9 * n))}: {default['r2']:.4f}, "
        f"128: {small['r2']:.4f}, PCA {default['pca']:.4f}"
    )
    name = "held-out R2 of the default batch, less that of 128"
    return [row(name, default["r2"] - small["r2"], ">= -0.003", sizes)]


def measure_ranks(folder: Path, n: int) -> list[Row]:
    """Beside it what the machine gives: processors that share caches, memory and clock do not double."""
    path = stored(folder, n, TENTH, precision="half")
    found = {
        name: [child(name, size=s, **arguments)["seconds"] for s in (1, 2)]
        for name, arguments in (("ranks", {"path": path}), ("products", {}))
    }
    ours, bare = (one / two for one, two in found.values())
    sizes = f"N = {n:,}, P = {TENTH.size:,}, K = 256, by the clock; plain products: {bare:.2f}"
    return [row("two processes against one", ours, ">= 1.7", sizes)]


def measure_files(folder: Path, n: int) -> list[Row]:
    loras = folder / "loras"
    loras.mkdir(exist_ok=True)
    for i, w in enumerate(synthetic_dataset(n, SD15).vectors()):
        save_lora(SD15.unpack(w), loras / f"{i:04}.safetensors", format="peft", alpha=SD15.alpha)
    theirs, ours = (child("files", folder=str(loras), ours=o)["rate"] for o in (False, True))
    return [
        row(
            "dataset / load_file and cat",
            ours / theirs,
            ">= 0.8",
            f"{n} files, {ours:.0f} and {theirs:.0f} files/s",
        )
    ]


def measure_gpu(folder: Path, n: int) -> list[Row]:
    rows = []
    for k in (1000, 10_000):
        done = child("on_gpu", rows=n, k=k)
        sizes = f"N = {n:,}, P = 99,648, K = {k:,}: basis {done['basis']:.0f} s, VAE {done['vae']:.0f} s"
        goal = "<= 15" if k == 1000 else ""
        rows.append(
            row(f"one GPU, K = {k:,}, minutes", (done["basis"] + done["vae"]) / 60, goal, sizes)
        )
    return rows


MEASURES: dict[str, tuple[Callable[[Path, int], list[Row]], int]] = {
    "gram": (measure_gram, 4000),
    "iteration": (measure_iteration, 3000),
    "growth": (measure_growth, 10_000),
    "true": (measure_true, W2W_ROWS),
    "vae": (measure_vae, 4000),
    "batch": (measure_batch, 16_000),
    "ranks": (measure_ranks, W2W_ROWS),
    "files": (measure_files, 128),
    "gpu": (measure_gpu, W2W_ROWS),
}


def table(rows: list[Row]) -> str:
    lines = ["| what | measured | goal | sizes |", "|---|---|---|---|"]
    lines += [f"| {r['name']} | {r['measured']:.4g} | {r['goal']} | {r['sizes']} |" for r in rows]
    return "\n".join(lines)


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """Rows measured again take their place."""
    fresh = {r["name"]: r for r in new}
    kept = [fresh.pop(r["name"], r) for r in old]
    return kept + list(fresh.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--rows", nargs="+", choices=MEASURES, help="some of the measurements")
    parser.add_argument("--work", type=Path, help="folder for data (default: a temporary one)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        print(json.dumps(CHILDREN[args.child[0]](**json.loads(args.child[1]))))
        return
    wanted = args.rows or [name for name in MEASURES if name != "gpu" or args.device == "cuda"]
    rows: list[Row] = []
    if args.rows and args.output and args.output.exists():
        rows = json.loads(args.output.read_text("utf-8"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in wanted:
            measure, size = MEASURES[name]
            rows = merged(rows, measure(folder, size))
            publish(rows, table(rows), args.output)


if __name__ == "__main__":
    main()
