"""What W2W++ Train Start Network costs on SD 1.5, against painting the same number of pictures: time and memory.

    PYTHONPATH=. python benchmarks/start_cost.py -o benchmarks/results/start_cost.json
    PYTHONPATH=. python benchmarks/start_cost.py --size 64 --paint-steps 2 --rounds 1 --learn-steps 20   # a quick look

Runs with the interpreter of a ComfyUI install (COMFYUI_PATH names its folder), in this process, on the CPU. UNet and
VAE have the full size of SD 1.5 and random weights, the space 1,000 components and 512 latents. What is compared takes
turns within one run, in seconds of processor time:

- ours: drawn people to LoRAs, painted by the node's own code in batches, decoded, written as PNGs.
- bare: as many pictures in batches of the same size with the host's sampler, without any LoRA, decoded and written.

Learning (reading the pictures, the reader, the locator, the verdict) is measured on pictures of random numbers, whose
contents do not matter to how long it takes. With --learn-steps below the node's own numbers, seconds of a step are
extrapolated to them; the result says so. The ratio is that of the whole node for --people to bare painting:

    (paintings * ours + learning) / (paintings * bare)

Memory is the peak of resident memory beyond what the process held before; that of painting, in processes of their own,
beyond the models. Full size takes about (rounds + 2) * rows * 4 paintings and the learning, an hour on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import inversion_speed as speed  # enters the host
import torch
from PIL import Image
from publish import publish

easel = speed.in_host.part("nodes.host.easel")
paintings = speed.in_host.part("nodes.host.paintings")
fitting = speed.in_host.part("w2wpp.training.fit_paintings")
start_table = speed.in_host.part("w2wpp.training.start_table")
save_picture = speed.in_host.part("w2wpp.files.pictures").save_picture

SCENES = 2  # paintings of each person
VAE = {
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip


def open_vae() -> Any:
    """The VAE of SD 1.5 with random weights."""
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencoderKL

    network = AutoencoderKL(ddconfig=VAE, embed_dim=4)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, t in network.state_dict().items():
        if t.ndim > 1:
            state[name] = torch.randn(t.shape, generator=generator) * t[0].numel() ** -0.5
        else:
            state[name] = torch.full_like(t, float(name.endswith("weight")))
    return comfy.sd.VAE(sd=state)


class Cost:
    """Both ways of painting, with one model."""

    def __init__(self, size: int, steps: int, folder: Path) -> None:
        import folder_paths

        folder_paths.set_output_directory(str(folder))
        model, prompt, self.space = speed.open_model("sd15")
        scenes = [prompt, [[prompt[0][0].flip(1), {}]]]
        self.folder = folder
        self.painter = paintings.Painter(
            model, open_vae(), scenes, None, size, steps, cfg=1.0, seed=0
        )
        self.rows = easel.rows_at_once(model, self.painter.side, paintings.AT_ONCE)
        self.people = 0

    def ours(self) -> Path:
        """As many further people as fill a batch, in every scene; the table of all so far."""
        self.people += self.rows
        someone = paintings.draw_people(self.space, self.people, 0)
        return paintings.paint_people(self.painter, self.space, someone, lambda *_: None)

    def bare(self) -> None:
        """As many pictures by the host alone."""
        import comfy.sample

        painter = self.painter
        shape = easel.latent_shape(painter.model, painter.side)
        for scene in painter.scenes:
            noise = comfy.sample.prepare_noise(torch.zeros(self.rows, *shape), 0)
            latents = comfy.sample.sample(
                painter.model, noise, painter.steps, 1.0, easel.SAMPLER, easel.SCHEDULER, scene, scene,
                torch.zeros_like(noise), disable_pbar=True, seed=0,
            )  # fmt: skip
            for i, picture in enumerate(easel.decoded(painter.vae, latents)):
                save_picture(Image.fromarray(picture.numpy(), "RGB"), self.folder / f"bare{i}.png")

    @property
    def pictures(self) -> int:
        """Of one turn."""
        return self.rows * len(self.painter.scenes)


def beyond(run: Callable[[], Any]) -> int:
    """The peak of resident memory in bytes while it runs, beyond what there is before."""
    Path("/proc/self/clear_refs").write_text("5")  # restart the peak
    before = speed.memory("VmRSS")
    run()
    return max(0, speed.memory("VmHWM") - before)


def peak_elsewhere(way: str, size: int) -> int:
    """Of one turn of one step, in a process whose memory no earlier turn has shaped."""
    command = [sys.executable, __file__, "--peak", way, "--size", str(size)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(told.split()[-1])


def learning(latent_size: int, people: int, steps: int) -> dict[str, Any]:
    """Seconds that learning from this many people takes with the node's own settings, and its memory."""
    usual = fitting.PaintingsTraining()
    taken = {"reader": usual.steps, "locator": usual.locator.steps}
    run = usual
    if steps:
        taken = {name: min(steps, own) for name, own in taken.items()}
        run = replace(
            usual, steps=taken["reader"], locator=replace(usual.locator, steps=taken["locator"])
        )
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(people, latent_size, generator=generator)
    shape = (people, SCENES, 3, usual.size, usual.size)
    bank = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    marks: dict[str, list[float]] = {"reader": [], "locator": []}

    def told(done: int, of: int, line: str) -> None:
        marks[line.split()[0]].append(time.process_time())

    started = time.process_time()
    memory = beyond(
        lambda: fitting.fit_paintings(fitting.PaintedPeople(z, bank), run, callback=told)
    )
    whole = time.process_time() - started
    # The median, for between two rounds of the reader lies what belongs to no step.
    a_step = {
        name: statistics.median(b - a for a, b in pairwise(at)) if len(at) > 1 else whole
        for name, at in marks.items()
    }
    rest = max(0.0, whole - sum(a_step[name] * count for name, count in taken.items()))
    own = {"reader": usual.steps, "locator": usual.locator.steps}
    return {
        "seconds": rest + sum(a_step[name] * own[name] for name in own),
        "seconds_of_a_step": a_step,
        "seconds_besides": rest,
        "steps_measured": taken,
        "extrapolated": taken != own,
        "peak_bytes": memory,
    }


def measure(size: int, paint_steps: int, rounds: int, people: int, steps: int) -> dict[str, Any]:
    # First, so that no two models are in memory at once.
    peaks = {way: peak_elsewhere(way, size) for way in ("ours", "bare")}
    with tempfile.TemporaryDirectory() as name:
        cost = Cost(size, paint_steps, Path(name))
        seconds = speed.in_turns({"ours": cost.ours, "bare": cost.bare}, rounds)
        table_path = cost.ours()
        started = time.process_time()
        with torch.inference_mode(False):
            read = start_table.painted_people(
                table_path, cost.space, fitting.PaintingsTraining().size
            )
        reading = (time.process_time() - started) / read.bank.shape[:2].numel()
    each = {way: statistics.median(s) / cost.pictures for way, s in seconds.items()}
    with torch.inference_mode(False), torch.enable_grad():
        learned = learning(cost.space.latent_size, people, steps)
    count = people * SCENES
    ours = count * (each["ours"] + reading) + learned["seconds"]
    return {
        "pixels": cost.painter.side,
        "paint_steps": paint_steps,
        "rows": cost.rows,
        "people": people,
        "paintings": count,
        "seconds_of_a_painting": each,
        "painting_over_bare": speed.ratios(seconds, "ours"),
        "seconds_of_reading_one": reading,
        "learning": learned,
        "peak_bytes": peaks,
        "node_over_bare": ours / (count * each["bare"]),
    }


def table(result: dict[str, Any]) -> str:
    each, learned = result["seconds_of_a_painting"], result["learning"]
    took = ", ".join(f"{n} {s}" for n, s in learned["steps_measured"].items())
    how = f"extrapolated from steps: {took}" if learned["extrapolated"] else f"steps: {took}"
    whole = f"the node for {result['paintings']:,} paintings / painting as many"
    rows = [
        (whole, f"{result['node_over_bare']:.3f}", "<= 1.15"),
        ("one painting / bare", "{median:.3f} ({low:.3f} to {high:.3f})".format(**result["painting_over_bare"]), ""),
        ("seconds of a painting, ours and bare", f"{each['ours']:.2f}, {each['bare']:.2f}", ""),
        (f"seconds of learning ({how})", f"{learned['seconds']:.0f}", ""),
        ("peak memory of painting beyond the models, ours and bare, MB",
         ", ".join(f"{result['peak_bytes'][way] / 1e6:.0f}" for way in ("ours", "bare")), ""),
        ("peak memory of learning, MB", f"{learned['peak_bytes'] / 1e6:.0f}", ""),
    ]  # fmt: skip
    size = f"SD 1.5 of random weights, {result['pixels']} pixels, {result['paint_steps']} steps"
    lines = [f"| {size} | measured | goal |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} | {goal} |" for name, value, goal in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--size", type=int, default=512, help="pixels per side of a painting")
    parser.add_argument("--paint-steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3, help="turns of both, after one more")
    parser.add_argument("--people", type=int, default=1000, help="that the ratio is stated for")
    parser.add_argument(
        "--learn-steps", type=int, default=0, help="0 for the node's own; fewer are extrapolated"
    )
    parser.add_argument("--peak", choices=("ours", "bare"), help="only print one peak, in bytes")
    args = parser.parse_args()
    if args.peak:
        with torch.inference_mode(), tempfile.TemporaryDirectory() as name:
            cost = Cost(args.size, 1, Path(name))
            print(beyond(getattr(cost, args.peak)))
        return
    with torch.inference_mode():
        result = measure(args.size, args.paint_steps, args.rounds, args.people, args.learn_steps)
    publish(result, table(result), args.output)


if __name__ == "__main__":
    main()
