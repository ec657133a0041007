"""The spaces that are compared in the miniature world, and the two that ship."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...basis import AffineBasis, Basis
from ...diffusion.denoise import Denoise
from ...diffusion.schedule import NoiseSchedule
from ...errors import ConfigError
from ...space import Space
from ...spacefile import extras, load_space, same_coordinates, save_space
from ...training.coefficients import Coefficients
from ...training.compute import Compute
from ...training.config import VaeTraining, original_training
from ...training.dataset import VectorDataset, write_dataset
from ...training.fit_basis import fit_coefficients
from ...training.fit_curved import FOLDS, CurvedTraining, fit_curved
from ...training.fit_flow import with_flow
from ...training.fit_vae import fit_vae, linear_space
from ...training.output_term import OutputTerm
from ...training.sketch import functional_metric, load_sketch, save_sketch, sketch
from ..world.renderer import TRAITS

COMPONENTS = 256
SIZES = (16, 32, 64, 128, 256)
METRICS = ("parameter", "raw", "update", "functional")
SKETCH_ROWS = 1024
NEAR = 100  # training people about whom the model is linearised: the first ones, whatever the size of the set
PULLED = 0.7  # towards the mean: rows are about where people live, not only where these do


@dataclass(frozen=True)
class Model:
    """The base model as spaces see it: a function, its schedule, and pictures [M, C, H, W] as it sees them."""

    denoise: Denoise
    schedule: NoiseSchedule
    pictures: Tensor


@dataclass(frozen=True)
class Candidate:
    """A space that is compared: a codec of d latents on components under a metric."""

    codec: str
    metric: str = ""  # none: raw vectors
    latent: int = 32
    flow: bool = False
    outputs: bool = False  # trained on the model's outputs as well
    adversarial: bool = False

    @property
    def family(self) -> str:
        """All but the size: "curved-functional"."""
        extras = {"outputs": self.outputs, "discriminator": self.adversarial}
        parts = [self.codec, self.metric, *(name for name, has in extras.items() if has)]
        return "-".join(part for part in parts if part)

    @property
    def name(self) -> str:
        """Of its file and its rows: "curved-functional-32-flow"."""
        return f"{self.family}-{self.latent}" + ("-flow" if self.flow else "")

    @property
    def needs_model(self) -> bool:
        """Whether it cannot be made from LoRAs alone."""
        return self.metric == "functional" or self.outputs


def candidates(sizes: Collection[int] = SIZES) -> list[Candidate]:
    """All that are compared on reconstruction: metrics and codecs, side by side, at each size."""
    bending = [size for size in sizes if size < COMPONENTS]
    few = [size for size in sizes if size == 32] or list(sizes)[:1]
    return [
        *(Candidate("pca", metric, size) for metric in METRICS for size in sizes),
        *(Candidate("curved", "functional", size) for size in bending),
        *(Candidate("curved", "update", size) for size in few),
        *(Candidate("vae-skip", "parameter", size) for size in bending),
        *(Candidate("vae-skip", "functional", size) for size in bending),
        *(Candidate("vae-skip", "functional", size, outputs=True) for size in few),
        *(Candidate("tokens", latent=size) for size in few),
        *(Candidate("original", latent=size) for size in few),
        *(Candidate("original-residual", latent=size, adversarial=True) for size in few),
    ]


DEFAULT = Candidate("curved", "functional", 128, flow=True)
LINEAR = Candidate("pca", "functional", 128)
W2W = Candidate("pca", "parameter", 128)  # weights2weights, to compare with


class Workshop:
    """Makes candidates from one data set; bases and the sketch are made once. Folder ``sketches`` keeps the latter."""

    def __init__(
        self,
        dataset: VectorDataset,
        model: Model | None = None,
        *,
        folder: Path | None = None,
        compute: Compute | None = None,
    ) -> None:
        self.dataset, self.model, self.folder = dataset, model, folder
        self.compute = compute or Compute()
        self.fitted: Callable[[str], tuple[Basis, Coefficients]] = cache(self._fitted)
        self.rows: Callable[[], Tensor] = cache(self._rows)

    def can_make(self, candidate: Candidate) -> bool:
        """Whether there are people and components enough, and a model if it takes one."""
        most = components_of(self.dataset)
        if (
            candidate.codec == "curved"
        ):  # which is judged in the components of four fifths of the people
            most = min(most - 1, len(self.dataset.training_rows) * (FOLDS - 1) // FOLDS - 2)
        return candidate.latent <= most and not (candidate.needs_model and self.model is None)

    def make(self, candidate: Candidate) -> Space:
        """Fit a candidate on the training people."""
        about = provenance(candidate.name)
        if not candidate.metric:
            return self._raw(candidate, about)
        basis, coefficients = self.fitted(candidate.metric)
        if candidate.codec == "pca":
            cut = coefficients.truncated(candidate.latent, basis.singular_values)
            space = linear_space(cut, basis.truncated(candidate.latent), provenance=about)
            return with_flow(space, cut) if candidate.flow else space
        if candidate.codec == "curved":
            training = CurvedTraining(latent=candidate.latent)
            space = fit_curved(coefficients, basis, training, provenance=about)
        else:
            term = self._output_term(basis) if candidate.outputs else None
            training_vae = _vae(candidate)
            space = fit_vae(
                coefficients,
                basis,
                training_vae,
                provenance=about,
                outputs=term,
                compute=self.compute,
            )
        return with_flow(space, coefficients) if candidate.flow else space

    def smaller(self, people: int) -> Workshop:
        """The same held-out people and sketch, and the first so many of the training people."""
        rows = torch.cat([self.dataset.training_rows[:people], self.dataset.heldout_rows])
        data, labels = self.dataset, self.dataset.labels
        fewer = replace(
            data,
            source=data.vectors(rows),
            identity=data.identity[rows],
            heldout=data.heldout[rows],
            labels=None if labels is None else labels[rows],
        )
        other = Workshop(fewer, self.model, folder=self.folder, compute=self.compute)
        other.rows = self.rows
        return other

    def _raw(self, candidate: Candidate, about: dict[str, Any]) -> Space:
        """Codecs of raw vectors, which are brought to -1 .. 1 by one factor, as in the original."""
        chunks = self.dataset.chunks(self.dataset.training_rows)
        largest = max(float(w.abs().max()) for _, w in chunks)
        affine = AffineBasis(self.dataset.layout.size, scale=1 / largest)
        return fit_vae(
            self.dataset, affine, _vae(candidate), provenance=about, compute=self.compute
        )

    def _output_term(self, basis: Basis) -> OutputTerm:
        model, training = self.model, self.dataset.training_rows
        assert model is not None
        vectors = self.dataset.vectors(training)
        basis = basis.to(self.compute.device)
        return OutputTerm(model.denoise, model.schedule, model.pictures, basis, vectors)

    def _fitted(self, metric: str) -> tuple[Basis, Coefficients]:
        how: Any = metric
        if metric == "functional":
            how = functional_metric(self.dataset, self.rows())
        fitted = fit_coefficients(
            self.dataset, components_of(self.dataset), metric=how, compute=self.compute
        )
        return fitted.basis, fitted.coefficients

    def _rows(self) -> Tensor:
        path = None if self.folder is None else self.folder / "sketch.safetensors"
        layout = self.dataset.layout
        if path is not None and path.exists():
            return load_sketch(path, layout)
        rows = sketch_of(self.dataset, self.model, SKETCH_ROWS, seed=0)
        if path is not None:
            save_sketch(path, layout, rows, made_by="w2wpp avatars spaces")
            rows = load_sketch(
                path, layout
            )  # in the precision of the file, as the next run will have it
        return rows


def sketch_of(dataset: VectorDataset, model: Model | None, rows: int, *, seed: int) -> Tensor:
    """Rows [n, P] of the model's Jacobian about training people; see `training.sketch`."""
    if model is None:
        raise ConfigError(
            "A functional metric needs the base model. Build it first: w2wpp avatars base."
        )
    near = dataset.vectors(dataset.training_rows[:NEAR])
    points = near.mean(0) + PULLED * (near - near.mean(0))
    generator = torch.Generator().manual_seed(seed)
    return sketch(
        model.denoise, model.schedule, model.pictures, points, rows=rows, generator=generator
    )


def _vae(candidate: Candidate) -> VaeTraining:
    """How the codecs that are trained by gradients are trained."""
    if candidate.codec == "original":
        return original_training(latent=candidate.latent, epochs=40)
    common: dict[str, Any] = {"codec": candidate.codec, "latent": candidate.latent}
    if candidate.codec == "original-residual":
        # The blocks of the published checkpoints at half their width, trained until held-out people say stop.
        return VaeTraining(
            **common,
            hidden=(512, 512),
            lr=5e-4,
            epochs=150,
            beta=3e-3,
            adversarial=0.02,
            patience=30,
        )
    if candidate.codec == "tokens":
        return VaeTraining(**common, lr=5e-4, epochs=100, beta=1e-3, patience=20)
    if candidate.metric != "functional":
        return VaeTraining(**common, beta=0.03)
    # Nearly all of this metric's energy is in the first units; a KL term that weighs more than what is left to win
    # would forbid winning it.
    epochs = 120 if candidate.outputs else 400  # a pass of the model in every step
    return VaeTraining(**common, beta=1e-4, dropout=0.3, hidden=(512,), lr=6e-3, epochs=epochs)


def train_spaces(
    dataset: VectorDataset,
    folder: Path,
    *,
    model: Model | None = None,
    only: Collection[Candidate] | None = None,
    compute: Compute | None = None,
    callback: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Fit every candidate, or some, on the training people and write it to ``folder``; what exists is kept.

    Fewer people than components leave out the spaces that are too large for them, and without a model those that are
    fitted to what it does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    workshop, written = Workshop(dataset, model, folder=folder, compute=compute), []
    for candidate in (*candidates(), DEFAULT) if only is None else only:
        path = folder / f"{candidate.name}.safetensors"
        if not path.exists():
            if not workshop.can_make(candidate):
                callback(f"spaces: {candidate.name} left out: too few people for it, or no model")
                continue
            space = workshop.make(candidate)
            save_space(space, path)
            r2 = space.training_report["weight_r2"]
            callback(f"spaces: {candidate.name} written, R2 {r2} in its own metric")
        written.append(path)
    return written


def components_of(dataset: VectorDataset) -> int:
    """How many components a data set of avatars gets: 256, or all that its training people allow."""
    return min(COMPONENTS, len(dataset.training_rows) - 1)


def ship(
    dataset: VectorDataset, folder: Path, models: Path, *, replace: bool = False
) -> list[Path]:
    """Write the default space, the linear one of the same size, and the held-out LoRAs they are scored on.

    Directions and start networks of what is there stay where the coordinates do. Where they do not, they mean nothing
    in the new space: then this raises ConfigError before anything is written, unless told to ``replace`` them.
    """
    spaces = {
        "avatars": (DEFAULT.name, "Avatars"),
        "avatars-pca": (LINEAR.name, "Avatars (linear)"),
    }
    found = {
        models / f"{name}.safetensors": (folder / f"{source}.safetensors", title)
        for name, (source, title) in spaces.items()
    }
    for path, (source, _) in found.items():
        lost = path.exists() and not same_coordinates(source, path) and extras(path)
        if lost and not replace:
            raise ConfigError(
                f"{path} holds {' and '.join(lost)} for other latents than {source}. Ship with --replace, and make "
                "them again with 'w2wpp avatars start --ship' and 'w2wpp avatars directions --ship'."
            )
    for path, (source, title) in found.items():
        space = load_space(source)
        space = space.with_(provenance={**space.provenance, "name": title})
        if path.exists() and same_coordinates(source, path):
            before = load_space(path)
            about = {k: v for k, v in before.provenance.items() if k == "directions"}
            space = space.with_(
                provenance={**space.provenance, **about},
                directions=before.directions,
                start=before.start,
            )
        save_space(space, path)
    heldout = models / "avatars-heldout.safetensors"
    write_heldout(dataset, heldout)
    return [*found, heldout]


def write_heldout(dataset: VectorDataset, path: Path) -> None:
    """The held-out people's LoRAs behind the mean of the others: all that scoring a space needs of a data set."""
    assert dataset.labels is not None
    held = dataset.heldout_rows
    mean = dataset.vectors(dataset.training_rows).mean(0, keepdim=True)
    nobody = torch.tensor([-1])
    write_dataset(
        path,
        torch.cat([mean, dataset.vectors(held)]),
        dataset.layout,
        torch.cat([nobody, dataset.identity[held]]),
        heldout=torch.cat([nobody > 0, dataset.heldout[held]]),
        labels=torch.cat([torch.zeros(1, len(TRAITS)), dataset.labels[held]]),
        label_names=TRAITS,
        provenance={**dataset.provenance, "first_row": "mean LoRA of the training people"},
    )


def provenance(name: str) -> dict[str, Any]:
    """What every space of the miniature world says of itself."""
    return {
        "name": f"avatars {name}",
        "version": "1",
        "licence": "Apache-2.0",
        "trigger_prompt": "person",
        "base_model": "avatar-base.safetensors",
        "made_by": "w2wpp avatars spaces",
    }
