"""One gradient step of an inversion against bare passes through the same UNet, its memory, and a population's forward.

    PYTHONPATH=. python benchmarks/inversion_speed.py -o benchmarks/results/inversion_speed.json

Runs with the interpreter of a ComfyUI install (COMFYUI_PATH names its folder), in this process, on the CPU. SD 1.5 has
its full size and random weights, the space for it 1,000 components; the avatar model and its space are the shipped
ones. What is compared takes turns within one run; medians of the ratios of each turn are reported, in seconds of
processor time, which other programs on the machine disturb least:

- ours: noise, latent to LoRA, forward, loss, backward to the latent, Adam; as W2W++ Invert from Image does it.
- bare: forward and backward of the same UNet with every A and B as a leaf, no space, no optimiser.
- w2w: as in the published code, every layer projects its slice of all components at every step.
- population: N latents decoded and denoised in one batch, each under some draws of noise, against one batch of the
  bare UNet without any LoRA.

Memory is the peak of resident memory during one step, beyond what the process held before it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import in_host
import torch
import torch.nn.functional as F
from publish import publish
from space_speed import write_space

import w2wpp

HOST = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI")
in_host.enter(HOST)
denoiser = in_host.part("nodes.host.denoiser").denoiser
noise_schedule = in_host.part("nodes.host.model").noise_schedule
plan_run = in_host.part("nodes.host.plan").plan_run
inversion = in_host.part("w2wpp.inversion")

COMPONENTS = 1000
LATENTS = {"sd15": 4, "avatar": 3}  # channels


def open_model(family: str) -> tuple[Any, list, w2wpp.Space]:
    """MODEL, CONDITIONING and a space for it."""
    if family == "avatar":
        out = in_host.part("nodes.avatars").LoadAvatarModel.execute("white", "neutral", "front", 1)
        return (
            out.args[0],
            out.args[1],
            w2wpp.load_space(in_host.REPO / "models/avatars.safetensors"),
        )
    # The tests' full-size UNet of random weights; importable only within a host.
    spec = importlib.util.spec_from_file_location(
        "probe", in_host.REPO / "tests/host/probe/__init__.py"
    )
    assert spec and spec.loader
    probe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(probe)
    out = probe.SmallSD15.execute("float32", False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "space.safetensors"
        write_space(path, COMPONENTS)
        space = w2wpp.load_space(path)
        space.decode(torch.zeros(1, space.latent_size))  # read now: the file goes
    return out.args[0], out.args[1], space


def batch(family: str, rows: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy latents, timesteps and targets."""
    generator = torch.Generator().manual_seed(0)
    shape = (rows, LATENTS[family], size, size)
    noisy, target = (torch.randn(shape, generator=generator) for _ in range(2))
    return noisy, torch.linspace(50, 950, rows).long(), target


class Bench:
    """The three ways of one gradient step, and the two of a population, on one model."""

    def __init__(self, family: str, rows: int, size: int, population: int, draws: int = 1) -> None:
        self.model, self.prompt, self.space = open_model(family)
        self.family, self.layout = family, self.space.layout
        self.noisy, self.times, self.target = batch(family, rows, size)
        self.crowd = batch(family, population * draws, size)
        generator = torch.Generator().manual_seed(1)
        self.z = (0.5 * torch.randn(1, self.space.latent_size, generator=generator)).requires_grad_(
            True
        )
        self.latents = 0.5 * torch.randn(population, self.space.latent_size, generator=generator)
        self.adam = inversion.Adam(lr=1e-3).begin(self.z, steps=1000, seed=0)
        vector = self.space.decode(self.z.detach())[0]
        self.leaves = {
            name: (a.clone().requires_grad_(True), b.clone().requires_grad_(True))
            for name, (a, b) in self.layout.unpack(vector).items()
        }

    def plan(self, noisy: torch.Tensor, *, gradients: bool, checkpointing: bool = False) -> Any:
        return plan_run(self.model, noisy.shape, gradients=gradients, checkpointing=checkpointing)

    def ours(self, objective: Any) -> None:
        draw = objective.draw(0)
        self.adam.tell(*objective.value_and_gradient(self.adam.ask(), None, draw))

    def objective(self, denoise: Callable) -> Any:
        schedule = noise_schedule(self.model)
        return inversion.Objective(
            self.space, self.target[:1], denoise, schedule, draws=len(self.noisy)
        )

    def backward(self, unet: Callable, leaves: list[torch.Tensor]) -> None:
        loss = F.mse_loss(unet(self.noisy, self.times), self.target)
        torch.autograd.grad(loss, leaves)

    def gradient_steps(self, rounds: int) -> dict[str, list[float]]:
        with contextlib.ExitStack() as stack:
            opened = denoiser(
                self.model, self.layout, self.prompt, self.plan(self.noisy, gradients=True)
            )
            denoise = stack.enter_context(opened)
            objective = self.objective(denoise)
            plain = {way: bare_model(denoise) for way in ("bare", "w2w")}
            hook(
                plain["bare"].diffusion_model,
                denoise,
                lambda name: self.leaves[name],
                self.layout.scale,
            )
            coefficients, projected = self.projected()
            hook(plain["w2w"].diffusion_model, denoise, projected, self.layout.scale)
            leaves = [t for pair in self.leaves.values() for t in pair]
            ways = {
                "ours": lambda: self.ours(objective),
                "bare": lambda: self.backward(denoise_with(plain["bare"], denoise), leaves),
                "w2w": lambda: self.backward(denoise_with(plain["w2w"], denoise), [coefficients]),
            }
            return in_turns(ways, rounds)

    def projected(self) -> tuple[torch.Tensor, Callable[[str], tuple[torch.Tensor, torch.Tensor]]]:
        """Coefficients [1, K], and a layer's A and B as their product with its slice of V."""
        tensors = self.space.basis.tensors()
        v = tensors["components"].float() * tensors["singular_values"].float()[:, None]
        mean, std = tensors["mean"].float(), tensors["std"].float()
        parts = {m.name: (m, down, up) for m, down, up in self.layout.slices()}
        slices = {
            (name, half): (v[:, where].contiguous(), std[where], mean[where])
            for name, (_, down, up) in parts.items()
            for half, where in ((0, down), (1, up))
        }
        coefficients = torch.zeros(1, len(v), requires_grad=True)

        def lora(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            a, b = (
                (coefficients @ v * std + mean)
                for v, std, mean in (slices[name, 0], slices[name, 1])
            )
            rank, module = self.layout.rank, parts[name][0]
            return a.view(rank, module.in_features), b.view(module.out_features, rank)

        return coefficients, lora

    def populations(self, rounds: int) -> dict[str, list[float]]:
        noisy, times, _ = self.crowd
        plan = self.plan(noisy, gradients=False)
        with torch.no_grad(), contextlib.ExitStack() as stack:
            denoise = stack.enter_context(denoiser(self.model, self.layout, self.prompt, plan))
            plain = denoise_with(denoise._base, denoise)

            def bare() -> None:
                with unhooked(denoise._base.diffusion_model):
                    plain(noisy, times)

            ways = {
                "ours": lambda: denoise(noisy, times, self.space.decode(self.latents)),
                "bare": bare,
            }
            return in_turns(ways, rounds)

    def peak(self, checkpointing: bool) -> int:
        """Bytes that one step takes beyond the weights."""
        plan = self.plan(self.noisy, gradients=True, checkpointing=checkpointing)
        with denoiser(self.model, self.layout, self.prompt, plan) as denoise:
            objective = self.objective(denoise)
            Path("/proc/self/clear_refs").write_text("5")  # restart the peak
            before = memory("VmRSS")
            self.ours(objective)
            return memory("VmHWM") - before


def bare_model(denoise: Any) -> Any:
    """The host's model around the same weights in a network without any LoRA."""
    network = denoise._base.diffusion_model
    shared = {id(p): p for p in network.parameters()}
    twin = copy.deepcopy(network, shared)
    for module in twin.modules():
        module._forward_hooks.clear()
    base = copy.copy(denoise._base)
    base._modules = {**base._modules, "diffusion_model": twin}
    return base


def hook(network: torch.nn.Module, denoise: Any, lora: Callable, scale: float) -> None:
    """LoRAs as anyone would inject them."""
    paths = {id(layer): path for path, layer in denoise._base.diffusion_model.named_modules()}

    def added(name: str) -> Callable:
        def add(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
            a, b = lora(name)
            return output + scale * F.linear(F.linear(inputs[0], a), b)

        return add

    for name, site in denoise._sites.items():
        network.get_submodule(paths[id(site.layer)]).register_forward_hook(added(name))


def denoise_with(base: Any, denoise: Any) -> Callable:
    def call(noisy: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        shown = noisy.unsqueeze(2) if denoise._frames else noisy
        sigma = denoise._sigmas[times]
        options = {**denoise._options, "sigmas": sigma}
        given = denoise._prompt.batch(len(noisy))
        found = base.apply_model(shown, sigma, transformer_options=options, **given)
        return found.squeeze(2) if denoise._frames else found

    return call


@contextlib.contextmanager
def unhooked(unet: torch.nn.Module) -> Iterator[None]:
    hooks = [
        (module, dict(module._forward_hooks)) for module in unet.modules() if module._forward_hooks
    ]
    try:
        for module, _ in hooks:
            module._forward_hooks.clear()
        yield
    finally:
        for module, kept in hooks:
            module._forward_hooks.update(kept)


def in_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every way in every round; each round starts with another one, the first is not counted."""
    names, seconds = list(ways), {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            started = time.process_time()
            ways[name]()
            if turn:
                seconds[name].append(time.process_time() - started)
    return seconds


def memory(what: str) -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(what))
    return 1024 * int(line.split()[1])


def ratios(seconds: dict[str, list[float]], way: str) -> dict[str, float]:
    each = sorted(a / b for a, b in zip(seconds[way], seconds["bare"]))
    return {"median": statistics.median(each), "low": each[0], "high": each[-1]}


def measure(
    family: str, rows: int, size: int, population: int, draws: int, rounds: int
) -> dict[str, Any]:
    bench = Bench(family, rows, size, population, draws)
    steps, crowd = bench.gradient_steps(rounds), bench.populations(rounds)
    return {
        "rows": rows,
        "latent": size,
        "components": bench.space.basis.n_components,
        "seconds": {way: statistics.median(s) for way, s in steps.items()},
        "step_over_bare": ratios(steps, "ours"),
        "w2w_over_bare": ratios(steps, "w2w"),
        "population": population,
        "draws": draws,
        "population_seconds": {way: statistics.median(s) for way, s in crowd.items()},
        "population_over_bare": ratios(crowd, "ours"),
    }


def peak_elsewhere(family: str, size: int, checkpointing: bool) -> int:
    """In a process of its own, whose memory no earlier step has shaped."""
    command = [sys.executable, __file__, "--peak", family, "--size", str(size)]
    command += ["--checkpointing"] * checkpointing
    return int(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    )


def table(result: dict[str, Any]) -> str:
    names = {"sd15": "SD 1.5", "avatar": "avatar model"}
    lines = [
        "| | " + " | ".join(names[f] for f in result["models"]) + " | goal |",
        "|---" * (2 + len(result["models"])) + "|",
    ]
    rows = {
        "gradient step / bare forward and backward": ("step_over_bare", "at most 1.10"),
        "the w2w way / bare": ("w2w_over_bare", ""),
        "population / bare batched forward": ("population_over_bare", "at most 1.05"),
    }
    for label, (key, goal) in rows.items():
        cells = [
            "{median:.3f} ({low:.3f} to {high:.3f})".format(**model[key])
            for model in result["models"].values()
        ]
        lines.append(f"| {label} | {' | '.join(cells)} | {goal} |")
    for label, key in (
        ("seconds of a gradient step", "seconds"),
        ("seconds of a population", "population_seconds"),
    ):
        cells = [f"{model[key]['ours']:.3f}" for model in result["models"].values()]
        lines.append(f"| {label} | {' | '.join(cells)} | |")
    for label, key in (
        ("peak memory, MB", "peak"),
        ("the same with checkpointing", "peak_checkpointing"),
    ):
        cells = [f"{model[key] / 1e6:.0f}" for model in result["models"].values()]
        lines.append(f"| {label} | {' | '.join(cells)} | |")
    sizes = "; ".join(
        f"{names[f]}: step {m['rows']} x {m['latent']}x{m['latent']}, "
        f"population {m['population']} x {m['draws']}, peak 1 x {m['peak_latent']}x{m['peak_latent']}"
        for f, m in result["models"].items()
    )
    return "\n".join([*lines, "", f"Latents: {sizes}. Median over rounds (lowest to highest)."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--size", type=int, default=16, help="side of SD 1.5's latents in the timings"
    )
    parser.add_argument("--peak", choices=list(LATENTS), help="only print one peak, at --size")
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args()
    if args.peak:
        print(Bench(args.peak, 1, args.size, 1).peak(args.checkpointing))
        return
    models = {}
    # The avatar model's population is that of the node's recipe, four draws of each candidate.
    for family, rows, size, population, draws, large in (
        ("avatar", 8, 32, 8, 4, 32),
        ("sd15", 1, args.size, 8, 1, 64),
    ):
        rounds = args.rounds * (4 if family == "avatar" else 1)
        models[family] = measure(family, rows, size, population, draws, rounds)
        print(json.dumps({family: models[family]}), file=sys.stderr, flush=True)
        models[family]["peak"] = peak_elsewhere(family, large, False)
        models[family]["peak_checkpointing"] = peak_elsewhere(family, large, True)
        models[family]["peak_latent"] = large
        print(json.dumps({family: models[family]}), file=sys.stderr, flush=True)
    result = {"models": models}
    publish(result, table(result), args.output)


if __name__ == "__main__":
    main()
