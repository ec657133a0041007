"""Pictures of people as they come, brought into the frame in which a space's people were photographed.

Where the person is says a mask, or else a locator: windows of several sizes are looked at, and the best again from
close by. Without either the middle of the picture is taken. What was done is told in words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, DataError, ShapeError
from ..placement import Frame, Locator, Sighting, compose, crop, place_box

SCALES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18)  # sides of windows, in shorter sides of the picture
STRIDE = 0.5  # of a window, from one to the next
LONGEST = (
    768  # pixels per side that a locator is shown at most: crops are cut from the picture itself
)
LOOK = 64  # pixels per side of a window
CERTAIN = 0.5  # of a locator, to be believed
MOST_WINDOWS = 600  # of one scale; of a picture like a ribbon only the large ones are looked at
CANDIDATES = 12  # windows that are looked at again
SEEN, BLANK = 0.5, 1 / 128  # where a mask is white, and where it is black
STRAY = 0.004  # share of a mask's white that is no part of its box on each side: specks of a brush
MOST_PIXELS = 8_192  # per side


@dataclass(frozen=True, eq=False)
class Framed:
    """n pictures in the frame of a space."""

    pictures: Tensor  # [n, 3, S, S] in [-1, 1]
    weights: Tensor  # [n, 1, S, S] what counts: what the mask says, less what cropping invented
    placement: Tensor  # [n, 4] of the frame in each picture
    certainty: Tensor  # [n] of the locator that somebody is there; NaN without one
    how: tuple[str, ...]  # by what each was found
    remarks: tuple[str, ...]  # for the report
    faces: int = 1  # how many people the locator sees in a picture, the most of all of them

    @property
    def weighted(self) -> bool:
        """Whether anything counts less than all."""
        return bool((self.weights < 1).any())


@dataclass(frozen=True)
class Framing:
    """How pictures are brought into a frame."""

    frame: Frame | None = None  # none: a space that does not know how its people were photographed
    locator: Locator | None = None
    crop: bool = True  # otherwise the middle of each picture is taken as it is

    def __call__(
        self,
        pictures: Tensor,
        size: int,
        *,
        mask: Tensor | None = None,
        alpha: Tensor | None = None,
    ) -> Framed:
        """Pictures [n, 3, H, W] in [-1, 1] of any size, with a mask [n or 1, 1, h, w] that is white where the person
        is, and what is opaque of them [n, 1, H, W], cut to `size` pixels per side.

        Raises ShapeError, ConfigError or DataError for what is no picture, and for a mask that fits none of them.
        """
        _check(pictures, mask, size)
        found = [
            self._one(
                pictures[i : i + 1],
                size,
                _row(mask, i),
                _row(alpha, i),
                "" if len(pictures) == 1 else f"Picture {i + 1}: ",
            )
            for i in range(len(pictures))
        ]
        return Framed(
            torch.cat([f.pictures for f in found]),
            torch.cat([f.weights for f in found]),
            torch.cat([f.placement for f in found]),
            torch.cat([f.certainty for f in found]),
            tuple(how for f in found for how in f.how),
            tuple(dict.fromkeys(remark for f in found for remark in f.remarks)),
            max(f.faces for f in found),
        )

    def _one(
        self, picture: Tensor, size: int, mask: Tensor | None, alpha: Tensor | None, name: str
    ) -> Framed:
        """picture [1, 3, H, W], mask [1, 1, h, w], alpha [1, 1, H, W]"""
        remarks: list[str] = []
        if alpha is not None and bool((alpha < 1).any()):
            picture = picture * alpha  # on grey
            if mask is None or not bool((mask > BLANK).any()):
                mask, said = alpha, "What is transparent does not count."
                remarks.append(said)
        else:
            alpha = None
        mask = self._judged(picture, mask, remarks)
        seen = self._look(picture, mask)
        placement, certainty, how, faces = self._place(picture, mask, seen, remarks)
        cut, inside = crop(picture, placement, size)
        if self.locator is not None and how != "found":  # what would it say of what was taken?
            with torch.no_grad():
                certainty = float(self.locator.locate(cut).certainty)
        weights = inside
        for layer in (mask, alpha):
            if layer is not None:
                layer = _stretched(layer, picture.shape[-2:])
                weights = weights * crop(layer, placement, size, edge="zeros")[0]
        if not bool((weights > BLANK).any()):
            raise ConfigError(
                f"{name}The mask leaves nothing of the picture. Paint over the person, or leave the mask out."
            )
        told = tuple(f"{name}{remark}" for remark in remarks)
        return Framed(
            cut, weights, placement, torch.tensor([certainty]), (how,), told, max(1, faces)
        )

    def _judged(self, picture: Tensor, mask: Tensor | None, remarks: list[str]) -> Tensor | None:
        """The mask if it says anything, right way round."""
        if mask is None:
            return None
        mask = mask.nan_to_num().clamp(0, 1)
        if not bool((mask > BLANK).any()):
            remarks.append("The mask is black everywhere: it counts as none.")
            return None
        white = mask > SEEN * mask.max()
        if bool(white.all()):
            remarks.append("The mask is white everywhere: it counts as none.")
            return None
        if self._is_inverted(picture, mask, white):
            remarks.append(
                "The mask is inverted: it leaves out a person whom it should be painted over. What it leaves out "
                "was taken; invert the mask to be rid of this line."
            )
            return 1 - mask
        return mask

    def _is_inverted(self, picture: Tensor, mask: Tensor, white: Tensor) -> bool:
        """Whether the picture's black part holds the person: its rim is white, and a locator sees nobody else."""
        rim = torch.cat([white[..., 0, :], white[..., -1, :], white[..., 0], white[..., -1]], -1)
        if float(rim.float().mean()) < 0.75 or float(white.float().mean()) < 0.3:
            return False
        if self.locator is None:
            return True
        for kept, inverted in ((mask, False), (1 - mask, True)):
            if (seen := self._look(picture, kept)) is not None and len(seen.certainty):
                return inverted
        return True

    def _place(
        self, picture: Tensor, mask: Tensor | None, seen: Sighting | None, remarks: list[str]
    ) -> tuple[Tensor, float, str, int]:
        """Placement [1, 4], certainty, how and how many people."""
        whole = torch.zeros(1, 4)
        if not self.crop:
            return whole, math.nan, "whole", 1
        faces = 0 if seen is None else len(seen.certainty)
        if seen is not None and faces:
            best = int(_merit(seen).argmax())
            placement = seen.placement[best : best + 1]
            if faces > 1:
                remarks.append(
                    f"{faces} people are in the picture{' under the mask' if mask is not None else ''}; the "
                    f"{_which(seen, best)} was taken. Paint a mask over the one who is meant."
                )
            if self.frame is not None and bool(self.frame.as_photographed(placement)):
                placement = whole if _is_square(picture) else placement
            return placement, float(seen.certainty[best]), "found", faces
        if mask is not None:
            return self._place_by(mask, picture, remarks), math.nan, "mask", 1
        if seen is not None:
            remarks.append("No face was found; the middle of the picture was taken.")
        elif not _is_square(picture):
            remarks.append(
                "The middle square of the picture was taken. Paint a mask over the person to say where they are."
            )
        return whole, math.nan, "whole", 1

    def _place_by(self, mask: Tensor, picture: Tensor, remarks: list[str]) -> Tensor:
        """Placement [1, 4] in which what a mask shows lies as heads did in training."""
        frame, head = self.frame or Frame(), _box(mask, picture.shape[-2:])
        placement = frame.around(head)
        near = bool(frame.as_photographed(placement))
        if self.frame is None:
            # Whoever fills a square picture is taken to be framed as in training; nothing is known that says otherwise.
            near |= float(head[0, 2:].max()) > 0.5
            if not (near and _is_square(picture)):
                remarks.append(
                    "This space does not know how its people were photographed; a usual portrait was assumed."
                )
        return torch.zeros(1, 4) if near and _is_square(picture) else placement

    def _look(self, picture: Tensor, mask: Tensor | None) -> Sighting | None:
        """The people whom the locator is certain of, under the mask if there is one; surest first."""
        if self.locator is None:
            return None
        frame = self.frame or Frame()
        shown = _within(picture, LONGEST)
        windows = torch.cat(list(_windows(picture.shape[-2:], mask)))
        first = _looked(self.locator, shown, windows)
        order = first.certainty.argsort(descending=True)[:CANDIDATES]
        again = _looked(self.locator, shown, first.placement[order])
        keep = again.certainty >= CERTAIN
        if mask is not None:
            keep &= _covered(mask, frame.head(again.placement), picture.shape[-2:]) >= 0.3
        return _apart(Sighting(again.placement[keep], again.certainty[keep]), frame)


def _check(pictures: Tensor, mask: Tensor | None, size: int) -> None:
    if pictures.ndim != 4 or pictures.shape[1] != 3 or 0 in pictures.shape:
        raise ShapeError(f"Pictures to frame are [n, 3, H, W]. Got {list(pictures.shape)}.")
    if max(pictures.shape[-2:]) > MOST_PIXELS:
        raise ConfigError(
            f"Pictures have at most {MOST_PIXELS:,} pixels per side. Got {pictures.shape[-1]:,} x "
            f"{pictures.shape[-2]:,}; scale them down first."
        )
    if not bool(torch.isfinite(pictures).all()):
        raise DataError("The pictures hold NaN or infinite numbers.")
    if mask is not None and (
        mask.ndim != 4
        or mask.shape[1] != 1
        or len(mask) not in (1, len(pictures))
        or 0 in mask.shape
    ):
        raise ConfigError(
            f"There are {len(pictures)} pictures and masks of the shape {list(mask.shape)}; connect one mask for all, "
            "or one for each."
        )
    if size < 1:
        raise ConfigError(f"A frame has at least one pixel per side. Got {size}.")


def _row(layers: Tensor | None, i: int) -> Tensor | None:
    if layers is None:
        return None
    return (layers if len(layers) == 1 else layers[i : i + 1]).float()


def _stretched(layer: Tensor, size: Sequence[int]) -> Tensor:
    """A mask over a picture (height, width), whatever its own size."""
    if tuple(layer.shape[-2:]) == tuple(size):
        return layer
    return F.interpolate(layer, tuple(size), mode="bilinear", antialias=True)


def _is_square(picture: Tensor) -> bool:
    return picture.shape[-1] == picture.shape[-2]


def _within(picture: Tensor, longest: int) -> Tensor:
    """A picture [1, 3, H, W] scaled down until its longer side is no longer than that."""
    height, width = picture.shape[-2:]
    share = longest / max(height, width)
    if share >= 1:
        return picture
    return F.interpolate(
        picture, [max(1, round(side * share)) for side in (height, width)], mode="area"
    )


def _windows(size: Sequence[int], mask: Tensor | None) -> Iterator[Tensor]:
    """Placements [m, 4] of windows of each scale all over a picture (height, width), or about what a mask shows."""
    shorter = min(size)
    reach = [side / shorter for side in (size[1], size[0])]  # of right and down, from the middle
    box = None if mask is None else _box(mask, size)[0]
    scales: Sequence[float] = SCALES
    if box is not None:
        large = float(box[2:].max())
        scales = tuple(large * s for s in (2.2, 1.5, 1.0, 0.7, 0.5))
    for scale in scales:
        places: list[Tensor] = []
        for axis in range(2):
            low, high = -reach[axis] + scale, reach[axis] - scale
            if box is not None:
                low, high = (float(box[axis]) + sign * float(box[2 + axis]) for sign in (-1, 1))
            elif low > high:
                low = high = 0.0
            count = 1 + math.ceil(max(0.0, high - low) / (2 * scale * STRIDE))
            count = min(count, MOST_WINDOWS)
            places.append(
                torch.linspace(low, high, count) if count > 1 else torch.tensor([(low + high) / 2])
            )
        if len(places[0]) * len(places[1]) > MOST_WINDOWS and scale != scales[0]:
            continue
        right, down = torch.meshgrid(*places, indexing="xy")
        log = torch.full_like(right, math.log(scale))
        yield torch.stack([right, down, log, torch.zeros_like(log)], dim=-1).reshape(-1, 4)


def _looked(locator: Locator, picture: Tensor, windows: Tensor) -> Sighting:
    """What the locator says of windows [m, 4], in the picture's coordinates."""
    places, certain = [], []
    for some in windows.split(64):
        alike = some[:, 2].unique()
        if len(alike) == 1:  # windows of one scale share the picture that is averaged down for them
            shown = crop(picture, some, LOOK)[0]
        else:
            shown = torch.cat([crop(picture, w[None], LOOK)[0] for w in some])
        with torch.no_grad():
            answer = locator.locate(shown)
        places.append(compose(some, answer.placement.float().cpu()))
        certain.append(answer.certainty.float().cpu())
    return Sighting(torch.cat(places), torch.cat(certain))


def _apart(seen: Sighting, frame: Frame) -> Sighting:
    """One sighting of each person: the surest of those whose heads overlap."""
    heads = frame.head(seen.placement)
    kept: list[int] = []
    for i in seen.certainty.argsort(descending=True).tolist():
        away = [(heads[i, :2] - heads[k, :2]).abs() / (heads[i, 2:] + heads[k, 2:]) for k in kept]
        if all(float(gap.max()) > 0.6 for gap in away):
            kept.append(i)
    rows = torch.tensor(kept, dtype=torch.long)
    return Sighting(seen.placement[rows], seen.certainty[rows])


def _merit(seen: Sighting) -> Tensor:
    """Large and certain: [m]."""
    return seen.certainty * seen.placement[:, 2].exp().sqrt()


def _which(seen: Sighting, best: int) -> str:
    return "largest" if best == int(seen.placement[:, 2].argmax()) else "most certain"


def _box(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Middle and half sides [1, 4] of what a mask [1, 1, h, w] of a picture (height, width) shows, without specks."""
    white = (mask[0, 0] > SEEN * mask.max()).double()
    edges = []
    for sums, side in ((white.sum(0), size[1]), (white.sum(1), size[0])):
        share = sums.cumsum(0) / sums.sum()
        first = int((share > STRAY).nonzero()[0])
        last = int((share >= 1 - STRAY).nonzero()[0])
        edges.append((first * side / len(sums), (last + 1) * side / len(sums)))
    (left, right), (top, bottom) = edges
    return place_box(torch.tensor([[left, top, right, bottom]]), (size[0], size[1]))


def _covered(mask: Tensor, heads: Tensor, size: Sequence[int]) -> Tensor:
    """How much of heads (middle and half sides [m, 4]) a mask covers [m]."""
    upright = torch.cat([heads[:, :2], (heads[:, 2:].prod(1, keepdim=True)).log() / 2], dim=1)
    place = torch.cat([upright, torch.zeros(len(heads), 1)], dim=1)
    whole = _stretched(mask, size)
    return crop(whole, place, 16, edge="zeros")[0].mean((1, 2, 3))
