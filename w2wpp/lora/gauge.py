"""Gauge: which of the many factorisations of one update a space means.

A LoRA's update B A does not change when A becomes G^-1 A and B becomes B G, G [r, r] invertible. A
space knows LoRAs that were trained alike, in one gauge; a LoRA from elsewhere comes in any. Here
its update is factored again at the layout's rank and turned into the space's gauge:

1. singular vectors of the product, found from the thin factors alone;
2. per module, the lengths of A and B in the proportion that they have in the space, and the
   orthogonal Q that brings both nearest to the space's mean LoRA (Procrustes, Schoenemann 1966; for
   rank 1 this is a sign). Alternatively the G that brings A alone nearest to the mean's A;
3. Gauss-Newton on all G together, for the least distance to the span of the space's basis.

Step 3 finds the gauge of whatever came out of the space, because another gauge leads out of the
span, which has far fewer dimensions than the vectors. A LoRA that it hardly improves was in the
space's gauge already and stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..basis import Basis
from .layout import Layout, Lora

KEPT = 0.1  # share of the distance to the span that another gauge must save
STEPS = 30  # of Gauss-Newton, at most
ROUNDING = 1e-7  # share of a vector's squared length that half precision leaves outside of the span
BATCH = 32  # rows that a pass over the components is worth, see `Basis.blocks`
CONDITION = 1e4  # of a G that may serve as a start


@dataclass(frozen=True, eq=False)
class Reference:
    """What the LoRAs of a space look like: their mean [P] and deviations [P], both of the layout."""

    layout: Layout
    mean: Tensor
    std: Tensor

    def modules(self) -> dict[str, tuple[Tensor, Tensor, float]]:
        """{module: (mean A [r, in], mean B [out, r], root-mean-square |A| over that of |B|)}."""
        mean = self.layout.unpack(self.mean.double())
        squares = self.layout.unpack(self.mean.double().square() + self.std.double().square())
        found = {}
        for name, (a, b) in mean.items():
            square_a, square_b = (float(t.sum()) for t in squares[name])
            ratio = (square_a / square_b) ** 0.5 if square_a > 0 and square_b > 0 else 1.0
            found[name] = (a, b, ratio)
        return found


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


def nearest(lora: Mapping[str, tuple[Tensor, Tensor]], reference: Reference) -> Lora:
    """Balanced factors -> the same updates, lengths and orientation as the reference has them."""
    return {
        name: _procrustes(*lora[name], a0, b0, ratio)
        for name, (a0, b0, ratio) in reference.modules().items()
    }


def nearest_down(lora: Mapping[str, tuple[Tensor, Tensor]], reference: Reference) -> Lora:
    """The same with A nearest to the reference's A, where that determines the gauge."""
    found = {}
    for name, (a0, b0, ratio) in reference.modules().items():
        a, b = lora[name]
        h = torch.linalg.lstsq(a.T, a0.T, driver="gelsd").solution.T  # h a ~ a0
        if torch.isfinite(h).all() and torch.linalg.cond(h) < CONDITION:
            found[name] = (h @ a, b @ torch.linalg.inv(h))
        else:
            found[name] = _procrustes(a, b, a0, b0, ratio)
    return found


def to_span(w: Tensor, layout: Layout, basis: Basis) -> tuple[Tensor, float]:
    """w [P] in the gauge that is nearest to the span of a basis, and its squared distance to it.

    Gauss-Newton with Levenberg's damping. A module's G is exp(X): dA = -X A, dB = B X.
    """
    damping, (value, jacobian, gradient) = 1e-6, _span_system(w, layout, basis)
    floor = ROUNDING * float(basis.standardise(w.float() - basis.mean).square().sum())
    for _ in range(STEPS):
        if value <= floor or damping > 1.0:
            break
        scale = jacobian.diagonal()
        scale = scale.clamp_min(1e-12 * (1 + float(scale.max())))
        x = torch.linalg.solve(jacobian + torch.diag(damping * scale), -gradient).clamp(-1.0, 1.0)
        turned = _turned(w, layout, x)
        after = _span_system(turned, layout, basis)
        if not after[0] < value:
            damping *= 100
            continue
        gained = value - after[0]
        w, (value, jacobian, gradient), damping = turned, after, max(damping / 10, 1e-9)
        if gained < 1e-4 * value:
            break
    return w, value


def is_kept(own: Tensor, best: float, layout: Layout, basis: Basis) -> bool:
    """Whether a LoRA w [P] that stands as near to the span as another gauge would be, or nearly so,
    keeps its own. M r^2 free numbers save M r^2 / (P - K) of pure noise."""
    free = len(layout.modules) * layout.rank**2 / max(1, layout.size - basis.rank)
    length = float(basis.standardise(own.float() - basis.mean).square().sum())
    distance = span_distance(own, basis)
    return distance <= 10 * ROUNDING * length or best >= distance * (1 - min(0.5, KEPT + 2 * free))


def span_distance(w: Tensor, basis: Basis) -> float:
    """Squared standardised distance of w [P] to the span of a basis."""
    x = basis.standardise(w[None].float() - basis.mean)
    c = basis.project(w[None]) * basis.singular_values
    return max(0.0, float(x.double().square().sum() - c.double().square().sum()))


def _procrustes(
    a: Tensor, b: Tensor, a0: Tensor, b0: Tensor, ratio: float
) -> tuple[Tensor, Tensor]:
    """Balanced A, B -> lengths in proportion to `ratio`, turned towards A0, B0; no update has A0."""
    if not bool(b.any()):
        return a0.clone(), torch.zeros_like(b0)
    a, b = a * ratio**0.5, b / ratio**0.5
    u, _, vt = torch.linalg.svd(a @ a0.T / ratio + b.T @ b0 * ratio)
    q = u @ vt
    return q.T @ a, b @ q


def _span_system(w: Tensor, layout: Layout, basis: Basis) -> tuple[float, Tensor, Tensor]:
    """The squared distance to the span, and J^T J [M r^2, M r^2] and J^T residual of its root."""
    inverse = basis.standardise(torch.ones(basis.size))
    x = (w.float() - basis.mean) * inverse
    parts = list(_directions(w.float(), inverse, layout))
    inside, along_rows = [], []
    for rows in basis.blocks(BATCH):
        inside.append((rows @ x).double())
        along_rows.append(torch.cat([rows[:, s] @ j.T for s, j in parts], 1).double())
    c, t = torch.cat(inside), torch.cat(along_rows)
    own = torch.block_diag(*(j.double() @ j.double().T for _, j in parts))
    along = torch.cat([j.double() @ x[s].double() for s, j in parts])
    value = max(0.0, float(x.double().square().sum() - c.square().sum()))
    return value, own - t.T @ t, along - t.T @ c


def _directions(w: Tensor, inverse: Tensor, layout: Layout):  # type: ignore[no-untyped-def]
    """(slice, J [r^2, n]) of each module: how its standardised numbers move with X [r, r]."""
    r = layout.rank
    for module, down, up in layout.slices():
        a = w[down].unflatten(0, (r, module.in_features))
        b = w[up].unflatten(0, (module.out_features, r))
        da = torch.zeros(r, r, *a.shape)
        db = torch.zeros(r, r, *b.shape)
        for i in range(r):
            da[i, :, i] = -a  # X_ij takes row j of A from row i and adds column i of B to column j
            db[i, torch.arange(r), :, torch.arange(r)] = b[:, i]
        j = torch.cat([da.flatten(2), db.flatten(2)], 2).flatten(0, 1)
        where = slice(down.start, up.stop)
        yield where, j * inverse[where]


def _turned(w: Tensor, layout: Layout, x: Tensor) -> Tensor:
    """w [P] with every module's A and B in the gauge exp(X)."""
    r = layout.rank
    lora, turned = layout.unpack(w.double()), {}
    for (name, (a, b)), block in zip(lora.items(), x.unflatten(0, (-1, r, r)).double()):
        turned[name] = (torch.matrix_exp(-block) @ a, b @ torch.matrix_exp(block))
    return layout.pack(turned)
