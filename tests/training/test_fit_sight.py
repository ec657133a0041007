"""A start that sees with a pretrained vision model: what it learns, what it remembers, and what it refuses."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from w2wpp import Basis, Layout, Module, Space, build_codec, inversion, load_space, save_space
from w2wpp.errors import ConfigError, DataError, FormatError, ShapeError
from w2wpp.evidence import evidence
from w2wpp.inversion.framing import Framing
from w2wpp.inversion.verdict import judge
from w2wpp.placement import Frame
from w2wpp.sight import Sight, known_by, patterns
from w2wpp.training.fit_paintings import fit_paintings
from w2wpp.training.fit_sight import SightTraining, fit_sight

from .test_fit_paintings import QUICK, SHOWN, SIZE, TURN, D, people

TRAINING = dataclasses.replace(QUICK, locator=None, sight=SightTraining(judged=60))


class Pretrained:
    """A vision model: random features of pictures of 16 pixels, some of them far larger than others."""

    def __init__(self, seed=0, width=96, precision=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randn(3 * 16 * 16, width, generator=generator) / 16
        self.weights = weights * torch.logspace(-1, 1, width)
        self.name = f"random features {width}"
        self.precision, self.calls, self.sides = precision, 0, set()

    def describe(self, pictures):
        self.calls += len(pictures)
        self.sides.add(pictures.shape[-1])
        small = F.interpolate(pictures, (16, 16), mode="bilinear", antialias=True)
        features = small.flatten(1).to(self.precision) @ self.weights.to(self.precision)
        return features.float().tanh() * self.weights.norm(dim=0)


@pytest.fixture(scope="module")
def vision():
    return Pretrained()


@pytest.fixture(scope="module")
def learned(vision):
    return fit_paintings(people(500), TRAINING, vision=vision)


def space_with(start, frame=None):
    layout = Layout("toy", "toy", (Module("a", 3, 4),), rank=2, alpha=1.0)
    generator = torch.Generator().manual_seed(1)
    v = torch.linalg.qr(torch.randn(layout.size, D, generator=generator)).Q.T
    basis = Basis(torch.zeros(layout.size), torch.ones(layout.size), v, torch.ones(D))
    codec = build_codec({"name": "pca", "coefficient_size": D, "latent_size": D})
    return Space(layout, basis, codec, torch.zeros(D), torch.ones(D), start=start, frame=frame)


def test_strangers_are_read_by_what_the_vision_model_sees(learned, vision):
    start, frame, report = learned
    strangers = people(200, scenes=4, seed=9)
    pictures = strangers.bank.flatten(0, 1).float() / 127
    answers = (start.seeing(vision)(pictures) @ TURN)[:, :SHOWN].unflatten(0, (200, 4))
    truth = (strangers.z @ TURN)[:, :SHOWN]
    one = F.cosine_similarity(answers[:, 0], truth, dim=1)
    four = F.cosine_similarity(answers.mean(1), truth, dim=1)
    assert float(one.mean()) > 0.8
    assert float((four - one).mean()) > 0
    slope = float((answers[:, 0] * truth).sum() / truth.square().sum())
    assert slope == pytest.approx(1, abs=0.3)
    assert report["vision"] == vision.name and report["cosine_of_one"] > 0.8
    assert start.sight.size == SIZE and start.sight.features == 96
    # It looks at the head, which is where the frame says.
    right, down, log = start.sight.placement
    assert (right, down) == pytest.approx((frame.right, frame.down))
    assert -1 < log < 0


def test_it_can_be_told_whether_to_trust_the_answer(learned, vision):
    start = learned[0].seeing(vision)
    pictures = people(60, seed=11).bank[:, 0].float() / 127
    clean = [judge(start, Framing()(pictures[i : i + 1], SIZE)) for i in range(20)]
    assert sum(v.flagged for v in clean) <= 6
    black = judge(start, Framing()(torch.full((1, 3, 16, 16), -1.0), SIZE))
    assert black.flagged
    assert float(evidence(start, pictures)["strangeness"].exp().mean()) == pytest.approx(1, abs=0.5)


def test_without_its_vision_model_or_with_another_it_refuses(learned, vision):
    start, picture = learned[0], torch.zeros(1, 3, SIZE, SIZE)
    for use in (
        lambda: start(picture),
        lambda: start.seeing(None),
        lambda: start.describe(picture),
    ):
        with pytest.raises(ConfigError, match=r"random features 96.*none is connected"):
            use()
    with pytest.raises(
        ConfigError, match=r"taught with.*features of test patterns differ by \d+ ?%"
    ):
        start.seeing(Pretrained(seed=1))
    with pytest.raises(ConfigError, match=r"random features 64: it gives 64 features, not 96"):
        start.seeing(Pretrained(width=64))
    with pytest.raises(ShapeError):
        start.seeing(vision)(torch.zeros(1, 4, SIZE, SIZE))


def test_half_precision_is_the_same_model(learned, vision):
    half = learned[0].seeing(Pretrained(precision=torch.bfloat16))
    picture = people(64).bank[:8, 0].float() / 127
    torch.testing.assert_close(
        half(picture), learned[0].seeing(vision)(picture), atol=0.2, rtol=0.1
    )


def test_a_start_that_needs_none_takes_any(vision):
    start = fit_paintings(people(80), dataclasses.replace(QUICK, steps=2, locator=None))[0]
    assert start.seeing(None) is start and start.seeing(vision) is start
    assert start.sight is None


def test_a_file_remembers_what_it_sees_with(learned, vision, tmp_path):
    start, frame, _ = learned
    space = space_with(start, frame)
    save_space(space, tmp_path / "space.safetensors")
    loaded = load_space(tmp_path / "space.safetensors")
    assert loaded.start.sight == start.sight and loaded.start.verdict == start.verdict
    assert not any("eye" in name for name in loaded.start.state_dict())
    picture = people(64).bank[:4, 0].float() / 127
    torch.testing.assert_close(
        loaded.start.seeing(vision)(picture), start.seeing(vision)(picture), atol=0.05, rtol=0.05
    )
    with pytest.raises(ConfigError, match="none is connected"):
        loaded.start_from(picture)
    # With it the space guesses, and moving the space does not copy the model.
    seeing = loaded.with_(start=loaded.start.seeing(vision))
    moved = seeing.to("cpu")
    torch.testing.assert_close(moved.start_from(picture).z, loaded.start.seeing(vision)(picture))
    assert copy.deepcopy(seeing.start)._eye.vision is vision
    guess = inversion.start_from(seeing, picture)
    assert guess.z.shape == (1, D) and seeing.fingerprint == space.fingerprint


def test_a_damaged_sight_is_named(learned, tmp_path, monkeypatch):
    start = learned[0]
    for damage in ({"placement": [0.0]}, {"size": 0}, {"features": 0}, {"placement": ["x", 0, 0]}):
        config = {**start.sight.to_json(), **damage}
        monkeypatch.setattr(Sight, "to_json", lambda self, config=config: config)
        save_space(space_with(start), tmp_path / "odd.safetensors")
        with pytest.raises(FormatError):
            load_space(tmp_path / "odd.safetensors")


def test_broken_vision_models_are_refused(vision):
    class Odd(Pretrained):
        def __init__(self, describe):
            super().__init__()
            self.describe = describe

    painted = people(80)
    with pytest.raises(DataError, match="NaN or infinite"):
        known_by(Odd(lambda p: torch.full((len(p), 4), torch.nan)))
    with pytest.raises(ShapeError, match=r"describes 3 pictures by \[3, V\]"):
        known_by(Odd(lambda p: torch.zeros(1, 4)))
    with pytest.raises(DataError, match="the same in every painting"):
        fit_paintings(painted, TRAINING, vision=Odd(lambda p: torch.ones(len(p), 4)))
    assert patterns().shape == (3, 3, 64, 64) and float(patterns().abs().max()) <= 1
    with pytest.raises(ConfigError, match="looks at least once"):
        SightTraining(looks=0)


def test_the_ridge_is_chosen_by_people_who_took_no_part(vision):
    """With a few people and many features a strong ridge reads strangers better than the weakest."""
    common = {
        "frame": Frame(), "head": torch.ones(SIZE, SIZE), "augmentation": QUICK.augmentation, "most": 6,
        "least_share": 0.08, "features": 32, "seed": 3,
    }  # fmt: skip
    told = []
    sighted = fit_sight(
        people(70), Pretrained(width=400), SightTraining(looks=1), callback=lambda *t: told.append(t), **common
    )  # fmt: skip
    assert sighted.penalty > 1e-3
    assert told[-1][:2] == (140, 140) and sighted.features.shape[0] == 140
    assert sighted.network.features == sighted.features.shape[1]
