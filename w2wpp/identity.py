"""Identities: one or many points of a space, as one value that can travel along a wire."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .arrays import Array, as_tensor, is_finite
from .errors import ConfigError, FormatError, ShapeError, SpaceMismatch
from .files.container import open_container, write_container

FORMAT = "w2wpp.identity"
MOST_STEPS = 100_000  # of a walk
LARGEST_PICTURE, MOST_PICTURES = 512, 64


class Decoder(Protocol):
    """What identities need of their space."""

    @property
    def name(self) -> str:
        """What the space is called, for messages."""

    @property
    def fingerprint(self) -> str:
        """Names the coordinates that an identity must have been made in."""

    def decode(self, z: Tensor, residual: Tensor | None = None) -> Tensor:
        """Latents z [B, d] and a residual [B, K] -> vectors [B, P]."""


@dataclass(frozen=True, eq=False)
class Identity:
    """Latents z [B, d] of one space, with an optional residual [B, K] in its coefficients.

    The vector is decode(z) plus the residual lifted; the residual reaches what the latents alone
    can't express.
    """

    z: Tensor
    space_fingerprint: str
    residual: Tensor | None = None
    provenance: Mapping[str, Any] = field(
        default_factory=dict
    )  # JSON: how it was made, from which seed or parents

    def __post_init__(self) -> None:
        object.__setattr__(self, "z", as_tensor(self.z, "latents [B, d]"))
        if self.residual is not None:
            object.__setattr__(self, "residual", as_tensor(self.residual, "a residual [B, K]"))
        if self.z.ndim != 2:
            raise ShapeError(f"An identity holds latents [B, d]. Got {list(self.z.shape)}.")
        r = self.residual
        if r is not None and (r.ndim != 2 or len(r) != len(self.z)):
            raise ShapeError(
                f"An identity of {len(self.z)} latents takes a residual [{len(self.z)}, K]. Got "
                f"{list(r.shape)}."
            )
        if not all(bool(torch.isfinite(t).all()) for t in (self.z, r) if t is not None):
            raise ShapeError(
                "The latents of an identity hold NaN or infinite numbers; its optimisation "
                "diverged."
            )

    def __len__(self) -> int:
        return len(self.z)

    def __repr__(self) -> str:
        residual = "" if self.residual is None else f", residual K={self.residual.shape[1]}"
        made = f", made by {self.provenance['made_by']}" if "made_by" in self.provenance else ""
        sizes = f"{len(self)} x d={self.z.shape[1]}{residual}"
        return f"Identity({sizes}, space {self.space_fingerprint[:8]}{made})"

    def __getitem__(self, index: int | slice | Sequence[int] | Array) -> Identity:
        """Some of the identities, still as a batch: by number, slice, list of numbers or mask of B flags.

        Provenance keeps the row numbers. Raises IndexError beyond the end, ShapeError for an index of another kind.
        """
        rows = _rows(index, len(self))
        before = self._rows()
        provenance = {**self.provenance, "rows": [before[i] for i in rows]}
        residual = None if self.residual is None else self.residual[rows]
        return Identity(self.z[rows], self.space_fingerprint, residual, provenance)

    def _rows(self) -> Sequence[int]:
        """Where each row stood in what was made first."""
        rows = self.provenance.get("rows")
        return rows if isinstance(rows, list) and len(rows) == len(self) else range(len(self))

    def __iter__(self) -> Iterator[Identity]:
        return (self[i] for i in range(len(self)))

    def vectors(self, space: Decoder) -> Tensor:
        """The LoRA vectors [B, P]; refuses any space but the one it was made in."""
        require_same_space(self.space_fingerprint, space.fingerprint, space.name)
        w = space.decode(self.z, self.residual)
        if not is_finite(w):
            raise ConfigError(
                "The weights of this identity are NaN or infinite: it lies too far from the people of "
                "its space. Edit or exaggerate it less."
            )
        return w


def concat(identities: Sequence[Identity]) -> Identity:
    """Several identities of one space as one.

    Raises ConfigError for an empty list, SpaceMismatch for identities of several spaces, ShapeError for residuals of
    several sizes.
    """
    if not identities:
        raise ConfigError("There is nothing to concatenate: the list of identities is empty.")
    first = identities[0]
    for other in identities[1:]:
        require_same_space(first.space_fingerprint, other.space_fingerprint)
    z = torch.cat([i.z for i in identities])
    parents = {"made_by": "concat", "parents": [dict(i.provenance) for i in identities]}
    return Identity(z, first.space_fingerprint, _stack_residuals(identities), parents)


def interpolate(
    a: Identity,
    b: Identity,
    *,
    steps: int | None = None,
    positions: Sequence[float] | Array | None = None,
    mode: str = "slerp",
) -> Identity:
    """Points between two identities, a at 0 and b at 1.

    `steps` spreads that many over [0, 1]; `positions` names them, and those outside of [0, 1]
    extrapolate. slerp follows the great circle, which keeps latents at the length that the prior
    gives them (Shoemake 1985); lerp is the straight line. A residual is always interpolated along
    the line.

    Raises ConfigError for an unknown mode or bad positions, ShapeError where an end is not one person, SpaceMismatch
    for ends of two spaces.
    """
    if mode not in ("slerp", "lerp"):
        raise ConfigError(f"The mode of an interpolation is 'slerp' or 'lerp'. Got {mode!r}.")
    if len(a) != 1 or len(b) != 1:
        raise ShapeError(
            f"Interpolation takes one identity at each end. Got {len(a)} and {len(b)}."
        )
    require_same_space(a.space_fingerprint, b.space_fingerprint)
    t = _positions(steps, positions)
    path = _slerp if mode == "slerp" else _lerp
    z = path(a.z.double(), b.z.double(), t).float()
    residual = None
    if a.residual is not None or b.residual is not None:
        ends = _stack_residuals([a, b])
        assert ends is not None
        residual = _lerp(ends[:1].double(), ends[1:].double(), t).float()
    parents = [dict(a.provenance), dict(b.provenance)]
    how = {
        "made_by": "interpolate",
        "mode": mode,
        "positions": t.flatten().tolist(),
        "parents": parents,
    }
    return Identity(z, a.space_fingerprint, residual, how)


def save_identity(
    identity: Identity,
    path: str | os.PathLike[str],
    pictures: Tensor | None = None,
    *,
    new: bool = False,
) -> None:
    """Write an identity; with pictures [n, H, W, 3] of bytes of what it looks like. With `new` only if no file has
    the name (else FileExistsError).

    Raises ShapeError for pictures of another kind.
    """
    tensors = {"z": identity.z.float()}
    if pictures is not None:
        if pictures.ndim != 4 or pictures.shape[-1] != 3 or pictures.dtype != torch.uint8:
            raise ShapeError(
                f"Pictures of an identity are [n, H, W, 3] of bytes. Got {list(pictures.shape)} "
                f"{pictures.dtype}."
            )
        tensors["pictures"] = pictures
    if identity.residual is not None:
        tensors["residual"] = identity.residual.float()
    config = {
        "space_fingerprint": identity.space_fingerprint,
        "provenance": without_names(identity.provenance),
    }
    write_container(path, tensors, format=FORMAT, config=config, new=new)


def load_identity(path: str | os.PathLike[str]) -> Identity:
    """Read an identity file. Raises FormatError for any other, or one of a version that is not known here."""
    with open_container(path, FORMAT) as file:
        fingerprint = file.config.get("space_fingerprint")
        provenance = file.config.get("provenance", {})
        if not isinstance(fingerprint, str) or not isinstance(provenance, dict):
            raise FormatError(f"{path}: the identity does not say which space it belongs to.")
        rows, size = file.require("z", (None, None), torch.float32).shape
        if rows < 1 or size < 1:
            raise FormatError(f"{path}: there is nobody in this identity file.")
        residual = None
        if "residual" in file:
            file.require("residual", (rows, None), torch.float32)
            residual = file.read("residual")
        return Identity(file.read("z"), fingerprint, residual, provenance)


def load_pictures(path: str | os.PathLike[str]) -> Tensor | None:
    """The pictures [n, H, W, 3] in an identity file, as bytes; None if it has none.

    Raises FormatError for pictures that `save_identity` would not have written.
    """
    with open_container(path, FORMAT) as file:
        if "pictures" not in file:
            return None
        shape = file.require("pictures", (None, None, None, 3), torch.uint8).shape
        if 0 in shape or max(shape[1:3]) > LARGEST_PICTURE or shape[0] > MOST_PICTURES:
            raise FormatError(
                f"{path}: pictures of the size {list(shape)} are not what w2wpp saves: 1 to {MOST_PICTURES} of at most "
                f"{LARGEST_PICTURE} x {LARGEST_PICTURE} pixels. Save the identity again."
            )
        return file.read("pictures")


def require_same_space(identity: str, space: str, name: str = "") -> None:
    """Raise SpaceMismatch if an identity's fingerprint is not the space's."""
    if identity != space:
        which = (
            f"the space '{name}' ({space[:8]})" if name else f"one made in the space {space[:8]}"
        )
        raise SpaceMismatch(
            f"This identity was made in the space {identity[:8]} and can't be used with {which}: "
            "the same numbers mean another face there. Load the space that it was made in."
        )


def _rows(index: Any, count: int) -> list[int]:
    """Row numbers from 0 of whatever an identity of `count` rows was indexed by."""
    if isinstance(index, slice):
        return list(range(count))[index]
    wanted = index.tolist() if isinstance(index, Tensor | np.ndarray) else index
    wanted = (
        list(wanted) if isinstance(wanted, Sequence) and not isinstance(wanted, str) else [wanted]
    )
    if wanted and all(isinstance(i, bool) for i in wanted):
        if len(wanted) != count:
            raise IndexError(f"A mask for {count} identities has {count} flags. Got {len(wanted)}.")
        return [i for i, chosen in enumerate(wanted) if chosen]
    if not all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in wanted):
        raise ShapeError(
            "Identities are picked by a number, a slice, a list of numbers or a mask of flags, in one dimension. Got "
            f"{index!r}."
        )
    outside = [i for i in wanted if not -count <= i < count]
    if outside:
        raise IndexError(f"There are {count} identities, numbered from 0. Got {outside[0]}.")
    return [int(i) % count for i in wanted]


def _positions(steps: int | None, positions: Sequence[float] | Array | None) -> Tensor:
    """[T, 1] in double precision."""
    if (steps is None) == (positions is None):
        raise ConfigError("Interpolation takes either steps or positions.")
    if steps is not None:
        if not 1 <= steps <= MOST_STEPS:
            raise ConfigError(
                f"Interpolation needs at least one step and takes at most {MOST_STEPS:,}. Got {steps}."
            )
        return torch.linspace(0.0, 1.0, steps, dtype=torch.float64)[:, None]
    try:
        t = torch.as_tensor(positions, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        t = torch.empty(0)
    if t.ndim != 1 or len(t) == 0 or not bool(torch.isfinite(t).all()):
        raise ConfigError(f"Interpolation needs a list of finite positions. Got {positions}.")
    return t[:, None]


def _lerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    return (1.0 - t) * a + t * b


def _slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """a, b [1, d], t [T, 1] -> [T, d]; lengths are blended as well, because latents are not of unit length."""
    lengths = a.norm() * b.norm()
    angle = (
        torch.acos(((a * b).sum() / lengths).clamp(-1.0, 1.0)) if lengths > 0 else torch.zeros(())
    )
    # Parallel ends have no circle to follow and opposite ones have too many; both go straight.
    if torch.sin(angle) < 1e-6:
        return _lerp(a, b, t)
    return (torch.sin((1.0 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def _stack_residuals(identities: Sequence[Identity]) -> Tensor | None:
    """[sum B, K], zero where an identity has none; None if none has one."""
    sizes = {i.residual.shape[1] for i in identities if i.residual is not None}
    if not sizes:
        return None
    if len(sizes) > 1:
        raise ShapeError(f"Residuals of one space have one size. Got {sorted(sizes)}.")
    width = sizes.pop()
    return torch.cat(
        [i.z.new_zeros(len(i), width) if i.residual is None else i.residual for i in identities]
    )


def without_names(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The same without names of LoRA files, which may be people's: older files list them, parents too."""
    facts = dict(provenance)
    if isinstance(facts.get("files"), (list, tuple)):
        facts["files"] = len(facts["files"])
    if isinstance(facts.get("parents"), (list, tuple)):
        parents = facts["parents"]
        facts["parents"] = [without_names(p) if isinstance(p, Mapping) else p for p in parents]
    return facts
