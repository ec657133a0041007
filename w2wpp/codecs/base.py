"""What every codec is: a module between whitened coefficients [B, K] and latents [B, d]."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..arrays import Array, as_batch

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0


@dataclass(frozen=True, eq=False)
class Posterior:
    """A diagonal Gaussian over latents: mean [B, d] and logarithm of the variance [B, d]."""

    mean: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        """Standard deviations [B, d]."""
        return torch.exp(0.5 * self.logvar)

    def kl(self) -> Tensor:
        """Divergence from N(0, I) per unit, in nats [B, d] (Kingma and Welling 2014, app. B)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar)

    def at(self, noise: Tensor) -> Tensor:
        """The reparametrised sample for standard normal noise [B, d]."""
        return self.mean + self.std * noise


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) that can draw from a generator of its own.

    torch.nn.Dropout knows only the global one, which neither a seed of ours nor a checkpoint
    covers. Masks are drawn on the generator's device, so a CPU generator gives the same ones
    everywhere.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.generator: torch.Generator | None = None  # the global one

    def forward(self, h: Tensor) -> Tensor:
        """h of any shape; unchanged in evaluation."""
        if not self.training or self.p == 0:
            return h
        where = h.device if self.generator is None else self.generator.device
        kept = torch.rand(h.shape, generator=self.generator, device=where) >= self.p
        return h * kept.to(h) / (1.0 - self.p)


class Codec(nn.Module):
    """Subclasses define `_encode`, `_decode` and `options`."""

    name: ClassVar[str]
    stored_name: ClassVar[str] = (
        ""  # in files, where it was another from the first; fingerprints depend on it
    )

    def __init__(self, coefficient_size: int, latent_size: int) -> None:
        super().__init__()
        self.coefficient_size, self.latent_size = coefficient_size, latent_size  # K, d
        self._reader: Callable[[], Mapping[str, Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: with the weights, read now."""
        self.materialise()
        return self.__dict__

    def encode(self, c: Array) -> Posterior:
        """c [B, K] -> posterior over z [B, d]."""
        c = as_batch(c, self.coefficient_size, "coefficients", "K")
        self.materialise()
        return self._encode(c)

    def decode(self, z: Array) -> Tensor:
        """z [B, d] -> c [B, K]."""
        z = as_batch(z, self.latent_size, "latents", "d")
        self.materialise()
        return self._decode(z)

    @property
    def config(self) -> dict[str, Any]:
        """Everything that `build_codec` needs to make this architecture again."""
        sizes = {"coefficient_size": self.coefficient_size, "latent_size": self.latent_size}
        return {"name": self.stored_name or self.name, **sizes, **self.options()}

    def options(self) -> dict[str, Any]:
        """What `config` holds beyond name and sizes."""
        return {}

    def adapt(self, singular_values: Tensor, weight: Tensor, beta: float) -> None:
        """Before training: fit fixed parts to the scales [K], the loss's weights [K] and beta."""

    def learn_from(self, c: Tensor) -> None:
        """Before training, after `adapt`: begin at what the training rows c [n, K] tell in closed form."""

    def draw_from(self, generator: torch.Generator | None) -> None:
        """Let everything random in training come from a generator (None: the global one again)."""
        for module in self.modules():
            if isinstance(module, Dropout):
                module.generator = generator

    def read_later(self, reader: Callable[[], Mapping[str, Tensor]]) -> None:
        """Leave the weights in their file until first use; the codec was built on meta."""
        self._reader = reader

    @torch.inference_mode(False)
    def materialise(self) -> None:
        """Read the weights now, if they are still in a file."""
        if self._reader is not None:
            reader, self._reader = self._reader, None
            self.load_state_dict(dict(reader()), strict=True, assign=True)
            self.requires_grad_(False).eval()

    def _encode(self, c: Tensor) -> Posterior:
        raise NotImplementedError

    def _decode(self, z: Tensor) -> Tensor:
        raise NotImplementedError
