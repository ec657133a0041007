"""LoRAs from anywhere into a space: rank and gauge are the space's, and a report says what was lost."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .basis import Basis
from .delta_basis import DeltaBasis
from .encode_delta import DeltaReport, encode_update
from .errors import DataError
from .identity import Identity
from .lora.files import LoraFile, load_lora, lora_of_tensors
from .lora.gauge import towards, towards_span
from .lora.layout import Layout, Lora
from .lora.match import Base, Match, match_modules
from .lora.products import Product
from .noise import standard_normal
from .space import Space

AnyLora = str | os.PathLike[str] | LoraFile | Mapping[str, Tensor]
SAME = 0.1  # share of a vector's length by which its gauge may differ from the file's own and count as kept
ALTERNATIONS = 10  # of decoding and turning towards what was decoded, in spaces without a basis
NOTHING = 0.02  # share of the length of a usual update below which there is nobody to find
ROUNDING = 1e-6  # of single precision, as a share of a vector's length


@dataclass(frozen=True)
class EncodeReport:
    """What became of a LoRA on its way into a space."""

    update_error: float  # |Delta' - Delta| / |Delta|, Frobenius norms over the layout's modules
    rank_energy_lost: float  # share of |Delta|^2 that the layout's rank can't hold
    weight_r2: float  # share of the standardised distance from the mean LoRA that is reconstructed
    gauge: str  # "kept" or "resolved"
    ignored_modules: tuple[str, ...]  # the LoRA's modules that the layout does not have
    missing_modules: tuple[str, ...]  # the layout's that the LoRA does not have: taken as no update
    unread_tensors: tuple[str, ...]  # of other kinds: text encoder, biases, norms
    kinds: Mapping[str, int] = field(default_factory=dict)  # modules by kind: LoRA, LoHa, ...
    remarks: tuple[str, ...] = ()  # what had to be assumed

    def to_json(self) -> dict[str, Any]:
        """The same as JSON, rounded for reading."""
        return {
            "update_error": round(self.update_error, 6),
            "rank_energy_lost": round(self.rank_energy_lost, 6),
            "weight_r2": round(self.weight_r2, 4),
            "gauge": self.gauge,
            "ignored_modules": list(self.ignored_modules),
            "missing_modules": list(self.missing_modules),
            "unread_tensors": list(self.unread_tensors),
            "kinds": dict(self.kinds),
            "remarks": list(self.remarks),
        }

    def __str__(self) -> str:
        text = f"reconstruction error of the update {self.update_error:.1%}"
        if self.rank_energy_lost > 5e-4:
            text += f", {self.rank_energy_lost:.1%} of its energy lost to the rank"
        others = {kind: n for kind, n in self.kinds.items() if kind != "LoRA"}
        for kind, count in others.items():
            text += f", {count} modules of the kind {kind} brought in through their product"
        for count, what in (
            (len(self.ignored_modules), "modules outside of the space ignored"),
            (len(self.missing_modules), "modules missing, taken as unchanged"),
            (len(self.unread_tensors), "tensors of other kinds not read"),
        ):
            text += f", {count} {what}" if count else ""
        return "; ".join([text, *self.remarks])


@torch.no_grad()
def encode_lora(
    space: Space,
    lora: AnyLora,
    *,
    residual: bool = False,
    base: Base | None = None,
    assume_family: bool = False,
) -> tuple[Identity, EncodeReport | DeltaReport]:
    """The identity of a LoRA, given as a file's path, as read by `load_lora` or as {key: tensor}.

    Any rank, alpha, spelling, kind and gauge. With `residual` the identity also keeps what its
    latents can't express of the coefficients. `base` gives the base model's weight [out, in] of a
    module by its name, which DoRA needs. A LoRA that does not tell the family of its base model is
    refused unless `assume_family` says that it is the space's.
    """
    if isinstance(space.basis, DeltaBasis):
        return encode_update(space, lora, residual=residual)
    file = read_any(lora, space.layout)
    match = match_modules(file, space.layout, base=base, assume_family=assume_family)
    _require_update(space, file, match)
    w, energy_lost, gauge = _space_vector(space, match)
    z = space.encode(w[None]).mean
    rest = None
    if residual:
        rest = space.residual(space.basis.project(w[None]), z)
    identity = Identity(z, space.fingerprint, rest, {"made_by": "encode"})
    decoded = space.decode(z, rest)[0]
    report = EncodeReport(
        match.error(decoded),
        energy_lost,
        weight_share(space, w, decoded),
        gauge,
        match.ignored,
        match.missing,
        file.unread,
        file.kinds,
        file.remarks,
    )
    return identity, report


def read_any(lora: AnyLora, layout: Layout | None = None) -> LoraFile:
    """A LoRA in any form as read; the layout tells how its base model counts blocks in LDM names."""
    if isinstance(lora, LoraFile):
        return lora
    layers = None if layout is None else layout.layers
    if isinstance(lora, Mapping):
        return lora_of_tensors(lora, layers=layers)
    return load_lora(lora, layers=layers)


def weight_share(space: Space, w: Tensor, reconstruction: Tensor) -> float:
    """The share of the standardised distance of w [P] from the mean LoRA that is reconstructed.

    1 for the mean LoRA itself.
    """
    mean = space.lift(torch.zeros(1, space.basis.n_components))[0]
    missed = float(space.basis.standardise(w - reconstruction).square().sum())
    distance = float(space.basis.standardise(w - mean).square().sum())
    least = ROUNDING * float(space.basis.standardise(w).square().sum())
    return 1.0 - missed / max(distance, least, 1e-30)


@torch.no_grad()
def vector_in(space: Space, file: LoraFile, *, assume_family: bool = False) -> tuple[Tensor, Match]:
    """The LoRA's vector w [P] in the layout's rank and the space's gauge, and what it met there."""
    match = match_modules(file, space.layout, assume_family=assume_family)
    return _space_vector(space, match)[0], match


def _require_update(space: Space, file: LoraFile, match: Match) -> None:
    """Refuse a LoRA that changes next to nothing: the nearest person to it would be somebody all the same."""
    size = match.square() ** 0.5
    usual, mean = _usual_size(space)
    if size == 0 or (size < NOTHING * usual and size < 0.5 * mean):
        raise DataError(
            f"{file.name} changes next to nothing: the length of its update is {size:.3g}, that of "
            f"people in the space '{space.name}' about {usual:.3g}. There is nothing to encode; was it "
            "trained, and with what learning rate?"
        )


def _usual_size(space: Space) -> tuple[float, float]:
    """|Delta| of a usual person of a space (the median of a few), and of the mean LoRA."""
    z = standard_normal(3, space.latent_size, generator=torch.Generator().manual_seed(0))
    vectors = space.decode(torch.cat([z, torch.zeros(1, space.latent_size)]))
    sizes = [_size(space.layout, w) for w in vectors]
    return sorted(sizes[:3])[1], sizes[3]


def _size(layout: Layout, w: Tensor) -> float:
    pairs = layout.unpack(w).values()
    return layout.scale * sum(Product(a, b).square() for a, b in pairs) ** 0.5


def _space_vector(space: Space, match: Match) -> tuple[Tensor, float, str]:
    """The vector [P], the energy lost to the rank, and what became of the gauge."""
    balanced, lost = match.balanced()
    own = match.own()
    if isinstance(space.basis, Basis):
        w = towards_span(balanced, space.layout, space.basis, own)
    else:
        w = _towards_codec(space, balanced)
    kept = own is not None and float((own - w).norm()) <= SAME * float(own.norm())
    return w, lost, "kept" if kept else "resolved"


def _towards_codec(space: Space, balanced: Lora) -> Tensor:
    """For spaces of raw vectors, which have no mean and no span: towards the LoRA of latent zero,
    then towards what the codec makes of it, as long as that comes nearer."""
    best, target = None, space.decode(torch.zeros(1, space.latent_size))[0]
    least = float("inf")
    for _ in range(ALTERNATIONS):
        w = towards(balanced, space.layout, target)
        target = space.decode(space.encode(w[None]).mean)[0]
        missed = float((target - w).double().square().sum())
        if not missed < least:
            break
        best, least = w, missed
    assert best is not None
    return best
