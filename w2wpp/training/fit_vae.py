"""Training of the VAE codecs on whitened coefficients, and the linear space beside them.

How many epochs are good is found on persons held back for validation. The basis was made from
these persons too, and a basis fits its own rows far better than anybody else's: judged on them,
no codec would ever beat it. So the search runs in principal components found again among the
other persons, and then all of them train the codec for as many epochs.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..basis import Basis
from ..codecs import Codec, Posterior, build_codec
from ..delta_basis import DeltaBasis
from ..errors import ConfigError, DataError, FormatError, ShapeError, reading
from ..space import Space, SpaceBasis
from .checkpoint import load_checkpoint, save_checkpoint
from .coefficients import Coefficients, components_among, project_dataset
from .compute import Compute, explained
from .config import VaeTraining
from .dataset import VectorDataset, holdout_by_identity
from .output_term import OutputTerm
from .ranks import Ranks, current_ranks
from .report import latent_report, pca_report, reconstruction_report, thinned
from .run import Progress, Run

CHECKPOINT_EVERY = 25  # epochs
ADVICE = "Train with a smaller --batch or --hidden, or a basis of fewer --components."
Callback = Callable[[Progress], object]


def fit_vae(
    data: VectorDataset | Coefficients,
    basis: SpaceBasis,
    training: VaeTraining | None = None,
    *,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    compute: Compute | None = None,
    ranks: Ranks | None = None,
    outputs: OutputTerm | None = None,
) -> Space:
    """Train a codec on the training rows; its report is provenance["training_report"].

    All randomness comes from the generator (by default one seeded with training.seed). With a
    checkpoint path the run is saved there now and then, and taken up again if the file exists;
    the result is the same as without the break. Under `torchrun` ranks share every minibatch.
    ``outputs`` adds what the model does under decoded LoRAs to the loss, once the number of epochs is known; its
    vectors are those of the training rows.
    """
    training = training or VaeTraining()
    where: dict[str, Any] = {"compute": compute or Compute(), "ranks": ranks or current_ranks()}
    with explained(ADVICE):
        coefficients = coefficients_of(data, basis)
        return _fit(
            coefficients,
            basis,
            training,
            generator,
            callback,
            checkpoint,
            provenance,
            where,
            outputs,
        )


def _fit(
    coefficients: Coefficients,
    basis: SpaceBasis,
    training: VaeTraining,
    generator: torch.Generator | None,
    callback: Callback | None,
    checkpoint: str | os.PathLike[str] | None,
    provenance: Mapping[str, Any] | None,
    where: dict[str, Any],
    outputs: OutputTerm | None,
) -> Space:
    if training.codec == "tokens":
        where["segments"] = [up.stop - down.start for _, down, up in coefficients.layout.slices()]
    if outputs is not None and len(outputs.vectors) != int((~coefficients.heldout).sum()):
        raise ShapeError(
            "A term on outputs needs the vectors [n, P] of all training rows. Got "
            f"{list(outputs.vectors.shape)} for {int((~coefficients.heldout).sum())} rows."
        )
    generator = generator or torch.Generator().manual_seed(training.seed)
    seed = int(torch.randint(2**62, (), generator=generator))
    saved = _Checkpoint(checkpoint, _digest(coefficients, training, seed, outputs))
    rows = torch.nonzero(~coefficients.heldout).flatten()
    found = saved.search
    if training.validation and not found:
        found = _search(
            coefficients, basis, training, rows, seed, generator, saved, callback, where
        )
    epochs = found.get("best_epoch", training.epochs)
    c = coefficients.values[rows]
    run = Run(
        "final",
        training,
        c,
        basis.singular_values,
        seed=seed,
        epochs=epochs,
        outputs=outputs,
        **where,
    )
    _drive(run, saved, callback, found)
    codec = run.finish()
    report = {**_vae_report(codec, coefficients, basis, run), "early_stopping": found}
    if outputs is not None:
        report["outputs"] = outputs.config()
    return as_space(codec, coefficients, basis, provenance, report)


def linear_space(
    data: VectorDataset | Coefficients,
    basis: SpaceBasis,
    *,
    provenance: Mapping[str, Any] | None = None,
) -> Space:
    """The PCA space (w2w): latents are the whitened coefficients."""
    coefficients = coefficients_of(data, basis)
    sizes = {"coefficient_size": basis.n_components, "latent_size": basis.n_components}
    codec = build_codec({"name": "pca", **sizes})
    report = report_of(codec, coefficients, basis)
    return as_space(codec, coefficients, basis, provenance, report)


def report_of(codec: Codec, data: Coefficients, basis: SpaceBasis) -> dict[str, Any]:
    """What is said of any codec: its size, on how many rows it was fitted, and how well it reconstructs them."""
    splits = _splits(data)
    r2 = reconstruction_report(codec, data, basis.singular_values, splits)
    rows = {name: len(r) for name, r in splits.items()}
    return {"codec": codec.name, "latent_size": codec.latent_size, "rows": rows, "weight_r2": r2}


def prior_of(posterior: Posterior) -> tuple[Tensor, Tensor]:
    """Mean and std [d] of the aggregate posterior over the training rows.

    Its variance is that of the means plus the mean variance, so a collapsed unit keeps std 1
    instead of blowing up, and N(0, I) in standardised latents is where the decoder was trained.
    """
    variance = posterior.mean.double().var(0) + posterior.logvar.double().exp().mean(0)
    return posterior.mean.double().mean(0).float(), variance.sqrt().float()


def coefficients_of(data: VectorDataset | Coefficients, basis: SpaceBasis) -> Coefficients:
    """The coefficients of a data set in a basis; given as such they are checked. Raises ShapeError or DataError."""
    if isinstance(data, VectorDataset):
        if isinstance(basis, DeltaBasis):
            raise ConfigError(
                "A collection's basis has no place for rows of vectors. Train on its own coefficients: "
                "collection_coefficients(space)."
            )
        c = project_dataset(data, basis)
    else:
        c = data
    if c.values.shape[1] != basis.n_components:
        raise ShapeError(
            f"The coefficients have K = {c.values.shape[1]} and the basis {basis.n_components}; project "
            "the data set again."
        )
    if not bool(torch.isfinite(c.values).all()):
        raise DataError("The coefficients hold NaN or infinite numbers.")
    return c


def _search(
    data: Coefficients,
    basis: SpaceBasis,
    training: VaeTraining,
    rows: Tensor,
    seed: int,
    generator: torch.Generator,
    saved: _Checkpoint,
    callback: Callback | None,
    where: Mapping[str, Any],
) -> dict[str, Any]:
    """The number of epochs after which persons who take no part are reconstructed best."""
    chosen = holdout_by_identity(data.identity[rows], training.validation, generator=generator)
    if not bool(chosen.any()):
        raise DataError(
            f"A validation share of {training.validation} holds no person; use more, or 0 for none."
        )
    c, scales = data.values[rows], basis.singular_values
    if isinstance(basis, Basis):
        c, scales = components_among(c, scales, ~chosen)
    run = Run("search", training, c[~chosen], scales, seed=seed, validation=c[chosen], **where)
    _drive(run, saved, callback)
    return {
        "rows": {"training": int((~chosen).sum()), "validation": int(chosen.sum())},
        "epochs": run.epoch,
        "best_epoch": run.best_epoch,
        "start": round(run.start, 6),
        "best": round(run.best, 6),
        "stop_reason": run.stop_reason,
        "history": thinned(run.history),
    }


def _drive(
    run: Run, saved: _Checkpoint, callback: Callback | None, found: Mapping[str, Any] | None = None
) -> None:
    """Run to the end, from the checkpoint if it is of this stage."""
    saved.restore(run)
    while not run.stop_reason:
        progress = run.advance()
        if run.ranks.is_writer and (run.stop_reason or run.epoch % CHECKPOINT_EVERY == 0):
            saved.keep(run, found or {})
        if callback is not None:
            callback(progress)


class _Checkpoint:
    """The file of a run, if there is to be one: its stage, and the search's result once known."""

    def __init__(self, path: str | os.PathLike[str] | None, digest: str) -> None:
        self.path, self.digest = path, digest
        exists = path is not None and os.path.exists(path)
        self.tensors, self.numbers = load_checkpoint(path, digest) if exists else ({}, {})  # type: ignore[arg-type]

    @property
    def search(self) -> dict[str, Any]:
        found = self.numbers.get("search", {})
        if found and not (isinstance(found, dict) and type(found.get("best_epoch")) is int):
            raise FormatError(
                f"{self.path}: this checkpoint cannot be read. Delete it to start again."
            )
        return found

    def restore(self, run: Run) -> None:
        if self.numbers.get("stage") == run.stage:
            with reading(f"{self.path}: this checkpoint"):
                run.load(self.tensors, self.numbers)

    def keep(self, run: Run, found: Mapping[str, Any]) -> None:
        if self.path is not None:
            tensors, numbers = run.state()
            save_checkpoint(self.path, self.digest, tensors, {**numbers, "search": dict(found)})


@torch.no_grad()
def _vae_report(codec: Codec, data: Coefficients, basis: SpaceBasis, run: Run) -> dict[str, Any]:
    splits = _splits(data)
    return {
        "codec": codec.config,
        "settings": {**run.training.to_json(), "batch": run.batch},
        "computed": {**run.compute.to_json(), "processes": run.ranks.size},
        "seed": run.training.seed,
        "rows": {name: len(rows) for name, rows in splits.items()},
        "epochs": run.epoch,
        "weight_r2": reconstruction_report(codec, data, basis.singular_values, splits),
        "weight_r2_of_pca": pca_report(data, basis.singular_values, splits, codec.latent_size),
        **latent_report(codec.encode(data.values[splits["training"]])),
        "history": thinned(run.history),
    }


def _splits(data: Coefficients) -> dict[str, Tensor]:
    """Row numbers of training and held-out persons."""
    return {
        "training": torch.nonzero(~data.heldout).flatten(),
        "heldout": torch.nonzero(data.heldout).flatten(),
    }


@torch.no_grad()
def as_space(
    codec: Codec,
    data: Coefficients,
    basis: SpaceBasis,
    provenance: Mapping[str, Any] | None,
    report: Mapping[str, Any],
) -> Space:
    """A fitted codec as a space, with the prior of its training rows."""
    mean, std = prior_of(codec.encode(data.values[~data.heldout]))
    return Space(
        data.layout,
        basis,
        codec,
        mean,
        std,
        {**(provenance or {}), "training_report": dict(report)},
    )


def _digest(
    data: Coefficients, training: VaeTraining, seed: int, outputs: OutputTerm | None
) -> str:
    """Names a run: settings and data. A checkpoint of another run must not be taken up."""
    digest = hashlib.sha256(repr((training, seed)).encode())
    if outputs is not None:
        digest.update(repr(outputs.config()).encode())
    for t in (data.values, data.heldout, data.identity):
        digest.update(t.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
