"""LoRAs from anywhere into a space: rank and gauge are the space's, and a report says what was lost."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .basis import Basis
from .delta_basis import DeltaBasis
from .encode_delta import DeltaReport, encode_update
from .errors import FormatError, LayoutMismatch
from .identity import Identity
from .lora.files import LoraFile, load_lora, lora_of_tensors
from .lora.gauge import factor, towards, towards_span
from .lora.layout import Layout, Lora
from .space import Space

AnyLora = str | os.PathLike[str] | LoraFile | Mapping[str, Tensor]
SAME = 0.1  # share of a vector's length by which its gauge may differ from the file's own and count as kept
ALTERNATIONS = 10  # of decoding and turning towards what was decoded, in spaces without a basis


@dataclass(frozen=True)
class EncodeReport:
    """What became of a LoRA on its way into a space."""

    update_error: float  # |Delta' - Delta| / |Delta|, Frobenius norms over the layout's modules
    rank_energy_lost: float  # share of |Delta|^2 that the layout's rank can't hold
    weight_r2: float  # share of the standardised distance from the mean LoRA that is reconstructed
    gauge: str  # "kept" or "resolved"
    ignored_modules: tuple[str, ...]  # the LoRA's modules that the layout does not have
    missing_modules: tuple[str, ...]  # the layout's that the LoRA does not have: taken as no update
    unread_tensors: tuple[str, ...]  # of other kinds: text encoder, convolutions, ...

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
        }

    def __str__(self) -> str:
        text = f"reconstruction error of the update {self.update_error:.1%}"
        if self.rank_energy_lost > 5e-4:
            text += f", {self.rank_energy_lost:.1%} of its energy lost to the rank"
        for count, what in (
            (len(self.ignored_modules), "modules outside of the space ignored"),
            (len(self.missing_modules), "modules missing, taken as unchanged"),
            (len(self.unread_tensors), "tensors of other kinds not read"),
        ):
            text += f", {count} {what}" if count else ""
        return text


@torch.no_grad()
def encode_lora(
    space: Space, lora: AnyLora, *, residual: bool = False
) -> tuple[Identity, EncodeReport | DeltaReport]:
    """The identity of a LoRA, given as a file's path, as read by `load_lora` or as {key: tensor}.

    Any rank, alpha, spelling and gauge. With `residual` the identity also keeps what its latents
    can't express of the coefficients.
    """
    if isinstance(space.basis, DeltaBasis):
        named = adapter_file(lora) if isinstance(lora, (str, os.PathLike)) else lora
        return encode_update(space, named, residual=residual)
    file = read_any(lora)
    matched, ignored, missing = match_modules(file, space.layout)
    w, energy_lost, gauge = _space_vector(space, matched, missing)
    z = space.encode(w[None]).mean
    rest = None
    if residual:
        rest = space.residual(space.basis.project(w[None]), z)
    how: dict[str, Any] = {"made_by": "encode"}
    if file.path:
        how["files"] = [Path(file.path).name]
    identity = Identity(z, space.fingerprint, rest, how)
    decoded = space.decode(z, rest)
    error = update_error(matched, space.layout.unpack(decoded[0]), space.layout)
    r2 = weight_share(space, w, decoded[0])
    report = EncodeReport(error, energy_lost, r2, gauge, ignored, missing, file.unread)
    return identity, report


def read_any(lora: AnyLora) -> LoraFile:
    """A LoRA given in any of the ways that `encode_lora` takes."""
    if isinstance(lora, LoraFile):
        return lora
    return lora_of_tensors(lora) if isinstance(lora, Mapping) else load_lora(adapter_file(lora))


def adapter_file(path: str | os.PathLike[str]) -> Path:
    """A LoRA file itself, or the one in a folder that diffusers or PEFT exported."""
    path = Path(path)
    if not path.is_dir():
        return path
    names = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
    for found in (path / part / name for part in ("", "unet") for name in names):
        if found.is_file():
            return found
    raise FormatError(f"{path} holds none of {', '.join(names)}, nor does its folder unet.")


def match_modules(file: LoraFile, layout: Layout) -> tuple[Lora, tuple[str, ...], tuple[str, ...]]:
    """The LoRA's part in the layout with B scaled for it [out, R], the names outside, the names missing."""
    matched = {}
    for module in layout.modules:
        if module.name not in file.lora:
            continue
        a, b = file.lora[module.name]
        if (a.shape[1], b.shape[0]) != (module.in_features, module.out_features):
            raise LayoutMismatch(
                f"{file.path or 'This LoRA'}: {module.name} maps {a.shape[1]} to {b.shape[0]} numbers, the layout "
                f"'{layout.name}' expects {module.in_features} to {module.out_features}. It was trained on another "
                "base model; use one of the same family."
            )
        matched[module.name] = file.scaled(module.name, layout)
    if not matched:
        raise LayoutMismatch(
            f"{file.path or 'This LoRA'} has none of the {len(layout.modules)} modules of the layout "
            f"'{layout.name}' (its first: {next(iter(file.lora))}). Use a LoRA for {layout.base_model}."
        )
    ignored = tuple(sorted(file.lora.keys() - matched.keys()))
    missing = tuple(m.name for m in layout.modules if m.name not in matched)
    return matched, ignored, missing


def at_rank(matched: Lora, layout: Layout) -> tuple[Lora, float]:
    """Balanced factors of the layout's rank for every module, and the share of |Delta|^2 lost."""
    lora, lost, total = {}, 0.0, 0.0
    for module in layout.modules:
        if module.name in matched:
            a, b = matched[module.name]
            new_a, new_b, missed = factor(a, b, layout.rank)
            total += square_norm(a, b)
            lost += missed
        else:
            new_a = torch.zeros(layout.rank, module.in_features, dtype=torch.float64)
            new_b = torch.zeros(module.out_features, layout.rank, dtype=torch.float64)
        lora[module.name] = (new_a, new_b)
    return lora, lost / total if total > 0 else 0.0


def square_norm(a: Tensor, b: Tensor) -> float:
    """|b a|^2 from the Gram matrices of the thin factors."""
    a, b = a.double(), b.double()
    return max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))


def update_error(matched: Lora, decoded: Lora, layout: Layout) -> float:
    """|Delta' - Delta| / |Delta| over all modules of the layout; a missing module's Delta is zero."""
    missed = total = 0.0
    for module in layout.modules:
        a1, b1 = (t.double() for t in decoded[module.name])
        if module.name in matched:
            a, b = (t.double() for t in matched[module.name])
            total += square_norm(a, b)
            missed += square_norm(torch.cat([a, a1]), torch.cat([b, -b1], dim=1))
        else:
            missed += square_norm(a1, b1)
    return (missed / total) ** 0.5 if total > 0 else 0.0


def weight_share(space: Space, w: Tensor, reconstruction: Tensor) -> float:
    """The share of the standardised distance of w [P] from the mean LoRA that is reconstructed."""
    mean = space.basis.mean  # type: ignore[union-attr]  # encode_lora sends delta bases elsewhere
    missed = space.basis.standardise(w - reconstruction).square().sum()
    return float(1.0 - missed / space.basis.standardise(w - mean).square().sum())


@torch.no_grad()
def vector_in(space: Space, file: LoraFile) -> Tensor:
    """The LoRA's vector w [P] in the layout's rank and the space's gauge."""
    matched, _, missing = match_modules(file, space.layout)
    return _space_vector(space, matched, missing)[0]


def aligned(file: LoraFile, layout: Layout, reference: Tensor | None) -> Tensor:
    """The LoRA's vector w [P] in the layout's rank, turned towards a reference [P]; without one, as it is."""
    matched, _, missing = match_modules(file, layout)
    balanced, _ = at_rank(matched, layout)
    if reference is None:
        own = _own_vector(layout, matched, missing)
        return own if own is not None else layout.pack(balanced).float()
    return towards(balanced, layout, reference)


def _space_vector(
    space: Space, matched: Lora, missing: tuple[str, ...]
) -> tuple[Tensor, float, str]:
    """The vector [P], the energy lost to the rank, and what became of the gauge."""
    layout = space.layout
    balanced, lost = at_rank(matched, layout)
    own = _own_vector(layout, matched, missing)
    if isinstance(space.basis, Basis):
        w = towards_span(balanced, layout, space.basis, own)
    else:
        w = _towards_codec(space, balanced)
    kept = own is not None and float((own - w).norm()) <= SAME * float(own.norm())
    return w, lost, "kept" if kept else "resolved"


def _own_vector(layout: Layout, matched: Lora, missing: tuple[str, ...]) -> Tensor | None:
    """The LoRA packed as it is, if it is of the layout's rank and complete."""
    whole = all(a.shape[0] == layout.rank and bool(a.any()) for a, _ in matched.values())
    if missing or not whole:
        return None
    return layout.pack(matched)


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
