"""Bases: between LoRA vectors [B, P] and whitened coefficients [B, K]."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .arrays import Array, as_batch
from .errors import ConfigError, FormatError, ShapeError
from .files.container import Container
from .lora.layout import Layout
from .weight_metric import BoundMetric, Metric, Plain, metric_from

# Half precision is for files: turning it to single costs more than reading it does. Components are kept in single
# precision up to this size, and turned block by block (small enough for a processor's cache) above it.
KEPT_BYTES = 512 * 2**20
BLOCK_BYTES = 2 * 2**20
FRAME_BATCH = 256  # rows that a pass over the components is worth when their frame is made
WEIGHTED = "weighted-pca"  # kind of a basis under another metric, which older releases must refuse


class Basis:
    """Principal components of standardised vectors: c = ((w - mean) / std) @ (G components^T) /
    singular_values.

    mean, std: P; components: K x P in half precision, orthonormal rows under the metric G;
    singular_values: K, the standard deviation of each coefficient over the training set. For w2w
    (Dravid et al. 2024) G is the identity. Under another metric the coefficients are the least
    squares fit of a vector by the components. A std
    may be negative, as in the published w2w files: its sign is part of the coordinates there and
    cancels on the way back. Where it is (nearly) zero the parameter never varied: it projects to
    nothing and lifts to its mean.

    Tensors may come from a `reader(name)`; it is asked once per tensor, on first use.
    """

    kind = "pca"

    def __init__(
        self,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        components: Tensor | None = None,
        singular_values: Tensor | None = None,
        *,
        metric: Metric | None = None,
        reader: Callable[[str], Tensor] | None = None,
        size: int = 0,
        n_components: int = 0,
    ) -> None:
        self._tensors: dict[str, Tensor] = {}
        self.metric: Metric = metric or Plain()
        self._bound: BoundMetric | None = None
        self._device: torch.device | None = None
        self._reader = reader
        self.size, self.n_components = size, n_components  # P, K
        if reader is not None:
            return
        if mean is None or std is None or components is None or singular_values is None:
            raise ConfigError(
                "A basis needs mean, std, components and singular_values, or a reader of them."
            )
        self.n_components, self.size = components.shape
        shapes = [list(t.shape) for t in (mean, std, singular_values)]
        if shapes != [[self.size], [self.size], [self.n_components]]:
            raise ShapeError(
                f"A basis with components {list(components.shape)} needs mean and std "
                f"[{self.size}] and singular values "
                f"[{self.n_components}]. Got {shapes[0]}, {shapes[1]} and {shapes[2]}."
            )
        parts = (mean, std, *components.split(64))
        if not all(bool(torch.isfinite(t).all()) for t in parts):
            raise ConfigError(
                "The mean, std or components of a basis hold NaN or infinite numbers."
            )
        if not bool(((singular_values > 0) & torch.isfinite(singular_values)).all()):
            raise ConfigError(
                "Every singular value of a basis must be finite and positive; keep fewer components."
            )
        self._tensors = {
            "mean": mean.detach().float(),
            "std": without_tiny(std.detach().float()),
            "components": components.detach().half(),
            "singular_values": singular_values.detach().float(),
        }

    @classmethod
    def from_container(cls, file: Container, layout: Layout, config: Mapping[str, Any]) -> Basis:
        """The basis.* tensors of a file, checked now and read later; `config` as `config()` gave it.

        Raises FormatError or ConfigError for what is no basis.
        """
        size, n_components = layout.size, config["rank"]  # "rank" in files
        if type(n_components) is not int or n_components < 1:
            raise ConfigError(f"a basis has at least one component. Got {n_components!r}.")
        floats = (torch.float16, torch.float32)
        file.require("basis.mean", (size,), *floats)
        file.require("basis.std", (size,), *floats)
        file.require("basis.components", (n_components, size), torch.float16)
        file.require("basis.singular_values", (n_components,), *floats)

        def read(name: str) -> Tensor:
            tensor = file.read(f"basis.{name}")
            return tensor if name == "components" else tensor.float()

        return cls(
            reader=read,
            size=size,
            n_components=n_components,
            metric=_metric(file, layout, config),
        )

    def __repr__(self) -> str:
        return f"Basis(P={self.size}, K={self.n_components})"

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: the tensors themselves, read now, in place of a reader."""
        names = ("mean", "std", "components", "singular_values")
        tensors = {name: self._get(name) for name in names}
        return {**vars(self), "_tensors": tensors, "_reader": None, "_bound": None}

    rank = property(lambda self: self.n_components, doc="K, by its older name")
    mean = property(lambda self: self._get("mean"), doc="[P]")
    std = property(lambda self: self._get("std"), doc="[P], signed as stored")
    components = property(
        lambda self: self._get("components"), doc="[K, P], orthonormal rows, half precision"
    )
    singular_values = property(lambda self: self._get("singular_values"), doc="[K]")

    def project(self, w: Array) -> Tensor:
        """w [B, P] -> whitened coefficients [B, K], in single precision."""
        w = as_batch(w, self.size, "vectors", "P")
        x = self._dual(self.standardise(w.float() - self.mean))
        parts = [x @ rows.T for rows in self.blocks(len(w))]
        return torch.cat(parts, dim=1) / self.singular_values

    def energy(self, difference: Tensor) -> Tensor:
        """Squared length [B] of differences of vectors [B, P] under the basis's metric, double precision."""
        return self._bind().energy(self.standardise(difference))

    def span(self, x: Tensor) -> Tensor:
        """Standardised differences x [B, P] -> coordinates [B, K] of what of them lies in the span of the
        components, in an orthonormal frame: |x|^2 - |span(x)|^2 is the squared distance to it."""
        return self.in_frame(torch.cat([x @ rows.T for rows in self.blocks(len(x))], dim=1))

    def in_frame(self, products: Tensor) -> Tensor:
        """Inner products with the components [B, K] -> coordinates in an orthonormal frame of their span."""
        if isinstance(self.metric, Plain):
            return products
        if "frame" not in self._tensors:
            with torch.inference_mode(False):
                self._tensors["frame"] = _frame(self.blocks(FRAME_BATCH), self.components)
        frame = self._tensors["frame"]
        solved = torch.linalg.solve_triangular(frame, products.T.to(frame), upper=False)
        return solved.T.to(products)

    def lift(self, c: Array) -> Tensor:
        """Whitened coefficients c [B, K] -> w [B, P], in single precision."""
        c = as_batch(c, self.n_components, "coefficients", "K")
        scaled = c.float() * self.singular_values
        x, start = torch.zeros(len(c), self.size, device=c.device), 0
        for rows in self.blocks(len(c)):
            x = torch.addmm(x, scaled[:, start : start + len(rows)], rows)
            start += len(rows)
        return x * self.std + self.mean

    def standardise(self, difference: Tensor) -> Tensor:
        """A difference of vectors [B, P] in units of each parameter's std."""
        return difference * torch.where(self.std == 0, 0.0, 1.0 / self.std)

    def truncated(self, count: int) -> Basis:
        """The first `count` components. Raises ConfigError for more than there are, or none."""
        if not 1 <= count <= self.n_components:
            raise ConfigError(
                f"A basis of {self.n_components} components can't be truncated to {count}."
            )
        return Basis(
            self.mean,
            self.std,
            self.components[:count],
            self.singular_values[:count],
            metric=self.metric,
        )

    def to(self, device: torch.device | str) -> Basis:
        """The same basis on a device; tensors move when they are first used."""
        moved = Basis(
            reader=lambda name: self._get(name).to(device),
            size=self.size,
            n_components=self.n_components,
            metric=self.metric,
        )
        moved._device = torch.device(device)
        return moved

    def tensors(self) -> dict[str, Tensor]:
        """What a file stores: mean and std [P], components [K, P], singular values [K], and the metric's."""
        own = {name: self._get(name) for name in ("mean", "std", "components", "singular_values")}
        return {**own, **{f"metric.{name}": t for name, t in self.metric.tensors().items()}}

    def config(self) -> dict[str, Any]:
        """The JSON beside its tensors in a file."""
        config = {
            "kind": self.kind,
            "size": self.size,
            "rank": self.n_components,
        }  # "rank" in files
        if isinstance(self.metric, Plain):
            return config
        return {**config, "kind": WEIGHTED, "metric": self.metric.config()}

    @torch.inference_mode(False)
    def _bind(self) -> BoundMetric:
        if self._bound is None:
            bound = self.metric.at(self.mean.cpu(), self.std.cpu())
            self._bound = bound.to(self._device or self.mean.device)
        return self._bound

    def _dual(self, x: Tensor) -> Tensor:
        return x if isinstance(self.metric, Plain) else self._bind().gram(x)

    # Outside of inference mode, so that what is cached here can take part in gradients later.
    @torch.inference_mode(False)
    def _get(self, name: str) -> Tensor:
        if name == "components" and "single" in self._tensors:
            return self._tensors["single"].half()  # where they came from, so nothing is lost
        if name not in self._tensors:
            assert self._reader is not None
            tensor = self._reader(name)
            if name == "singular_values" and not bool((tensor > 0).all()):
                raise FormatError("The singular values of this basis are not all positive.")
            self._tensors[name] = without_tiny(tensor) if name == "std" else tensor
        return self._tensors[name]

    def blocks(self, batch: int) -> Iterator[Tensor]:
        """The components in single precision [rows, P], a block at a time; larger batches read in larger blocks."""
        if 4 * self.size * self.n_components <= KEPT_BYTES:
            yield self._single()
            return
        for rows in self.components.split(max(1, batch * BLOCK_BYTES // (4 * self.size))):
            yield rows.float()

    @torch.inference_mode(False)
    def _single(self) -> Tensor:
        if "single" not in self._tensors:
            self._tensors["single"] = self.components.float()
            self._tensors.pop("components", None)
        return self._tensors["single"]


class AffineBasis:
    """Raw vectors up to an affine map: c = (w - shift) * scale, so K = P.

    This is how the checkpoints of the original w2w++ see a LoRA (its first VAE reads w * 10); there is
    nothing to whiten.
    """

    kind = "affine"
    rank = property(lambda self: self.n_components, doc="K, by its older name")

    def __init__(self, size: int, *, shift: float = 0.0, scale: float = 1.0) -> None:
        shift, scale = float(shift), float(scale)
        finite = math.isfinite(shift) and math.isfinite(scale)
        if type(size) is not int or size < 1 or not finite or scale == 0:
            raise ConfigError(
                "An affine basis needs a positive size, a finite shift and a finite scale other than "
                f"0. Got {size=}, {shift=} and {scale=}."
            )
        self.size = self.n_components = size
        self.shift, self.scale = shift, scale

    def __repr__(self) -> str:
        return f"AffineBasis({self.size}, shift={self.shift:g}, scale={self.scale:g})"

    @property
    def singular_values(self) -> Tensor:
        """[K], all one: every number of the vector weighs the same."""
        return torch.ones(self.n_components)

    @property
    def mean(self) -> Tensor:
        """[P], what coefficients of zero lift to."""
        return torch.full((self.size,), self.shift)

    def project(self, w: Array) -> Tensor:
        """w [B, P] -> c [B, P], in single precision."""
        w = as_batch(w, self.size, "vectors", "P")
        return (w.float() - self.shift) * self.scale

    def lift(self, c: Array) -> Tensor:
        """c [B, P] -> w [B, P], in single precision."""
        c = as_batch(c, self.n_components, "coefficients", "K")
        return c.float() / self.scale + self.shift

    def standardise(self, difference: Tensor) -> Tensor:
        """A difference of vectors [B, P] in the units of the coefficients."""
        return difference * self.scale

    def to(self, device: torch.device | str) -> AffineBasis:
        """Itself: it has no tensors to move."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        """None: two numbers say all, and they are in `config`."""
        return {}

    def config(self) -> dict[str, Any]:
        """The JSON that stands for it in a file."""
        return {"kind": self.kind, "size": self.size, "shift": self.shift, "scale": self.scale}


AnyBasis = Basis | AffineBasis


def _metric(file: Container, layout: Layout, config: Mapping[str, Any]) -> Metric | None:
    if "metric" not in config:
        return None
    prefix = "basis.metric."
    tensors = {n.removeprefix(prefix): file.read(n) for n in file.entries if n.startswith(prefix)}
    return metric_from(config["metric"], layout, tensors)


def _frame(blocks: Iterator[Tensor], components: Tensor) -> Tensor:
    """L [K, K] with L L^T = D D^T for components D [K, P], so that L^-1 D is orthonormal."""
    parts = [(rows @ components.float().T).double() for rows in blocks]
    gram = torch.cat(parts)
    gram = (gram + gram.T) / 2
    return torch.linalg.cholesky(gram + 1e-7 * torch.diag(gram.diagonal()))


def without_tiny(std: Tensor) -> Tensor:
    """Standard deviations [P] with those that are only rounding error set to exactly zero; signs stay."""
    return torch.where(std.abs() > 1e-8 * std.abs().max(), std, 0.0)
