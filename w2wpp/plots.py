"""Plots of an evaluation, as PNG. matplotlib is imported when a plot is drawn: it is an optional extra."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError
from .files.writing import replacing


def plot_latents(latents: Mapping[str, Tensor], path: Path, *, dimensions: int = 4) -> None:
    """Distribution of the first standardised latents [N, d] of each space, over N(0, 1)."""
    plt = _pyplot()
    figure, axes = plt.subplots(
        len(latents),
        dimensions,
        figsize=(2.6 * dimensions, 1.9 * len(latents)),
        squeeze=False,
        sharex=True,
    )
    grid = torch.linspace(-4, 4, 200)
    density = torch.exp(-(grid**2) / 2) / (2 * torch.pi) ** 0.5
    for line, (name, z) in zip(axes, latents.items()):
        for i, axis in enumerate(line):
            axis.hist(z[:, i].numpy(), bins=40, range=(-4, 4), density=True, color="#4c78a8")
            axis.plot(grid.numpy(), density.numpy(), color="#e45756", linewidth=1)
            axis.set_yticks([])
            axis.set_title(f"{name}, z{i}", fontsize=8)
    _save(plt, figure, path)


def plot_errors(errors: Mapping[str, Tensor], path: Path) -> None:
    """Share of a LoRA's variance that its reconstruction misses, 1 - R2 [N], sorted, one curve per space."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(7, 4))
    for name, values in errors.items():
        axis.plot(values.sort().values.numpy(), label=name, linewidth=1.2)
    axis.set_xlabel("held-out LoRAs, sorted")
    axis.set_ylabel("1 - R2 in weight space")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=7, ncol=2)
    _save(plt, figure, path)


def plot_curves(curves: Mapping[str, list[tuple[float, float]]], path: Path) -> None:
    """ID score over UNet evaluations, one curve per method; zero evaluations sit at the left edge."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for name, points in curves.items():
        if name == "reference":
            axis.axhline(points[0][1], color="black", linestyle=":", label="own LoRA")
            continue
        axis.plot(*zip(*points), marker="o", markersize=4, linewidth=1.2, label=name)
    axis.set_xscale("symlog", linthresh=10)
    axis.set_xlim(left=0)
    axis.set_xlabel("pictures through the UNet, per person")
    axis.set_ylabel("ID score")
    axis.legend(fontsize=7)
    _save(plt, figure, path)


def plot_sizes(
    lines: Mapping[str, list[tuple[float, float, float, float]]], path: Path, size: str, value: str
) -> None:
    """(size, mean, low, high) of each line, over sizes that double; intervals as bars."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for number, (name, points) in enumerate(lines.items()):
        x, mean, low, high = (torch.tensor(column, dtype=torch.float64) for column in zip(*points))
        aside = x * 1.012 ** (number - len(lines) / 2)  # so that bars do not hide each other
        bars = torch.stack([mean - low, high - mean]).clamp_min(0).tolist()
        axis.errorbar(
            aside.tolist(),
            mean.tolist(),
            bars,
            marker="o",
            markersize=3,
            linewidth=1.2,
            elinewidth=0.6,
            label=name,
        )
    ticks = sorted({point[0] for points in lines.values() for point in points})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel(size)
    axis.set_ylabel(value)
    axis.legend(fontsize=7)
    _save(plt, figure, path)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("Plots need matplotlib: pip install 'w2wpp[avatars]'.") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(plt: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    with replacing(path) as file:
        figure.savefig(file, dpi=110, format=path.suffix.lstrip(".") or "png")
    plt.close(figure)
