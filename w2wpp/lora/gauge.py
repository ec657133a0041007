"""Gauge: which of the many factorisations of one update a space means.

A LoRA's update B A does not change when A becomes G^-1 A and B becomes B G, G [r, r] invertible; at
rank 1, G is a scale and a sign. A space knows LoRAs that were trained alike, in one gauge; a LoRA
from elsewhere comes in any. Here its update is factored again at the layout's rank, which forgets
the file's own gauge, and G is found for which the vector is nearest to the span of the space's
basis: another gauge leads out of the span, which has far fewer dimensions than the vectors.

The vector is linear in u = (G^-1, G) of all modules, so the squared distance is one quadratic form
u^T Q u - 2 l^T u + c. A single pass over the components yields it, and everything after that is
small:

1. starts: the free minimum Q u = l, in which G^-1 and G need not be each other's inverse (exact for
   whatever came out of the space); the lowest directions of Q, for spaces whose mean says nothing;
   the orientation of the space's mean LoRA (Procrustes, Schoenemann 1966);
2. from each, Gauss-Newton on all G together (dG = G X) in turns with changes of sign, module by
   module, for as long as one helps;
3. the least distance found.

No step looks at the gauge in which the LoRA came. Only where the space itself does not tell two
gauges apart (a mean of zero, which leaves the sign of the whole open) the nearer one is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ..basis import Basis
from .layout import Layout

STEPS = 60  # of Gauss-Newton, at most
ROUNDS = 8  # of Gauss-Newton and changes of sign, at most
BATCH = 32  # rows that a pass over the components is worth, see `Basis.blocks`
FREE = 4096  # unknowns up to which the free minimum is solved for
CONDITION = 1e4  # of a G that may serve as a start
ROUNDING = 1e-7  # share of a vector's squared length below which two distances are the same


@dataclass(frozen=True, eq=False)
class Distance:
    """A squared distance as a function of the gauge.

    quadratic [M, 2 r^2, M, 2 r^2], linear [M, 2 r^2] and constant of u = (G^-1, G) per module, each
    r x r flattened by rows.
    """

    quadratic: Tensor
    linear: Tensor
    constant: float
    rank: int

    def __call__(self, u: Tensor) -> float:
        """At u [M, 2 r^2]."""
        square = (u * self.times(u)).sum() - 2.0 * (self.linear * u).sum()
        return max(0.0, float(square) + self.constant)

    def times(self, u: Tensor) -> Tensor:
        """Q u, [M, 2 r^2]."""
        return torch.einsum("mpnq,nq->mp", self.quadratic, u)


def factor(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best approximation of b a of a rank: A [rank, in], B [out, rank] of equal lengths, and
    the squared Frobenius norm of what it leaves out.

    a [R, in], b [out, R]. The singular vectors come from the QR factors of a and b; the product is
    never formed.
    """
    qa, ra = torch.linalg.qr(a.double().T)
    qb, rb = torch.linalg.qr(b.double())
    u, s, vt = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    root = s[:rank].sqrt()
    new_a, new_b = root[:, None] * (vt[:rank] @ qa.T), (qb @ u[:, :rank]) * root
    missing = rank - len(root)
    if missing > 0:  # an update of lower rank than the layout's
        new_a = torch.nn.functional.pad(new_a, (0, 0, 0, missing))
        new_b = torch.nn.functional.pad(new_b, (0, missing))
    return new_a, new_b, float(s[rank:].square().sum())


@torch.no_grad()
def towards_span(
    lora: Mapping[str, tuple[Tensor, Tensor]],
    layout: Layout,
    basis: Basis,
    own: Tensor | None = None,
) -> Tensor:
    """The vector w [P] of balanced factors, in the gauge that is nearest to the span of a basis.

    Where that leaves the sign open, w is on the side of `own` [P].
    """
    mean, std = basis.mean.cpu(), basis.std.cpu()
    problem = _Problem(lora, layout, mean)
    if not problem.names:
        return problem.fixed.float()
    distance = _distance_to_span(problem, basis)
    starts = [*_free_starts(distance), *_mean_starts(problem, mean, std)]
    best = _least(distance, starts)
    w, mirrored = problem.vector(best), problem.vector(-best)
    length = float(basis.standardise(w.to(basis.mean.device) - basis.mean).square().sum())
    if own is None or distance(_u(-best)) > distance(_u(best)) + ROUNDING * length:
        return w
    return min(w, mirrored, key=lambda side: float((side - own).norm()))


@torch.no_grad()
def towards(lora: Mapping[str, tuple[Tensor, Tensor]], layout: Layout, target: Tensor) -> Tensor:
    """The vector w [P] of balanced factors, in the gauge that is nearest to another vector [P].

    A module without an update takes the target's A, and B = 0.
    """
    problem = _Problem(lora, layout, target)
    if not problem.names:
        return problem.fixed.float()
    starts = _mean_starts(problem, target, torch.zeros_like(target))
    return problem.vector(_least(_distance_to(problem, target), starts))


def span_distance(w: Tensor, basis: Basis) -> float:
    """Squared standardised distance of w [P] to the span of a basis."""
    x = basis.standardise(w[None].float() - basis.mean)
    c = basis.span(x)
    return max(0.0, float(x.double().square().sum() - c.double().square().sum()))


class _Problem:
    """What is solved for: the modules that have an update; the others take the mean's A and B = 0."""

    def __init__(
        self, lora: Mapping[str, tuple[Tensor, Tensor]], layout: Layout, mean: Tensor
    ) -> None:
        self.layout, self.rank = layout, layout.rank
        self.lora = {n: (a.double(), b.double()) for n, (a, b) in lora.items()}
        self.names = [n for n, (a, b) in self.lora.items() if bool(a.any()) and bool(b.any())]
        around = layout.unpack(mean.double())
        nothing = {n: (a, torch.zeros_like(b)) for n, (a, b) in around.items()}
        for name in self.names:
            nothing[name] = tuple(torch.zeros_like(t) for t in around[name])  # type: ignore[assignment]
        self.fixed = layout.pack(nothing)  # [P]

    def directions(self) -> Iterator[tuple[slice, Tensor]]:
        """(slice, D [2 r^2, n]) of each module: how its part of the vector moves with u."""
        eye = torch.eye(self.rank, dtype=torch.float64)
        for module, down, up in self.layout.slices():
            if module.name not in self.names:
                continue
            a, b = self.lora[module.name]
            # (G^-1 A)_i = sum_j H_ij A_j and (B G)_j = sum_i B_i G_ij
            da = torch.einsum("ik,jn->ijkn", eye, a).flatten(2).flatten(0, 1)
            db = torch.einsum("mi,jk->ijmk", b, eye).flatten(2).flatten(0, 1)
            yield slice(down.start, up.stop), torch.block_diag(da, db)

    def vector(self, gauges: Tensor) -> Tensor:
        """w [P] in the gauges [M, r, r]."""
        w = self.layout.unpack(self.fixed.clone())
        for name, g, h in zip(self.names, gauges, torch.linalg.inv(gauges)):
            a, b = self.lora[name]
            w[name] = (h @ a, b @ g)
        return self.layout.pack(w).float()


def _distance_to_span(problem: _Problem, basis: Basis) -> Distance:
    device = basis.mean.device
    inverse = basis.standardise(torch.ones(basis.size, device=device))
    x = basis.standardise(problem.fixed.float().to(device) - basis.mean)
    parts = [(s, d.float().to(device) * inverse[s]) for s, d in problem.directions()]
    inside, along_rows = [], []
    for rows in basis.blocks(BATCH):
        inside.append((rows @ x).double().cpu())
        along_rows.append(torch.cat([rows[:, s] @ d.T for s, d in parts], 1).double().cpu())
    c = basis.in_frame(torch.cat(inside)[None])[0]
    t = basis.in_frame(torch.cat(along_rows).T).T
    x, parts = x.double().cpu(), [(s, d.double().cpu()) for s, d in parts]
    own = torch.block_diag(*(d @ d.T for _, d in parts))
    linear = t.T @ c - torch.cat([d @ x[s] for s, d in parts])
    constant = float(x.square().sum() - c.square().sum())
    return _shaped(own - t.T @ t, linear, constant, problem)


def _distance_to(problem: _Problem, target: Tensor) -> Distance:
    x = target.double() - problem.fixed
    parts = list(problem.directions())
    own = torch.block_diag(*(d @ d.T for _, d in parts))
    linear = torch.cat([d @ x[s] for s, d in parts])
    return _shaped(own, linear, float(x.square().sum()), problem)


def _shaped(quadratic: Tensor, linear: Tensor, constant: float, problem: _Problem) -> Distance:
    m = len(problem.names)
    quadratic = rearrange(quadratic, "(m p) (n q) -> m p n q", m=m, n=m)
    return Distance(quadratic, rearrange(linear, "(m p) -> m p", m=m), constant, problem.rank)


def _least(distance: Distance, starts: Sequence[Tensor]) -> Tensor:
    """The best gauges [M, r, r] that descent from any of the starts reaches."""
    found = [_descend(distance, start) for start in starts]
    return min(found, key=lambda pair: pair[1])[0]


def _descend(distance: Distance, g: Tensor) -> tuple[Tensor, float]:
    g, value = _gauss_newton(distance, g)
    for _ in range(ROUNDS):
        turned, flipped = _flip_signs(distance, g)
        if not flipped:
            break
        turned, after = _gauss_newton(distance, turned)
        if not after < value:
            break
        g, value = turned, after
    return g, value


def _gauss_newton(distance: Distance, g: Tensor) -> tuple[Tensor, float]:
    """Gauss-Newton with Levenberg's damping over X [M, r, r], G exp(X)."""
    m, r = len(g), distance.rank
    damping, value = 1e-6, distance(_u(g))
    for _ in range(STEPS):
        if damping > 1e6:
            break
        j = _jacobian(g)
        gradient = torch.einsum("mpa,mp->ma", j, distance.times(_u(g)) - distance.linear).flatten()
        half = torch.einsum("mpnq,nqb->mpnb", distance.quadratic, j)
        hessian = rearrange(torch.einsum("mpa,mpnb->manb", j, half), "m a n b -> (m a) (n b)")
        scale = hessian.diagonal().clamp_min(1e-12 * (1.0 + float(hessian.diagonal().max())))
        x = torch.linalg.solve(hessian + torch.diag(damping * scale), -gradient).clamp(-1.0, 1.0)
        turned = g @ torch.matrix_exp(x.view(m, r, r))
        after = distance(_u(turned))
        if not after < value:
            damping *= 100
            continue
        gained = value - after
        g, value, damping = turned, after, max(damping / 10, 1e-12)
        if gained <= 1e-9 * value + 1e-15 * distance.constant:
            break
    return g, value


def _flip_signs(distance: Distance, g: Tensor) -> tuple[Tensor, int]:
    """Change the sign of one module after the other while the distance falls; how many changed."""
    u, flips = _u(g), 0
    signs = torch.ones(len(g), dtype=torch.float64)
    quadratic = torch.einsum("mp,mpnq,nq->mn", u, distance.quadratic, u)
    linear = (distance.linear * u).sum(1)
    for _ in range(4 * len(g)):
        others = (quadratic @ signs) - quadratic.diagonal() * signs
        change = -4.0 * signs * (others - linear)
        best = int(change.argmin())
        if not float(change[best]) < 0:
            break
        signs[best] = -signs[best]
        flips += 1
    return g * signs[:, None, None], flips


def _u(g: Tensor) -> Tensor:
    """[M, 2 r^2] of gauges [M, r, r]."""
    return rearrange([torch.linalg.inv(g), g], "which m i k -> m (which i k)")


def _jacobian(g: Tensor) -> Tensor:
    """[M, 2 r^2, r^2]: how u moves with X; d(G^-1) = -X G^-1 and dG = G X."""
    eye = torch.eye(g.shape[-1], dtype=g.dtype)
    of_inverse = -torch.einsum("ia,mbk->mikab", eye, torch.linalg.inv(g))
    of_gauge = torch.einsum("mia,kb->mikab", g, eye)
    return rearrange([of_inverse, of_gauge], "which m i k a b -> m (which i k) (a b)")


def _free_starts(distance: Distance) -> Iterator[Tensor]:
    """Gauges of the free minimum and of the lowest directions of Q, each read off G^-1 and off G."""
    m, n = distance.linear.shape
    if m * n > FREE:
        return
    flat = rearrange(distance.quadratic, "m p n q -> (m p) (n q)")
    # Columns of unit length: what is small next to the others still counts.
    length = flat.diagonal().clamp_min(1e-30).sqrt()
    values, vectors = torch.linalg.eigh(flat / length / length[:, None])
    inverse = 1.0 / values.clamp_min(1e-10 * float(values[-1]))
    free = vectors @ (inverse * (vectors.T @ (distance.linear.flatten() / length)))
    for u in (free, vectors[:, 0], -vectors[:, 0]):
        yield from _gauges_of((u / length).view(m, n), distance.rank)


def _gauges_of(u: Tensor, r: int) -> Iterator[Tensor]:
    """Gauges near a free u, in which H stands for the inverse of G and need not be it.

    H G = c 1 means that G is off by the root of c, which is taken out.
    """
    h, g = rearrange(u, "m (which i k) -> which m i k", which=2, i=r)
    product = (torch.linalg.det(h).abs() * torch.linalg.det(g).abs()).clamp_min(1e-30)
    scale = product.pow(1.0 / (2 * r))[:, None, None]
    for candidate in (g / scale, torch.linalg.pinv(h) * scale):
        condition = torch.linalg.cond(candidate)
        usable = torch.isfinite(candidate).all() and bool((condition < CONDITION).all())
        length = candidate.flatten(1).norm(dim=1)
        if usable and bool((length > 1e-6).all()) and bool((length < 1e6).all()):
            yield candidate


def _mean_starts(problem: _Problem, mean: Tensor, std: Tensor) -> list[Tensor]:
    """Gauges in which A and B together, or A alone, lie as the mean LoRA's do."""
    around = problem.layout.unpack(mean.double())
    squares = problem.layout.unpack(mean.double().square() + std.double().square())
    both, down = [], []
    for name in problem.names:
        a, b = problem.lora[name]
        a0, b0 = around[name]
        square_a, square_b = (float(t.sum()) for t in squares[name])
        ratio = (square_a / square_b) ** 0.5 if square_a > 0 and square_b > 0 else 1.0
        both.append(_procrustes(a, b, a0, b0, ratio))
        h = torch.linalg.lstsq(a.T, a0.T, driver="gelsd").solution.T  # h a ~ a0
        fits = bool(torch.isfinite(h).all()) and float(torch.linalg.cond(h)) < CONDITION
        fits = fits and float(h.norm()) > 1e-6
        down.append(torch.linalg.inv(h) if fits else both[-1])
    return [torch.stack(both), torch.stack(down)]


def _procrustes(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor, ratio: float) -> Tensor:
    """G that gives balanced A, B lengths in proportion to `ratio` and turns them towards A0, B0."""
    a, b = a * ratio**0.5, b / ratio**0.5
    u, _, vt = torch.linalg.svd(a @ a0.T / ratio + b.T @ b0 * ratio)
    return (u @ vt) / ratio**0.5
