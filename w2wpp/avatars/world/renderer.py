"""Pictures of avatars drawn from known identities: the ground truth of the miniature world.

An avatar is an identity (20 numbers, standard normal) seen under a nuisance (pose, background, light, smile).
Shapes are soft-edged signed distances on a grid twice as fine as the picture, painted back to front.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TRAITS = (
    "skin_tone", "skin_hue", "face_width", "face_height", "jaw",
    "eye_spacing", "eye_size", "eye_hue", "brow_thickness", "brow_tilt",
    "nose", "mouth_width", "lips", "hair_lightness", "hair_hue",
    "hair_length", "hair_volume", "beard", "glasses", "fringe",
)  # fmt: skip
BACKGROUNDS = ("white", "grey", "red", "green", "blue", "sunset", "stripes", "checks")
SMILES = ("serious", "neutral", "smiling")
LIGHTS = ("left", "front", "right")
IMAGE_SIZE = 32
EXPRESSION = (
    1.6  # strength of smiling and frowning: enough to be told apart in three rows of pixels
)
TRAIT_LIMIT = 2.0  # identities are clamped here, so that no face leaves the frame


@dataclass(frozen=True)
class Nuisance:
    """What a photograph adds to an identity. B pictures; every tensor has B rows."""

    background: Tensor  # [B] index into BACKGROUNDS
    smile: Tensor  # [B] index into SMILES
    light: Tensor  # [B] index into LIGHTS
    pose: Tensor  # [B, 4] shift right, shift down, log scale, rotation; standard normal
    jitter: (
        Tensor  # [B, 3] how far smile, light and background stray from their word; standard normal
    )

    def __len__(self) -> int:
        return len(self.background)

    def __getitem__(self, index: slice | Tensor) -> Nuisance:
        return Nuisance(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def words(self) -> Tensor:
        """[B, 3] background, smile and light indices, in the order of the prompt's slots."""
        return torch.stack([self.background, self.smile, self.light], dim=1)


def sample_identities(count: int, *, generator: torch.Generator) -> Tensor:
    """Draw identities [count, 20]: independent standard normals, clamped to +-2."""
    draws = torch.randn(count, len(TRAITS), generator=generator)
    return draws.clamp(-TRAIT_LIMIT, TRAIT_LIMIT)


def sample_nuisance(count: int, *, generator: torch.Generator) -> Nuisance:
    """Draw photographing conditions for ``count`` pictures."""

    def pick(words: tuple[str, ...]) -> Tensor:
        return torch.randint(len(words), (count,), generator=generator)

    return Nuisance(
        background=pick(BACKGROUNDS),
        smile=pick(SMILES),
        light=pick(LIGHTS),
        pose=torch.randn(count, 4, generator=generator).clamp(-2, 2),
        jitter=torch.randn(count, 3, generator=generator).clamp(-2, 2),
    )


def render(
    identity: Tensor, nuisance: Nuisance, *, expression: float = EXPRESSION, chunk: int = 256
) -> Tensor:
    """Paint avatars: identity [B, 20] under ``nuisance`` -> pictures [B, 3, 32, 32] in [-1, 1]."""
    if identity.shape != (len(nuisance), len(TRAITS)):
        raise ValueError(
            f"expected identities of shape ({len(nuisance)}, {len(TRAITS)}), got {tuple(identity.shape)}"
        )
    parts = [
        _paint(identity[start : start + chunk], nuisance[slice(start, start + chunk)], expression)
        for start in range(0, len(identity), chunk)
    ]
    return torch.cat(parts)


class _Canvas:
    """A batch of pictures [B, 3, S, S] in [0, 1] onto which soft shapes are painted."""

    def __init__(self, background: Tensor, sharpness: float) -> None:
        self.pixels = background
        self.sharpness = sharpness

    def cover(self, distance: Tensor) -> Tensor:
        """Signed distance [B, S, S] (negative inside) -> coverage [B, S, S]."""
        return torch.sigmoid(-distance * self.sharpness)

    def paint(self, coverage: Tensor, colour: Tensor) -> None:
        """Blend ``colour`` [B, 3] over the picture where ``coverage`` [B, S, S] is one."""
        alpha = coverage[:, None]
        self.pixels = self.pixels * (1 - alpha) + colour[:, :, None, None] * alpha


def _ellipse(x: Tensor, y: Tensor, width: Tensor | float, height: Tensor | float) -> Tensor:
    """Approximate signed distance to an axis-aligned ellipse: exact in sign, close near the edge."""
    radius = torch.sqrt((x / width) ** 2 + (y / height) ** 2 + 1e-6)
    scale = width if isinstance(width, float) else torch.minimum(width, torch.as_tensor(height))
    return (radius - 1) * scale


def _box(x: Tensor, y: Tensor, width: Tensor | float, height: Tensor | float) -> Tensor:
    return torch.maximum(x.abs() - width, y.abs() - height)


def _colour(*channels: Tensor) -> Tensor:
    return torch.stack(channels, dim=1).clamp(0, 1)


def _background(nuisance: Nuisance, x: Tensor, y: Tensor) -> Tensor:
    """[B, 3, S, S]: six plain colours (one a vertical gradient) and two patterns, each a little off."""
    plain = torch.tensor(
        [[.95, .95, .93], [.5, .5, .52], [.78, .22, .2], [.2, .55, .25], [.2, .32, .75],
         [.95, .6, .25], [.85, .8, .45], [.45, .75, .8]]
    )  # fmt: skip
    other = torch.tensor(
        [[.95, .95, .93], [.5, .5, .52], [.78, .22, .2], [.2, .55, .25], [.2, .32, .75],
         [.35, .15, .45], [.45, .35, .1], [.1, .3, .4]]
    )  # fmt: skip
    kind = nuisance.background[:, None, None]
    gradient = (y + 1) / 2
    stripes = torch.sigmoid(12 * torch.sin(x * 3 * math.pi))
    checks = torch.sigmoid(14 * torch.sin(x * 2.5 * math.pi) * torch.sin(y * 2.5 * math.pi))
    blend = torch.where(kind == 5, gradient, torch.where(kind == 6, stripes, checks))[:, None]
    first, second = (table[nuisance.background][:, :, None, None] for table in (plain, other))
    shade = 1 + 0.05 * nuisance.jitter[:, 2, None, None, None]
    return ((first * (1 - blend) + second * blend) * shade).clamp(0, 1)


def _paint(identity: Tensor, nuisance: Nuisance, expression: float) -> Tensor:
    size = 2 * IMAGE_SIZE
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    grid_y, grid_x = torch.meshgrid(axis, axis, indexing="ij")
    grid_x, grid_y = grid_x[None], grid_y[None]

    trait = {name: identity[:, i, None, None] for i, name in enumerate(TRAITS)}
    flat = {name: identity[:, i] for i, name in enumerate(TRAITS)}
    smile = expression * (
        nuisance.smile[:, None, None] - 1 + 0.12 * nuisance.jitter[:, 0, None, None]
    )
    light = nuisance.light[:, None, None] - 1 + 0.12 * nuisance.jitter[:, 1, None, None]

    # Pose: the face's own coordinates, y pointing down.
    right, down, log_scale, turn = nuisance.pose[:, :, None, None].unbind(1)
    angle, scale = 0.09 * turn, torch.exp(0.04 * log_scale)
    shifted_x, shifted_y = grid_x - 0.05 * right, grid_y - 0.04 * down - 0.06
    x = (torch.cos(angle) * shifted_x + torch.sin(angle) * shifted_y) / scale
    y = (-torch.sin(angle) * shifted_x + torch.cos(angle) * shifted_y) / scale

    canvas = _Canvas(
        _background(nuisance, grid_x.expand_as(x), grid_y.expand_as(x)), sharpness=45.0
    )

    tone, hue = flat["skin_tone"], flat["skin_hue"]
    skin = _colour(
        0.76 + 0.11 * tone + 0.025 * hue,
        0.56 + 0.13 * tone - 0.035 * hue,
        0.44 + 0.13 * tone - 0.05 * hue,
    )
    lightness, warmth = flat["hair_lightness"], flat["hair_hue"]
    hair = _colour(
        0.38 + 0.2 * lightness + 0.12 * warmth,
        0.28 + 0.17 * lightness - 0.01 * warmth,
        0.2 + 0.13 * lightness - 0.1 * warmth,
    )
    face_width = 0.5 + 0.055 * trait["face_width"]
    face_height = 0.62 + 0.055 * trait["face_height"]

    # Hair behind the head: a cap that grows with volume, and strands down to the hair's length.
    volume = 0.08 + 0.04 * trait["hair_volume"]
    length = 0.25 + 0.3 * trait["hair_length"]
    cap = _ellipse(x, y + 0.12, face_width + volume, face_height + volume)
    strands = torch.maximum(
        _box(
            x, y - length / 2 + 0.1, face_width + volume, (length + 0.3).clamp_min(0.02) / 2 + 0.1
        ),
        -y - 0.2,
    )
    canvas.paint(canvas.cover(torch.minimum(torch.maximum(cap, y - 0.1), strands)), hair)

    # Neck and shoulders, then the face, whose lower half narrows to the jaw.
    shirt = torch.tensor([0.3, 0.33, 0.4]).expand(len(identity), 3)
    canvas.paint(canvas.cover(_box(x, y - 0.75, 0.2, 0.35)), skin * 0.85)
    canvas.paint(canvas.cover(_ellipse(x, y - 1.15, 0.75, 0.33)), shirt)
    narrowing = 1 - (0.22 - 0.11 * trait["jaw"]) * (y / face_height).clamp(0, 1) ** 1.5
    face = canvas.cover(_ellipse(x / narrowing, y, face_width, face_height))
    canvas.paint(face, skin)

    # Beard: the lower face in a darker shade of the hair.
    beard = torch.sigmoid(2.2 * (trait["beard"] - 0.3))
    mouth_y = 0.34 + 0.03 * trait["face_height"]
    growth = canvas.cover(
        torch.maximum(0.14 - y + 0.25 * x**2, -_ellipse(x, y - mouth_y, 0.17, 0.07))
    )
    canvas.paint(face * growth * beard, hair * 0.75)

    _paint_mouth(canvas, x, y - mouth_y, trait, smile, skin)
    _paint_nose(canvas, x, y, trait, skin)
    _paint_eyes(canvas, x, y, trait, hair)

    # Fringe over the forehead, down to where the trait puts it.
    hairline = -face_height * (0.62 - 0.15 * trait["fringe"]) + 0.12 * x * trait[
        "fringe"
    ].clamp_min(0)
    fringe = torch.maximum(_ellipse(x, y, face_width + 0.03, face_height + 0.04), y - hairline)
    canvas.paint(canvas.cover(fringe), hair)
    _paint_glasses(canvas, x, y, trait)

    # Light falls from one side; the background catches half of it.
    subject = torch.maximum(face, canvas.cover(torch.minimum(cap, strands)))[:, None]
    shading = 1 + (0.25 + 0.2 * subject) * (light * grid_x)[:, None] - 0.08 * (light.abs())[:, None]
    pixels = (canvas.pixels * shading).clamp(0, 1)
    return F.avg_pool2d(pixels, 2) * 2 - 1


def _paint_mouth(
    canvas: _Canvas, x: Tensor, y: Tensor, trait: dict[str, Tensor], smile: Tensor, skin: Tensor
) -> None:
    width = 0.17 + 0.035 * trait["mouth_width"] + 0.025 * smile
    thickness = 0.045 + 0.013 * trait["lips"]
    bend = 0.13 * smile * ((x / width) ** 2 - 0.5)  # smiling lifts the corners
    beside = x.abs() - width  # keeps the bent ellipse from trailing off along its parabola
    lips = torch.stack([skin[:, 0] * 0.8, skin[:, 1] * 0.45, skin[:, 2] * 0.5], dim=1)
    canvas.paint(canvas.cover(torch.maximum(_ellipse(x, y + bend, width, thickness), beside)), lips)
    inside = torch.maximum(_ellipse(x, y + bend, width * 0.75, thickness * 0.5), beside)
    teeth = canvas.cover(inside) * torch.sigmoid(8 * (smile - 0.5))
    canvas.paint(teeth, torch.full_like(skin, 0.95))


def _paint_nose(
    canvas: _Canvas, x: Tensor, y: Tensor, trait: dict[str, Tensor], skin: Tensor
) -> None:
    width = 0.065 + 0.02 * trait["nose"]
    length = 0.13 + 0.03 * trait["nose"]
    canvas.paint(0.8 * canvas.cover(_ellipse(x, y - 0.06, width, length)), skin * 0.8)
    canvas.paint(0.8 * canvas.cover(_ellipse(x, y - 0.03, width * 0.6, length)), skin * 1.05)


def _paint_eyes(
    canvas: _Canvas, x: Tensor, y: Tensor, trait: dict[str, Tensor], hair: Tensor
) -> None:
    spacing = 0.22 + 0.025 * trait["eye_spacing"]
    size = 0.085 + 0.018 * trait["eye_size"]
    hue = trait["eye_hue"][:, 0, 0]
    iris = _colour(0.3 - 0.12 * hue, 0.3 + 0.06 * hue, 0.3 + 0.2 * hue)
    white = torch.full_like(iris, 0.95)
    dark = torch.full_like(iris, 0.05)
    brow_y = 0.16 + 0.5 * size
    for side in (-1, 1):
        eye_x, eye_y = x - side * spacing, y + 0.1
        opening = canvas.cover(_ellipse(eye_x, eye_y, size * 1.25, size * 0.85))
        canvas.paint(opening, white)
        canvas.paint(opening * canvas.cover(_ellipse(eye_x, eye_y, size * 0.72, size * 0.72)), iris)
        canvas.paint(opening * canvas.cover(_ellipse(eye_x, eye_y, size * 0.3, size * 0.3)), dark)
        # A positive tilt raises the outer ends.
        tilted = eye_y + brow_y + 0.3 * trait["brow_tilt"] * side * eye_x
        brow = _box(
            eye_x, tilted, size * 1.35, (0.034 + 0.014 * trait["brow_thickness"]).clamp_min(0.008)
        )
        canvas.paint(canvas.cover(brow), hair * 0.6)


def _paint_glasses(canvas: _Canvas, x: Tensor, y: Tensor, trait: dict[str, Tensor]) -> None:
    worn = torch.sigmoid(2.5 * (trait["glasses"] - 0.5))
    spacing = 0.22 + 0.025 * trait["eye_spacing"]
    frame = _ellipse(x.abs() - spacing, y + 0.1, 0.17, 0.15).abs() - 0.022
    bridge = _box(x, y + 0.12, spacing - 0.15, 0.02)
    colour = torch.tensor([0.08, 0.08, 0.12]).expand(len(x), 3)
    canvas.paint(worn * canvas.cover(torch.minimum(frame, bridge)), colour)
