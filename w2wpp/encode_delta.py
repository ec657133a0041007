"""LoRAs into a space of updates: inner products with its members, and what the space can't express.

Nothing has to be aligned or cut: any rank, alpha, spelling and gauge, whatever modules there are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .delta_basis import DeltaBasis, Products
from .errors import ConfigError, DataError, FormatError, LayoutMismatch
from .identity import Identity
from .lora.delta import Factors, square_norm
from .lora.families import Shape, of_text_encoders
from .lora.files import LoraFile
from .lora.layout import Layout
from .lora.members import (
    Member,
    fitted,
    member_of_tensors,
    open_member,
    read_fitted,
    source_of,
)
from .lora.source import InMemory
from .space import Space


@dataclass(frozen=True)
class DeltaReport:
    """How much of a LoRA a space of updates explains, as shares of |dW|^2."""

    explained: float  # by the identity that was found
    mean_share: float  # by the mean LoRA alone, at its best strength
    by_block: Mapping[str, float]  # explained, block by block of the model
    weight_r2: float  # share of the squared distance from the mean LoRA that is reconstructed
    outside: float  # share of |dW|^2 in modules that no member has
    ignored_modules: tuple[str, ...]
    missing_modules: tuple[str, ...]  # the space's that the LoRA does not have: taken as no update
    text_encoder_modules: int  # left out; of a space of text encoders, the modules of the model
    unread_tensors: tuple[str, ...]
    gauge: str = "none needed"
    of_texts: bool = False  # whether the space is of text encoders

    @property
    def update_error(self) -> float:
        """|Delta' - Delta| / |Delta| over the space's modules."""
        return max(0.0, 1.0 - self.explained) ** 0.5

    def to_json(self) -> dict[str, Any]:
        """The same as JSON, rounded for reading."""
        return {
            "explained": round(self.explained, 6),
            "mean_lora_share": round(self.mean_share, 6),
            "by_block": {block: round(share, 4) for block, share in self.by_block.items()},
            "update_error": round(self.update_error, 6),
            "weight_r2": round(self.weight_r2, 4),
            "outside": round(self.outside, 6),
            "ignored_modules": list(self.ignored_modules),
            "missing_modules": list(self.missing_modules),
            "text_encoder_modules": self.text_encoder_modules,
            "unread_tensors": list(self.unread_tensors),
        }

    def __str__(self) -> str:
        text = f"the space explains {self.explained:.1%} of the update, its mean LoRA alone {self.mean_share:.1%}"
        if self.ignored_modules:
            text += (
                f", {len(self.ignored_modules)} modules outside of the space ignored ({self.outside:.1%} of the "
                "whole update)"
            )
        if self.missing_modules:
            text += f", {len(self.missing_modules)} modules missing, taken as unchanged"
        if self.text_encoder_modules:
            whose = "the diffusion model" if self.of_texts else "text encoders"
            text += f", {self.text_encoder_modules} modules of {whose} left out"
        return text + f"; error of the update {self.update_error:.1%}"


def encode_update(
    space: Space,
    lora: str | os.PathLike[str] | LoraFile | Mapping[str, Tensor] | Member,
    *,
    residual: bool = False,
) -> tuple[Identity, DeltaReport]:
    """The identity of a LoRA in a space of collected LoRAs, and how much of it that is.

    Raises LayoutMismatch for a LoRA that shares no module with the space, DataError for an update of zero.
    """
    basis = space.basis
    assert isinstance(basis, DeltaBasis)
    texts = of_text_encoders(m.name for m in space.layout.modules)
    member = as_member(lora, text_encoders=texts)
    shapes = layout_shapes(space.layout)
    member, found, rest = fitted(member, shapes)
    if not found:
        raise LayoutMismatch(
            f"{member.name} has none of the {len(shapes)} modules of the space '{space.name}' (its first: "
            f"{next(iter(member.modules))}). It is for {member.family}; the space is for {space.base_model}."
        )
    names = list(shapes)

    def read(i: int) -> Factors | None:
        name = names[i]
        return read_fitted(member, name, shapes[name], found[name]) if name in found else None

    products = basis.products(read)
    if not products.square_norm > 0:
        raise DataError(f"{member.name}: its update is zero, there is nothing to encode.")
    c = basis.coefficients(products.total[None]).float()
    z = space.latent_of(space.codec.encode(c).mean)
    decoded = space.codec.decode(space.codec_latent(z))
    rest_c = c - decoded if residual else None
    identity = Identity(z, space.fingerprint, rest_c, {"made_by": "encode"})
    reached = decoded if rest_c is None else decoded + rest_c
    missing = tuple(n for n in names if n not in found)
    return identity, _report(basis, products, reached, member, rest, missing)


def as_member(
    lora: str | os.PathLike[str] | LoraFile | Mapping[str, Tensor] | Member,
    *,
    text_encoders: bool = False,
) -> Member:
    """A LoRA in any form (file, {key: tensor}, member) as a member of a collection, of models or of text encoders.

    Raises ConfigError for the text encoders of a LoRA that was read without them.
    """
    if isinstance(lora, Member):
        return lora
    if isinstance(lora, LoraFile):
        if text_encoders:
            raise ConfigError(
                f"{lora.name} was read without its text encoders, and the space is of these. Give its path."
            )
        return _member_of_file(lora)
    if isinstance(lora, Mapping):
        return member_of_tensors(lora, text_encoders=text_encoders)
    return open_member(lora, text_encoders=text_encoders)


def layout_shapes(layout: Layout) -> dict[str, Shape]:
    """{module: shape} of a layout."""
    return {m.name: Shape(m.in_features, m.out_features) for m in layout.modules}


def _member_of_file(file: LoraFile) -> Member:
    dora = next((n for n, u in file.updates.items() if u.needs_base), None)
    if dora is not None:
        raise FormatError(
            f"{file.name}: {dora} is trained with DoRA: how it changes a weight depends on the base model's. Merge it "
            "into that model and extract a plain LoRA, or leave it out."
        )
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in file.lora.items():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
        tensors[f"{name}.alpha"] = torch.tensor(float(file.alphas[name]), dtype=torch.float64)
    others = {n: source_of(u.kind, u.parts) for n, u in file.updates.items() if not u.is_plain}
    name = Path(file.path).stem if file.path else "this LoRA"
    if not tensors:
        return Member(name, InMemory(Path(name), {}), others)
    member = member_of_tensors(tensors, name)
    return replace(member, modules={**member.modules, **others})


def _report(
    basis: DeltaBasis,
    products: Products,
    c: Tensor,
    member: Member,
    rest: list[str],
    missing: tuple[str, ...],
) -> DeltaReport:
    a, p = basis.shares(c)[0], basis.weights
    grams = basis.grams
    by_block = {}
    for block, with_members in products.with_members.items():
        own = products.own[block]
        if own > 0:
            g = grams.blocks[block].double()
            by_block[block] = 1.0 - float(own - 2 * a @ with_members + a @ g @ a) / own
    own, total, gram = products.square_norm, products.total, grams.total
    missed = max(0.0, float(own - 2 * a @ total + a @ gram @ a))
    distance = float(own - 2 * p @ total + p @ gram @ p)
    along, mean_norm = float(p @ total), float(p @ gram @ p)
    beyond = sum(_square(member, name) for name in rest)
    return DeltaReport(
        explained=1.0 - missed / own,
        mean_share=along**2 / (own * mean_norm) if mean_norm > 0 else 0.0,
        by_block=by_block,
        weight_r2=1.0 - missed / distance if distance > 1e-12 * own else 1.0,
        outside=beyond / (beyond + own),
        ignored_modules=tuple(sorted(rest)),
        missing_modules=missing,
        text_encoder_modules=member.apart,
        unread_tensors=member.unread,
        of_texts=of_text_encoders(m.name for m in basis.layout.modules),
    )


def _square(member: Member, name: str) -> float:
    f = member.read(name)
    return 0.0 if f is None else square_norm(f)
