"""A space: everything between a latent and a LoRA, as one immutable value."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .arrays import Array, as_batch, is_finite
from .basis import AnyBasis
from .codecs import Codec, Posterior
from .delta_basis import DeltaBasis
from .errors import ConfigError, DataError, ShapeError
from .files.container import DTYPE_NAMES
from .flow import Flow
from .identity import Identity
from .lora.layout import Layout
from .noise import standard_normal
from .placement import Frame
from .start_network import StartNetwork

SpaceBasis = AnyBasis | DeltaBasis
MOST_NUMBERS = 2**28  # of latents in one identity: a gigabyte


@dataclass(frozen=True, eq=False)
class Space:
    """layout, basis and codec in a row. Latents leave it standardised: (codec latent - prior_mean)
    / prior_std.

    So every latent dimension has mean 0 and unit std over the training set, whatever the
    codec, and N(0, I) is the prior to sample from. A space with a flow sends standardised latents
    through it on the way out, and back on the way in: its latents are the flow's coordinates.
    """

    layout: Layout
    basis: SpaceBasis
    codec: Codec
    prior_mean: Tensor  # [d]
    prior_std: Tensor  # [d], positive
    provenance: Mapping[str, Any] = field(
        default_factory=dict
    )  # JSON: name, version, licence, trigger_prompt, ...
    directions: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # attribute directions [d], standardised latents
    start: StartNetwork | None = None  # picture -> latent, the amortised start of an inversion
    flow: Flow | None = None  # standardised latents <-> N(0, I) where people are no Gaussian cloud
    frame: Frame | None = None  # how its people were photographed, if that is known

    def __post_init__(self) -> None:
        if (self.layout.size, self.basis.n_components) != (
            self.basis.size,
            self.codec.coefficient_size,
        ):
            raise ShapeError(
                f"The parts of a space must fit together: layout P = {self.layout.size} and basis P = "
                f"{self.basis.size}, "
                f"basis K = {self.basis.n_components} and codec K = {self.codec.coefficient_size}."
            )
        d = (self.codec.latent_size,)
        vectors = {"prior_mean": self.prior_mean, "prior_std": self.prior_std, **self.directions}
        wrong = [f"{name} {list(t.shape)}" for name, t in vectors.items() if tuple(t.shape) != d]
        if wrong:
            raise ShapeError(
                f"The latents of this codec have {d[0]} dimensions. Got {', '.join(wrong)}."
            )
        if self.start is not None and self.start.latent_size != d[0]:
            raise ShapeError(
                f"The latents of this codec have {d[0]} dimensions, those of its start network "
                f"{self.start.latent_size}."
            )
        if self.flow is not None and self.flow.size != d[0]:
            raise ShapeError(
                f"The latents of this codec have {d[0]} dimensions, those of its flow {self.flow.size}."
            )
        odd = [name for name, t in vectors.items() if not bool(torch.isfinite(t).all())]
        if odd:
            raise ConfigError(
                f"These vectors of a space hold NaN or infinite numbers: {', '.join(odd)}."
            )
        if not bool((self.prior_std > 0).all()):
            raise ConfigError("The prior's standard deviations must be positive.")

    def __repr__(self) -> str:
        """One line: what it is called, what it is for, how large it is, what it can do."""
        extras = [f"{len(self.directions)} directions"] if self.directions else []
        extras += ["flow"] if self.flow is not None else []
        extras += ["start network"] if self.start is not None else []
        sizes = f"d={self.latent_size}, K={self.basis.n_components}, P={self.layout.size}"
        parts = [repr(self.name), f"for {self.base_model}", self.codec.name, sizes, *extras]
        return f"Space({', '.join(parts)})"

    @property
    def latent_size(self) -> int:
        """d."""
        return self.codec.latent_size

    @property
    def name(self) -> str:
        """As its file says, 'unnamed' otherwise."""
        return str(self.provenance.get("name", "unnamed"))

    @property
    def version(self) -> str:
        """As its file says, empty otherwise."""
        return str(self.provenance.get("version", ""))

    @property
    def licence(self) -> str:
        """As its file says, empty otherwise: then nothing is known of how it may be used."""
        return str(self.provenance.get("licence", ""))

    @property
    def base_model(self) -> str:
        """Family of the base model that its LoRAs fit: 'sd15', 'avatar', ..."""
        return self.layout.base_model

    @property
    def trigger_prompt(self) -> str:
        """Words that call up its people in a prompt, empty if there are none."""
        return str(self.provenance.get("trigger_prompt", ""))

    @property
    def training_report(self) -> Mapping[str, Any]:
        """What was measured when it was trained, as JSON."""
        report = self.provenance.get("training_report")
        return report if isinstance(report, Mapping) else {}

    @property
    def device(self) -> torch.device:
        """Where its tensors are; what is given to `encode` and `decode` is moved there."""
        return self.prior_mean.device

    def encode(self, w: Array) -> Posterior:
        """w [B, P], a tensor or numpy array of any precision -> posterior over standardised latents [B, d].

        Raises ShapeError for another shape and DataError for numbers that are not finite.
        """
        w = as_batch(w, self.layout.size, "vectors", "P").to(self.device)
        if not is_finite(w):
            raise DataError("The LoRA vectors to encode hold NaN or infinite numbers.")
        raw = self.codec.encode(self.basis.project(w))
        mean = (raw.mean - self.prior_mean) / self.prior_std
        logvar = raw.logvar - 2.0 * torch.log(self.prior_std)
        if self.flow is None:
            return Posterior(mean, logvar)
        mean, variance = self.flow.push(mean, logvar.exp())
        return Posterior(mean, variance.log())

    def latent_of(self, raw: Tensor) -> Tensor:
        """Latents of the codec [B, d] -> the space's latents z [B, d], in which N(0, I) is the prior."""
        z = (raw - self.prior_mean) / self.prior_std
        return z if self.flow is None else self.flow(z)

    def codec_latent(self, z: Tensor) -> Tensor:
        """The inverse of ``latent_of``: the space's latents z [B, d] -> latents of the codec [B, d]."""
        z = z.float() if self.flow is None else self.flow.inverse(z.float())
        return z * self.prior_std + self.prior_mean

    def decode(self, z: Array, residual: Array | None = None) -> Tensor:
        """Standardised latents z [B, d], and a residual [B, K] in coefficients -> w [B, P] in single precision.

        Both are tensors or numpy arrays of any precision. All rows go through in one pass. A row differs from the
        same row decoded alone, or in another batch, by the rounding of single precision: by no more than 1e-6 of its
        largest number. Raises ShapeError for another shape.
        """
        z = as_batch(z, self.latent_size, "latents", "d").to(self.device)
        if residual is not None:
            residual = as_batch(residual, self.basis.n_components, "a residual", "K")
            residual = residual.to(self.device).float()
        c = self.codec.decode(self.codec_latent(z))
        return self.basis.lift(c if residual is None else c + residual)

    def kept_energy(self, identity: Identity, w: Tensor) -> float | None:
        """Share of one identity's update that its vector w [1, P] keeps; None where a vector is all there is."""
        if not isinstance(self.basis, DeltaBasis):
            return None
        c = self.codec.decode(self.codec_latent(identity.z))
        c = c if identity.residual is None else c + identity.residual
        return float(self.basis.kept_energy(c, w)[0])

    def uncut(self) -> Space:
        """The same coordinates and fingerprint, decoded to LoRAs of a rank that loses nothing, where that is small.

        What an inversion moves along: of the spaces of collections, whose LoRAs are cut to a rank, only these decode
        without a decomposition in every step. Any other space is returned as it is.
        """
        basis = self.basis.uncut() if isinstance(self.basis, DeltaBasis) else None
        if basis is None:
            return self
        return replace(self, layout=basis.layout, basis=basis).known_as(self.fingerprint)

    def residual(self, c: Tensor, z: Tensor) -> Tensor:
        """What latents z [B, d] can't express of coefficients c [B, K], such that decode(z, residual) has them all."""
        return c - self.codec.decode(self.codec_latent(z))

    def lift(self, c: Array) -> Tensor:
        """Whitened coefficients c [B, K] -> w [B, P]."""
        c = as_batch(c, self.basis.n_components, "coefficients", "K")
        return self.basis.lift(c.to(self.device))

    def sample(self, n: int, *, generator: torch.Generator, truncation: float = 1.0) -> Identity:
        """n identities from N(0, I), scaled by the truncation. Same generator seed, same bits, on every machine.

        Raises ConfigError for n or a truncation out of range.
        """
        if not 1 <= n <= MOST_NUMBERS // self.latent_size:
            raise ConfigError(
                "Sampling draws at least one identity and at most "
                f"{MOST_NUMBERS // self.latent_size:,} of this space. Got {n}."
            )
        if not 0.0 <= truncation < float("inf"):
            raise ConfigError(
                f"Truncation must be zero or positive (usually 0 to 1). Got {truncation}."
            )
        seed = generator.initial_seed()
        z = standard_normal(n, self.latent_size, generator=generator) * truncation
        how = {"made_by": "sample", "seed": seed, "truncation": truncation, "space": self.name}
        return Identity(z, self.fingerprint, None, how)

    def start_from(self, pictures: Tensor) -> Identity:
        """What the start network makes of pictures [n, 3, H, W] in [-1, 1]: n identities.

        Raises ConfigError for a space without one.
        """
        if self.start is None:
            raise ConfigError(f"The space '{self.name}' has no start network.")
        with torch.no_grad():
            z = self.start(pictures.to(self.prior_mean)).float()
        return Identity(z, self.fingerprint, None, {"made_by": "start network", "space": self.name})

    @torch.inference_mode(False)  # as in spacefile
    def to(self, device: torch.device | str) -> Space:
        """The same space, with the same fingerprint, and its tensors on a device such as "cuda:0".

        Spaces compute in single precision wherever they are: coefficients reach over many orders of magnitude.
        Raises ConfigError for anything but a device.
        """
        device = as_device(device)
        self.codec.materialise()
        moved = replace(
            self,
            basis=self.basis.to(device),
            codec=copy.deepcopy(self.codec).to(device),
            prior_mean=self.prior_mean.to(device),
            prior_std=self.prior_std.to(device),
            directions={name: t.to(device) for name, t in self.directions.items()},
            start=None if self.start is None else copy.deepcopy(self.start).to(device),
            flow=None if self.flow is None else copy.deepcopy(self.flow).to(device),
        )
        return moved.known_as(self.fingerprint)

    def with_(self, **changes: Any) -> Space:
        """The same coordinates with another provenance, other directions, another start network or frame.

        The fingerprint stays, without reading any weights. Raises ConfigError for parts that coordinates depend on.
        """
        beside = ("provenance", "directions", "start", "frame")
        if wrong := sorted(changes.keys() - set(beside)):
            raise ConfigError(
                f"What can change in a space without making it another one is {', '.join(beside)}. Got {wrong[0]}."
            )
        other = replace(self, **changes)
        return other.known_as(self.fingerprint) if "fingerprint" in vars(self) else other

    def known_as(self, fingerprint: str) -> Space:
        """This space, with a fingerprint that was computed before; computing it would read every tensor."""
        vars(self)["fingerprint"] = fingerprint
        return self

    def tensors(self) -> dict[str, Tensor]:
        """What decides how latents become vectors, as files store it: half precision wherever that loses nothing."""
        self.codec.materialise()
        parts = {
            **{f"basis.{name}": t for name, t in self.basis.tensors().items()},
            **{f"codec.{name}": t for name, t in self.codec.state_dict().items()},
            "prior.mean": self.prior_mean,
            "prior.std": self.prior_std,
            **({} if self.flow is None else flow_tensors(self.flow)),
        }
        return {name: compact(t.detach().cpu()) for name, t in parts.items()}

    def architecture(self) -> dict[str, Any]:
        """The JSON beside these tensors."""
        return {
            "layout": self.layout.to_json(),
            "basis": self.basis.config(),
            "codec": self.codec.config,
            **({} if self.flow is None else {"flow": self.flow.config}),
        }

    @cached_property
    def fingerprint(self) -> str:
        """Names the coordinates, not the file: 32 hex digits over tensors and architecture, not over provenance."""
        tensors = sorted(self.tensors().items())
        return fingerprint_of(
            self.architecture(), ((n, t.dtype, t.shape, (t,)) for n, t in tensors)
        )


def as_device(device: torch.device | str) -> torch.device:
    """A device by its name, or a ConfigError that says what came instead."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as e:
        raise ConfigError(
            f"Expected a device such as 'cpu' or 'cuda:0'. Got {device!r}. (Spaces compute in single precision; "
            "convert what they return.)"
        ) from e


def flow_tensors(flow: Flow) -> dict[str, Tensor]:
    """A flow's tensors under the names that files give them."""
    return {f"prior.flow.{name}": t for name, t in flow.state_dict().items()}


def fingerprint_of(
    architecture: Mapping[str, Any],
    tensors: Iterable[tuple[str, torch.dtype, Sequence[int], Iterable[Tensor]]],
) -> str:
    """32 hex digits over an architecture and (name, type, shape, pieces) of tensors sorted by name."""
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    for name, dtype, shape, pieces in tensors:
        digest.update(f"{name} {DTYPE_NAMES[dtype]} {list(shape)};".encode())
        for t in pieces:
            digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def compact(t: Tensor) -> Tensor:
    """A tensor in half precision if every number survives it, unchanged otherwise."""
    t = t.contiguous()
    if t.dtype != torch.float32:
        return t
    half = t.half()
    return half if torch.equal(half.float(), t) else t
