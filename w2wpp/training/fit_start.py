"""Train a start network (picture -> latent) from pictures of people whose LoRAs are known, and of people whose are not.

Few people have a LoRA, pictures of people are plenty. So the network learns to read what is known of the people in
pictures (their labels: traits, or any pretrained embedding), and a ridge regression on the few maps labels to latents.
Pictures painted with latents of the space then correct that map. All is linear at the end and folds into one layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, DataError
from ..metrics import ridge_regression
from ..rates import warm_cosine
from ..start_network import StartNetwork, build_start
from .augment import Augmentation
from .compute import Compute

# pictures(count, generator) -> pictures [count, 3, H, W] in [-1, 1] and labels [count, L] of who is in them
Pictures = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StartTraining:
    """Settings of a start network's training."""

    seed: int = 11
    steps: int = 1500
    batch: int = 128
    learning_rate: float = 2e-3  # peak; linear warm-up, cosine to zero
    noise: float = 0.04  # largest std of the white noise added to a picture
    augmented: float = 0.7  # share of the pictures that suffer what photographs do; 0: none do
    augmentation: Augmentation = field(default_factory=Augmentation)
    penalty: float = 0.05  # of the ridge regression, in mean eigenvalues of its Gram matrix
    size: int = 32
    width: int = 32
    features: int = 128

    def __post_init__(self) -> None:
        if not 0 <= self.augmented <= 1:
            raise ConfigError(
                f"The share of augmented pictures is between 0, none, and 1. Got {self.augmented}."
            )


def picture_bank(bank: Tensor, labels: Tensor) -> Pictures:
    """Draws from pictures [n, 3, H, W] in int8 (-127 is black, 127 white) and the labels [n, L] of who is in them."""

    def pictures(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(bank), (count,), generator=generator)
        return bank[rows].float() / 127, labels[rows]

    return pictures


def to_bank(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1] as a bank holds them."""
    return pictures.mul(127).round().to(torch.int8)


def train_reader(
    pictures: Pictures,
    labels: int,
    config: StartTraining,
    *,
    compute: Compute | None = None,
    callback: Callable[[str], None] = lambda line: None,
) -> StartNetwork:
    """A network that reads labels [L] from pictures; by default trained on the CPU with bf16 products."""
    compute = compute or Compute.mixed("cpu")
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = StartNetwork(
            labels,
            size=config.size,
            width=config.width,
            features=config.features,
            hides=config.augmented > 0 and config.augmentation.hidden > 0,
        )
    network.to(compute.device)
    optimiser = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=0.02)
    for step in range(config.steps):
        rate = warm_cosine(step, config.steps, warmup=min(100, 1 + config.steps // 10))
        optimiser.param_groups[0]["lr"] = config.learning_rate * rate
        seen, wanted = pictures(config.batch, generator)
        seen = _augmented(seen, config, generator)
        std = config.noise * torch.rand(len(seen), 1, 1, 1, generator=generator)
        seen = seen + std * torch.randn(seen.shape, generator=generator)
        seen, wanted = compute.put(seen), compute.put(wanted)
        with compute.products():
            read = network(seen)
        loss = F.mse_loss(read.float(), wanted)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        if (step + 1) % 100 == 0:
            callback(f"start step {step + 1}/{config.steps} loss {loss.item():.4f}")
    return network.requires_grad_(False).eval().cpu()


def _augmented(pictures: Tensor, config: StartTraining, generator: torch.Generator) -> Tensor:
    """Pictures of any size, some of them augmented at the size at which the network sees them."""
    if not config.augmented:
        return pictures
    size = (config.size, config.size)
    if pictures.shape[-2:] != size:
        pictures = F.interpolate(pictures, size, mode="bilinear", antialias=True)
    chosen = torch.rand(len(pictures), generator=generator) < config.augmented
    return torch.where(
        chosen[:, None, None, None], config.augmentation(pictures, generator), pictures
    )


@dataclass(frozen=True, eq=False)
class LabelMap:
    """An affine map from labels [n, L] to latents [n, d]."""

    weights: Tensor  # [L, d]
    bias: Tensor  # [d]

    def __call__(self, labels: Tensor) -> Tensor:
        return labels @ self.weights + self.bias

    @classmethod
    def fit(cls, labels: Tensor, z: Tensor, *, penalty: float) -> LabelMap:
        """By ridge regression on labels [N, L] and latents [N, d] of people.

        Raises DataError where they are not as many.
        """
        if len(labels) != len(z) or len(z) < 2:
            raise DataError(f"Labels and latents go by person. Got {len(labels)} and {len(z)}.")
        middle, weights, mean = ridge_regression(labels, z, penalty)
        return cls(weights, mean - middle @ weights)

    def calibrated(self, z: Tensor, read: Tensor, *, damping: float = 0.1) -> LabelMap:
        """Corrected by what is painted: latents z [n, d] and the labels [n, L] read in pictures painted with them.

        A regression on weights answers too close to the mean, and knows nothing of how strongly a latent shows in a
        picture. A linear fit read = z @ M + c does, and each answer moves by the shortest step after which it is
        expected to show the labels asked for. `damping` (in mean eigenvalues of M^T M) keeps labels that hardly show
        in any painting from claiming long steps.

        Raises DataError for other sizes, or fewer paintings than latents.
        """
        if len(z) != len(read) or (z.shape[1], read.shape[1]) != self.weights.T.shape:
            raise DataError(
                f"Paintings come with latents [n, {len(self.bias)}] and labels [n, {len(self.weights)}]. Got "
                f"{list(z.shape)} and {list(read.shape)}."
            )
        if len(z) <= z.shape[1]:
            raise DataError(
                f"Calibration fits {z.shape[1]} latents and needs more paintings than that, several times as many if "
                f"possible. Got {len(z)}."
            )
        shown = LabelMap.fit(z, read, penalty=1e-3)  # latents to labels
        gram = shown.weights.T @ shown.weights  # [L, L]
        gram = gram + damping * gram.diagonal().mean() * torch.eye(len(gram))
        step = torch.linalg.solve(gram, shown.weights.T)  # [L, d]
        missing = torch.eye(len(self.weights)) - self.weights @ shown.weights
        return LabelMap(
            self.weights + missing @ step,
            self.bias - shown(self.bias) @ step,
        )

    def stretched(self, share: float) -> LabelMap:
        """For labels of which a reader gives this share: what is hard to read is answered closer to the mean."""
        return LabelMap(self.weights / share, self.bias)


def shrinkage(truth: Tensor, read: Tensor) -> float:
    """Slope of what was read on the truth, both [n, L] with the mean person at zero; 1 for a perfect reader."""
    return float((truth * read).sum() / truth.square().sum())


def start_from_reader(
    reader: StartNetwork, answer: LabelMap, *, scale: float = 1.0
) -> StartNetwork:
    """A reader of labels and a map from labels to latents make one network; both are linear where they meet.

    Labels are in stds, so that the weights are what a latent moves by when a person differs by one.
    """
    weights = answer.weights  # [L, d]
    network = build_start({**reader.config, "latent_size": weights.shape[1], "rank": len(weights)})
    own = ("head", "spread", "scale")
    parts = {n: t for n, t in reader.state_dict().items() if not n.startswith(own)}
    parts["head.weight"] = weights.T @ reader.head.weight  # [d, F]
    parts["head.bias"] = answer(reader.head.bias)
    parts["spread"] = weights
    parts["scale"] = torch.tensor(float(scale))
    network.load_state_dict(parts)
    return network.requires_grad_(False).eval()
