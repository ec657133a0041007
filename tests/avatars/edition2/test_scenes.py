"""The renderer of scenes and the frame that faces are brought into."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from w2wpp.avatars.edition2.framing import WINDOW, compose, crop, inverse, matrix
from w2wpp.avatars.edition2.renderer import matte, render, render_empty
from w2wpp.avatars.edition2.scene import (
    FRAMINGS,
    TRAITS,
    WORDS,
    Scene,
    face_map,
    face_weights,
    sample_identities,
    sample_scenes,
)


def drawn(count: int, seed: int = 0, **fixed: int) -> tuple[torch.Tensor, Scene]:
    generator = torch.Generator().manual_seed(seed)
    identity, scene = (
        sample_identities(count, generator=generator),
        sample_scenes(count, generator=generator),
    )
    words = {slot: torch.full((count,), value) for slot, value in fixed.items()}
    return identity, dataclasses.replace(scene, **words)


def test_same_seed_same_pictures_whatever_the_chunk():
    identity, scene = drawn(5)
    assert torch.allclose(
        render(identity, scene, size=32), render(identity, scene, size=32, chunk=2), atol=1e-6
    )


def test_a_smaller_picture_is_the_larger_one_made_small():
    identity, scene = drawn(4)
    small, large = render(identity, scene, size=32), render(identity, scene, size=96)
    assert large.shape == (4, 3, 96, 96) and large.abs().max() <= 1
    assert (F.avg_pool2d(large, 3) - small).abs().mean() < 0.03


@pytest.mark.parametrize("trait", TRAITS)
def test_every_trait_shows_in_the_face(trait):
    _, scene = drawn(1, framing=0, smile=1)
    scene = dataclasses.replace(scene, pose=torch.zeros(1, 4), jitter=torch.zeros(1, 3))
    low, high = torch.zeros(1, len(TRAITS)), torch.zeros(1, len(TRAITS))
    low[0, TRAITS.index(trait)], high[0, TRAITS.index(trait)] = -1.5, 1.5
    changed = (render(low, scene, size=64) - render(high, scene, size=64)).abs()
    assert changed.amax() > 0.15 and changed.mean() > 2e-4


def test_nobody_wears_half_a_pair_of_glasses():
    """Across the trait's range the picture changes at one point only."""
    _, scene = drawn(1, framing=0)
    traits = torch.zeros(21, len(TRAITS))
    traits[:, TRAITS.index("glasses")] = torch.linspace(-2, 2, 21)
    whole = scene[torch.zeros(21, dtype=torch.long)]
    steps = (render(traits, whole, size=32).diff(dim=0)).abs().mean((1, 2, 3))
    assert steps.amax() > 0.8 * steps.sum()


def test_words_decide_what_they_name():
    identity, scene = drawn(2, seed=3, smile=1, light=1)
    for slot, choices in WORDS.items():
        one, two = (
            dataclasses.replace(scene, **{slot: torch.full((2,), value)})
            for value in (0, len(choices) - 1)
        )
        assert (
            render(identity, one, size=32) - render(identity, two, size=32)
        ).abs().amax() > 0.2, slot
    assert scene.words().shape == (2, len(WORDS))


def test_faces_of_wide_scenes_are_smaller_and_stay_in_the_picture():
    _, scene = drawn(400, seed=4)
    scale = scene.placement()[:, 2].exp()
    wide = scene.framing == FRAMINGS.index("wide")
    assert scale[wide].max() < scale[~wide].min()
    assert scene.placement()[wide][:, :2].abs().max() < 0.75


def test_placements_form_a_group():
    generator = torch.Generator().manual_seed(1)
    one, two = (0.4 * torch.randn(6, 4, generator=generator) for _ in range(2))
    assert torch.allclose(compose(one, inverse(one)), torch.zeros(6, 4), atol=1e-6)
    assert torch.allclose(compose(inverse(one), one), torch.zeros(6, 4), atol=1e-6)
    points = torch.randn(6, 2, 1, generator=generator)

    def applied(placement, point):
        linear, offset = matrix(placement).split([2, 1], dim=2)
        return linear @ point + offset

    assert torch.allclose(
        applied(compose(one, two), points), applied(one, applied(two, points)), atol=1e-5
    )


def test_one_frame_for_every_picture_of_a_person():
    """Brought into their frame, pictures of one person from anywhere in the frame show the same face."""
    identity, scene = drawn(12, seed=5, background=0, smile=1, light=1)
    same = identity[:1].expand(12, -1)
    still = dataclasses.replace(scene, jitter=torch.zeros(12, 3))
    faces = crop(render(same, still, size=128), still.placement(), 48)
    middle = slice(12, 36)  # the face without what lies behind it
    faces = faces[:, :, middle, middle]
    apart = (faces - faces.mean(0)).abs().mean()
    other = crop(render(identity, still, size=128), still.placement(), 48)[:, :, middle, middle]
    assert apart < 0.06 < 0.15 < (other - other.mean(0)).abs().mean()


def test_a_crop_is_the_window_around_the_face():
    picture = torch.zeros(1, 3, 64, 64)
    picture[:, :, 20:30, 40:50] = 1  # centre (45, 25) px: (0.406, -0.219) in half frames
    placement = torch.tensor([[0.40625, -0.21875, torch.tensor(0.15625 / WINDOW).log(), 0.0]])
    found = crop(picture, placement, 8)
    assert torch.allclose(found[..., 1:-1, 1:-1], torch.ones(1, 3, 6, 6), atol=1e-4)
    assert torch.allclose(found, found.flip(2)) and torch.allclose(found, found.flip(3))
    placement[:, 2] += torch.tensor(2.0).log()  # twice the window: the square fills a quarter
    assert crop(picture, placement, 8).mean() == pytest.approx(0.25, abs=0.01)


def test_empty_places_show_nobody():
    _, scene = drawn(3, seed=6, background=0, light=1)
    empty = render_empty(scene, size=32)
    assert empty.shape == (3, 3, 32, 32)
    assert empty.diff(dim=3).abs().max() < 0.05  # a wall in soft light, no edge anywhere


def test_wrong_shapes_are_named():
    identity, scene = drawn(3)
    with pytest.raises(ValueError, match=r"\(3, 20\)"):
        render(identity[:2], scene)


@pytest.mark.parametrize("framing", range(len(FRAMINGS)))
def test_faces_get_their_share_of_the_loss_whatever_their_size(framing):
    identity, scene = drawn(6, framing=framing)
    weights = face_weights(scene, 64, 0.6)
    assert weights.shape == (6, 1, 64, 64)
    assert torch.allclose(weights.mean((1, 2, 3)), torch.ones(6), atol=1e-5)
    assert torch.equal(face_weights(scene, 64, 0.0), torch.ones(6, 1, 64, 64))
    # What weighs much is of the person, but for a rim, and holds the middle of the face.
    person = matte(identity, scene, size=64)
    heavy = weights > weights.mean()
    assert (person * heavy).sum() > 0.55 * heavy.sum()
    right, down = ((scene.placement()[:, :2] + 1) / 2 * 64).long().unbind(1)
    assert heavy[torch.arange(6), 0, down, right].all()
    in_heads = (weights * heavy).sum((1, 2, 3)) / weights.sum((1, 2, 3))
    assert (in_heads > 0.6).all(), in_heads


def test_a_map_of_a_face_says_where_it_is_how_large_and_how_turned():
    placement = torch.tensor([[0.5, -0.25, 0.0, 0.0], [0.0, 0.0, math.log(0.5), math.pi / 2]])
    axis = (torch.arange(64) + 0.5) / 32 - 1
    upright, turned = face_map(placement, 64)
    assert upright.shape == (3, 64, 64)
    down, right = divmod(int(upright[2].argmax()), 64)
    assert abs(axis[right] - 0.5) < 0.02 and abs(axis[down] + 0.25) < 0.02
    x, y, near = upright[:, 40, 50].tolist()
    across, below = float(axis[50]) - 0.5, float(axis[40]) + 0.25
    assert near == pytest.approx(math.exp(-(across**2) - below**2), abs=1e-5)
    assert x == pytest.approx(across * near, abs=1e-5)
    assert y == pytest.approx(below * near, abs=1e-5)
    # Half as large, so everything is twice as far; what is to the right of the picture is below in the face.
    x, y, near = turned[:, 32, 48].tolist()
    assert x / near == pytest.approx(2 * float(axis[32]), abs=1e-4)
    assert y / near == pytest.approx(-2 * float(axis[48]), abs=1e-4)
