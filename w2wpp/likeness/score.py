"""ID scores by any embedder: cosines between a person's photographs and paintings, beside what they could be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError
from ..files.tables import LabelTable
from ..metrics import estimate, ratio_estimate
from .embedder import Embedder
from .faces import Faces
from .table import PAINTING, PHOTOGRAPH, Entry


def embed_entries(
    entries: Sequence[Entry],
    embedder: Embedder,
    faces: Faces,
    *,
    callback: Callable[[str], None] = lambda line: None,
) -> tuple[Tensor, dict[str, int]]:
    """Unit embeddings [n, E] of pictures, and how many faces were found in which way."""
    parts, ways = [], {"box": 0, "found": 0, "whole": 0}
    for i, entry in enumerate(entries):
        face, how = faces(entry.picture, embedder.size, entry.box)
        ways[how] = ways.get(how, 0) + 1
        parts.append(embedder.embed(face))
        if (i + 1) % 50 == 0 or i + 1 == len(entries):
            callback(f"{i + 1} of {len(entries)} pictures embedded")
    return torch.cat(parts), ways


def given_embeddings(entries: Sequence[Entry], table: LabelTable) -> Tensor:
    """Unit embeddings [n, E] of pictures that somebody embedded: a table whose first column is the picture's path,
    from the table of pictures or absolute.

    Raises DataError for a picture without a line and for an embedding of zeros.
    """
    rows = torch.stack(
        [table.of(e.key, str(e.picture), str(e.picture.resolve())) for e in entries]
    ).float()
    if bool((rows.norm(dim=1) == 0).any()):
        raise DataError(f"{table.path}: an embedding is zero.")
    return F.normalize(rows, dim=1)


def score_likeness(entries: Sequence[Entry], embeddings: Tensor) -> dict[str, Any]:
    """Means with 95 % intervals over people, from unit embeddings [n, E] of their pictures.

    id_score       cosine between a person's photographs and paintings, the mean over all pairs
    strangers      the same between the photographs of each and the paintings of all others: what no likeness is
    photographs    cosine between two photographs of one person: what could be reached; None without two of anybody
    share          id_score over photographs, of those who have two
    recognised     share of people whose paintings are, in the mean, nearest to their own photographs
    confidence_rank  rank correlation of confidence and score; None where fewer than three have one

    Raises DataError for fewer than two people, or embeddings that are not as many.
    """
    if len(entries) != len(embeddings):
        raise DataError(f"There are {len(entries)} pictures and {len(embeddings)} embeddings.")
    people = list(dict.fromkeys(e.person for e in entries))
    if len(people) < 2:
        raise DataError(
            f"Likeness is measured against strangers: two people at least. Got {len(people)}."
        )
    photographs, paintings = (
        [_of(entries, embeddings, person, kind) for person in people]
        for kind in (PHOTOGRAPH, PAINTING)
    )
    # The mean cosine over pairs is the product of the means.
    a, b = (torch.stack([t.mean(0) for t in kind]) for kind in (photographs, paintings))
    cosine = a @ b.T  # [N photographed, N painted]
    own, n = cosine.diagonal(), len(people)
    others = (cosine.sum(1) - own) / (n - 1)
    several = torch.tensor([len(t) > 1 for t in photographs])
    ceiling = torch.stack([_among(t) for t in photographs])[several]
    nearest = (F.normalize(a, dim=1) @ F.normalize(b, dim=1).T).argmax(0)
    result: dict[str, Any] = {
        "people": n,
        "pictures": len(entries),
        "id_score": estimate(own).to_json(),
        "strangers": estimate(others).to_json(),
        "above_strangers": estimate(own - others).to_json(),
        "recognised": round(float((nearest == torch.arange(n)).float().mean()), 4),
        "photographs": None,
        "share": None,
        "confidence_rank": _rank(entries, people, own),
        "by_person": {name: round(float(s), 4) for name, s in zip(people, own)},
    }
    if len(ceiling) > 1:
        result["photographs"] = estimate(ceiling).to_json()
        result["share"] = ratio_estimate(own[several], ceiling, paired=True).to_json()
    return result


def _of(entries: Sequence[Entry], embeddings: Tensor, person: str, kind: str) -> Tensor:
    rows = [i for i, e in enumerate(entries) if (e.person, e.kind) == (person, kind)]
    return embeddings[rows].double()


def _among(unit: Tensor) -> Tensor:
    """Mean cosine between different ones of unit vectors [k, E]; NaN of one."""
    count = len(unit)
    return (
        (unit.sum(0).square().sum() - count) / (count * (count - 1))
        if count > 1
        else unit.new_tensor(torch.nan)
    )


def _rank(entries: Sequence[Entry], people: Sequence[str], scores: Tensor) -> float | None:
    """Of each person's mean confidence and score."""
    sure = torch.stack(
        [
            torch.tensor([e.confidence for e in entries if (e.person, e.kind) == (name, PAINTING)])
            .double()
            .nanmean()
            for name in people
        ]
    )
    known = torch.isfinite(sure) & (sure >= 0)  # -1 is the node's word for: nobody can tell
    if int(known.sum()) < 3:
        return None
    ranks = torch.stack([_ranks(sure[known]), _ranks(scores[known])])
    found = float(torch.corrcoef(ranks)[0, 1])
    return round(found, 4) if found == found else None


def _ranks(values: Tensor) -> Tensor:
    """Ranks, equal values sharing theirs [N]."""
    _, which, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count - 1) / 2)[which]
