"""Learning to read people from paintings alone, in a world where it is known what shows."""

import dataclasses
import math

import pytest
import torch

from w2wpp.errors import ConfigError, DataError, ShapeError
from w2wpp.evidence import NAMES, evidence
from w2wpp.inversion.framing import Framing
from w2wpp.inversion.verdict import Calibration, judge, repainted
from w2wpp.start_network import build_start
from w2wpp.training.augment import Augmentation, compressed, plain
from w2wpp.training.fit_locator import LocatorTraining, fit_locator, scenes
from w2wpp.training.fit_paintings import (
    PaintedPeople,
    PaintingsTraining,
    fit_paintings,
    measure_head,
    readable,
)

D, SHOWN, SIZE = 8, 3, 16
TURN = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(5))).Q
SIZES = {"size": SIZE, "width": 8, "features": 32}
QUICK = PaintingsTraining(
    steps=160,
    batch=64,
    most=6,
    augmentation=Augmentation(tint=0.02, gain=0.05, grey=0, covered=0.05),
    locator=LocatorTraining(steps=200, batch=48, **SIZES),
    **SIZES,
)


def faces(z, generator):
    """[n, 3, 16, 16]: a disc in the middle, whose colours are three of the eight turned latents, on anything."""
    n = len(z)
    shown = (z @ TURN)[:, :SHOWN]
    axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    x, y = axis[None, None], axis[None, :, None]
    shift = 0.05 * torch.randn(n, 2, 1, 1, generator=generator)
    radius = ((x - shift[:, 0]) ** 2 + (y - shift[:, 1]) ** 2).sqrt()
    disc = torch.sigmoid((0.55 - radius) * 12)[:, None]
    upper = torch.sigmoid(-(y - shift[:, 1]) * 10)[:, None]
    skin = 0.3 * torch.stack([shown[:, 0], shown[:, 1], -shown[:, 0]], 1)[:, :, None, None]
    hair = 0.4 * torch.stack([shown[:, 2], -shown[:, 2], shown[:, 1]], 1)[:, :, None, None] - 0.3
    person = upper * hair + (1 - upper) * skin
    ground = 0.5 * torch.randn(n, 3, 1, 1, generator=generator)
    return (disc * person + (1 - disc) * ground).clamp(-1, 1)


def people(count, scenes=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, D, generator=generator)
    painted = [faces(z, generator).mul(127).round().to(torch.int8) for _ in range(scenes)]
    return PaintedPeople(z, torch.stack(painted, 1))


@pytest.fixture(scope="module")
def learned():
    return fit_paintings(people(500), QUICK)


def test_what_shows_of_latents_is_found_and_nothing_else():
    painted = people(600)
    seen = painted.bank[:, 0].float().flatten(1)
    found = readable(seen, painted.z, most=8, least_share=0.1)
    assert len(found.share) == SHOWN and float(found.share.min()) > 0.5
    inside = (TURN[:, :SHOWN].T @ found.directions).square().sum(0)
    assert float(inside.min()) > 0.97
    noise = torch.randn(600, 40, generator=torch.Generator().manual_seed(1))
    assert float(readable(noise, painted.z, most=8, least_share=0.1).share.max()) < 0.1


def test_heads_are_where_paintings_change_with_people():
    head, frame = measure_head(people(400))
    assert abs(frame.right) < 0.1 and abs(frame.down) < 0.1
    assert frame.half_width == pytest.approx(0.6, abs=0.15)
    assert float(head[8, 8]) == 1 and float(head[0, 0]) < 0.3


def test_strangers_are_read_and_several_pictures_of_one_are_better_than_one(learned):
    start, _, report = learned
    strangers = people(300, scenes=4, seed=9)
    pictures = strangers.bank.flatten(0, 1).float() / 127
    answers = (start(pictures) @ TURN)[:, :SHOWN].unflatten(0, (300, 4))
    truth = (strangers.z @ TURN)[:, :SHOWN]
    one = torch.nn.functional.cosine_similarity(answers[:, 0], truth, dim=1)
    four = torch.nn.functional.cosine_similarity(answers.mean(1), truth, dim=1)
    assert float(one.mean()) > 0.85
    assert float((four - one).mean()) > 0
    slope = float((answers[:, 0] * truth).sum() / truth.square().sum())
    assert slope == pytest.approx(1, abs=0.3)
    hidden = (start(pictures) @ TURN)[:, SHOWN:]
    assert float(hidden.std()) < 0.5 * float(answers.std())
    assert report["cosine_of_one"] > 0.85 and report["coordinates"] >= SHOWN
    assert report["people"] + report["kept_apart"] == 500


def test_people_are_found_in_larger_pictures(learned):
    start, frame, _ = learned
    strangers = people(12, seed=10)
    wide = torch.full((12, 3, 40, 60), 0.1)
    right, down = 34, 12
    wide[..., down : down + SIZE, right : right + SIZE] = strangers.bank[:, 0].float() / 127
    framed = Framing(frame, start)(wide, SIZE)
    found = framed.placement[torch.tensor([how == "found" for how in framed.how])]
    assert len(found) >= 8
    miss = found[:, :2] - torch.tensor([(right + 8 - 30) / 20, (down + 8 - 20) / 20])
    assert float(miss.abs().median()) < 0.12


def test_confidence_tells_faces_from_what_is_none(learned):
    start, _, _ = learned
    calibration = Calibration.of(start)
    strangers = people(120, seed=11)
    pictures = strangers.bank[:, 0].float() / 127
    good = calibration(evidence(start, pictures))
    nobody = calibration(evidence(start, plain(120, SIZE, torch.Generator().manual_seed(0))))
    black = calibration(evidence(start, torch.full((4, 3, SIZE, SIZE), -1.0)))
    assert float((good < calibration.flag_below).float().mean()) < 0.15
    assert float((nobody < calibration.flag_below).float().mean()) > 0.6
    assert bool((black < calibration.flag_below).all())
    verdict = judge(start, Framing(None, None)(pictures[:1], SIZE))
    assert not verdict.flagged and verdict.to_json()["confidence"] > calibration.flag_below
    verdict.require()
    bad = judge(start, Framing(None, None)(pictures[:1] * 0 - 1, SIZE))
    assert bad.flagged and bad.sentence
    with pytest.raises(DataError, match="strict"):
        bad.require()


def test_a_person_who_explains_nothing_is_flagged(learned):
    framed = Framing(None, None)(people(64).bank[:1, 0].float() / 127, SIZE)
    for start in (learned[0], None):
        verdict = judge(start, framed, gain=-0.01)
        assert verdict.flagged and "no better" in verdict.sentence
    unknown = judge(None, framed, gain=0.1)
    assert unknown.confidence is None and "not known" in unknown.sentence
    with pytest.raises(DataError):
        unknown.require()


def test_a_painting_of_somebody_else_speaks_against_the_answer(learned):
    start = learned[0]
    calibration = Calibration.of(start)
    assert calibration.same[0] > calibration.other[0] + 0.3
    strangers = people(60, seed=12)
    first, second = (strangers.bank[:, i].float() / 127 for i in (0, 1))
    flags = {"same": 0, "other": 0, "none": 0}
    for i in range(60):
        framed = Framing(None, None)(first[i : i + 1], SIZE)
        again = torch.nn.functional.interpolate(second[i : i + 1], scale_factor=2)
        other = second[(i + 1) % 60][None]
        alone = judge(start, framed)
        verdicts = {
            "same": judge(start, framed, repaint=repainted(start, framed, again)),
            "other": judge(start, framed, repaint=repainted(start, framed, other)),
            "none": alone,
        }
        for name, verdict in verdicts.items():
            flags[name] += verdict.flagged
            assert verdict.confidence <= alone.confidence
        if verdicts["other"].flagged and not alone.flagged:
            assert "does not look like" in verdicts["other"].sentence
    assert flags["same"] <= flags["none"] + 4
    assert flags["other"] > 30
    assert "repaint" in verdicts["other"].to_json()["evidence"]


def test_doubt_is_the_likelihood_of_two_people_and_never_negative():
    """By hand: artanh(.5) = .5493 under N(1, .25) and N(0, .5)."""
    calibration = Calibration((0.0,), (1.0,), (0.0,), {}, 0.5, same=(1.0, 0.25), other=(0.0, 0.5))
    x = math.atanh(0.5)
    two = -0.5 * (x / 0.5) ** 2 - math.log(0.5)
    one = -0.5 * ((x - 1) / 0.25) ** 2 - math.log(0.25)
    assert calibration.doubt(0.5) == pytest.approx(two - one, abs=1e-5)
    assert calibration.doubt(0.99) == 0 and calibration.doubt(-1.0) == 4.0
    assert dataclasses.replace(calibration, same=None).doubt(-1.0) == 0
    assert dataclasses.replace(calibration, same=(-1.0, 0.25)).doubt(-1.0) == 0


def test_what_a_mask_hides_is_hidden_in_the_painting_too(learned):
    start = learned[0]
    strangers = people(64, seed=13)
    picture, other = strangers.bank[:1, 0].float() / 127, strangers.bank[1:2, 0].float() / 127
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., : SIZE // 2] = 1
    # Under the mask the painting is the picture; what lies outside is somebody else.
    painted = picture * mask + other * (1 - mask)
    framed = Framing(None, None, crop=False)(picture, SIZE, mask=mask)
    hidden = repainted(start, framed, painted)
    assert hidden > 0.98  # but for the mask's soft edge
    assert repainted(start, Framing(None, None)(picture, SIZE), painted) < hidden - 0.01


def test_verdicts_of_later_releases_and_damaged_ones_are_named(learned):
    config = learned[0].config
    late = build_start({**config, "verdict": {**config["verdict"], "version": 2}})
    with pytest.raises(ConfigError, match="version 1"):
        Calibration.of(late)
    for damage in (
        {"std": [1.0]},
        {"weights": "x"},
        {"usual": 3},
        {"mean": [math.nan] * 7},
        {"repaint": {"same": [1.0, 0.1]}},
        {"repaint": {"same": [1.0, 0.0], "other": [0.0, 1.0]}},
    ):
        odd = build_start({**config, "verdict": {**config["verdict"], **damage}})
        with pytest.raises(ConfigError, match="damaged"):
            Calibration.of(odd)


def test_the_same_seed_learns_the_same():
    short = dataclasses.replace(QUICK, steps=4, locator=LocatorTraining(steps=2, batch=8, **SIZES))
    first, second = (fit_paintings(people(80), short)[0] for _ in range(2))
    assert first.config == second.config
    for name, t in first.state_dict().items():
        assert torch.equal(t, second.state_dict()[name]), name


def test_evidence_has_all_its_names(learned):
    found = evidence(learned[0], torch.zeros(3, 3, 20, 20))
    assert tuple(found) == NAMES and all(t.shape == (3,) for t in found.values())


def test_frames_of_a_locators_lessons_lie_where_they_say():
    bank = people(64).bank[:, 0].float() / 127
    config = LocatorTraining(batch=32, nobody=0.0, **SIZES)

    def pictures(count, generator):
        return bank[torch.randint(64, (count,), generator=generator)]

    seen, place, present = scenes(pictures, config, torch.Generator().manual_seed(2))
    assert seen.shape == (32, 3, SIZE, SIZE) and bool(torch.isfinite(seen).all())
    assert 0.5 < float(present.mean()) <= 1 and float(place[:, 2].min()) < -0.8
    network = fit_locator(pictures, LocatorTraining(steps=1, batch=4, **SIZES))
    assert network(seen).shape == (32, 5)


def test_a_jpeg_of_high_quality_is_the_picture_and_of_low_quality_is_not():
    rough = torch.nn.functional.interpolate(
        torch.rand(2, 3, 7, 7, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8, (20, 28)
    )
    fine, coarse = (compressed(rough, torch.full((2,), q)) for q in (100.0, 10.0))
    assert (fine - rough).abs().mean() < 0.02 < (coarse - rough).abs().mean()


def test_too_few_paintings_and_odd_shapes_are_refused():
    with pytest.raises(DataError, match="learns from 64 painted people"):
        fit_paintings(people(40), QUICK)
    with pytest.raises(ShapeError):
        PaintedPeople(torch.zeros(3, 2), torch.zeros(2, 1, 3, 8, 8, dtype=torch.int8))
    with pytest.raises(ConfigError):
        PaintingsTraining(apart=1.0)
