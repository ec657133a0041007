"""One training of one codec: everything that changes, and how it moves one epoch ahead."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..codecs import Codec, Posterior, build_codec
from ..errors import ConfigError, DataError
from ..rates import half_cosine
from .config import VaeTraining
from .schedules import kl_schedule


@dataclass(frozen=True)
class Progress:
    """What a callback gets after every epoch."""

    stage: str  # "search" for the number of epochs, then "final"
    epoch: int  # finished so far
    epochs: int  # at most
    loss: float
    reconstruction: float
    kl: float  # sum over units, nats
    beta: float
    monitored: float  # on the validation persons; without any, the loss again
    best: float


class Run:
    """Trains on c [n, K]; with validation rows [m, K] it knows its best epoch and when to stop."""

    def __init__(
        self,
        stage: str,
        training: VaeTraining,
        c: Tensor,
        singular_values: Tensor,
        *,
        seed: int,
        validation: Tensor | None = None,
        epochs: int | None = None,
    ) -> None:
        if len(c) < 2:
            raise DataError(f"A VAE needs at least two training rows. Got {len(c)}.")
        self.stage, self.training, self.c, self.validation = stage, training, c, validation
        self.epochs = training.epochs if epochs is None else epochs
        self.generator = torch.Generator().manual_seed(seed)
        self.weight = self._weight(singular_values)  # [K], of squared errors of coefficients
        self.codec = self._build_codec()
        self.codec.adapt(singular_values, self.weight, training.beta)
        self.codec.draw_from(self.generator)
        self.schedule = kl_schedule(
            training.kl, beta=training.beta, warmup=training.warmup, epochs=training.epochs
        )
        self.optimiser = self._build_optimiser()
        if validation is not None:
            shape = (len(validation), training.latent)
            self.judge_noise = torch.randn(shape, generator=self.generator)
        self.epoch = self.best_epoch = 0
        self.best = self.start = math.inf if validation is None else self.judge()
        self.history: list[dict[str, Any]] = []

    @property
    def stop_reason(self) -> str:
        """Why the run is over; empty while it is not."""
        if self.epoch >= self.epochs:
            return f"All {self.epochs} epochs were run."
        patience = self.training.patience
        if self.validation is not None and patience and self.epoch - self.best_epoch >= patience:
            return f"The validation persons did not improve for {patience} epochs."
        return ""

    def advance(self) -> Progress:
        """One epoch."""
        n = len(self.c)
        batch = min(self.training.batch or n, n)
        order = torch.randperm(n, generator=self.generator)
        # Equal parts rather than a small last one, whose gradient would be mostly noise.
        parts = order.tensor_split(max(1, round(n / batch)))
        sums = torch.zeros(3)
        self.codec.train()
        for i, rows in enumerate(parts):
            sums += self._step(self.c[rows], self.epoch + i / len(parts)) * len(rows) / n
        beta = self.schedule(self.epoch)
        self.epoch += 1
        loss, reconstruction, kl = sums.tolist()
        monitored = loss if self.validation is None else self.judge()
        if not math.isfinite(loss + monitored):
            raise DataError(
                f"The training diverged in epoch {self.epoch}: the loss is {loss}. "
                f"Lower lr (now {self.training.lr})."
            )
        if monitored < self.best:
            self.best, self.best_epoch = monitored, self.epoch
        row = {"loss": loss, "reconstruction": reconstruction, "kl": kl, "beta": beta}
        self.history.append({"epoch": self.epoch, **row, "monitored": monitored})
        return Progress(
            self.stage, self.epoch, self.epochs, **row, monitored=monitored, best=self.best
        )

    @torch.no_grad()
    def judge(self) -> float:
        """What early stopping minimises; with the final beta and the same noise at every call."""
        assert self.validation is not None
        self.codec.eval()
        posterior = self.codec.encode(self.validation)
        if self.training.monitor == "reconstruction":
            decoded = self.codec.decode(posterior.mean)
            return float(self._reconstruction(self.validation, decoded))
        decoded = self.codec.decode(posterior.at(self.judge_noise))
        reconstruction = self._reconstruction(self.validation, decoded)
        return float(reconstruction + self.schedule(self.training.epochs) * self._kl(posterior))

    @torch.no_grad()
    def finish(self) -> Codec:
        """The codec as it is, frozen."""
        self.codec.requires_grad_(False).eval()
        self.codec.draw_from(None)
        if self.training.half:
            for p in self.codec.parameters():
                p.copy_(p.half())
        return self.codec

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON) of everything that changes."""
        tensors = {f"weights.{k}": v.detach() for k, v in self.codec.state_dict().items()}
        for i, slots in self.optimiser.state_dict()["state"].items():
            tensors.update({f"optimiser.{i}.{k}": v for k, v in slots.items()})
        tensors["generator"] = self.generator.get_state()
        names = ("epoch", "best", "best_epoch", "history")
        best = {"best": None if math.isinf(self.best) else self.best}
        return tensors, {"stage": self.stage, **{k: getattr(self, k) for k in names}, **best}

    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        self.codec.load_state_dict(_under("weights.", tensors))
        slots: dict[int, dict[str, Tensor]] = {}
        for key, t in _under("optimiser.", tensors).items():
            i, name = key.split(".", 1)
            slots.setdefault(int(i), {})[name] = t
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": slots})
        self.generator.set_state(tensors["generator"])
        self.epoch, self.history = numbers["epoch"], list(numbers["history"])
        self.best_epoch = numbers["best_epoch"]
        self.best = math.inf if numbers["best"] is None else numbers["best"]

    def _step(self, c: Tensor, epoch: float) -> Tensor:
        """One update; returns [loss, reconstruction, KL summed over units]."""
        t = self.training
        for group in self.optimiser.param_groups:
            group["lr"] = t.lr * half_cosine(epoch / t.epochs)
        seen = c
        if t.input_noise:
            seen = c + t.input_noise * torch.randn(c.shape, generator=self.generator)
        posterior = self.codec.encode(seen)
        noise = torch.randn(len(c), t.latent, generator=self.generator)
        reconstruction = self._reconstruction(c, self.codec.decode(posterior.at(noise)))
        loss = reconstruction + self.schedule(epoch) * self._kl(posterior)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        kl = posterior.kl().mean(0).sum()
        return torch.stack([loss, reconstruction, kl]).detach()

    def _weight(self, singular_values: Tensor) -> Tensor:
        if self.training.reconstruction == "mse":
            return torch.full_like(singular_values, 1.0 / len(singular_values))
        squares = singular_values.square()
        return squares / (squares * self.c.var(0, correction=0)).sum()

    def _reconstruction(self, c: Tensor, decoded: Tensor) -> Tensor:
        return ((c - decoded).square() @ self.weight).mean()

    def _kl(self, posterior: Posterior) -> Tensor:
        per_unit = posterior.kl().mean(0)  # over the minibatch, so that the floor holds per unit
        return per_unit.clamp_min(self.training.free_bits).mean()

    def _build_codec(self) -> Codec:
        t = self.training
        if t.codec == "pca":
            raise ConfigError("The codec 'pca' has nothing to train; use linear_space.")
        options: dict[str, Any] = {"coefficient_size": self.c.shape[1], "latent_size": t.latent}
        if t.hidden is not None:
            options["hidden"] = list(t.hidden)
        if t.dropout:
            options["dropout"] = t.dropout
        # Layers draw their first weights from the global generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=self.generator)))
            return build_codec({"name": t.codec, **options})

    def _build_optimiser(self) -> torch.optim.Optimizer:
        decayed = [p for p in self.codec.parameters() if p.ndim > 1]
        others = [p for p in self.codec.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": decayed},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            groups, lr=self.training.lr, weight_decay=self.training.weight_decay
        )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
