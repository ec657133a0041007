"""The delta basis: principal components of updates dW themselves, which are never built.

A LoRA's factors A and B mean nothing apart, so LoRAs from anywhere can be compared by their updates
only. Let dW_i be those of N members, p their weights (which sum to one), mean = sum_i p_i dW_i, and
G [N, N] their Gram matrix. PCA needs no more than G (kernel PCA, Schoelkopf et al. 1998):

    K = P^1/2 (G - 1 m^T - m 1^T + m^T p) P^1/2 = U L U^T,  m = G p, P = diag(p)
    V_k = sum_i p_i^1/2 U_ik (dW_i - mean) / L_k^1/2        principal updates, orthonormal
    c_k = <dW - mean, V_k> / s_k,  s_k = (L_k n / (n - 1))^1/2,  n = 1 / sum_i p_i^2

Inner products are sums over modules, each with a weight: one, or what the model makes of a change there.

So a point of the space is a combination of the members whose weights sum to one,

    dW = mean + sum_k c_k s_k V_k = sum_i a_i dW_i,  a = p + c Q,  Q [K, N]

and to encode is to take inner products with the members. Vectors are LoRAs of the layout's rank:
lifting cuts the combination to it, projecting reads A and B in any gauge.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .arrays import Array, as_batch
from .basis import KEPT_BYTES
from .errors import ConfigError, DataError, FormatError
from .files.container import Container, Streamed
from .lora.collection import Stacks
from .lora.delta import (
    DIRECT,
    ColumnGrams,
    Factors,
    Room,
    Stack,
    cut_sum,
    inner,
    square_norm,
    stack,
)
from .lora.families import blocks
from .lora.layout import Layout
from .workers import in_order

UNCUT_RANK = 256  # of all members together, up to which they are cheaper side by side than cut
MOST_AT_ONCE = 8  # modules that are multiplied at a time
STACK_BYTES = 8  # of a number of a stack: in half precision by itself and side by side, and single
WORKING_BYTES = 1 << 30  # of the stacks in use at a time, unless one alone takes more
NEGLIGIBLE = 1e-6  # share of the largest eigenvalue below which a component is rounding


@dataclass(frozen=True, eq=False)
class Grams:
    """Inner products of N members: of everything, and block by block of the model."""

    total: Tensor  # [N, N] double
    blocks: dict[str, Tensor]  # {block: [N, N]}, single precision; they sum to the total
    scales: Tensor  # [M, N] double, of the factors that were read


@dataclass(frozen=True, eq=False)
class Products:
    """One LoRA against the members of a basis, block by block: <dW, dW_i> and |dW|^2."""

    with_members: dict[str, Tensor]  # {block: [N]}
    own: dict[str, float]

    @property
    def total(self) -> Tensor:
        """<dW, dW_i> [N] over all blocks."""
        return torch.stack(list(self.with_members.values())).sum(0)

    @property
    def square_norm(self) -> float:
        """|dW|^2 over all blocks."""
        return sum(self.own.values())


class DeltaBasis:
    """Components of the updates of N members, as combinations of them; see the module.

    The members' factors are read from `stacks` whenever they are needed, and kept if they are small.
    """

    kind = "delta"

    def __init__(
        self,
        layout: Layout,
        stacks: Stacks,
        *,
        grams: Callable[[], Grams],
        weights: Tensor,
        mixing: Tensor,
        singular_values: Tensor,
        module_weights: Tensor | None = None,
    ) -> None:
        self.layout, self.stacks, self._grams = layout, stacks, grams
        ones = torch.ones(len(layout.modules), dtype=torch.float64)
        self.module_weights = (
            ones if module_weights is None else module_weights.double().cpu()
        )  # [M]
        self.size, self.n_components = layout.size, len(mixing)  # P, K
        self.weights, self.mixing = weights.double(), mixing.double()  # p [N], Q [K, N]
        self.singular_values = singular_values.float()  # [K]
        self._kept: dict[int, Stack] = {}
        numbers = sum(
            int(n) * (m.in_features + m.out_features)
            for n, m in zip(stacks.ranks.sum(1), layout.modules)
        )
        self._keeps = 4 * numbers <= KEPT_BYTES
        self._kept_grams: dict[int, ColumnGrams] = {}
        ranks = stacks.ranks.sum(1)
        small = 16 * int(ranks.square().sum()) <= KEPT_BYTES // 2
        self._keeps_grams = small and int(ranks.max()) <= DIRECT

    def __repr__(self) -> str:
        return f"DeltaBasis(P={self.size}, K={self.n_components}, {self.count} members)"

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: the factors themselves, read now, in place of their files."""
        names = ("layout", "weights", "mixing", "singular_values", "module_weights")
        stacks = [self.stack(i) for i in range(len(self.layout.modules))]
        state = {name: getattr(self, name) for name in names}
        return {**state, "grams": self.grams, "stacks": _Held(stacks, self.stacks.ranks)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        grams = state.pop("grams")
        self.__init__(**state, grams=lambda: grams)  # type: ignore[misc]

    @property
    def count(self) -> int:
        """N."""
        return len(self.weights)

    @functools.cached_property
    def grams(self) -> Grams:
        """Inner products of the members, computed or read on first use."""
        return self._grams()

    @functools.cached_property
    def block_names(self) -> dict[str, str]:
        """{module: block of the model}."""
        return blocks(m.name for m in self.layout.modules)

    def member_coefficients(self) -> Tensor:
        """Whitened coefficients of the members [N, K]."""
        return self.coefficients(self.grams.total).float()

    def coefficients(self, products: Tensor) -> Tensor:
        """Inner products with the members [B, N] -> whitened coefficients [B, K] in double precision."""
        centred = products.double() - self.grams.total.to(products.device) @ self.weights
        return centred @ (self.mixing / self.singular_values.double()[:, None].square()).T

    def shares(self, c: Tensor) -> Tensor:
        """Whitened coefficients c [B, K] -> weights a [B, N] of the members, which sum to one."""
        return self.weights + c.double() @ self.mixing

    def mixture(self, shares: Tensor) -> Tensor:
        """Weights of the members [B, N], each row with the sum one -> whitened coefficients [B, K].

        Raises ConfigError for rows of another sum.
        """
        if not torch.allclose(shares.double().sum(1), torch.ones(len(shares), dtype=torch.float64)):
            raise ConfigError(f"The weights of a mixture sum to one. Got {shares.sum(1).tolist()}.")
        return self.coefficients(shares.double() @ self.grams.total).float()

    def project(self, w: Array) -> Tensor:
        """LoRAs w [B, P] in any gauge -> whitened coefficients [B, K]."""
        w = as_batch(w, self.size, "vectors", "P")
        found = torch.zeros(len(w), self.count, dtype=torch.float64, device=w.device)
        for i, (_, down, up) in enumerate(self.layout.slices()):
            rows = [self._factors(row, i, down, up) for row in w.detach()]
            together = stack(rows)
            if together is not None:
                found += float(self.module_weights[i]) * inner(together, self.stack(i))
        return self.coefficients(found).float()

    def products(self, read: Callable[[int], Factors | None]) -> Products:
        """A LoRA of any ranks, given module by module, against the members."""
        with_members = {b: torch.zeros(self.count, dtype=torch.float64) for b in self._block_list()}
        own = dict.fromkeys(with_members, 0.0)
        for i, module in enumerate(self.layout.modules):
            together = stack([read(i)])
            if together is not None:
                block, weight = self.block_names[module.name], float(self.module_weights[i])
                with_members[block] += weight * inner(together, self.stack(i))[0].cpu()
                own[block] += weight * float(inner(together))
        return Products(with_members, own)

    def lift(self, c: Array) -> Tensor:
        """Whitened coefficients c [B, K] -> LoRAs w [B, P] of the layout's rank, balanced.

        The nearest of that rank to each combination; `kept_energy` tells how near. Gradients reach c, exactly as far
        as the cut loses nothing.
        """
        c = as_batch(c, self.n_components, "coefficients", "K")
        shares = self.shares(c)
        parts = []
        for i in range(len(self.layout.modules)):
            members = self.stack(i)
            grams = self._column_grams(i, members, shares)
            rows = [_nearest(row, members, self.layout.rank, grams) for row in shares]
            parts.append(torch.stack(rows))
        return torch.cat(parts, dim=1)

    def combination(self, c: Array) -> dict[str, Factors]:
        """The combination of one c [1, K] before any cut: members side by side, of their ranks' sum."""
        c = as_batch(c, self.n_components, "coefficients", "K")
        shares = self.shares(c.detach())[0]
        return {m.name: self.stack(i).weighted(shares) for i, m in enumerate(self.layout.modules)}

    def kept_energy(self, c: Tensor, w: Tensor) -> Tensor:
        """Share of |dW|^2 [B] of the combinations c [B, K] that their lifted vectors w [B, P] hold."""
        a = self.shares(c.detach()).cpu()
        whole = ((a @ self.grams.total) * a).sum(1)
        held = torch.zeros(len(w), dtype=torch.float64)
        for i, (_, down, up) in enumerate(self.layout.slices()):
            squares = [square_norm(self._factors(row, i, down, up)) for row in w]
            held += float(self.module_weights[i]) * torch.tensor(squares)
        return torch.where(whole > 0, held / whole, 1.0).clamp(max=1.0)

    def standardise(self, difference: Tensor) -> Tensor:
        """Vectors of a delta basis have no standard form: their numbers mean nothing one by one.

        Raises ConfigError always.
        """
        raise ConfigError("A delta basis compares updates, not the numbers of A and B.")

    def truncated(self, count: int) -> DeltaBasis:
        """The first `count` components. Raises ConfigError for more than there are, or none."""
        if not 1 <= count <= self.n_components:
            raise ConfigError(
                f"A basis of {self.n_components} components can't be truncated to {count}."
            )
        return self._with(self.stacks, self.mixing[:count], self.singular_values[:count])

    def to(self, device: torch.device | str) -> DeltaBasis:
        """The same basis on a device; the members' factors move as they are read."""
        moved = _Moved(self.stacks, torch.device(device))
        basis = self._with(moved, self.mixing.to(device), self.singular_values.to(device))
        basis.weights = self.weights.to(device)
        return basis

    def stack(self, module: int) -> Stack:
        """Module number `module` of all members. Raises DataError if none has it."""
        if module in self._kept:
            return self._kept[module]
        found = self.stacks.stack(module)
        if found is None:
            raise DataError(f"No member has {self.layout.modules[module].name}.")
        if self._keeps:
            self._kept[module] = found
        return found

    def tensors(self) -> dict[str, Tensor]:
        """What decides the coordinates; the members' factors are apart, in `bulk`."""
        grams = self.grams
        by_block = torch.stack([grams.blocks[b] for b in self._block_list()])
        weighted = not bool((self.module_weights == 1).all())
        return {
            **({"module_weights": self.module_weights} if weighted else {}),
            "gram": grams.total,
            "gram_blocks": by_block,
            "scales": grams.scales,
            "ranks": self.stacks.ranks,
            "weights": self.weights.cpu(),
            "mixing": self.mixing.cpu(),
            "singular_values": self.singular_values.cpu(),
        }

    def bulk(self) -> dict[str, Streamed]:
        """The members' factors as a file keeps them, module by module, in half precision."""
        found = {}
        total = self.stacks.ranks.sum(1).tolist()
        for i, module in enumerate(self.layout.modules):
            for part, size in (("down", module.in_features), ("up", module.out_features)):
                chunks = _later(self._half, i, part)
                found[f"delta.{i:05d}.{part}"] = Streamed(
                    torch.float16, (int(total[i]), size), chunks
                )
        return found

    def bulk_bytes(self) -> int:
        """How many bytes the members' factors take in a file."""
        return sum(2 * t.shape[0] * t.shape[1] for t in self.bulk().values())

    def config(self) -> dict[str, Any]:
        """The JSON beside its tensors in a file."""
        return {
            "kind": self.kind,
            "size": self.size,
            "rank": self.n_components,  # "rank" in files
            "members": self.count,
            "blocks": self._block_list(),
        }

    @classmethod
    def from_container(
        cls, file: Container, layout: Layout, config: Mapping[str, Any]
    ) -> DeltaBasis:
        """The basis of a file, checked now; its factors are read module by module, later.

        Raises FormatError or ConfigError for what is no basis of updates.
        """
        n, k, names = config["members"], config["rank"], list(config["blocks"])
        m = len(layout.modules)
        if not all(type(size) is int and size >= 1 for size in (n, k)):
            raise ConfigError(f"impossible sizes: {n!r} members, {k!r} components.")
        if sorted(set(blocks(x.name for x in layout.modules).values())) != names:
            raise ConfigError("its blocks are not those of its modules.")
        double, single = torch.float64, (torch.float16, torch.float32)
        file.require("basis.gram", (n, n), double)
        file.require("basis.gram_blocks", (len(names), n, n), *single)
        file.require("basis.scales", (m, n), double)
        file.require("basis.ranks", (m, n), torch.int32)
        file.require("basis.weights", (n,), double)
        file.require("basis.mixing", (k, n), double)
        file.require("basis.singular_values", (k,), *single)
        weights = None
        if "basis.module_weights" in file:
            file.require("basis.module_weights", (m,), double)
            weights = file.read("basis.module_weights")
            if not bool((weights >= 0).all()):
                raise FormatError(f"{file.path}: weights of modules are not negative.")
        stacks = _FileStacks(file, layout)
        values = file.read("basis.singular_values").float()
        if not bool((values > 0).all()):
            raise FormatError(
                f"{file.path}: the singular values of its basis are not all positive."
            )

        def grams() -> Grams:
            by_block = file.read("basis.gram_blocks").float()
            return Grams(file.read("basis.gram"), dict(zip(names, by_block)), stacks.scales)

        return cls(
            layout,
            stacks,
            grams=grams,
            weights=file.read("basis.weights"),
            mixing=file.read("basis.mixing"),
            singular_values=values,
            module_weights=weights,
        )

    def _block_list(self) -> list[str]:
        return sorted(set(self.block_names.values()))

    def uncut(self) -> DeltaBasis | None:
        """The same components with a layout of a rank at which lifting loses nothing; None where that takes much."""
        ranks = self.stacks.ranks.sum(1)
        rank = int(ranks.max())
        layout = replace(self.layout, rank=rank, alpha=float(rank))
        if rank > UNCUT_RANK or 4 * layout.size > KEPT_BYTES:
            return None
        basis = UncutBasis(
            layout,
            self.stacks,
            grams=lambda: self.grams,
            weights=self.weights,
            mixing=self.mixing,
            singular_values=self.singular_values,
            module_weights=self.module_weights,
        )
        basis._kept, basis._keeps = self._kept, self._keeps
        return basis

    def _column_grams(self, module: int, members: Stack, shares: Tensor) -> ColumnGrams | None:
        """What cuts of all combinations of a module share, kept where it is small; None if one alone is quicker."""
        if module not in self._kept_grams:
            some = len(shares) == 1 and not bool(shares.all())
            if some or not self._keeps_grams:
                return None
            self._kept_grams[module] = members.column_grams()
        return self._kept_grams[module]

    def _with(self, stacks: Stacks, mixing: Tensor, values: Tensor) -> DeltaBasis:
        return type(self)(
            self.layout,
            stacks,
            grams=lambda: self.grams,
            weights=self.weights,
            mixing=mixing,
            singular_values=values,
            module_weights=self.module_weights,
        )

    def _factors(self, w: Tensor, module: int, down: slice, up: slice) -> Factors:
        m, r = self.layout.modules[module], self.layout.rank
        a, b = w[down].view(r, m.in_features), w[up].view(m.out_features, r)
        return Factors(a, b, self.layout.scale)

    def _half(self, module: int, part: str) -> Iterator[Tensor]:
        found = self.stack(module)
        yield (found.down if part == "down" else found.up.T).half()


class UncutBasis(DeltaBasis):
    """A delta basis whose lifts are the members' own factors side by side, which is linear in the coefficients."""

    def lift(self, c: Array) -> Tensor:
        """Whitened coefficients c [B, K] -> LoRAs w [B, P]: A of all members, and B times their weights."""
        c = as_batch(c, self.n_components, "coefficients", "K")
        shares = self.shares(c)  # [B, N]
        parts = []
        for i in range(len(self.layout.modules)):
            stack = self.stack(i)
            missing = self.layout.rank - stack.rank  # of a module that not all members have
            weights = (shares[:, stack.owner] * stack.scale).to(stack.up)  # [B, R]
            down = torch.nn.functional.pad(stack.down, (0, 0, 0, missing))
            up = torch.nn.functional.pad(stack.up * weights[:, None, :], (0, missing))
            parts += [down.flatten().expand(len(c), -1), up.flatten(1)]
        return torch.cat(parts, dim=1)


class _Nearest(torch.autograd.Function):
    """Weights a [N] of a stack's updates -> A and B, flat, of the nearest update of a rank to their sum.

    Backwards, with U S V^T that update and g = dL/dW: A = S^1/2 V^T and B = U S^1/2 hold dL/dA = S^1/2 U^T g and
    dL/dB = g V S^1/2. So U^T g and g V are known, which is all of g that matters to movements along updates of this
    rank: dL/da_i = <g, U U^T D_i + D_i V V^T - U U^T D_i V V^T> (Koch & Lubich 2007, eq. 2.4). Holds for losses that
    depend on B A alone, as everything does that a model computes.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, stack: Stack, rank: int, grams: ColumnGrams | None) -> Tensor:
        f, _ = cut_sum(stack, a, rank, grams)
        ctx.stack, ctx.factors = stack, f
        return torch.cat([f.down.flatten(), f.up.flatten()])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        stack, f = ctx.stack, ctx.factors
        size = f.down.numel()
        of_down = gradient[:size].view_as(f.down).double()
        of_up = gradient[size:].view_as(f.up).double()
        down, up = f.down.double(), f.up.double()
        s = down.square().sum(1)  # singular values: A and B are balanced
        inverse = torch.where(s > 1e-9 * s.max().clamp_min(1e-30), 1.0 / s, 0.0)
        # In terms of A and B: U^T g = S^-1/2 dL/dA, g V = dL/dB S^-1/2, U = B S^-1/2, V^T = S^-1/2 A.
        left = up.T @ stack.up.double()  # S^1/2 U^T B_i  [r, R]
        right = stack.down.double() @ down.T  # A_i V S^1/2  [R, r]
        from_left = inverse[:, None] * left * (of_down @ stack.down.double().T)
        from_right = (of_up.T @ stack.up.double()) * inverse[:, None] * right.T
        both = (of_down @ down.T) * inverse  # U^T g V, up to S^1/2 on the left
        twice = (inverse[:, None] * left) * (both @ right.T)
        along = (from_left + from_right - twice).sum(0) * stack.scale
        found = torch.zeros(stack.count, dtype=torch.float64, device=gradient.device)
        return found.index_add_(0, stack.owner, along), None, None, None


def _nearest(a: Tensor, stack: Stack, rank: int, grams: ColumnGrams | None) -> Tensor:
    return _Nearest.apply(a, stack, rank, grams)  # type: ignore[no-any-return]


def delta_components(
    gram: Tensor, weights: Tensor, components: int | None = None
) -> tuple[Tensor, Tensor]:
    """Q [K, N] and singular values [K] of members with a Gram matrix [N, N] and weights [N].

    All components above rounding, or the first so many.

    Raises DataError where all updates are the same, ConfigError for more components than they span.
    """
    p = weights.double()
    mean = gram @ p
    centred = gram - mean[:, None] - mean + p @ mean
    root = p.sqrt()
    values, u = torch.linalg.eigh(root[:, None] * centred * root)
    values, u = values.flip(0), u.flip(1)
    # Against the updates' own size: what copies of one LoRA leave is rounding, however large beside nothing.
    floor = NEGLIGIBLE * max(float(values[0]), 1e-3 * float(gram.diagonal() @ p))
    usable = int((values > floor).sum())
    if not usable:
        raise DataError(
            f"All {len(p)} LoRAs have the same update: there is nothing between them. Add others."
        )
    if components is not None and not 1 <= components <= usable:
        raise ConfigError(
            f"These {len(p)} LoRAs span {usable} components: choose between 1 and {usable}. Got {components}."
        )
    k = components or usable
    values, u = values[:k], u[:, :k]
    signs = torch.sign(u.gather(0, u.abs().argmax(0, keepdim=True)))  # eigenvectors have none
    n = 1.0 / float(p.square().sum())
    s = (values * n / (n - 1.0)).sqrt()
    mixing = (signs * u * root[:, None] * (s / values.sqrt())).T
    return mixing.contiguous(), s.float()


def compute_grams(
    layout: Layout,
    stacks: Stacks,
    progress: Callable[[int, int], None] | None = None,
    *,
    device: torch.device | str = "cpu",
    module_weights: Tensor | None = None,
) -> Grams:
    """Inner products of all members, reading each module once, the next one while others are multiplied.

    `module_weights` [M]: how much each module counts, one by default.

    `progress(done, of)` may raise. Products are taken on the device, which has to know double precision, of modules
    that it has no room for on the CPU; the results are on the CPU.

    Raises DataError where the updates overflow.
    """
    n, modules = stacks.count, layout.modules
    total = torch.zeros(n, n, dtype=torch.float64)
    named = blocks(m.name for m in modules)
    by_block = {b: torch.zeros(n, n, dtype=torch.float64) for b in sorted(set(named.values()))}
    scales = torch.zeros(len(modules), n, dtype=torch.float64)
    at_once, cores = _division(stacks, layout, device)
    turns, own = threading.Semaphore(at_once), threading.local()

    def multiplied(i: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Inner products of a module [N, N], and whose its columns are, with their scales [R]."""
        if not hasattr(own, "room"):
            own.room = Room()
        found = stacks.stack(i, own.room)
        if found is None:
            return None
        with turns:
            return _inner_on(device, found), found.owner, found.scale

    # One more than multiply at a time, to read meanwhile.
    for i, found in enumerate(in_order(multiplied, len(modules), at_once=at_once + 1, cores=cores)):
        if found is not None:
            part, owner, scale = found
            if module_weights is not None:
                part *= float(module_weights[i])
            total += part
            by_block[named[modules[i].name]] += part
            scales[i].index_copy_(0, owner, scale)
        if progress is not None:
            progress(i + 1, len(modules))
    if not bool(torch.isfinite(total).all()):
        raise DataError("The updates of these LoRAs overflow: one of them holds absurd numbers.")
    return Grams(total, {b: g.float() for b, g in by_block.items()}, scales)


def _division(stacks: Stacks, layout: Layout, device: torch.device | str) -> tuple[int, int]:
    """How many modules are multiplied at a time, and on how many cores each."""
    cores = torch.get_num_threads()
    sizes = torch.tensor([m.in_features + m.out_features for m in layout.modules])
    largest = STACK_BYTES * int((stacks.ranks.sum(1) * sizes).max())
    if torch.device(device).type != "cpu":
        return 1, cores
    at_once = max(1, min(cores, MOST_AT_ONCE, WORKING_BYTES // largest - 1))
    return at_once, max(1, cores // at_once)


def _inner_on(device: torch.device | str, stack: Stack) -> Tensor:
    try:
        return inner(stack.to(device)).cpu()
    except torch.cuda.OutOfMemoryError:
        return inner(stack)


class _FileStacks:
    """Stacks of a space file: delta.<module>.down [R, in] and .up [R, out], half precision."""

    def __init__(self, file: Container, layout: Layout) -> None:
        self._file = file
        self.ranks = file.read("basis.ranks")
        self.scales = file.read("basis.scales")
        self.count = self.ranks.shape[1]
        if bool((self.ranks < 0).any()) or not bool((self.ranks.sum(1) > 0).all()):
            raise FormatError(f"{file.path}: the ranks of its members are impossible.")
        for i, m in enumerate(layout.modules):
            total = int(self.ranks[i].sum())
            file.require(f"delta.{i:05d}.down", (total, m.in_features), torch.float16)
            file.require(f"delta.{i:05d}.up", (total, m.out_features), torch.float16)

    @torch.inference_mode(False)
    def stack(self, module: int, room: Room | None = None) -> Stack:
        ranks = self.ranks[module].long()
        return Stack(
            self._file.read(f"delta.{module:05d}.down").float(),
            self._file.read(f"delta.{module:05d}.up").float().T,
            self.scales[module].repeat_interleave(ranks),
            torch.arange(self.count).repeat_interleave(ranks),
            self.count,
        )


class _Held:
    """Stacks in memory."""

    def __init__(self, stacks: list[Stack], ranks: Tensor) -> None:
        self._stacks, self.ranks, self.count = stacks, ranks, ranks.shape[1]

    def stack(self, module: int, room: Room | None = None) -> Stack:
        return self._stacks[module]


class _Moved:
    """Stacks on a device."""

    def __init__(self, stacks: Stacks, device: torch.device) -> None:
        self._stacks, self._device = stacks, device
        self.count, self.ranks = stacks.count, stacks.ranks

    def stack(self, module: int, room: Room | None = None) -> Stack | None:
        found = self._stacks.stack(module, room)
        return None if found is None else found.to(self._device)


@dataclass(frozen=True)
class _later:
    """An iterable that calls a function each time it is iterated, so that a file can be written twice."""

    call: Callable[..., Iterator[Tensor]]
    module: int
    part: str

    def __iter__(self) -> Iterator[Tensor]:
        return self.call(self.module, self.part)
