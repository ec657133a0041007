"""Pictures as they come: what happens to one picture of a person before it is inverted, and what that costs.

Everything here is done to pictures and their masks, so that any world serves that can photograph a person and read
paintings: `WildWorld`. What is asked of a space is what a user gets: framing, the start, and the verdict.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError
from ...inversion import start_from
from ...inversion.framing import Framed, Framing
from ...inversion.verdict import judge
from ...lora.layout import Layout
from ...metrics import estimate, id_scores
from ...placement import crop
from ...space import Space

Changes = Callable[["Portraits", torch.Generator], "Shown"]
NOBODY = ("no_face", "blend", "black")  # conditions in which nobody is to be found


class WildWorld(Protocol):
    """A world that knows its people."""

    @property
    def size(self) -> int:
        """Pixels per side of a portrait."""

    def portraits(self, identity: Tensor, rows: Tensor, shot: int) -> tuple[Tensor, Tensor]:
        """The shot-th portraits [N, 3, S, S] of people [N, T], framed as in training, with masks [N, 1, S, S].

        `rows` [N] number the people; a number and a shot always give the same light and pose.
        """

    def glasses(self, identity: Tensor) -> Tensor:
        """The same people with glasses on [N, T]."""

    def read(self, vectors: Tensor, layout: Layout) -> dict[str, Tensor]:
        """What each embedder reads in paintings of LoRAs [N, P]: unit vectors [N, M, T] by its name."""


@dataclass(frozen=True)
class Portraits:
    """What the conditions start from."""

    pictures: Tensor  # [N, 3, S, S]
    masks: Tensor  # [N, 1, S, S]
    glasses: Tensor  # [N, 3, S, S] the same with glasses on


@dataclass(frozen=True)
class Shown:
    """What an inversion is given."""

    pictures: Tensor  # [N, 3, H, W]
    masks: Tensor | None = None
    crop: bool = True


def conditions() -> dict[str, Changes]:
    """By name, the clean one first."""
    return {
        "clean": lambda p, g: Shown(p.pictures),
        "shift_12": lambda p, g: Shown(_moved(p.pictures, right=0.24, down=-0.17)),
        "shift_25": lambda p, g: Shown(_moved(p.pictures, right=-0.5)),
        "zoom_0.6": lambda p, g: Shown(_moved(p.pictures, scale=1 / 0.6)),
        "zoom_1.4": lambda p, g: Shown(_moved(p.pictures, scale=1 / 1.4)),
        "rotation_10": lambda p, g: Shown(_moved(p.pictures, degrees=10)),
        "rotation_25": lambda p, g: Shown(_moved(p.pictures, degrees=-25)),
        "gain_0.6": lambda p, g: Shown(_gain(p.pictures, 0.6)),
        "gain_1.4": lambda p, g: Shown(_gain(p.pictures, 1.4)),
        "grey": lambda p, g: Shown(p.pictures.mean(1, keepdim=True).expand(-1, 3, -1, -1)),
        "jpeg_50": lambda p, g: Shown(_jpeg(p.pictures, 50)),
        "jpeg_20": lambda p, g: Shown(_jpeg(p.pictures, 20)),
        "blur": lambda p, g: Shown(_blur(p.pictures)),
        "hat": lambda p, g: Shown(_hat(p)[0]),
        "half_covered": lambda p, g: Shown(_half_covered(p)[0]),
        "half_covered_mask": lambda p, g: Shown(*_half_covered(p)),
        "glasses": lambda p, g: Shown(p.glasses),
        "background": lambda p, g: Shown(_composed(p, ground(p, g))),
        "wide": lambda p, g: Shown(_wide(p, g)[0]),
        "wide_mask": lambda p, g: Shown(*_wide(p, g)),
        "two_mask": lambda p, g: Shown(*_two(p)),
        "far_out": lambda p, g: Shown(_moved(p.pictures, right=0.9, scale=1.8), crop=False),
        "blend": lambda p, g: Shown((p.pictures + p.pictures.roll(1, 0)) / 2),
        "no_face": lambda p, g: Shown(ground(p, g)),
        "black": lambda p, g: Shown(torch.full_like(p.pictures, -1.0)),
    }


@dataclass
class _Found:
    """Of one condition: by embedder the ID scores [N], flags and confidences [N]."""

    scores: dict[str, Tensor]
    flagged: Tensor
    confidence: Tensor
    sentences: list[str] = field(default_factory=list)


def run_wild(
    world: WildWorld,
    space: Space,
    identity: Tensor,
    rows: Tensor,
    own: Tensor,
    *,
    learned: Space | None = None,
    callback: Callable[[str], None] = lambda line: None,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Score every condition on people [N, T] whose own LoRAs are `own` [N, P].

    `learned` is the same space with a start that learned from paintings alone, for comparison on clean pictures. `save`
    gets the result after each condition. Raises ConfigError for a space without a start network.
    """
    if space.start is None:
        raise ConfigError(f"The space '{space.name}' has no start network: nothing to be measured.")
    generator = torch.Generator().manual_seed(1_000_003)
    portraits = _portraits(world, identity, rows, 0)
    reference = {
        name: id_scores(seen, identity) for name, seen in world.read(own, space.layout).items()
    }
    found: dict[str, _Found] = {}
    more: dict[str, Any] = {}
    for name, change in conditions().items():
        found[name] = _score(world, space, change(portraits, generator), identity, rows)
        result = {**more, **summary(found, reference)}
        save(result)
        first = next(iter(found[name].scores))
        callback(f"{name}: ID {float(found[name].scores[first].mean()):.3f}")
        if name == "clean":
            if learned is not None:
                alone = _score(world, learned, change(portraits, generator), identity, rows)
                more["paintings_of_own"] = _share(alone.scores, reference)
            more["four_minus_one"] = _four(world, space, identity, rows, found[name])
    result = {**more, **summary(found, reference)}
    save(result)
    return result


def _score(world: WildWorld, space: Space, shown: Shown, identity: Tensor, rows: Tensor) -> _Found:
    """One picture of each person, each on its own."""
    z, flags, sure, said = [], [], [], []
    for i in range(len(identity)):
        mask = None if shown.masks is None else shown.masks[i : i + 1]
        framed = _framed(space, shown.pictures[i : i + 1], mask, world.size, shown.crop)
        z.append(_guess(space, framed))
        verdict = judge(space.start, framed)
        flags.append(verdict.flagged)
        sure.append(math.nan if verdict.confidence is None else verdict.confidence)
        said.append(verdict.sentence)
    seen = world.read(space.decode(torch.cat(z)), space.layout)
    scores = {name: id_scores(embeddings, identity) for name, embeddings in seen.items()}
    return _Found(scores, torch.tensor(flags), torch.tensor(sure), said)


def _framed(space: Space, pictures: Tensor, mask: Tensor | None, size: int, cut: bool) -> Framed:
    start = space.start
    locator = start if start is not None and start.locates else None
    return Framing(space.frame, locator, crop=cut)(pictures, size, mask=mask)


def _guess(space: Space, framed: Framed) -> Tensor:
    """[1, d]"""
    guess = start_from(space, framed.pictures, mask=framed.weights if framed.weighted else None)
    assert guess is not None
    return guess.z


def _portraits(world: WildWorld, identity: Tensor, rows: Tensor, shot: int) -> Portraits:
    pictures, masks = world.portraits(identity, rows, shot)
    glasses, _ = world.portraits(world.glasses(identity), rows, shot)
    return Portraits(pictures, masks, glasses)


def _four(
    world: WildWorld, space: Space, identity: Tensor, rows: Tensor, one: _Found
) -> list[float]:
    """What four pictures of a person add to one, paired: mean and 95 % interval."""
    shots = torch.stack([world.portraits(identity, rows, shot)[0] for shot in range(4)], dim=1)
    z = [_guess(space, _framed(space, some, None, world.size, True)) for some in shots]
    seen = world.read(space.decode(torch.cat(z)), space.layout)
    gains = [id_scores(seen[name], identity) - one.scores[name] for name in seen]
    mean = estimate(torch.stack(gains).mean(0))
    return [round(n, 4) for n in (mean.mean, mean.low, mean.high)]


def summary(found: Mapping[str, _Found], reference: Mapping[str, Tensor]) -> dict[str, Any]:
    """The result from what was found by condition, and the ID scores [N] of own LoRAs by embedder."""
    clean = found["clean"]
    rows: dict[str, Any] = {}
    for name, f in found.items():
        rows[name] = {
            "id_score": {n: estimate(s).to_json() for n, s in f.scores.items()},
            "share": round(_share(f.scores, clean.scores), 4),
            "flagged": round(float(f.flagged.float().mean()), 4),
            "confidence": round(float(f.confidence.nanmean()), 4),
            "said": max(sorted(set(f.sentences)), key=f.sentences.count, default=""),
        }
    people = len(clean.flagged)
    rank = _rank(found)
    return {
        "clean_of_own": round(_share(clean.scores, reference), 4),
        "share": {n: r["share"] for n, r in rows.items()},
        "flagged": {n: r["flagged"] for n, r in rows.items() if n != "clean"},
        "false_alarms": rows["clean"]["flagged"],
        "confidence_rank": None if rank is None else round(rank, 4),
        "people": people,
        "own": {n: estimate(s).to_json() for n, s in reference.items()},
        "conditions": rows,
    }


def _share(scores: Mapping[str, Tensor], of: Mapping[str, Tensor]) -> float:
    """Ratio of mean ID scores, the mean over embedders."""
    ratios = [float(scores[name].mean() / of[name].mean()) for name in of]
    return sum(ratios) / len(ratios)


def _rank(found: Mapping[str, _Found]) -> float | None:
    """Rank correlation of confidence and true ID over all conditions; where nobody is to be found, ID is 0."""
    sure = torch.cat([f.confidence for f in found.values()])
    true = torch.cat(
        [
            torch.zeros(len(f.flagged)) if name in NOBODY else _mean(f.scores)
            for name, f in found.items()
        ]
    )
    known = torch.isfinite(sure)
    if int(known.sum()) < 3:
        return None
    ranks = torch.stack([_ranks(sure[known]), _ranks(true[known])])
    return float(torch.corrcoef(ranks)[0, 1])


def _mean(scores: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(scores.values())).mean(0)


def _ranks(values: Tensor) -> Tensor:
    """Ranks, equal values sharing theirs [N]."""
    _, which, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count - 1) / 2)[which]


def table(result: Mapping[str, Any]) -> str:
    """As Markdown; +- is half of a 95 % interval over people."""
    names = list(result["own"])
    head = (
        "| | " + " | ".join(f"ID, {n}" for n in names) + " | share of clean | flagged | verdict |"
    )
    lines = [head, "|---" * (len(names) + 4) + "|"]
    for name, row in result["conditions"].items():
        cells = [
            f"{s['mean']:.3f} +- {(s['high'] - s['low']) / 2:.3f}"
            for s in (row["id_score"][n] for n in names)
        ]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {row['share']:.3f} | {row['flagged']:.2f} | {row['said']} |"
        )
    return "\n".join(lines)


def ground(portraits: Portraits, generator: torch.Generator) -> Tensor:
    """Places without anybody [N, 3, S, S]: colours that change slowly, and a few edges."""
    count, _, height, width = portraits.pictures.shape
    slow = torch.rand(count, 3, 3, 3, generator=generator) * 1.6 - 0.8
    place = F.interpolate(slow, (height, width), mode="bilinear", align_corners=True)
    shelf = (torch.arange(height) > 0.7 * height).float()[None, None, :, None]
    tone = torch.rand(count, 3, 1, 1, generator=generator) * 1.6 - 0.8
    return place * (1 - 0.6 * shelf) + tone * 0.6 * shelf


def _moved(
    pictures: Tensor, *, right: float = 0, down: float = 0, scale: float = 1, degrees: float = 0
) -> Tensor:
    """By half frames to the right and down; a scale above 1 shows more, and the person smaller."""
    move = torch.tensor([[-right, -down, math.log(scale), -math.radians(degrees)]])
    return crop(pictures, move.expand(len(pictures), -1), pictures.shape[-1])[0]


def _gain(pictures: Tensor, gain: float) -> Tensor:
    return ((pictures + 1) * gain - 1).clamp(-1, 1)


def _blur(pictures: Tensor) -> Tensor:
    """A box about 6 % of a side wide."""
    reach = max(1, round(pictures.shape[-1] * 0.03))
    padded = F.pad(pictures, (reach,) * 4, mode="replicate")
    return F.avg_pool2d(padded, 2 * reach + 1, stride=1)


def _jpeg(pictures: Tensor, quality: int) -> Tensor:
    """Through Pillow's own JPEG."""
    import numpy as np
    from PIL import Image

    found = []
    for picture in pictures:
        pixels = picture.add(1).mul(127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        read = np.asarray(Image.open(file).convert("RGB")).copy()
        found.append(torch.from_numpy(read).float().div(127.5).sub(1).permute(2, 0, 1))
    return torch.stack(found)


def _boxes(masks: Tensor) -> Tensor:
    """Left, top, right and bottom [N, 4] of what masks show, in pixels."""
    boxes = []
    for mask in masks[:, 0] > 0.5:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        if not len(rows):
            raise ConfigError("A portrait's mask shows nobody.")
        boxes.append([int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1])
    return torch.tensor(boxes)


def _hat(portraits: Portraits) -> tuple[Tensor, Tensor]:
    """A plain hat over the upper quarter of the person, wider than they are; and what is left of their masks."""
    pictures, masks = portraits.pictures.clone(), portraits.masks.clone()
    for i, (left, top, right, bottom) in enumerate(_boxes(masks).tolist()):
        brim = top + round(0.25 * (bottom - top))
        wider = round(0.05 * (right - left))
        rows, columns = slice(0, brim), slice(max(0, left - wider), right + wider)
        pictures[i, :, rows, columns] = torch.tensor([0.1, -0.4, -0.2])[:, None, None]
        masks[i, :, rows, columns] = 0
    return pictures, masks


def _half_covered(portraits: Portraits) -> tuple[Tensor, Tensor]:
    """Something plain over one half of the person; and masks of the other half."""
    pictures, masks = portraits.pictures.clone(), portraits.masks.clone()
    for i, (left, _, right, _) in enumerate(_boxes(masks).tolist()):
        middle = (left + right) // 2
        columns = slice(0, middle) if i % 2 else slice(middle, pictures.shape[-1])
        pictures[i, :, :, columns] = torch.tensor([-0.3, -0.1, 0.2])[:, None, None]
        masks[i, :, :, columns] = 0
    return pictures, masks


def _composed(portraits: Portraits, place: Tensor) -> Tensor:
    return portraits.pictures * portraits.masks + place * (1 - portraits.masks)


def _wide(portraits: Portraits, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The person somewhere in a picture three times as high and four times as wide, and their mask."""
    count, _, height, width = portraits.pictures.shape
    large = Portraits(
        *(F.interpolate(t, (3 * height, 4 * width)) for t in vars(portraits).values())
    )
    place = ground(large, generator)
    mask = torch.zeros(count, 1, 3 * height, 4 * width)
    for i in range(count):
        x = int(torch.randint(3 * width, (), generator=generator))
        y = int(torch.randint(2 * height, (), generator=generator))
        rows, columns = slice(y, y + height), slice(x, x + width)
        person = portraits.masks[i]
        place[i, :, rows, columns] = portraits.pictures[i] * person + place[i, :, rows, columns] * (
            1 - person
        )
        mask[i, :, rows, columns] = person
    return place, mask


def _two(portraits: Portraits) -> tuple[Tensor, Tensor]:
    """Two people side by side, the one who is meant on the left, and their mask."""
    other = torch.zeros_like(portraits.masks)
    pictures = torch.cat([portraits.pictures, portraits.pictures.roll(1, 0)], dim=3)
    return pictures, torch.cat([portraits.masks, other], dim=3)
