"""What an edit along a direction does to a face: the attribute, everything else, and who it is.

Every identity is painted under its own scene at every strength, so that what differs between its
pictures is the edit alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...edits import edit
from ...identity import Identity, concat
from ...metrics import estimate
from ...space import Space
from ...training.dataset import VectorDataset
from ...training.directions import Directions
from ..world.renderer import TRAITS
from ..world.studio import Studio

STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)
ENDS = (-2.0, 0.0, 2.0)  # what the naive directions are compared at
Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Faces:
    """Traits [S, N, 20] as the embedder reads them at S strengths."""

    strengths: tuple[float, ...]
    traits: Tensor

    def at(self, strength: float) -> Tensor:
        """The faces after an edit of this strength, in standard deviations."""
        return self.traits[self.strengths.index(strength)]

    def slopes(self) -> Tensor:
        """Change of every trait per unit of strength between the ends [N, 20]."""
        span = self.strengths[-1] - self.strengths[0]
        return (self.traits[-1] - self.traits[0]) / span


def people(space: Space, dataset: VectorDataset, count: int, seed: int) -> Identity:
    """Half of them held-out people, as the space encodes them, half drawn from the space."""
    rows = dataset.heldout_rows[: count // 2]
    with torch.no_grad():
        known = Identity(space.encode(dataset.vectors(rows)).mean, space.fingerprint)
    drawn = space.sample(count - len(rows), generator=torch.Generator().manual_seed(seed))
    return concat([known, drawn])


def measure_directions(
    space: Space,
    debiased: Directions,
    naive: Directions,
    studio: Studio,
    crowd: Identity,
    *,
    callback: Callable[[str], None] = lambda line: None,
) -> dict[str, Row]:
    """A row for each attribute, with 95 % intervals over the identities of a crowd."""
    start = _read(space, studio, crowd)  # [N, 20]
    again = _read(space, _elsewhere(studio), crowd)
    rows: dict[str, Row] = {}
    for name in debiased.names:
        row: Row = {}
        faces = {}
        for kind, found, strengths in (("debiased", debiased, STRENGTHS), ("naive", naive, ENDS)):
            faces[kind] = _faces(space, studio, crowd, found, name, strengths, start)
            row[kind] = _judge(faces[kind], name)
        row["debiased_minus_naive"] = _compare(faces["debiased"], faces["naive"], name)
        row["same_person_id_without"] = estimate(_likeness(start, again, name)).to_json()
        row["passes"] = passes(row["debiased"])
        rows[name] = row
        callback(f"{name}: {_summary(row)}")
    return rows


def passes(row: Mapping[str, Any]) -> bool:
    """The attribute grows with every step of strength, and more than twice as much as others drift."""
    grows = all(step["low"] > 0 for step in row["steps"])
    return grows and row["leak_share"]["high"] < 0.5


def table(rows: Mapping[str, Row]) -> str:
    """The rows as a Markdown table; +- is half of a 95 % interval over identities."""
    head = ("attribute", "change per unit", "monotone", "leak", "leak, naive", "leak difference",
            "ID without it", "ID, naive", "ID, another picture", "ships")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in rows.items():
        ours, naive = row["debiased"], row["naive"]
        cells = (
            ours["change"], ours["monotone"], ours["leak_share"], naive["leak_share"],
            row["debiased_minus_naive"]["leak_share"], ours["id_without"], naive["id_without"],
            row["same_person_id_without"],
        )  # fmt: skip
        shown = " | ".join(
            f"{c:.2f}" if isinstance(c, float) else f"{c['mean']:.3f} +- {_half(c):.3f}"
            for c in cells
        )
        lines.append(f"| {name} | {shown} | {'yes' if row['passes'] else 'no'} |")
    return "\n".join(lines)


def _faces(
    space: Space,
    studio: Studio,
    crowd: Identity,
    found: Directions,
    name: str,
    strengths: tuple[float, ...],
    start: Tensor,
) -> Faces:
    along = space.with_(directions={name: found.as_mapping()[name]})
    traits = [
        start if s == 0 else _read(space, studio, edit(crowd, along, {name: s})) for s in strengths
    ]
    return Faces(strengths, torch.stack(traits))


@torch.no_grad()
def _read(space: Space, studio: Studio, crowd: Identity) -> Tensor:
    """Mean traits [N, 20] over each identity's pictures."""
    return studio.photograph(crowd.vectors(space), space.layout).traits.mean(1)


def _elsewhere(studio: Studio) -> Studio:
    """The same studio with other scenes."""
    return Studio(studio.base, studio.embedder, studio.pictures, seed=studio.seed + 1)


def _judge(faces: Faces, name: str) -> Row:
    a = TRAITS.index(name)
    slopes, own = faces.slopes(), faces.traits[:, :, a]  # [N, 20], [S, N]
    steps = own[1:] - own[:-1]
    return {
        "change": estimate(slopes[:, a]).to_json(),
        "steps": [estimate(step).to_json() for step in steps],
        "monotone": float((steps > 0).float().mean()),  # share of single steps that go up
        "leak_share": estimate(_leak(slopes, a)).to_json(),
        "id_without": estimate(_kept(faces, name)).to_json(),
        "id_without_at_1": estimate(
            _kept(Faces((-1.0, 0.0, 1.0), faces.traits[1:4]), name)
        ).to_json()
        if len(faces.strengths) == 5
        else None,
    }


def _compare(ours: Faces, naive: Faces, name: str) -> Row:
    a = TRAITS.index(name)
    leak = _leak(ours.slopes(), a) - _leak(naive.slopes(), a)
    kept = _kept(ours, name) - _kept(naive, name)
    return {"leak_share": estimate(leak).to_json(), "id_without": estimate(kept).to_json()}


def _leak(slopes: Tensor, a: int) -> Tensor:
    """Root-mean-square change of the other traits [N], over the mean change of trait a."""
    others = torch.cat([slopes[:, :a], slopes[:, a + 1 :]], dim=1)
    return others.square().mean(1).sqrt() / slopes[:, a].mean().clamp_min(1e-6)


def _kept(faces: Faces, name: str) -> Tensor:
    """Likeness to the unedited face in all other traits, mean of both ends [N]."""
    start = faces.at(0.0)
    return (_likeness(start, faces.traits[0], name) + _likeness(start, faces.traits[-1], name)) / 2


def _likeness(one: Tensor, other: Tensor, name: str) -> Tensor:
    """Cosine [N] of faces [N, 20] without a trait: the ID score of everything else."""
    a = TRAITS.index(name)
    keep = [i for i in range(one.shape[1]) if i != a]
    return F.cosine_similarity(one[:, keep], other[:, keep], dim=1)


def _summary(row: Row) -> str:
    ours, naive = row["debiased"], row["naive"]
    return (
        f"change {ours['change']['mean']:.2f}, leak {ours['leak_share']['mean']:.2f} "
        f"(naive {naive['leak_share']['mean']:.2f}), ID {ours['id_without']['mean']:.2f} "
        f"(naive {naive['id_without']['mean']:.2f})"
    )


def _half(cell: Mapping[str, float]) -> float:
    return (cell["high"] - cell["low"]) / 2
