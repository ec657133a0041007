"""Updates of low rank, without building them: inner products, sums, and the nearest of a lower rank.

A module's update is dW = scale * B A with A [r, in] and B [out, r]. A and B alone mean nothing:
B G and G^-1 A are the same update for every invertible G [r, r]. Everything here depends on dW only
and costs O(r) of what dW itself would:

    <dW_i, dW_j> = scale_i scale_j tr((B_i^T B_j)(A_j A_i^T))

A sum of updates is their factors side by side, and its nearest update of a lower rank comes from
QR decompositions of the two stacks and an SVD of what is between them (Eckart & Young 1936).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arrays import is_finite
from ..errors import DataError

EXACT_RANK = 512  # up to this many stacked ranks, products are taken in double precision as well
LEAST, MOST = 200, 1024  # rows and columns of the stacked factors that are multiplied at a time
WHOLE = 1 << 22  # numbers of multiplied-out updates at a time
THIN = 1.5  # how much longer an operation takes where it makes a large matrix of thin factors
DIRECT = 384  # smallest side of a stack up to which its SVD is taken as a whole
INDEPENDENT = 1e-4  # smallest pivot of a factor's root, beside the largest, at which it is used
LEAST_SQUARE = 1e-14  # of a squared singular value, beside the largest, that is not rounding
OVERSAMPLING, ITERATIONS = 16, 3  # of the subspace iteration beyond that


@dataclass(frozen=True, eq=False)
class Factors:
    """The update of one module, scale * up @ down."""

    down: Tensor  # A [r, in]
    up: Tensor  # B [out, r]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """r, the number of columns of B."""
        return self.down.shape[0]

    def dense(self) -> Tensor:
        """dW [out, in] in double precision; for tests and small modules."""
        return self.scale * (self.up.double() @ self.down.double())


Update = Mapping[str, Factors]  # a whole LoRA: {module: its update}; absent is zero


@dataclass(frozen=True, eq=False)
class ColumnGrams:
    """A A^T and B^T B [R, R] of factors, in double precision."""

    down: Tensor
    up: Tensor

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> ColumnGrams:
        """Of A [R, in] and B [out, R], both in double precision."""
        return cls(a @ a.T, b.T @ b)

    def __getitem__(self, kept: Tensor) -> ColumnGrams:
        """Of some columns, kept [R] of bool."""
        return ColumnGrams(self.down[kept][:, kept], self.up[kept][:, kept])


@dataclass(frozen=True, eq=False)
class Stack:
    """Updates of one module from several LoRAs side by side.

    down [R, in], up [out, R]; owner [R] in order: which of the `count` LoRAs a column belongs to; scale [R] in
    double precision, the owner's. R is the sum of their ranks; a LoRA without this module owns none.
    """

    down: Tensor
    up: Tensor
    scale: Tensor
    owner: Tensor
    count: int

    @property
    def rank(self) -> int:
        """The sum of the members' ranks."""
        return len(self.owner)

    def to(self, device: torch.device | str) -> Stack:
        """The same on a device."""
        down, up, scale, owner = (
            t.to(device) for t in (self.down, self.up, self.scale, self.owner)
        )
        return Stack(down, up, scale, owner, self.count)

    def shares(self, weights: Tensor) -> Tensor:
        """What every column counts [R] in a sum of the updates under weights [count], in double precision."""
        return weights.to(self.scale)[self.owner] * self.scale

    def weighted(self, weights: Tensor) -> Factors:
        """sum_i weights_i dW_i for weights [count], exact, of rank R at most; zeros are left out."""
        share = self.shares(weights).to(self.up)
        kept = share != 0
        if bool(kept.all()):
            return Factors(self.down, self.up * share)
        return Factors(self.down[kept], self.up[:, kept] * share[kept])

    def column_grams(self) -> ColumnGrams:
        """Of its columns with each other, for several cuts of sums of the same updates."""
        return ColumnGrams.of(self.down.double(), self.up.double())


class Room:
    """Memory that is used again: the system takes its time to hand out large pieces anew.

    What is taken under a name holds until more is taken under it.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor whose numbers are yet to be written."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size or held.dtype != dtype:
            held = self._held[name] = torch.empty(size, dtype=dtype)
        return held[:size].view(*shape)

    def side_by_side(self, name: str, parts: list[Tensor], dim: int) -> Tensor:
        """Matrices of one type on the CPU side by side, in single precision."""
        shape = [*parts[0].shape]
        shape[dim] = sum(part.shape[dim] for part in parts)
        stored = self.take(f"{name} as stored", shape, parts[0].dtype)
        torch.cat(parts, dim, out=stored)
        return self.take(name, shape, torch.float32).copy_(stored)


def stack(factors: Sequence[Factors | None], room: Room | None = None) -> Stack | None:
    """One module of several LoRAs, None where one lacks it; None if all of them do.

    With `room`, for those on the CPU without gradients, it holds until the next one there.
    """
    present = [(i, f) for i, f in enumerate(factors) if f is not None and f.rank]
    if not present:
        return None
    downs, ups = [f.down for _, f in present], [f.up for _, f in present]
    # Put side by side first: narrow pieces are slow to convert one by one.
    if room is not None and len({t.dtype for t in (*downs, *ups)}) == 1:
        down, up = room.side_by_side("down", downs, 0), room.side_by_side("up", ups, 1)
    else:
        down, up = torch.cat(downs).float(), torch.cat(ups, dim=1).float()
    ranks = torch.tensor([f.rank for _, f in present])
    scale = torch.tensor([f.scale for _, f in present], dtype=torch.float64)
    owner = torch.tensor([i for i, _ in present])
    scale, owner = (t.repeat_interleave(ranks).to(down.device) for t in (scale, owner))
    return Stack(down, up, scale, owner, len(factors))


def inner(first: Stack, second: Stack | None = None) -> Tensor:
    """<dW_i, dW_j> of one module, [first.count, second.count] in double precision.

    With one stack, its own Gram matrix. That has two exact ways, and the one of fewer operations is taken:
    R^2 (in + out) on the factors as they are, or 2 R in out to multiply them out and 2 N^2 in out on
    what comes of it. The second is shorter where ranks are large and matrices are not.

    Products are summed in double precision; the products themselves are single where stacks are large.
    """
    if second is None and _shorter_multiplied_out(first):
        return _inner_multiplied_out(first)
    return _inner_of_factors(first, second)


def _shorter_multiplied_out(s: Stack) -> bool:
    size_out, size_in = s.up.shape[0], s.down.shape[1]
    as_they_are = s.rank**2 * (size_in + size_out)
    return 2 * size_in * size_out * (THIN * s.rank + s.count**2) < as_they_are


def _inner_of_factors(first: Stack, second: Stack | None) -> Tensor:
    other = first if second is None else second
    dtype = torch.float64 if max(first.rank, other.rank) <= EXACT_RANK else torch.float32
    a, b = first.down.to(dtype), first.up.to(dtype)
    c, d = (a, b) if second is None else (second.down.to(dtype), second.up.to(dtype))
    found = torch.zeros(first.count, other.count, dtype=torch.float64, device=a.device)
    (of_rows, e), (of_columns, f) = (_ownership(s, dtype) for s in (first, other))
    tiles = _tiles(first.rank, other.rank) if second is not None else _triangle(0, first.rank)
    for rows, columns in tiles:
        product = (a[rows] @ c[columns].T).mul_(b[:, rows].T @ d[:, columns])
        i, j = of_rows(rows), of_columns(columns)
        part = e[rows, i].double().T @ (product @ f[columns, j]).double()
        found[i, j] += part
        if second is None and rows != columns:  # what is on the other side of the diagonal
            found[j, i] += part.T
    return found * _by_lora(first)[:, None] * _by_lora(other)


def _by_lora(s: Stack) -> Tensor:
    """Scales [count], zero for a LoRA without the module."""
    return s.scale.new_zeros(s.count).index_copy_(0, s.owner, s.scale)


def _triangle(start: int, stop: int) -> Iterator[tuple[slice, slice]]:
    """Tiles on the diagonal and to one side of it: what is enough of a symmetric matrix."""
    if stop - start <= LEAST:
        yield slice(start, stop), slice(start, stop)
        return
    middle = (start + stop) // 2
    yield from _triangle(start, middle)
    yield from _triangle(middle, stop)
    for rows, columns in _tiles(middle - start, stop - middle):
        yield _moved(rows, start), _moved(columns, middle)


def _tiles(height: int, width: int) -> Iterator[tuple[slice, slice]]:
    for top in range(0, height, MOST):
        for left in range(0, width, MOST):
            yield slice(top, min(top + MOST, height)), slice(left, min(left + MOST, width))


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


def _ownership(s: Stack, dtype: torch.dtype) -> tuple[Callable[[slice], slice], Tensor]:
    """Who owns some columns of a stack, and the matrix [R, count] that adds up the columns of each."""
    owners = s.owner.tolist()
    sums = torch.zeros(s.rank, s.count, dtype=dtype, device=s.owner.device)
    sums.scatter_(1, s.owner[:, None], 1.0)
    return lambda part: slice(owners[part.start], owners[part.stop - 1] + 1), sums


def _inner_multiplied_out(s: Stack) -> Tensor:
    """The Gram matrix of a stack by way of its updates themselves, some rows of them at a time."""
    dtype = torch.float64 if s.rank <= EXACT_RANK else torch.float32
    a, b = s.down.to(dtype), s.up.to(dtype)
    owners, ranks = s.owner.unique_consecutive(return_counts=True)
    downs = a.split(ranks.tolist())
    step = max(1, WHOLE // (len(owners) * a.shape[1]))
    between = torch.zeros(len(owners), len(owners), dtype=torch.float64, device=a.device)
    for rows in b.split(step):
        built = a.new_empty(len(owners), len(rows), a.shape[1])
        for update, down, up in zip(built, downs, rows.split(ranks.tolist(), dim=1)):
            torch.mm(up, down, out=update)
        flat = built.flatten(1)
        between += (flat @ flat.T).double()
    found = between.new_zeros(s.count, s.count)
    found[owners[:, None], owners] = between
    scale = _by_lora(s)
    return found * scale[:, None] * scale


def gram(updates: Sequence[Update]) -> Tensor:
    """<dW_i, dW_j> of whole LoRAs, [N, N] in double precision."""
    modules = sorted({name for update in updates for name in update})
    found = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for name in modules:
        together = stack([update.get(name) for update in updates])
        if together is not None:
            found += inner(together)
    return found


def combine(updates: Sequence[Update], weights: Tensor) -> dict[str, Factors]:
    """sum_i weights_i dW_i of N updates under weights [N], exact: factors side by side, of their ranks' sum."""
    found = {}
    for name in sorted({name for update in updates for name in update}):
        together = stack([update.get(name) for update in updates])
        if together is not None:
            found[name] = together.weighted(weights)
    return found


def square_norm(f: Factors) -> float:
    """|dW|^2."""
    a, b = f.down.double(), f.up.double()
    return max(0.0, f.scale**2 * float(((b.T @ b) * (a @ a.T)).sum()))


def cut(f: Factors, rank: int) -> tuple[Factors, float]:
    """The nearest update of a rank, balanced (|A_k| = |B_k|), and the |dW|^2 that it keeps.

    Exactly `rank` rows, zero where dW has fewer. Signs are fixed, so that the same update gives the
    same numbers.

    Raises DataError for numbers out of range.
    """
    scale = torch.full((f.rank,), f.scale, dtype=torch.float64, device=f.down.device)
    return _cut(f.down, f.up, scale, rank, None)


def cut_sum(
    s: Stack, weights: Tensor, rank: int, grams: ColumnGrams | None = None
) -> tuple[Factors, float]:
    """The same of sum_i weights_i dW_i for weights [count], whose zeros cost nothing.

    `grams` are those of the stack, where somebody has them.
    """
    a, b, share = s.down, s.up, s.shares(weights)
    kept = share != 0
    if not bool(kept.all()):
        a, b, share = a[kept], b[:, kept], share[kept]
        grams = grams and grams[kept]
    return _cut(a, b, share, rank, grams)


def _cut(
    a: Tensor, b: Tensor, scale: Tensor, rank: int, grams: ColumnGrams | None
) -> tuple[Factors, float]:
    """Of dW = B diag(scale) A with A [R, in], B [out, R] and scale [R] in double precision."""
    size_out, size_in = b.shape[0], a.shape[1]
    smallest = min(len(scale), size_out, size_in)
    new_down = torch.zeros(rank, size_in, device=a.device)
    new_up = torch.zeros(size_out, rank, device=a.device)
    if not smallest:
        return Factors(new_down, new_up), 0.0
    direct = smallest <= max(DIRECT, rank + OVERSAMPLING)
    weighted = b if direct else b * scale.to(b)
    _require_finite(a, weighted, scale)
    if direct:
        u, s, vt = _svd(a.double(), b.double(), scale, rank, grams)
    else:
        u, s, vt = _leading(a, weighted, rank + OVERSAMPLING)
    k = min(rank, len(s))
    u, s, vt = u[:, :k], s[:k], vt[:k]
    # The entry of each row of A that is largest becomes positive.
    signs = torch.sign(vt.gather(1, vt.abs().argmax(1, keepdim=True)))
    root = s.sqrt()[:, None]
    new_down[:k] = (signs * root * vt).float()
    new_up[:, :k] = (u * (signs * root).T).float()
    _require_finite(new_down, new_up, s.float())
    return Factors(new_down, new_up), float(s.double().square().sum())


def _require_finite(*numbers: Tensor) -> None:
    if not all(map(is_finite, numbers)):
        raise DataError(
            "An update to cut to a rank holds NaN, infinite or overflowing numbers: its weights or the LoRAs that it "
            "is made of are out of range."
        )


def _svd(
    a: Tensor, b: Tensor, scale: Tensor, rank: int, grams: ColumnGrams | None
) -> tuple[Tensor, Tensor, Tensor]:
    """u [out, k], s [k], vt [k, in] of dW, k at most the rank, by the eigenvectors of dW dW^T within B's columns.

    With B^T B = L L^T, Q = B L^-T is orthonormal and, A weighted by its scale, dW dW^T = Q (L^T A A^T L) Q^T. That
    squares singular values: in double precision those below 1e-7 of the largest are rounding, and become zero. Where
    B's columns are nearly dependent, which roots square, QR decompositions take their place. A column of little
    weight, as of a LoRA that a mixture hardly holds, is not dependent: columns have the length one here, and A's rows
    what they weigh.
    """
    grams = grams or ColumnGrams.of(a, b)
    lengths = grams.up.diagonal().sqrt()
    lengths = torch.where(lengths > 0, lengths, 1.0)
    root = _root(grams.up / lengths / lengths[:, None])
    if root is None:
        q_b, r_b = torch.linalg.qr(b * scale)
        q_a, r_a = torch.linalg.qr(a.T)
        u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        return q_b @ u[:, :rank], s[:rank], vt[:rank] @ q_a.T
    weights = (lengths * scale)[:, None]
    between = grams.down * weights * weights.T
    squares, u = torch.linalg.eigh(root.T @ between @ root)
    squares, u = squares.flip(0)[:rank].clamp_min(0), u.flip(1)[:, :rank]
    s = torch.where(squares > LEAST_SQUARE * squares[0], squares.sqrt(), 0.0)
    turn = torch.linalg.solve_triangular(root.T, u, upper=True) / lengths[:, None]
    # A stack's B lies in memory column by column: multiplied from that side it is ten times as fast.
    left = (turn.T @ b.T).T
    inverse = torch.where(s > 0, 1 / s, 0.0)
    return left, s, inverse[:, None] * ((weights * (root @ u)).T @ a)


def _root(gram: Tensor) -> Tensor | None:
    """The Cholesky factor of a Gram matrix, where nothing of it is lost in rounding."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal()
    if int(failed) or not float(pivots.min()) > INDEPENDENT * float(pivots.max()):
        return None
    return factor


def _leading(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same for the leading singular values only, by subspace iteration (Halko et al. 2011, alg. 4.4).

    Its start is seeded; exact where dW has that rank or less.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(a.shape[1], rank, generator=generator).to(a)
    q = torch.linalg.qr(b @ (a @ start))[0]
    for _ in range(ITERATIONS):
        p = torch.linalg.qr(a.T @ (b.T @ q))[0]
        q = torch.linalg.qr(b @ (a @ p))[0]
    u, s, vt = torch.linalg.svd(((q.T @ b) @ a).double(), full_matrices=False)
    return q.double() @ u, s, vt
