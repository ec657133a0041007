"""Several starts: which ones are screened, and that the best of them goes on."""

from itertools import pairwise

import pytest
import torch

from w2wpp.inversion.multistart import Multistart

START = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])


def begin(settings, start=START, seed=5, steps=4):
    run = settings.begin(start, steps=steps, seed=seed)
    return run, run.ask().unflatten(0, (len(start), -1))  # [B, starts, D]


def test_screens_the_start_the_start_scaled_and_samples_around_it():
    _, asked = begin(Multistart(starts=5, scales=(0.9, 1.1), spread=0.25))
    torch.testing.assert_close(asked[:, 0], START)
    torch.testing.assert_close(asked[:, 1], 0.9 * START)
    torch.testing.assert_close(asked[:, 2], 1.1 * START)
    assert asked.shape == (2, 5, 3)
    assert not torch.equal(asked[:, 3] - START, asked[:, 4] - START)


def test_scales_by_default():
    _, asked = begin(Multistart())
    torch.testing.assert_close(asked[:, 1:3], torch.stack([0.7 * START, 1.3 * START], 1))
    assert asked.shape[1] == 4


def test_samples_have_the_spread_asked_for_and_come_from_the_seed():
    wide = torch.full((1, 2000), 2.0)
    _, asked = begin(Multistart(starts=3, scales=(), spread=0.25), wide)
    assert float((asked[0, 1:] - wide).std()) == pytest.approx(0.25, rel=0.05)
    assert torch.equal(begin(Multistart(), seed=5)[1], begin(Multistart(), seed=5)[1])
    assert not torch.equal(begin(Multistart(), seed=5)[1], begin(Multistart(), seed=6)[1])


def test_from_the_mean_there_is_nothing_to_scale():
    _, asked = begin(Multistart(starts=4), torch.zeros(1, 3))
    assert torch.equal(asked[0, 0], torch.zeros(3))
    assert len(asked[0].unique(dim=0)) == 4


def test_each_person_goes_on_from_their_best_start():
    run, asked = begin(Multistart(starts=3, scales=(0.9, 1.1)))
    assert not run.gradients and run.stage == "screening"
    run.tell(torch.tensor([3.0, 1.0, 2.0, 2.0, 5.0, 1.0]), None)
    torch.testing.assert_close(run.ask(), torch.stack([asked[0, 1], asked[1, 2]]))
    assert run.gradients and run.stage == "adam"


def test_fewer_starts_than_scales_screen_the_first_scales():
    _, asked = begin(Multistart(starts=2, scales=(0.9, 1.1)))
    torch.testing.assert_close(asked, torch.stack([START, 0.9 * START], 1))


def test_the_step_that_screens_is_one_of_all():
    """Of three steps two are left, so the second of them has half of Adam's rate."""
    run, _ = begin(Multistart(starts=1), steps=3)
    run.tell(torch.zeros(2), None)
    points = [run.result()]
    for _ in range(2):
        run.tell(torch.zeros(2), torch.ones_like(run.ask()))
        points.append(run.result())
    lengths = [float((a - b).mean()) for a, b in pairwise(points)]
    assert lengths == pytest.approx([0.1, 0.05], rel=1e-3)
