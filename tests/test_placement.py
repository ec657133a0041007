"""Placements are a group, crops cut what they say, and a frame puts heads where they were in training."""

import json
import math

import pytest
import torch

from w2wpp.errors import ConfigError, ShapeError
from w2wpp.placement import Frame, compose, crop, inverse, place_box


def some(count, seed=0):
    drawn = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return drawn * torch.tensor([0.4, 0.4, 0.5, 0.7])


def blob(height, width, x, y, radius):
    """A white disc on black [1, 3, H, W], in pixels."""
    rows, columns = torch.arange(height)[:, None] + 0.5, torch.arange(width)[None] + 0.5
    disc = ((columns - x) ** 2 + (rows - y) ** 2).sqrt() < radius
    return disc.float().expand(1, 3, -1, -1)


def test_placements_are_a_group():
    a, b, c = some(9, 1), some(9, 2), some(9, 3)
    zero = torch.zeros(9, 4)
    torch.testing.assert_close(compose(a, inverse(a)), zero, atol=1e-5, rtol=0)
    torch.testing.assert_close(compose(inverse(a), a), zero, atol=1e-5, rtol=0)
    torch.testing.assert_close(compose(compose(a, b), c), compose(a, compose(b, c)))


def test_a_crop_of_a_crop_is_the_crop_at_once():
    picture = torch.nn.functional.interpolate(
        torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0)), (90, 90), mode="bicubic"
    )
    outer = torch.tensor([[0.1, -0.05, math.log(0.7), 0.3]])
    inner = torch.tensor([[-0.1, 0.1, math.log(0.6), -0.2]])
    twice = crop(crop(picture, outer, 120)[0], inner, 24)[0]
    at_once = crop(picture, compose(outer, inner), 24)[0]
    assert (twice - at_once).abs().max() < 0.04


@pytest.mark.parametrize("size", [(60, 60), (60, 160), (400, 90)])
def test_a_crop_keeps_circles_round_and_says_what_it_invented(size):
    height, width = size
    picture = blob(height, width, 30, height - 20, 12)
    box = place_box(torch.tensor([[18.0, height - 32.0, 42.0, height - 8.0]]), size)
    placement = torch.cat([box[:, :2], box[:, 2:3].log(), torch.zeros(1, 1)], dim=1)
    cut, inside = crop(picture, placement, 48)
    white = cut[0, 0] > 0.5
    assert float(white.float().mean()) == pytest.approx(math.pi / 4, abs=0.02)
    assert torch.equal(white, white.T) and bool((inside == 1).all())
    wider = placement + torch.tensor([[0.0, 0.0, math.log(3.0), 0.0]])
    cut, inside = crop(picture, wider, 48)
    assert 0.2 < float(inside.mean()) < 0.95
    nothing = crop(picture + 1, wider, 48, edge="zeros")[0][inside.expand_as(cut) == 0]
    assert float(nothing.mean()) < 0.05  # half a pixel of the rim is blended


def test_a_large_picture_is_averaged_on_the_way_down():
    stripes = torch.arange(999).remainder(2).float().expand(1, 3, 999, -1)
    cut, _ = crop(stripes, torch.zeros(1, 4), 16)
    assert (cut - 0.5).abs().max() < 0.05


def test_a_frame_puts_heads_where_they_were():
    frame = Frame(0.05, -0.1, 0.4, 0.5)
    heads = torch.tensor([[0.3, 0.2, 0.2, 0.25], [-1.0, 0.4, 0.8, 1.0]])
    placement = frame.around(heads)
    torch.testing.assert_close(frame.head(placement), heads)
    same = torch.tensor([[0.05, -0.1, 0.4, 0.5]])
    assert bool(frame.as_photographed(frame.around(same)))
    assert not bool(frame.as_photographed(frame.around(same + torch.tensor([[0.5, 0, 0, 0]]))))


def test_a_frame_is_measured_kept_and_read_again():
    heads = torch.tensor([[0.1, -0.1, 0.4, 0.5]]) + 0.02 * some(200)
    frame = Frame.of_heads(heads)
    assert frame.half_height == pytest.approx(0.5, abs=0.01)
    assert frame.spread[0] == pytest.approx(float(heads[:, 0].std()), abs=1e-3)
    again = Frame.from_json(json.loads(json.dumps(frame.to_json())))
    assert again == frame


@pytest.mark.parametrize(
    "odd",
    [
        {"version": 2},
        {"half_width": 0.0},
        {"right": float("nan")},
        {"spread": [0.1]},
        {"spread": "wide"},
    ],
)
def test_odd_frames_are_refused(odd):
    with pytest.raises(ConfigError):
        Frame.from_json({**Frame().to_json(), "spread": [0.1] * 4, **odd})


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ShapeError, match=r"placement \[B, 4\]"):
        crop(torch.zeros(2, 3, 8, 8), torch.zeros(3, 4), 8)
    with pytest.raises(ShapeError, match=r"heads \[n, 4\]"):
        Frame.of_heads(torch.zeros(0, 4))
