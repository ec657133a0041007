"""Training of the VAE codecs on whitened coefficients, and the linear space beside them."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..basis import AnyBasis
from ..codecs import Codec, Posterior, build_codec
from ..errors import ConfigError, DataError, ShapeError
from ..space import Space
from .checkpoint import load_checkpoint, save_checkpoint
from .coefficients import Coefficients, project_dataset
from .config import VaeTraining
from .dataset import VectorDataset, holdout_by_identity
from .report import latent_report, reconstruction_report, thinned
from .schedules import kl_schedule

CHECKPOINT_EVERY = 25  # epochs


@dataclass(frozen=True)
class Progress:
    """What a callback gets after every epoch."""

    epoch: int  # finished so far
    epochs: int
    loss: float
    reconstruction: float
    kl: float  # sum over units, nats
    beta: float
    monitored: float  # of the validation rows, or of the training rows without any
    best: float


def fit_vae(
    data: VectorDataset | Coefficients,
    basis: AnyBasis,
    training: VaeTraining | None = None,
    *,
    generator: torch.Generator | None = None,
    callback: Callable[[Progress], object] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Space:
    """Train a codec on the training rows and return the space with its report
    (provenance["training_report"]).

    All randomness comes from the generator (by default one seeded with training.seed). With a
    checkpoint path the run is saved there now and then, and taken up again if the file exists; the
    result is the same as without the break.
    """
    training = training or VaeTraining()
    coefficients = _coefficients(data, basis)
    run = _Run(coefficients, basis.singular_values, training, generator)
    digest = _digest(coefficients, training, run.generator)
    if checkpoint is not None and os.path.exists(checkpoint):
        run.load(load_checkpoint(checkpoint, digest))
    while not run.stop_reason:
        progress = run.epoch_forward()
        if checkpoint is not None and (run.stop_reason or run.epoch % CHECKPOINT_EVERY == 0):
            save_checkpoint(checkpoint, digest, *run.state())
        if callback is not None:
            callback(progress)
    codec = run.finish()
    return _space(codec, coefficients, basis, provenance, run.report())


def linear_space(
    data: VectorDataset | Coefficients,
    basis: AnyBasis,
    *,
    provenance: Mapping[str, Any] | None = None,
) -> Space:
    """The PCA space (w2w): latents are the whitened coefficients."""
    coefficients = _coefficients(data, basis)
    sizes = {"coefficient_size": basis.rank, "latent_size": basis.rank}
    codec = build_codec({"name": "pca", **sizes})
    splits = _splits(coefficients)
    r2 = reconstruction_report(codec, coefficients, basis.singular_values, splits)
    rows = {name: len(r) for name, r in splits.items()}
    report = {"codec": "pca", "latent_size": basis.rank, "rows": rows, "weight_r2": r2}
    return _space(codec, coefficients, basis, provenance, report)


def prior_of(posterior: Posterior) -> tuple[Tensor, Tensor]:
    """Mean and deviation [d] of the aggregate posterior over the training rows.

    Its variance is that of the means plus the mean variance, so a collapsed unit keeps deviation 1
    instead of blowing up, and N(0, I) in standardised latents is where the decoder was trained.
    """
    variance = posterior.mean.double().var(0) + posterior.logvar.double().exp().mean(0)
    return posterior.mean.double().mean(0).float(), variance.sqrt().float()


class _Run:
    """The state of one training: everything that changes, and how it moves one epoch ahead."""

    def __init__(
        self,
        data: Coefficients,
        singular_values: Tensor,
        training: VaeTraining,
        generator: torch.Generator | None,
    ) -> None:
        self.training, self.data, self.singular_values = training, data, singular_values
        self.generator = generator or torch.Generator().manual_seed(training.seed)
        self.splits = _splits(data, training.validation, self.generator)
        self.c = data.values[self.splits["training"]]  # [n, K]
        self.held = data.values[self.splits["validation"]]
        if len(self.c) < 2:
            raise DataError(f"A VAE needs at least two training rows. Got {len(self.c)}.")
        self._weigh_reconstruction()
        self.codec = self._build_codec()
        self.schedule = kl_schedule(
            training.kl, beta=training.beta, warmup=training.warmup, epochs=training.epochs
        )
        self.final_beta = self.schedule(training.epochs)
        decayed = [p for p in self.codec.parameters() if p.ndim > 1]
        others = [p for p in self.codec.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": decayed},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(
            groups, lr=training.lr, weight_decay=training.weight_decay
        )
        judged = self.held if len(self.held) else self.c
        self.judge_noise = torch.randn(len(judged), training.latent, generator=self.generator)
        self.epoch, self.stop_reason = 0, ""
        self.history: list[dict[str, Any]] = []
        self.best_epoch, self.best = 0, self.judge()  # the start counts: for vae-skip it is PCA
        self.best_weights = self._weights()

    def epoch_forward(self) -> Progress:
        n = len(self.c)
        batch = min(self.training.batch or n, n)
        order = torch.randperm(n, generator=self.generator)
        # Equal parts rather than a small last one, whose gradient would be mostly noise.
        parts = order.tensor_split(max(1, round(n / batch)))
        sums = torch.zeros(3)
        self.codec.train()
        for i, rows in enumerate(parts):
            sums += self._step(self.c[rows], self.epoch + i / len(parts)) * len(rows) / n
        self.epoch += 1
        loss, reconstruction, kl = sums.tolist()
        monitored = self.judge()
        if not math.isfinite(loss) or not math.isfinite(monitored):
            raise DataError(
                f"The training diverged in epoch {self.epoch}: the loss is {loss}. Lower lr (now "
                f"{self.training.lr})."
            )
        if monitored < self.best:
            self.best, self.best_epoch, self.best_weights = monitored, self.epoch, self._weights()
        self._check_stop()
        beta = self.schedule(self.epoch - 1)
        row = {"epoch": self.epoch, "loss": loss, "reconstruction": reconstruction, "kl": kl}
        self.history.append({**row, "beta": beta, "monitored": monitored})
        return Progress(
            self.epoch, self.training.epochs, loss, reconstruction, kl, beta, monitored, self.best
        )

    @torch.no_grad()
    def judge(self) -> float:
        """What early stopping minimises, with the same noise at every call."""
        self.codec.eval()
        c = self.held if len(self.held) else self.c
        posterior = self.codec.encode(c)
        reconstruction = self._reconstruction(c, self.codec.decode(posterior.at(self.judge_noise)))
        if self.training.monitor == "reconstruction":
            return float(self._reconstruction(c, self.codec.decode(posterior.mean)))
        return float(reconstruction + self.final_beta * self._kl_term(posterior))

    def finish(self) -> Codec:
        """The best codec, frozen."""
        self.codec.load_state_dict(self.best_weights)
        self.codec.requires_grad_(False).eval()
        if self.training.half:
            for p in self.codec.parameters():
                p.copy_(p.half())
        return self.codec

    @torch.no_grad()
    def report(self) -> dict[str, Any]:
        posterior = self.codec.encode(self.data.values[~self.data.heldout])
        r2 = reconstruction_report(self.codec, self.data, self.singular_values, self.splits)
        return {
            "codec": self.codec.config,
            "settings": self.training.to_json(),
            "seed": self.training.seed,
            "rows": {name: len(rows) for name, rows in self.splits.items()},
            "epochs": self.epoch,
            "best_epoch": self.best_epoch,
            "stop_reason": self.stop_reason,
            "weight_r2": r2,
            **latent_report(posterior),
            "history": thinned(self.history),
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON) of everything that changes."""
        tensors = {f"weights.{k}": v for k, v in self._weights().items()}
        tensors.update({f"best.{k}": v for k, v in self.best_weights.items()})
        for i, slots in self.optimiser.state_dict()["state"].items():
            tensors.update({f"optimiser.{i}.{k}": v for k, v in slots.items()})
        tensors["generator"] = self.generator.get_state()
        numbers = {
            "epoch": self.epoch,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "stop_reason": self.stop_reason,
            "history": self.history,
        }
        return tensors, numbers

    def load(self, state: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
        tensors, numbers = state
        self.codec.load_state_dict(_under("weights.", tensors))
        self.best_weights = _under("best.", tensors)
        slots: dict[int, dict[str, Tensor]] = {}
        for key, t in _under("optimiser.", tensors).items():
            i, name = key.split(".", 1)
            slots.setdefault(int(i), {})[name] = t
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": slots})
        self.generator.set_state(tensors["generator"])
        self.epoch, self.history = numbers["epoch"], numbers["history"]
        self.best, self.best_epoch = numbers["best"], numbers["best_epoch"]
        self.stop_reason = numbers["stop_reason"]

    def _step(self, c: Tensor, epoch: float) -> Tensor:
        """One update; returns [loss, reconstruction, KL summed over units]."""
        t = self.training
        for group in self.optimiser.param_groups:
            group["lr"] = t.lr * 0.5 * (1.0 + math.cos(math.pi * epoch / t.epochs))
        seen = c
        if t.input_noise:
            seen = c + t.input_noise * torch.randn(c.shape, generator=self.generator)
        posterior = self.codec.encode(seen)
        noise = torch.randn(len(c), t.latent, generator=self.generator)
        reconstruction = self._reconstruction(c, self.codec.decode(posterior.at(noise)))
        loss = reconstruction + self.schedule(epoch) * self._kl_term(posterior)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        kl = posterior.kl().mean(0).sum()
        return torch.stack([loss, reconstruction, kl]).detach()

    def _weigh_reconstruction(self) -> None:
        """weight [K] with which squared errors of coefficients are summed."""
        if self.training.reconstruction == "mse":
            self.weight = torch.full_like(self.singular_values, 1.0 / self.c.shape[1])
        else:
            squares = self.singular_values.square()
            self.weight = squares / (squares * self.c.var(0, correction=0)).sum()

    def _reconstruction(self, c: Tensor, decoded: Tensor) -> Tensor:
        return ((c - decoded).square() @ self.weight).mean()

    def _kl_term(self, posterior: Posterior) -> Tensor:
        per_unit = posterior.kl().mean(0)  # over the minibatch, so that the floor holds per unit
        return per_unit.clamp_min(self.training.free_bits).mean()

    def _build_codec(self) -> Codec:
        t = self.training
        options: dict[str, Any] = {"coefficient_size": self.c.shape[1], "latent_size": t.latent}
        if t.hidden is not None:
            options["hidden"] = list(t.hidden)
        if t.dropout:
            options["dropout"] = t.dropout
        if t.codec == "pca":
            raise ConfigError("The codec 'pca' has nothing to train; use linear_space.")
        seed = int(torch.randint(2**62, (), generator=self.generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # layers draw their first weights from the global generator
            codec = build_codec({"name": t.codec, **options})
        codec.adapt(self.singular_values, self.weight, t.beta)
        return codec

    def _check_stop(self) -> None:
        t = self.training
        if self.epoch >= t.epochs:
            self.stop_reason = f"All {t.epochs} epochs were run."
        elif t.patience and self.epoch - self.best_epoch >= t.patience:
            where = "validation persons" if len(self.held) else "training rows"
            self.stop_reason = f"The {where} did not improve for {t.patience} epochs."

    def _weights(self) -> dict[str, Tensor]:
        return {k: v.detach().clone() for k, v in self.codec.state_dict().items()}


def _coefficients(data: VectorDataset | Coefficients, basis: AnyBasis) -> Coefficients:
    c = project_dataset(data, basis) if isinstance(data, VectorDataset) else data
    if c.values.shape[1] != basis.rank:
        raise ShapeError(
            f"The coefficients have K = {c.values.shape[1]} and the basis {basis.rank}; project "
            "the data set again."
        )
    if not bool(torch.isfinite(c.values).all()):
        raise DataError("The coefficients hold NaN or infinite numbers.")
    return c


def _splits(
    data: Coefficients, validation: float = 0.0, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Row numbers of training, validation and held-out persons."""
    rows = torch.nonzero(~data.heldout).flatten()
    generator = generator or torch.Generator()
    if data.unseen is not None and validation:
        chosen = data.unseen[rows]
    else:
        chosen = holdout_by_identity(data.identity[rows], validation, generator=generator)
    if validation and not bool(chosen.any()):
        raise DataError(
            f"A validation share of {validation} holds no person; use more, or 0 for none."
        )
    return {
        "training": rows[~chosen],
        "validation": rows[chosen],
        "heldout": torch.nonzero(data.heldout).flatten(),
    }


@torch.no_grad()
def _space(
    codec: Codec,
    data: Coefficients,
    basis: AnyBasis,
    provenance: Mapping[str, Any] | None,
    report: Mapping[str, Any],
) -> Space:
    mean, std = prior_of(codec.encode(data.values[~data.heldout]))
    return Space(
        data.layout,
        basis,
        codec,
        mean,
        std,
        {**(provenance or {}), "training_report": dict(report)},
    )


def _digest(data: Coefficients, training: VaeTraining, generator: torch.Generator) -> str:
    """Names a run: settings and data. A checkpoint of another run must not be taken up."""
    digest = hashlib.sha256(repr((training, generator.initial_seed())).encode())
    for t in (data.values, data.heldout, data.identity):
        digest.update(t.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
