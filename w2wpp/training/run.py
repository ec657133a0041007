"""One training of one codec: everything that changes, and how it moves one epoch ahead."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs import Codec, Posterior, build_codec
from ..errors import ConfigError, DataError
from ..rates import half_cosine
from .adversary import Adversary
from .compute import Compute
from .config import VaeTraining
from .output_term import OutputTerm
from .ranks import Ranks
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
    """Trains on c [n, K]; with validation rows [m, K] it knows its best epoch and when to stop.

    Under several ranks each takes its part of every minibatch, with the random numbers that one
    process alone would draw for it.
    """

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
        compute: Compute | None = None,
        ranks: Ranks | None = None,
        segments: Sequence[int] = (),
        outputs: OutputTerm | None = None,
    ) -> None:
        self.compute, self.ranks = compute or Compute(), ranks or Ranks()
        device = self.compute.device
        c, singular_values = c.to(device), singular_values.to(device)
        validation = None if validation is None else validation.to(device)
        if len(c) < 2:
            raise DataError(f"A VAE needs at least two training rows. Got {len(c)}.")
        self.stage, self.training, self.c, self.validation = stage, training, c, validation
        self.epochs = training.epochs if epochs is None else epochs
        self.batch = training.batch_of(len(c))
        self.generator = torch.Generator().manual_seed(seed)
        # Noise is drawn where it is used; on a CPU from the one generator of everything.
        self.noise = self.generator
        if device.type != "cpu":
            self.noise = torch.Generator(device).manual_seed(seed)
        self.weight = self._weight(singular_values)  # [K], of squared errors of coefficients
        if self.ranks.size > 1 and (training.adversarial or outputs is not None):
            raise ConfigError(
                "A discriminator and a term on the model's outputs train in one process. Start without torchrun."
            )
        self.segments, self.outputs = segments, outputs
        self.codec = self._build_codec().to(device)
        self.codec.adapt(singular_values, self.weight, training.beta)
        self.codec.learn_from(c)
        self.adversary = self._build_adversary()
        self.codec.draw_from(self.noise)
        self.step = _shared(_Step(self.codec), self.compute, self.ranks)
        self.schedule = kl_schedule(
            training.kl, beta=training.beta, warmup=training.warmup, epochs=training.epochs
        )
        self.optimiser = self._build_optimiser()
        if validation is not None:
            self.judge_noise = self._draw(len(validation), training.latent)
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
        """One epoch. Raises DataError if the loss is no number."""
        n = len(self.c)
        order = torch.randperm(n, generator=self.generator).to(self.c.device)
        # Equal parts rather than a small last one, whose gradient would be mostly noise.
        parts = order.tensor_split(max(1, round(n / self.batch)))
        sums = torch.zeros(3, device=self.c.device)
        self.codec.train()
        for i, rows in enumerate(parts):
            sums += self._advance(rows, self.epoch + i / len(parts)) * (len(rows) / n)
        sums = self.ranks.sum(sums)
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
        c, n = self.validation, len(self.validation)
        posterior = self.codec.encode(c)
        if self.training.monitor == "reconstruction":
            value = self._reconstruction(c, self.codec.decode(posterior.mean), n)
        else:
            value = self._reconstruction(c, self.codec.decode(posterior.at(self.judge_noise)), n)
            floored = posterior.kl().mean(0).clamp_min(self.training.free_bits).mean()
            value = value + self.schedule(self.training.epochs) * floored
        return float(self.ranks.share(value))  # all stop together

    @torch.no_grad()
    def finish(self) -> Codec:
        """The codec as it is, frozen."""
        self.codec.requires_grad_(False).eval()
        self.codec.draw_from(None)
        self.codec.cpu()
        if self.training.half:
            for p in self.codec.parameters():
                p.copy_(p.half())
        return self.codec

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON) of everything that changes."""
        tensors = {f"weights.{k}": v.detach() for k, v in self.codec.state_dict().items()}
        for i, slots in self.optimiser.state_dict()["state"].items():
            tensors.update({f"optimiser.{i}.{k}": v for k, v in slots.items()})
        if self.adversary is not None:
            tensors.update({f"adversary.{k}": v for k, v in self.adversary.state_dict().items()})
            for i, slots in self.adversary.optimiser.state_dict()["state"].items():
                tensors.update({f"opponent.{i}.{k}": v for k, v in slots.items()})
        tensors["generator"] = self.generator.get_state()
        tensors["noise"] = self.noise.get_state()
        names = ("epoch", "best", "best_epoch", "history")
        best = {"best": None if math.isinf(self.best) else self.best}
        return tensors, {"stage": self.stage, **{k: getattr(self, k) for k in names}, **best}

    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.codec.load_state_dict(_under("weights.", tensors))
        _load_slots(self.optimiser, _under("optimiser.", tensors))
        if self.adversary is not None:
            self.adversary.load_state_dict(_under("adversary.", tensors))
            _load_slots(self.adversary.optimiser, _under("opponent.", tensors))
        self.generator.set_state(tensors["generator"])
        if self.noise is not self.generator:
            self.noise.set_state(tensors["noise"])
        self.epoch, self.history = numbers["epoch"], list(numbers["history"])
        self.best_epoch = numbers["best_epoch"]
        self.best = math.inf if numbers["best"] is None else numbers["best"]

    def _advance(self, rows: Tensor, epoch: float) -> Tensor:
        """One update on a minibatch; returns this rank's part of [loss, reconstruction, KL summed over units]."""
        t, n = self.training, len(rows)
        for group in self.optimiser.param_groups:
            group["lr"] = t.lr * half_cosine(epoch / t.epochs)
        mine = self.ranks.mine(torch.arange(n)) if self.ranks.size > 1 else slice(None)
        c = self.c[rows[mine]]
        seen = c
        if t.input_noise:
            seen = c + t.input_noise * self._draw(n, c.shape[1])[mine]
        noise = self._draw(n, t.latent)[mine]
        with self.compute.products():
            mean, logvar, decoded = self.step(seen, noise)
        posterior = Posterior(mean.float(), logvar.float())
        reconstruction = self._reconstruction(c, decoded.float(), n)
        kl = posterior.kl().sum(0) / n  # [d]
        loss = reconstruction + self.schedule(epoch) * self._floored(kl)
        if self.outputs is not None:
            loss = loss + self.outputs(self.codec.decode(mean), rows, self.generator)
        if self.adversary is not None:
            drawn = self.codec.decode(self._draw(n, t.latent))
            made = torch.cat([decoded, drawn]).float()
            self.adversary.learn(c, made)
            loss = loss + t.adversarial * self.adversary.cost(made)
        self.optimiser.zero_grad(set_to_none=True)
        (loss * self.ranks.size).backward()  # what is shared of gradients is their mean
        self.optimiser.step()
        return torch.stack([loss, reconstruction, kl.sum()]).detach()

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.noise, device=self.c.device)

    def _weight(self, singular_values: Tensor) -> Tensor:
        if self.training.reconstruction == "mse":
            return torch.full_like(singular_values, 1.0 / len(singular_values))
        squares = singular_values.square()
        return squares / (squares * self.c.var(0, correction=0)).sum()

    def _reconstruction(self, c: Tensor, decoded: Tensor, n: int) -> Tensor:
        """The part of rows c [m, K] in the mean over n rows."""
        return ((c - decoded).square() @ self.weight).sum() / n

    def _floored(self, kl: Tensor) -> Tensor:
        """Mean over units of this rank's part of the KL [d]; the floor holds per unit, over the minibatch."""
        least = self.training.free_bits
        if not least:
            return kl.mean()
        whole = self.ranks.sum(kl.detach().clone())
        return torch.where(whole > least, kl, least / self.ranks.size).mean()

    def _build_codec(self) -> Codec:
        t = self.training
        if t.codec == "pca":
            raise ConfigError("The codec 'pca' has nothing to train; use linear_space.")
        options: dict[str, Any] = {"coefficient_size": self.c.shape[1], "latent_size": t.latent}
        if t.hidden is not None:
            options["hidden"] = list(t.hidden)
        if t.dropout:
            options["dropout"] = t.dropout
        if t.codec == "tokens":
            options["segments"] = list(self.segments)
        # Layers draw their first weights from the global generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=self.generator)))
            return build_codec({"name": t.codec, **options})

    def _build_adversary(self) -> Adversary | None:
        if not self.training.adversarial:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=self.generator)))
            return Adversary(self.c, lr=self.training.lr).to(self.c.device)

    def _build_optimiser(self) -> torch.optim.Optimizer:
        decayed = [p for p in self.codec.parameters() if p.ndim > 1]
        others = [p for p in self.codec.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": decayed},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            groups, lr=self.training.lr, weight_decay=self.training.weight_decay, fused=True
        )


class _Step(nn.Module):
    """Encoding and decoding in one call, which is what DistributedDataParallel wraps."""

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, c: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        posterior = self.codec.encode(c)
        return posterior.mean, posterior.logvar, self.codec.decode(posterior.at(noise))


def _shared(step: _Step, compute: Compute, ranks: Ranks) -> nn.Module:
    if ranks.size == 1:
        return step
    devices = [compute.device] if compute.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(step, device_ids=devices)


def _load_slots(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """What an optimiser keeps of each parameter, from keys "0.exp_avg" and the like."""
    slots: dict[int, dict[str, Tensor]] = {}
    for key, t in tensors.items():
        i, name = key.split(".", 1)
        slots.setdefault(int(i), {})[name] = t
    optimiser.load_state_dict({**optimiser.state_dict(), "state": slots})


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
