"""The settings of a VAE training."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ConfigError, check_finite

RECONSTRUCTIONS = ("explained", "mse")
MONITORS = ("elbo", "reconstruction")


@dataclass(frozen=True)
class VaeTraining:
    """loss = reconstruction + beta(epoch) * KL, both means over the minibatch.

    reconstruction "explained" is the share of variance left unexplained (1 for the training mean),
    weighted by the squared singular values, so a squared error in weight space; "mse" is a plain
    mean over coefficients, as the original w2w++ has it. KL is the mean over latent dimensions, in nats, each
    dimension counted at `free_bits` at least.
    """

    codec: str = "vae-skip"  # a name from CODECS with an encoder to train
    latent: int = 64  # d
    hidden: tuple[int, ...] | None = None  # widths of the networks; None: the codec's own
    dropout: float = 0.0  # in the residual networks of vae-skip
    epochs: int = 400  # at most; the learning rate decays to zero over them
    batch: int | None = None  # rows per step, 0 for all of them; None: see `batch_of`
    lr: float = 2e-3  # of AdamW
    weight_decay: float = 1e-2  # on matrices, not on biases
    input_noise: float = 0.0  # std of noise on the coefficients that the encoder reads
    reconstruction: str = "explained"  # or "mse"
    kl: str = "linear"  # annealing: off, linear, cyclical, sigmoid or original
    beta: float = 1e-3  # final weight of the KL term
    warmup: float = 40.0  # epochs of annealing, where the schedule has any
    adversarial: float = 0.0  # weight of a discriminator's judgement, of rows rebuilt and drawn
    free_bits: float = 0.0  # nats per latent dimension that cost nothing (Kingma et al. 2016)
    # Share of the training persons on whom the best number of epochs is sought, before all of
    # them train the codec for as long; 0 to run all epochs at once.
    validation: float = 0.1
    monitor: str = "elbo"  # minimised on them: the loss at the final beta, or "reconstruction"
    patience: int = 80  # epochs that the search goes on without a better value, 0 for all
    half: bool = True  # round the weights to half precision at the end: half the file
    seed: int = 0  # first weights, split, order and noise

    def __post_init__(self) -> None:
        floats = {name: value for name, value in asdict(self).items() if isinstance(value, float)}
        check_finite("A training", **floats)
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"A seed lies between 0 and 2^64 - 1. Got {self.seed}.")
        positive = {
            "latent": self.latent,
            "epochs": self.epochs,
            "lr": self.lr,
            "warmup": self.warmup,
        }
        low = [f"{k} = {v}" for k, v in positive.items() if not v > 0]
        least = {
            "batch": self.batch or 0,
            "weight_decay": self.weight_decay,
            "input_noise": self.input_noise,
            "beta": self.beta,
            "adversarial": self.adversarial,
            "free_bits": self.free_bits,
            "patience": self.patience,
        }
        low += [f"{k} = {v}" for k, v in least.items() if not v >= 0]
        if low:
            raise ConfigError(f"These settings of a training are too small: {', '.join(low)}.")
        if not 0 <= self.validation < 1 or not 0 <= self.dropout < 1:
            raise ConfigError("The shares validation and dropout lie in [0, 1).")
        if self.reconstruction not in RECONSTRUCTIONS or self.monitor not in MONITORS:
            raise ConfigError(
                f"reconstruction is one of {', '.join(RECONSTRUCTIONS)} and monitor one of "
                f"{', '.join(MONITORS)}. "
                f"Got {self.reconstruction!r} and {self.monitor!r}."
            )

    def batch_of(self, rows: int) -> int:
        """Rows per step: by default 128, and a 32nd of large sets (a power of two, 2,048 at most)."""
        if self.batch is not None:
            return min(self.batch or rows, rows)
        large = 1 << max(7, min(11, int(math.log2(max(1, rows / 32)))))
        return min(large, rows)

    def to_json(self) -> dict[str, Any]:
        """All settings, as space files keep them."""
        data = asdict(self)
        return {**data, "hidden": None if self.hidden is None else list(self.hidden)}


def original_training(**changes: Any) -> VaeTraining:
    """The recipe of the original w2w++, for `AffineBasis(P, scale=10)`; it had no early stopping."""
    recipe = {
        "codec": "original",
        "latent": 512,
        "epochs": 100,
        "batch": 64,
        "lr": 1e-4,
        "weight_decay": 0.0,
        "reconstruction": "mse",
        "kl": "original",
        "beta": 0.005,
        "validation": 0.0,
        "patience": 0,
    }
    return VaeTraining(**{**recipe, **changes})
