"""The functional metric: how much a difference of LoRAs changes what the model does.

Let y(w; x, t) be the model's output for a noised picture x at timestep t, and J = dy/dw. A small difference dw matters
by E |J dw|^2 = dw^T G dw with G = E[J^T J], the Gauss-Newton matrix (Fisher's information of a Gaussian observation of
the output; Martens 2020, sec. 9). G is far too large to write down; n rows f = v^T J with v standard normal are enough
of it: E[f^T f] = G. One forward and one backward pass a row.

Letters: n rows, P numbers per LoRA, M pictures, [C, H, W] a picture as the model sees it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arrays import is_finite
from ..diffusion.denoise import Denoise
from ..diffusion.schedule import Schedule
from ..errors import ConfigError, DataError, FormatError, ShapeError
from ..files.container import open_container, write_container
from ..lora.layout import Layout
from ..weight_metric import SketchMetric
from .dataset import VectorDataset

FORMAT = "w2wpp.sketch"
NAME = "functional"
KEPT = 256  # rows of a metric; a sketch of the shipped world loses nothing at 128
DAMPING = 0.1  # weight of the parameter metric beside the sketch: keeps what n rows do not see


def sketch(
    denoise: Denoise,
    schedule: Schedule,
    pictures: Tensor,
    vectors: Tensor,
    *,
    rows: int = 1024,
    batch: int = 16,
    generator: torch.Generator,
    callback: Callable[[int, int], None] = lambda done, rows: None,
) -> Tensor:
    """Rows v^T J [n, P] of the model's Jacobian at LoRAs spread over where people live.

    pictures [M, C, H, W] as the model sees them (scaled latents), each shown with another noise and timestep; timesteps
    are spread evenly over the schedule. vectors [N, P] are points to linearise at: samples of a plain space, drawn in
    towards its mean, or LoRAs of the data set. What is random comes from the CPU ``generator``.

    Raises ConfigError for shapes that do not fit, DataError for gradients that overflow.
    """
    if rows < 1 or batch < 1 or pictures.ndim != 4 or vectors.ndim != 2:
        raise ConfigError(
            "A sketch needs rows, pictures [M, C, H, W] and vectors [N, P]. Got "
            f"{rows=}, {list(pictures.shape)} and {list(vectors.shape)}."
        )
    found = torch.empty(rows, vectors.shape[1])
    for part in probes(schedule, pictures, len(vectors), rows, batch, generator):
        found[part.rows] = rows_at(denoise, part, vectors[part.points]).cpu()
        callback(int(part.rows[-1]) + 1, rows)
    return found


@dataclass(frozen=True, eq=False)
class Probes:
    """Some rows to take: at which LoRAs, of which noisy pictures, in which directions of the output."""

    rows: Tensor  # [b], their numbers
    points: Tensor  # [b], of LoRAs
    noisy: Tensor  # [b, C, H, W]
    timestep: Tensor  # [b]
    probe: Tensor  # [b, C, H, W] standard normal


def probes(
    schedule: Schedule,
    pictures: Tensor,
    points: int,
    rows: int,
    batch: int,
    generator: torch.Generator,
) -> Iterator[Probes]:
    """All rows, a batch at a time: pictures and points at random, timesteps spread evenly over the schedule."""
    shown = torch.randint(len(pictures), (rows,), generator=generator)
    chosen = torch.randint(points, (rows,), generator=generator)
    spread = torch.randperm(rows, generator=generator) + torch.rand(rows, generator=generator)
    timestep = (spread / rows * len(schedule)).long().clamp(max=len(schedule) - 1)
    for part in torch.arange(rows).split(batch):
        noise, probe = (
            torch.randn(len(part), *pictures.shape[1:], generator=generator).to(pictures)
            for _ in range(2)
        )
        at = timestep[part].to(pictures.device)
        noisy, _ = schedule.add_noise(pictures[shown[part]], noise, at)
        yield Probes(part, chosen[part], noisy, at, probe)


def rows_at(denoise: Denoise, part: Probes, vectors: Tensor) -> Tensor:
    """Rows v^T J [b, P] at LoRAs [b, P].

    Each sample has a LoRA of its own, so that one backward pass gives as many rows as there are samples.

    Raises DataError for gradients that overflow.
    """
    noisy, timestep, probe = part.noisy, part.timestep, part.probe
    with torch.inference_mode(False), torch.enable_grad():
        w = vectors.detach().clone().to(noisy.device, torch.float32).requires_grad_(True)
        output = denoise(noisy.clone(), timestep.clone(), w).float()
        size = output[0].numel() ** 0.5  # so that |f dw|^2 is a mean over the output, not a sum
        (rows,) = torch.autograd.grad((output * probe.float()).sum() / size, w)
    if not is_finite(rows):
        raise DataError(
            "The model's gradients hold NaN or infinite numbers. Use single precision or bf16."
        )
    return rows.detach()


def functional_metric(
    dataset: VectorDataset, rows: Tensor, *, damping: float = DAMPING, keep: int = KEPT
) -> SketchMetric:
    """<a, b> = (F a)(F b) / (n s) + damping (a / std)(b / std) / t on differences of vectors, for rows F [n, P].

    s and t are the mean energies of the two parts over the training LoRAs' differences from their mean, so that
    ``damping`` compares like with like. Files hold the rows, so of all their rotations the one is taken whose first
    ``keep`` rows see most of the training LoRAs' differences, and the others are left out.

    Raises ShapeError for rows of another layout, ConfigError for a damping of zero or no rows, DataError if the rows
    see nothing vary.
    """
    if rows.ndim != 2 or rows.shape[1] != dataset.layout.size:
        raise ShapeError(
            f"A sketch of this data set's layout has rows [n, {dataset.layout.size}]. Got {list(rows.shape)}."
        )
    if not 0 < damping < float("inf") or keep < 1:
        raise ConfigError(
            f"A functional metric has a positive damping and keeps rows. Got {damping=} and {keep=}."
        )
    mean, std = _moments(dataset)
    plain, between = 0.0, torch.zeros(len(rows), len(rows), dtype=torch.float64)
    unit = torch.where(std > 1e-8 * std.max(), 1 / std.clamp_min(1e-30), 0.0).float()
    for _, w in dataset.chunks(dataset.training_rows):
        difference = w - mean
        effect = (difference @ rows.T).double()  # [chunk, n]
        between += effect.T @ effect
        plain += float((difference * unit).square().sum(dtype=torch.float64))
    count, seen = len(dataset.training_rows), float(between.trace()) / len(rows)
    if not seen > 0 or not plain > 0:
        raise DataError("Nothing varies among the training LoRAs as far as this sketch can see.")
    scale = (damping / (plain / count)) ** 0.5 * unit
    unit_rows = rows / (len(rows) * seen / count) ** 0.5
    if keep < len(rows):
        turned = torch.linalg.eigh(between).eigenvectors.flip(1)[:, :keep].T
        unit_rows = turned.float() @ unit_rows
    return SketchMetric(scale, unit_rows, NAME)


def _moments(dataset: VectorDataset) -> tuple[Tensor, Tensor]:
    """Mean and std [P] of the training rows, in single precision."""
    total = torch.zeros(dataset.layout.size, dtype=torch.float64)
    squares, count = total.clone(), len(dataset.training_rows)
    for _, w in dataset.chunks(dataset.training_rows):
        total += w.sum(0, dtype=torch.float64)
    mean = total / count
    for _, w in dataset.chunks(dataset.training_rows):
        squares += (w - mean.float()).square().sum(0, dtype=torch.float64)
    return mean.float(), (squares / max(1, count - 1)).sqrt()


def save_sketch(
    path: str | os.PathLike[str], layout: Layout, rows: Tensor, **about: object
) -> None:
    """Keep rows [n, P] for ``fit-basis --metric functional --sketch``, in half precision behind a common factor."""
    factor = float(rows.abs().max().clamp_min(1e-30))
    config = {"layout": layout.to_json(), "factor": factor, "about": about}
    write_container(path, {"rows": (rows / factor).half()}, format=FORMAT, config=config)


def load_sketch(path: str | os.PathLike[str], layout: Layout) -> Tensor:
    """Rows [n, P] of a sketch for this layout.

    Raises ConfigError for another layout, FormatError for another file.
    """
    file = open_container(path, FORMAT)
    try:
        own, factor = Layout.from_json(file.config["layout"]), float(file.config["factor"])
    except (KeyError, TypeError, ValueError) as e:
        raise FormatError(f"{path}: the configuration of this sketch cannot be read: {e!r}.") from e
    if own != layout:
        raise ConfigError(
            f"{path} is a sketch for the layout '{own.name}'; the data set has '{layout.name}'."
        )
    file.require("rows", (None, layout.size), torch.float16)
    return file.read("rows").float() * factor
