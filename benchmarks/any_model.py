"""A gradient step of an inversion on other models than SD 1.5: against bare passes, and on SDXL at its full size.

    PYTHONPATH=. python benchmarks/any_model.py -o benchmarks/results/any_model.json
    PYTHONPATH=. python benchmarks/any_model.py --sdxl -o benchmarks/results/any_model_sdxl.json   # 13 GB of memory

Runs with the interpreter of a ComfyUI install (COMFYUI_PATH names its folder), in this process, on the CPU, with random
weights. The models of the first command are reduced in depth and width (tests/host/probe), their spaces collections of
four LoRAs of rank 4 for every linear layer of their blocks. What is compared takes turns within one run, in seconds of
processor time: a gradient step (noise, latent to LoRA, forward, loss, backward to the latent, Adam) against forward and
backward of the same network with every A and B as a leaf.

The second command makes SDXL whole, with the full module set of its LoRAs: where they land, and the resident memory
that one gradient step takes beyond the weights, which model and inversion share.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from pathlib import Path
from typing import Any

import inversion_speed as speed  # enters the host
import torch
from delta_speed import sdxl_modules
from publish import publish

Factors = speed.in_host.part("w2wpp.lora.delta").Factors
members_of = speed.in_host.part("w2wpp.lora.collection").members_of
fitting = speed.in_host.part("w2wpp.training.fit_delta")
model_of = speed.in_host.part("nodes.host.model")
patched_each = speed.in_host.part("nodes.host.patches").patched_each
kohya_tensors = speed.in_host.part("w2wpp.lora.write").kohya_tensors

FAMILIES = ("SDXL", "SD3", "Flux", "QwenImage")
SIDE = {"SDXL": 32, "SD3": 32, "Flux": 32, "QwenImage": 32}  # of the latents
ROWS = 4  # noised pictures of a step


def probe() -> Any:
    """The tests' models of random weights."""
    path = speed.in_host.REPO / "tests/host/probe/__init__.py"
    spec = importlib.util.spec_from_file_location("probe", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def collection(modules: dict[str, tuple[int, int]], files: int = 4, rank: int = 4) -> Any:
    """A space of random LoRAs for modules {name: (out, in)}."""
    g = torch.Generator().manual_seed(0)
    loras = {
        str(i): {
            name: Factors(
                torch.randn(rank, size_in, generator=g) / size_in**0.5,
                0.1 * torch.randn(size_out, rank, generator=g),
            )
            for name, (size_out, size_in) in modules.items()
        }
        for i in range(files)
    }
    return fitting.fit_delta(members_of(loras), fitting.CollectionSettings(rank=files * rank))[0]


def linear_layers(model: Any) -> dict[str, tuple[int, int]]:
    """Of the blocks of a network."""
    blocks = {id(block) for block in model_of.blocks_of(model.model.diffusion_model)}
    found = {}
    for path, block in model.model.diffusion_model.named_modules():
        if id(block) in blocks:
            for name, layer in block.named_modules():
                if isinstance(layer, torch.nn.Linear):
                    found[f"{path}.{name}"] = (layer.out_features, layer.in_features)
    return found


class Step:
    """One gradient step of a recipe, on one model."""

    def __init__(self, model: Any, prompt: list, space: Any, side: int, rows: int) -> None:
        self.model, self.prompt, self.space = model, prompt, space.uncut()
        channels = model.model.latent_format.latent_channels
        g = torch.Generator().manual_seed(0)
        self.picture = torch.randn(1, channels, side, side, generator=g)
        self.rows = rows
        self.plan = speed.plan_run(
            model, (rows, *self.picture.shape[1:]), gradients=True, checkpointing=False
        )
        z = 0.5 * torch.randn(1, space.latent_size, generator=g)
        self.adam = speed.inversion.Adam(lr=1e-3).begin(z, steps=1000, seed=0)

    def opened(self) -> Any:
        """The model as an inversion sees it, for as long as a block lasts."""
        return speed.denoiser(self.model, self.space.layout, self.prompt, self.plan)

    def objective(self, denoise: Any) -> Any:
        """The loss."""
        schedule = model_of.noise_schedule(self.model)
        return speed.inversion.Objective(
            self.space, self.picture, denoise, schedule, draws=self.rows
        )

    def take(self, objective: Any) -> None:
        """The step itself."""
        draw = objective.draw(0)
        self.adam.tell(*objective.value_and_gradient(self.adam.ask(), None, draw))


def against_bare(family: str, rounds: int) -> dict[str, Any]:
    model, prompt, _ = probe().ReducedModel.execute(family).args
    space = collection(linear_layers(model))
    step = Step(model, prompt, space, SIDE[family], ROWS)
    layout = step.space.layout
    with step.opened() as denoise:
        objective = step.objective(denoise)
        draw = objective.draw(0)
        noise, times = draw.noise[0], draw.timestep[0]
        noisy, target = objective.schedule.add_noise(step.picture.expand(noise.shape), noise, times)
        base = speed.bare_model(denoise)
        vector = step.space.decode(step.adam.ask())[0]
        leaves = {
            name: tuple(t.detach().clone().requires_grad_(True) for t in pair)
            for name, pair in layout.unpack(vector).items()
        }
        speed.hook(base.diffusion_model, denoise, leaves.__getitem__, layout.scale)
        bare = speed.denoise_with(base, denoise)
        flat = [t for pair in leaves.values() for t in pair]

        def backward() -> None:
            with torch.enable_grad():
                loss = torch.nn.functional.mse_loss(bare(noisy, times), target)
                torch.autograd.grad(loss, flat, allow_unused=True)

        seconds = speed.in_turns({"ours": lambda: step.take(objective), "bare": backward}, rounds)
    return {
        "modules": len(layout.modules),
        "rank": layout.rank,
        "rows": ROWS,
        "latent": SIDE[family],
        "seconds": {way: statistics.median(s) for way, s in seconds.items()},
        "step_over_bare": speed.ratios(seconds, "ours"),
    }


def table(result: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| reduced model | modules | seconds of a step | gradient step / bare forward and backward | goal |",
        "|---|---|---|---|---|",
    ]
    for family, row in result.items():
        ratio = "{median:.3f} ({low:.3f} to {high:.3f})".format(**row["step_over_bare"])
        step = row["seconds"]["ours"]
        lines.append(f"| {family} | {row['modules']} | {step:.3f} | {ratio} | at most 1.10 |")
    return "\n".join(lines)


def sdxl(side: int) -> dict[str, Any]:
    """SDXL at full size: layout, apply, one gradient step and its memory."""
    tests = probe()
    model, prompt, _ = tests.WholeSDXL.execute("float32").args
    space = collection(sdxl_modules(), files=2, rank=4)
    lora = space.layout.unpack(space.decode(torch.zeros(1, space.latent_size))[0])
    tensors = kohya_tensors(lora, alpha=space.layout.alpha)
    (patched,) = patched_each(model, space.layout, [tensors], 1.0)
    step = Step(model, prompt, space, side, rows=1)
    with step.opened() as denoise:
        objective = step.objective(denoise)
        Path("/proc/self/clear_refs").write_text("5")  # restart the peak
        before, started = speed.memory("VmRSS"), time.perf_counter()
        step.take(objective)
        taken = time.perf_counter() - started
        peak = speed.memory("VmHWM")
    return {
        "family": space.layout.base_model,
        "modules": len(space.layout.modules),
        "patched": len(patched.patches),
        "parameters": sum(p.numel() for p in model.model.diffusion_model.parameters()),
        "latent": side,
        "resident_before_gigabytes": before / 1e9,
        "peak_beyond_gigabytes": (peak - before) / 1e9,
        "seconds": taken,
    }


def sdxl_table(result: dict[str, Any]) -> str:
    rows = {
        "parameters": f"{result['parameters'] / 1e9:.2f} billion, in single precision",
        "modules of the space, family told": f"{result['modules']}, {result['family']}",
        "weights patched by Apply": f"{result['patched']}",
        "memory with the model loaded": f"{result['resident_before_gigabytes']:.1f} GB",
        f"peak of a gradient step at {result['latent']}x{result['latent']} beyond that": (
            f"{result['peak_beyond_gigabytes']:.2f} GB"
        ),
        "seconds of that step": f"{result['seconds']:.1f}",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| SDXL at full size | measured |", "|---|---|", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sdxl", action="store_true", help="SDXL at its full size instead")
    parser.add_argument("--side", type=int, default=32, help="of SDXL's latents")
    args = parser.parse_args()
    with torch.inference_mode(False), torch.no_grad():
        if args.sdxl:
            whole = sdxl(args.side)
            publish(whole, sdxl_table(whole), args.output)
            return
        result = {family: against_bare(family, args.rounds) for family in FAMILIES}
    publish(result, table(result), args.output)


if __name__ == "__main__":
    main()
