"""Pictures as they come: found by mask, by locator or not at all, and what is said of it."""

import math

import pytest
import torch
import torch.nn.functional as F

from w2wpp.errors import ConfigError, DataError, ShapeError
from w2wpp.inversion.framing import Framing
from w2wpp.placement import Frame, Sighting

FRAME = Frame(0.0, 0.0, 0.5, 0.5)  # people are discs of half the side in the middle of the picture


def scene(size, *people, background=-0.5):
    """Discs (x, y, radius in pixels) on a plain picture [1, 3, H, W], and the mask of the first [1, 1, H, W]."""
    height, width = size
    rows, columns = torch.arange(height)[:, None] + 0.5, torch.arange(width)[None] + 0.5
    discs = [((columns - x) ** 2 + (rows - y) ** 2).sqrt() < r for x, y, r in people]
    picture = torch.full((1, 3, height, width), background)
    for disc in discs:
        picture[:, :, disc] = torch.tensor([1.0, 0.2, -1.0])[None, :, None]
    return picture, discs[0].float()[None, None]


class Discs:
    """A locator of orange discs: by the moments of what is orange, if it is round and mostly inside."""

    def locate(self, pictures):
        orange = ((pictures[:, 0] > 0.5) & (pictures[:, 2] < -0.3)).float()
        size = pictures.shape[-1]
        axis = (torch.arange(size) + 0.5) / size * 2 - 1
        mass = orange.sum((1, 2)).clamp_min(1e-6)
        x = (orange.sum(1) @ axis) / mass
        y = (orange.sum(2) @ axis) / mass
        area = mass * (2 / size) ** 2
        radius = (area / math.pi).sqrt().clamp_min(1e-3)
        spread = (orange.sum(1) @ axis**2 + orange.sum(2) @ axis**2) / mass - x**2 - y**2
        round_ = ((spread / (radius**2 / 2)) - 1).abs() < 0.1
        inside = (x.abs() + radius < 1.05) & (y.abs() + radius < 1.05)
        place = torch.stack([x, y, (radius / 0.5).log(), torch.zeros_like(x)], dim=1)
        sure = round_ & inside & (radius > 0.08)
        return Sighting(place, torch.where(sure, 0.99 - (radius - 0.5).abs() / 4, 0.01))


def standard():
    return scene((64, 64), (32, 32, 16))[0]


def likeness(cut):
    return float((cut - F.interpolate(standard(), cut.shape[-2:], mode="area")).abs().mean())


@pytest.mark.parametrize(
    "size, person",
    [
        ((64, 64), (32, 32, 16)),
        ((200, 300), (70, 120, 20)),
        ((300, 100), (60, 250, 30)),
        ((80, 900), (700, 40, 30)),
    ],
)
@pytest.mark.parametrize("how", ["mask", "found"])
def test_the_person_is_brought_into_the_frame(size, person, how):
    picture, mask = scene(size, person)
    framing = Framing(FRAME, Discs() if how == "found" else None)
    framed = framing(picture, 64, mask=mask if how == "mask" else None)
    assert framed.how == (how,) and framed.pictures.shape == (1, 3, 64, 64)
    assert likeness(framed.pictures) < 0.06
    if how == "mask":
        assert framed.weights[0, 0, 32, 32] == 1 and framed.weights[0, 0, 2, 2] == 0
    else:
        assert framed.certainty[0] > 0.8


def test_a_mask_says_who_is_meant_and_a_locator_how_they_stand():
    picture, _ = scene((200, 300), (70, 100, 20), (200, 100, 40))
    _, mask = scene((200, 300), (75, 104, 30))  # painted roughly
    framed = Framing(FRAME, Discs())(picture, 64, mask=mask)
    assert framed.how == ("found",) and not framed.remarks
    torch.testing.assert_close(
        framed.placement[0, :3],
        torch.tensor([(70 - 150) / 100, 0.0, math.log(0.2 / 0.5)]),
        atol=0.02,
        rtol=0,
    )


def test_of_several_people_the_largest_is_taken_and_that_is_said():
    picture, _ = scene((200, 300), (70, 100, 20), (200, 100, 40))
    framed = Framing(FRAME, Discs())(picture, 64)
    assert framed.faces == 2
    assert framed.placement[0, 0] == pytest.approx(0.5, abs=0.02)
    assert framed.remarks == (
        "2 people are in the picture; the largest was taken. Paint a mask over the one who is meant.",
    )


@pytest.mark.parametrize("locator", [None, Discs()])
def test_an_inverted_mask_is_noticed_and_a_black_one_counts_as_none(locator):
    picture, mask = scene((120, 120), (50, 70, 20))
    right = Framing(FRAME, locator)(picture, 32, mask=mask)
    inverted = Framing(FRAME, locator)(picture, 32, mask=1 - mask)
    assert "inverted" in inverted.remarks[0] and "inverted" not in "".join(right.remarks)
    torch.testing.assert_close(inverted.placement, right.placement)
    torch.testing.assert_close(inverted.weights, right.weights)
    black = Framing(FRAME, locator)(picture, 32, mask=0 * mask)
    assert "black everywhere" in black.remarks[0] and not black.weighted
    white = Framing(FRAME, locator)(picture, 32, mask=mask * 0 + 1)
    assert "white everywhere" in white.remarks[0]


def test_a_large_mask_over_a_person_who_fills_the_picture_is_not_called_inverted():
    picture, mask = scene((64, 64), (32, 32, 31))
    assert not Framing(FRAME)(picture, 32, mask=mask).remarks


def test_transparency_says_where_the_person_is_and_does_not_count():
    picture, mask = scene((150, 150), (100, 100, 20))
    framed = Framing(FRAME)(picture, 64, alpha=mask)
    assert framed.how == ("mask",) and framed.weights[0, 0, 2, 2] == 0
    assert framed.pictures[0, :, 2, 2].abs().max() == 0  # grey, whatever lay under it
    assert framed.placement[0, 0] == pytest.approx(25 / 75, abs=0.02)


def test_what_cropping_invents_does_not_count():
    picture, mask = scene((100, 100), (10, 50, 20))
    weights = Framing(FRAME)(picture, 64, mask=mask).weights
    assert float(weights[..., :16].mean()) == 0 and float(weights[0, 0, 32, 40]) == 1


def test_without_mask_and_locator_the_middle_is_taken_with_its_aspect():
    picture, _ = scene((100, 220), (110, 50, 25))
    framed = Framing(FRAME)(picture, 64)
    assert framed.how == ("whole",) and likeness(framed.pictures) < 0.06
    assert "middle square" in framed.remarks[0]
    nobody = Framing(FRAME, Discs())(torch.zeros(1, 3, 90, 90), 32)
    assert nobody.certainty[0] < 0.5 and "No face was found" in nobody.remarks[0]


def test_cropping_can_be_left_off():
    picture, mask = scene((200, 200), (50, 60, 20))
    framed = Framing(FRAME, Discs(), crop=False)(picture, 32, mask=mask)
    assert not framed.placement.any() and framed.weights[0, 0, 16, 16] == 0
    assert framed.certainty[0] > 0.5  # somebody is there, if not where they should be


def test_an_old_space_leaves_a_person_who_fills_the_picture_where_they_are():
    picture, mask = scene((64, 64), (30, 30, 28))
    assert not Framing()(picture, 64, mask=mask).placement.any()
    small = Framing()(*scene((64, 64), (20, 30, 8))[:1], 64, mask=scene((64, 64), (20, 30, 8))[1])
    assert small.placement[0, 2] < 0 and "does not know" in small.remarks[0]


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (2, 3), (8000, 8), (2500, 2400)])
@pytest.mark.parametrize("locator", [None, Discs()])
def test_every_size_gives_a_picture(size, locator):
    picture = torch.zeros(1, 3, *size)
    framed = Framing(FRAME, locator)(picture, 32)
    assert framed.pictures.shape == (1, 3, 32, 32) and bool(torch.isfinite(framed.pictures).all())
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 20:40, 30:50] = 1
    assert Framing(FRAME, locator)(picture, 32, mask=mask).pictures.shape == (1, 3, 32, 32)


def test_pictures_of_a_batch_are_framed_each_and_named():
    both = torch.cat([scene((90, 120), (40, 50, 15))[0], torch.zeros(1, 3, 90, 120)])
    framed = Framing(FRAME, Discs())(both, 32)
    assert framed.how == ("found", "whole")
    assert framed.remarks == ("Picture 2: No face was found; the middle of the picture was taken.",)


def test_what_is_no_picture_is_refused():
    framing = Framing(FRAME)
    with pytest.raises(ShapeError, match=r"\[n, 3, H, W\]"):
        framing(torch.zeros(1, 4, 8, 8), 8)
    with pytest.raises(DataError, match="NaN"):
        framing(torch.full((1, 3, 8, 8), float("nan")), 8)
    with pytest.raises(ConfigError, match="one mask for all"):
        framing(torch.zeros(3, 3, 8, 8), 8, mask=torch.ones(2, 1, 8, 8))
    with pytest.raises(ConfigError, match="8,192"):
        framing(torch.zeros(1, 1, 1, 1).expand(1, 3, 4, 9000), 8)
