"""Pictures of avatars drawn from known identities: the ground truth of the miniature world.

Everything is signed distances in the face's own coordinates, painted back to front on a grid twice as fine as the
picture. A unit is half the frame of a close portrait; y points down.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .drawing import Canvas, arc, box, colour, ellipse, intersection, union
from .scene import BACKGROUNDS, TRAITS, Scene, face_coordinates

IMAGE_SIZE = 128
FINER = 2  # supersampling per side


def render(identity: Tensor, scene: Scene, *, size: int = IMAGE_SIZE, chunk: int = 8) -> Tensor:
    """Paint avatars: identity [B, 20] in ``scene`` -> pictures [B, 3, size, size] in [-1, 1].

    ``chunk`` pictures are painted at a time: few, because the layers of a few fit the processor's cache.
    """
    if identity.shape != (len(scene), len(TRAITS)):
        raise ValueError(
            f"expected identities of shape ({len(scene)}, {len(TRAITS)}), got {tuple(identity.shape)}"
        )
    parts = [
        _Portrait(identity[start : start + chunk], scene[slice(start, start + chunk)], size).paint()
        for start in range(0, len(identity), chunk)
    ]
    return torch.cat(parts)


def render_empty(scene: Scene, *, size: int = IMAGE_SIZE, chunk: int = 8) -> Tensor:
    """The same places with nobody in them: pictures [B, 3, size, size] in [-1, 1]."""
    nobody = torch.zeros(len(scene), len(TRAITS))
    parts = [
        _Portrait(nobody[start : start + chunk], scene[slice(start, start + chunk)], size).develop()
        for start in range(0, len(scene), chunk)
    ]
    return torch.cat(parts)


def matte(identity: Tensor, scene: Scene, *, size: int = IMAGE_SIZE) -> Tensor:
    """How much of each pixel [B, 1, size, size] is the person: what stays as it is when the background changes."""
    walls = [
        replace(scene, background=torch.full_like(scene.background, BACKGROUNDS.index(name)))
        for name in ("white", "blue")
    ]
    one, other = (render(identity, wall, size=size) for wall in walls)
    bare, bare_other = (render_empty(wall, size=size) for wall in walls)
    changed, full = (
        (a - b).abs().sum(1, keepdim=True) for a, b in ((one, other), (bare, bare_other))
    )
    return (1 - changed / full).clamp(0, 1)


class _Portrait:
    """One chunk of pictures while it is painted. Fields that vary over the picture are [B, S, S] or broadcast to it."""

    def __init__(self, identity: Tensor, scene: Scene, size: int) -> None:
        fine = size * FINER
        axis = (torch.arange(fine) + 0.5) / fine * 2 - 1
        self.frame_x, self.frame_y = axis[None, None, :], axis[None, :, None]
        self.scene = scene
        self.flat = {name: identity[:, i] for i, name in enumerate(TRAITS)}  # [B]
        self.trait = {name: value[:, None, None] for name, value in self.flat.items()}
        self.smile = (scene.smile - 1 + 0.1 * scene.jitter[:, 0])[:, None, None]
        self.light = (scene.light - 1 + 0.1 * scene.jitter[:, 1])[:, None, None]

        placement = scene.placement()
        self.x, self.y = face_coordinates(placement, fine)
        # Shoulders lean half as much as the head does.
        self.body_x, self.body_y = face_coordinates(placement, fine, turned=0.5)
        scale = placement[:, 2, None, None].exp()

        self.canvas = Canvas(self._background(), 2 / fine / scale)
        self._choose_colours()
        self._measure_face()

    def paint(self) -> Tensor:
        self._hair_behind()
        self._body()
        self._ears()
        self._head()
        self._beard()
        self._mouth()
        self._nose()
        self._eyes()
        self._hair_in_front()
        self._glasses()
        return self.develop()

    def develop(self) -> Tensor:
        """What is on the canvas, at the picture's size and in [-1, 1]."""
        return F.avg_pool2d(self.canvas.pixels.clamp(0, 1), FINER) * 2 - 1

    def _choose_colours(self) -> None:
        tone, hue = self.flat["skin_tone"], self.flat["skin_hue"]
        self.skin = colour(
            0.78 + 0.105 * tone + 0.02 * hue, 0.58 + 0.13 * tone - 0.035 * hue, 0.46 + 0.13 * tone - 0.055 * hue
        )  # fmt: skip
        lightness, warmth = self.flat["hair_lightness"], self.flat["hair_hue"]
        self.hair = colour(
            0.40 + 0.2 * lightness + 0.12 * warmth,
            0.29 + 0.17 * lightness - 0.015 * warmth,
            0.21 + 0.13 * lightness - 0.1 * warmth,
        )
        hue = self.flat["eye_hue"]
        self.iris = colour(0.34 - 0.13 * hue, 0.34 + 0.07 * hue, 0.32 + 0.22 * hue)

    def _measure_face(self) -> None:
        trait = self.trait
        self.width = 0.5 + 0.055 * trait["face_width"]
        self.height = 0.62 + 0.055 * trait["face_height"]
        # The lower half narrows to the chin; a strong jaw narrows late and little.
        below = (self.y / self.height).clamp(0, 1.2)
        self.narrowing = 1 - (0.2 - 0.1 * trait["jaw"]) * below.pow(1.6)
        self.face = ellipse(self.x / self.narrowing, self.y, self.width, self.height)
        self.mouth_y = 0.34 + 0.03 * trait["face_height"]
        self.eye_x = 0.22 + 0.026 * trait["eye_spacing"]
        self.eye_size = 0.088 + 0.018 * trait["eye_size"]
        # Light as on a ball: brighter where the surface turns to it, darker towards the far edge and the chin.
        across = (self.x / self.width).clamp(-1.2, 1.2)
        self.shade = 1 + 0.24 * self.light * across - 0.1 * across.square() - 0.05 * below.square()

    def _lit(self, tint: Tensor, strength: float = 1.0) -> Tensor:
        """A colour [B, 3] under the light: [B, 3, S, S]."""
        shade = 1 + strength * (self.shade - 1)
        return (tint[:, :, None, None] * shade[:, None]).clamp(0, 1)

    def _background(self) -> Tensor:
        """[B, 3, S, S]: plain colours, one gradient and two patterns, with a glow behind the head."""
        kind = self.scene.background
        x, y = self.frame_x, self.frame_y
        sunset = ((y + 1) / 2).expand(1, y.shape[1], x.shape[2])
        stripes = (0.5 + 5 * torch.sin(x * 4 * math.pi)).clamp(0, 1).expand_as(sunset)
        checks = (0.5 + 8 * torch.sin(x * 3 * math.pi) * torch.sin(y * 3 * math.pi)).clamp(0, 1)
        blend = torch.cat([torch.zeros_like(sunset).expand(5, -1, -1), sunset, stripes, checks])
        first, second = (table[kind][:, :, None, None] for table in (_FRONT, _OTHER))
        glow = 1.04 - 0.1 * (x.square() + (y + 0.1).square())
        glow = glow + 0.06 * self.light * x + 0.04 * self.scene.jitter[:, 2, None, None]
        return (torch.lerp(first, second, blend[kind][:, None]) * glow[:, None]).clamp(0, 1)

    def _strands(self) -> Tensor:
        """Hair colour [B, 3, S, S]: strands fall from the crown, with a soft sheen across them."""
        angle = torch.atan2(self.x, self.y + 1.7)
        strands = torch.sin(46 * angle + 2.2 * torch.sin(9 * angle)) + 0.6 * torch.sin(
            101 * angle + 1
        )
        sheen = torch.exp(-((self.y + 0.5 * self.height + 0.12 * self.x.square()) / 0.12).square())
        shade = (
            1
            + 0.10 * strands
            + 0.22 * sheen
            + 0.22 * self.light * (self.x / self.width).clamp(-1.2, 1.2)
        )
        return (self.hair[:, :, None, None] * shade[:, None]).clamp(0, 1)

    def _hair_behind(self) -> None:
        """A cap that grows with volume, and falls down to the hair's length."""
        volume = 0.075 + 0.04 * self.trait["hair_volume"]
        length = 0.28 + 0.36 * self.trait["hair_length"]
        self.strands = self._strands()
        cap = ellipse(self.x, self.y + 0.12, self.width + volume, self.height + volume)
        # It falls from where the cap is widest, so that the outline has no step.
        inwards = 0.1 * (self.y + 0.12).clamp_min(0).square()
        tips = 0.02 * torch.sin(38 * self.x) + 0.25 * self.x.square()
        fall = intersection(
            self.x.abs() - (self.width + volume) + inwards, -0.12 - self.y, self.y - length + tips
        )
        covered = union(intersection(cap, self.y), fall)
        self.canvas.paint(self.canvas.cover(covered), self.strands * 0.82)

    def _body(self) -> None:
        x, y = self.body_x, self.body_y
        shade = 1 + 0.2 * self.light * x.clamp(-1, 1) - 0.06 * x.square()
        neck = box(x, y - 0.72, 0.2 + 0.02 * self.trait["jaw"], 0.4, corner=0.05)
        under_chin = torch.exp(-((y - self.height + 0.02) / 0.14).square().clamp_max(20))
        tint = self.skin[:, :, None, None] * (0.9 * shade - 0.22 * under_chin)[:, None]
        self.canvas.paint(self.canvas.cover(neck), tint.clamp(0, 1))
        shoulders = union(ellipse(x, y - 1.32, 1.02, 0.56), box(x, y - 2.6, 1.0, 1.3, corner=0.2))
        collar = ellipse(x, y - 0.76, 0.29, 0.2)
        shirt = torch.tensor([0.27, 0.34, 0.46])[None, :, None, None] * shade[:, None]
        self.canvas.paint(self.canvas.cover(intersection(shoulders, -collar)), shirt.clamp(0, 1))
        seam = intersection(shoulders, collar.abs() - 0.022)
        self.canvas.paint(self.canvas.cover(seam), (shirt * 0.72).clamp(0, 1))

    def _ears(self) -> None:
        for side in (-1, 1):
            x, y = self.x - side * (self.width + 0.005), self.y + 0.02
            self.canvas.paint(
                self.canvas.cover(ellipse(x, y, 0.075, 0.125)), self._lit(self.skin * 0.94)
            )
            self.canvas.paint(
                0.5 * self.canvas.cover(ellipse(x - side * 0.01, y, 0.035, 0.07), 0.03),
                self._lit(self.skin * 0.72),
            )

    def _head(self) -> None:
        self.covered = self.canvas.cover(self.face)
        self.canvas.paint(self.covered, self._lit(self.skin))
        blush = torch.exp(
            -(((self.x.abs() - 0.27) / 0.13).square() + ((self.y - 0.16) / 0.1).square())
        )
        red = self.skin * torch.tensor([1.0, 0.8, 0.78])
        self.canvas.paint(0.4 * self.covered * blush, self._lit(red))

    def _beard(self) -> None:
        """The lower face in a darker shade of the hair: whoever has one has it, whoever has none has none."""
        worn = torch.sigmoid(5 * (self.trait["beard"] - 0.4))
        x, y = self.x, self.y
        edge = 0.13 - 0.9 * (x.abs() - 0.12).clamp_min(0).square()
        lips = ellipse(x, y - self.mouth_y, 0.16, 0.055)
        growth = self.canvas.cover(intersection(edge - y + 0.02, -lips), 0.05)
        texture = 1 + 0.1 * torch.sin(64 * x / (1.2 + 0.5 * y))
        tint = (self.hair * 0.72)[:, :, None, None] * (texture * self.shade)[:, None]
        self.canvas.paint(0.92 * self.covered * growth * worn, tint.clamp(0, 1))

    def _mouth(self) -> None:
        smile, x, y = self.smile, self.x, self.y - self.mouth_y
        width = 0.17 + 0.034 * self.trait["mouth_width"] + 0.03 * smile
        full = 0.042 + 0.014 * self.trait["lips"]
        curve = torch.where(smile > 0, 0.13 * smile, 0.1 * smile)
        bend = y + curve * ((x / width).square() - 0.45)  # smiling lifts the corners
        ends = x.abs() - width
        lips = self.skin * torch.tensor([0.82, 0.46, 0.5])
        taper = (1 - (x / width).square()).clamp_min(0).sqrt()
        upper = intersection((bend + 0.4 * full).abs() - full * taper * 0.75, ends)
        lower = intersection((bend - 0.45 * full).abs() - full * taper, ends)
        self.canvas.paint(self.canvas.cover(upper), lips * 0.92)
        self.canvas.paint(self.canvas.cover(lower), lips)
        shine = ellipse(x, bend - 0.6 * full, width * 0.4, full * 0.3)
        self.canvas.paint(0.25 * self.canvas.cover(shine, 0.02), torch.ones_like(lips))
        opened = torch.sigmoid(8 * (smile - 0.5))
        teeth = intersection(bend.abs() - full * 0.62 * taper, x.abs() - width * 0.8)
        self.canvas.paint(opened * self.canvas.cover(teeth), torch.full_like(lips, 0.97))
        line = intersection(bend.abs() - 0.008, ends + 0.01)
        self.canvas.paint(0.8 * (1 - opened) * self.canvas.cover(line), lips * 0.45)

    def _nose(self) -> None:
        size = self.trait["nose"]
        width, length = 0.07 + 0.021 * size, 0.15 + 0.03 * size
        x, y = self.x, self.y - 0.03
        ridge = torch.exp(-(x / (0.45 * width)).square()) * self.canvas.cover(
            y.abs() - length, 0.12
        )
        self.canvas.paint(0.35 * ridge, (self._lit(self.skin) * 1.12).clamp(0, 1))
        side = torch.where(self.light >= 0, -1.0, 1.0)  # the shadow falls away from the light
        flank = torch.exp(-((x - side * 0.8 * width) / (0.4 * width)).square())
        self.canvas.paint(
            0.3 * flank * self.canvas.cover((y - 0.02).abs() - length, 0.1),
            self._lit(self.skin * 0.75),
        )
        tip_y = y - length + 0.03
        tip = arc(x, tip_y - 0.035, width, -0.035, 0.012)
        self.canvas.paint(0.75 * self.canvas.cover(tip), self._lit(self.skin * 0.6))
        for hole in (-1, 1):
            nostril = ellipse(x - hole * 0.5 * width, tip_y - 0.012, 0.3 * width, 0.014)
            self.canvas.paint(0.7 * self.canvas.cover(nostril), self._lit(self.skin * 0.4))

    def _eyes(self) -> None:
        size = self.eye_size
        white, dark = torch.full_like(self.iris, 0.97), torch.full_like(self.iris, 0.06)
        for side in (-1, 1):
            x, y = self.x - side * self.eye_x, self.y + 0.1
            socket = torch.exp(
                -((x / (1.7 * size)).square() + ((y + 0.02) / (1.3 * size)).square())
            )
            self.canvas.paint(0.3 * socket, self._lit(self.skin * 0.72))
            almond = ellipse(x, y, size * 1.25, size * 0.82)
            opening = self.canvas.cover(almond)
            self.canvas.paint(opening, white)
            self.canvas.paint(
                opening * self.canvas.cover(ellipse(x, y, size * 0.72, size * 0.72)),
                self.iris * 0.6,
            )
            self.canvas.paint(
                opening * self.canvas.cover(ellipse(x, y, size * 0.6, size * 0.6)), self.iris
            )
            self.canvas.paint(
                opening * self.canvas.cover(ellipse(x, y, size * 0.3, size * 0.3)), dark
            )
            glint = ellipse(x - 0.2 * size, y + 0.25 * size, size * 0.16, size * 0.16)
            self.canvas.paint(opening * self.canvas.cover(glint), white)
            lid = intersection(almond.abs() - 0.014, y + 0.1 * size)
            self.canvas.paint(self.canvas.cover(lid), dark)
            self._brow(x, y, side)

    def _brow(self, x: Tensor, y: Tensor, side: int) -> None:
        thickness = (0.034 + 0.015 * self.trait["brow_thickness"]).clamp_min(0.009)
        # A positive tilt raises the outer ends.
        height = y + 0.16 + 0.5 * self.eye_size + 0.3 * self.trait["brow_tilt"] * side * x
        brow = arc(x, height, self.eye_size * 1.5, 0.045, thickness)
        texture = 1 + 0.12 * torch.sin(90 * x + 30 * y)
        tint = (self.hair * 0.6)[:, :, None, None] * texture[:, None]
        self.canvas.paint(0.95 * self.canvas.cover(brow), tint.clamp(0, 1))

    def _hair_in_front(self) -> None:
        """The hairline, as low as the fringe says, and locks beside the face when the hair is long."""
        fringe = self.trait["fringe"]
        x, y = self.x, self.y
        hairline = -self.height * (0.6 - 0.15 * fringe) + 0.14 * x * fringe.clamp_min(0)
        hairline = (
            hairline
            + 0.30 * x.square() * (1 - 0.5 * fringe.clamp(0, 1))
            + 0.012 * torch.sin(34 * x)
        )
        volume = 0.075 + 0.04 * self.trait["hair_volume"]
        cap = ellipse(x, y + 0.12 * (y < 0), self.width + volume, self.height + volume)
        top = intersection(cap, y - hairline)
        length = 0.28 + 0.36 * self.trait["hair_length"]
        inner = self.width - 0.045 - 0.05 * (y + 0.2).clamp(0, 1)
        outer = self.width + volume - 0.1 * (y + 0.12).clamp_min(0).square()
        locks = intersection(inner - x.abs(), x.abs() - outer, y - length + 0.05, -0.12 - y)
        # Above the temples the locks grow out of the hairline.
        roots = intersection(
            inner + 0.12 * (-0.12 - y) - x.abs(), cap, y + 0.12, -0.6 - y, -0.15 - length
        )
        locks = union(locks, roots)
        covered = self.canvas.cover(union(top, locks))
        shadow = self.covered * self.canvas.cover(union(top, locks) - 0.03, 0.09) * 0.3
        self.canvas.paint(shadow, self._lit(self.skin * 0.6))
        self.canvas.paint(covered, self.strands)

    def _glasses(self) -> None:
        """Worn or not: nobody wears half a pair."""
        worn = torch.sigmoid(25 * (self.trait["glasses"] - 0.5))
        x, y = self.x, self.y + 0.09
        beside = x.abs() - self.eye_x
        lens = box(beside, y, 0.165, 0.135, corner=0.1)
        frame = lens.abs() - 0.02
        bridge = box(x, y + 0.03, (self.eye_x - 0.15).clamp_min(0.01), 0.018)
        temple = intersection(
            self.eye_x + 0.16 - x.abs(), x.abs() - self.width - 0.01, (y + 0.03).abs() - 0.016
        )
        rims = torch.tensor([0.09, 0.09, 0.13]).expand(len(self.iris), 3)
        glass = torch.tensor([0.85, 0.93, 1.0]).expand(len(self.iris), 3)
        self.canvas.paint(0.14 * worn * self.canvas.cover(lens), glass)
        glare = intersection(lens + 0.03, (beside + y + 0.05).abs() - 0.02)
        self.canvas.paint(0.35 * worn * self.canvas.cover(glare, 0.02), glass)
        self.canvas.paint(worn * self.canvas.cover(union(frame, bridge, temple)), rims)


_FRONT = torch.tensor(
    [[.95, .95, .93], [.52, .52, .55], [.78, .24, .22], [.24, .56, .30], [.24, .36, .74],
     [.97, .64, .30], [.86, .80, .50], [.48, .76, .80]]
)  # fmt: skip
_OTHER = torch.tensor(
    [[.95, .95, .93], [.52, .52, .55], [.78, .24, .22], [.24, .56, .30], [.24, .36, .74],
     [.40, .20, .48], [.55, .42, .18], [.16, .38, .48]]
)  # fmt: skip
