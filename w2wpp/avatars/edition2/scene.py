"""Who is in a picture, and how it was taken: the two halves of every picture of the miniature world.

An avatar is an identity (20 numbers, standard normal) seen in a scene: words that a prompt can ask for (background,
smile, light, framing) and what no prompt tells (where in the frame the face is, how large, how it is turned).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

TRAITS = (
    "skin_tone", "skin_hue", "face_width", "face_height", "jaw",
    "eye_spacing", "eye_size", "eye_hue", "brow_thickness", "brow_tilt",
    "nose", "mouth_width", "lips", "hair_lightness", "hair_hue",
    "hair_length", "hair_volume", "beard", "glasses", "fringe",
)  # fmt: skip
TRAIT_LIMIT = 2.0  # identities are clamped here: no feature leaves the face, no face its frame

BACKGROUNDS = ("white", "grey", "red", "green", "blue", "sunset", "stripes", "checks")
SMILES = ("serious", "neutral", "smiling")
LIGHTS = ("left", "front", "right")
FRAMINGS = ("close", "wide")
WORDS = {
    "background": BACKGROUNDS, "smile": SMILES, "light": LIGHTS, "framing": FRAMINGS
}  # fmt: skip
POSE = ("right", "down", "log_scale", "rotation")

# Where a face sits: its origin (between the eyes and the nose) and size in half frames, its turn in radians. Each
# row is a framing's centre and what one standard deviation of the pose adds.
_CENTRE = torch.tensor([[0.0, 0.06, 0.0, 0.0], [0.0, -0.14, -0.6, 0.0]])
_SPREAD = torch.tensor([[0.09, 0.07, 0.09, 0.11], [0.22, 0.09, 0.1, 0.11]])
# Half width and half height of a head with its hair, and how far its middle is above the face's origin.
HEAD = (0.7, 0.82, 0.06)


@dataclass(frozen=True)
class Scene:
    """How B pictures were taken; every tensor has B rows."""

    background: Tensor  # [B] index into BACKGROUNDS
    smile: Tensor  # [B] index into SMILES
    light: Tensor  # [B] index into LIGHTS
    framing: Tensor  # [B] index into FRAMINGS
    pose: Tensor  # [B, 4] right, down, log scale, rotation, in standard deviations of the framing
    jitter: (
        Tensor  # [B, 3] how far smile, light and background stray from their word; standard normal
    )

    def __len__(self) -> int:
        return len(self.background)

    def __getitem__(self, index: slice | Tensor) -> Scene:
        return Scene(*(getattr(self, field.name)[index] for field in fields(self)))

    def words(self) -> Tensor:
        """[B, 4] background, smile, light and framing indices, in the order of the prompt's slots."""
        return torch.stack([getattr(self, slot) for slot in WORDS], dim=1)

    def placement(self) -> Tensor:
        """[B, 4] the face's place: right and down in half frames, natural log of its scale, turn in radians."""
        return _CENTRE[self.framing] + _SPREAD[self.framing] * self.pose


def face_coordinates(placement: Tensor, size: int, *, turned: float = 1.0) -> tuple[Tensor, Tensor]:
    """x and y [B, size, size] of a picture's pixels in the face's own coordinates, for faces at placements [B, 4].

    ``turned`` is how much of the face's turn counts.
    """
    right, down, log_scale, turn = placement[:, :, None, None].unbind(1)
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    across = (axis[None, None, :] - right) / log_scale.exp()
    below = (axis[None, :, None] - down) / log_scale.exp()
    turn = turned * turn
    return turn.cos() * across + turn.sin() * below, -turn.sin() * across + turn.cos() * below


def face_map(placement: Tensor, size: int) -> Tensor:
    """Where faces at placements [B, 4] are, as something to learn: [B, 3, size, size].

    Their own coordinates x and y and a one, all fading out with the distance from their middle.
    """
    x, y = face_coordinates(placement, size)
    near = (-x.square() - y.square()).exp()
    return torch.stack([x * near, y * near, near], dim=1)


def face_weights(scene: Scene, size: int, share: float) -> Tensor:
    """Weights [B, 1, size, size] of mean one for losses over pictures: faces get ``share``, and what an even one gives.

    However small a face is in its frame, so much of the loss is about it.
    """
    x, y = face_coordinates(scene.placement(), size)
    # An ellipse that holds head and hair, with a soft edge of a tenth of its radius.
    radius = ((x / HEAD[0]).square() + ((y + HEAD[2]) / HEAD[1]).square()).sqrt()
    inside = ((1 - radius) / 0.1).sigmoid()
    even = inside / inside.mean((1, 2), keepdim=True)
    return (1 + share * (even - 1))[:, None]


def poses(placement: Tensor, framing: Tensor) -> Tensor:
    """The poses [B, 4] that put faces at placements [B, 4] in pictures of framings [B]: undoes ``Scene.placement``."""
    return (placement - _CENTRE[framing]) / _SPREAD[framing]


def sample_identities(count: int, *, generator: torch.Generator) -> Tensor:
    """Draw identities [count, 20]: independent standard normals, clamped to +-2."""
    draws = torch.randn(count, len(TRAITS), generator=generator)
    return draws.clamp(-TRAIT_LIMIT, TRAIT_LIMIT)


def sample_scenes(count: int, *, generator: torch.Generator) -> Scene:
    """Draw scenes: every word with equal chance, pose and jitter standard normal, clamped to +-2."""
    words = {
        slot: torch.randint(len(choices), (count,), generator=generator)
        for slot, choices in WORDS.items()
    }
    pose = torch.randn(count, len(POSE), generator=generator).clamp(-2, 2)
    jitter = torch.randn(count, 3, generator=generator).clamp(-2, 2)
    return Scene(**words, pose=pose, jitter=jitter)
