"""The benchmark of pictures as they come: what its conditions do, what its figures mean, and a run in a tiny world."""

import json
import math

import pytest
import torch

from w2wpp import Basis, Layout, Module, Space, build_codec
from w2wpp.avatars.measure import wild
from w2wpp.errors import ConfigError
from w2wpp.start_network import StartNetwork

SIZE, T, D = 16, 3, 3
LAYOUT = Layout("toy", "toy", (Module("a", 3, 2),), rank=1, alpha=1.0)


class Tints:
    """People are discs whose colour is who they are; a LoRA's first numbers are read back."""

    size = SIZE

    def portraits(self, identity, rows, shot):
        axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
        disc = ((axis[:, None] ** 2 + axis[None] ** 2) < 0.5).float()
        masks = disc.expand(len(identity), 1, -1, -1).clone()
        tint = (identity / 3 + 0.01 * shot)[:, :, None, None].clamp(-1, 1)
        return masks * tint + (1 - masks) * 0.8, masks

    def glasses(self, identity):
        return identity + torch.tensor([0.5, 0, 0])

    def read(self, vectors, layout):
        seen = torch.nn.functional.normalize(vectors @ TURN, dim=1)[:, None].expand(-1, 2, -1)
        return {"one": seen, "other": seen}


TURN = torch.linalg.qr(torch.randn(LAYOUT.size, T, generator=torch.Generator().manual_seed(1))).Q


class Tinted(StartNetwork):
    """Answers the tint of the middle."""

    def describe(self, pictures):
        half = pictures.shape[-1] // 2
        return pictures[:, :, half - 2 : half + 2, half - 2 : half + 2].mean((2, 3))

    def answer(self, features):
        return features * 3


@pytest.fixture
def space():
    basis = Basis(
        torch.zeros(LAYOUT.size), torch.ones(LAYOUT.size), TURN.T.contiguous(), torch.ones(D)
    )
    codec = build_codec({"name": "pca", "coefficient_size": D, "latent_size": D})
    start = Tinted(D, size=SIZE, width=8, features=8).requires_grad_(False).eval()
    return Space(LAYOUT, basis, codec, torch.zeros(D), torch.ones(D), start=start)


def people(count=8):
    identity = torch.randn(count, T, generator=torch.Generator().manual_seed(2))
    return identity, torch.arange(count), identity @ TURN.T


def portraits(count=4):
    identity, rows, _ = people(count)
    return wild._portraits(Tints(), identity, rows, 0)


def test_every_condition_of_the_goals_is_there_and_gives_pictures():
    made = wild.conditions()
    wanted = {
        "clean", "shift_12", "shift_25", "zoom_0.6", "zoom_1.4", "rotation_10", "rotation_25", "gain_0.6", "gain_1.4",
        "grey", "jpeg_50", "jpeg_20", "blur", "hat", "half_covered", "half_covered_mask", "glasses", "background",
        "wide", "wide_mask", "two_mask", "far_out", "blend", "no_face", "black",
    }  # fmt: skip
    assert set(made) == wanted and next(iter(made)) == "clean"
    clean = portraits().pictures
    for name, change in made.items():
        shown = change(portraits(), torch.Generator().manual_seed(0))
        assert len(shown.pictures) == 4 and shown.pictures.shape[1] == 3, name
        assert float(shown.pictures.abs().max()) <= 1.01 and bool(
            torch.isfinite(shown.pictures).all()
        ), name
        assert (shown.masks is not None) == name.endswith("_mask"), name
        if shown.masks is not None:
            assert shown.masks.shape[-2:] == shown.pictures.shape[-2:]
        if (
            name not in ("clean", "rotation_10", "rotation_25")
            and shown.pictures.shape == clean.shape
        ):
            assert (shown.pictures - clean).abs().mean() > 1e-3, name


def test_moves_go_where_they_say():
    picture = torch.full((1, 3, 40, 40), -1.0)
    picture[..., 18:22, 18:22] = 1
    moved = wild._moved(picture, right=0.5, down=-0.25)
    rows, columns = (moved[0, 0] > 0).nonzero().float().mean(0).tolist()
    assert (columns, rows) == (pytest.approx(19.5 + 10, abs=0.6), pytest.approx(19.5 - 5, abs=0.6))
    smaller = wild._moved(picture, scale=2)
    assert float((smaller + 1).sum()) == pytest.approx(float((picture + 1).sum()) / 4, rel=0.1)


def test_half_of_a_person_is_covered_and_their_mask_is_the_other_half():
    shown, masks = wild._half_covered(portraits())
    kept = masks.sum((1, 2, 3)) / portraits().masks.sum((1, 2, 3))
    torch.testing.assert_close(kept, torch.full((4,), 0.5), atol=0.05, rtol=0)
    assert float(((shown - portraits().pictures).abs() * masks).max()) == 0


def test_a_run_writes_what_the_goals_are_stated_in(space):
    identity, rows, own = people()
    saved = []
    result = wild.run_wild(
        Tints(),
        space,
        identity,
        rows,
        own,
        learned=space,
        save=lambda r: saved.append(json.dumps(r)),
    )
    assert len(saved) == len(wild.conditions()) + 1
    assert result["clean_of_own"] == pytest.approx(1, abs=0.02)
    assert result["paintings_of_own"] == result["clean_of_own"]
    assert (
        result["share"]["clean"] == 1 and result["share"]["gain_0.6"] < result["share"]["jpeg_50"]
    )
    assert result["share"]["black"] < 0.7
    mean, low, high = result["four_minus_one"]
    assert low <= mean <= high
    assert result["confidence_rank"] is None  # this start was not taught to judge
    assert result["flagged"]["no_face"] == 0 and "clean" not in result["flagged"]
    lines = wild.table(result).splitlines()
    assert len(lines) == 2 + len(wild.conditions()) and "| ID, other |" in lines[0]


def found(scores, confidence):
    scores, confidence = torch.tensor(scores), torch.tensor(confidence)
    return wild._Found({"one": scores}, confidence < 0.5, confidence, ["said"] * len(scores))


def test_figures_are_shares_of_clean_and_ranks_count_nobody_as_nothing():
    parts = {
        "clean": found([0.8, 0.6], [0.9, 0.8]),
        "grey": found([0.4, 0.3], [0.6, 0.4]),
        "no_face": found([0.9, 0.9], [0.2, 0.1]),
    }
    result = wild.summary(parts, {"one": torch.tensor([0.7, 0.9])})
    assert result["share"]["grey"] == pytest.approx(0.5)
    assert result["clean_of_own"] == pytest.approx(0.7 / 0.8)
    assert result["flagged"] == {"grey": 0.5, "no_face": 1.0} and result["false_alarms"] == 0
    assert result["confidence_rank"] == pytest.approx(0.9857, abs=1e-3)
    parts["clean"].confidence[0] = math.nan
    assert wild.summary(parts, {"one": torch.ones(2)})["confidence_rank"] is not None


def test_a_space_without_a_start_is_refused(space):
    with pytest.raises(ConfigError, match="no start network"):
        wild.run_wild(Tints(), space.with_(start=None), *people())


def test_portraits_of_the_miniature_world_come_with_the_masks_of_their_people():
    pytest.importorskip("diffusers", reason="the miniature world needs diffusers")
    from w2wpp.avatars.measure.wild_world import StudioWorld
    from w2wpp.avatars.world.renderer import TRAITS

    world = StudioWorld(studio=None, more={})
    identity = torch.zeros(3, len(TRAITS))
    pictures, masks = world.portraits(identity, torch.arange(3), 0)
    size = world.size
    assert pictures.shape == (3, 3, size, size) and masks.shape == (3, 1, size, size)
    assert float(masks[:, 0, size // 2, size // 2].min()) > 0.95
    assert float(masks[:, 0, 0].max()) < 0.05 and 0.2 < float(masks.mean()) < 0.8
    again = world.portraits(identity, torch.arange(3), 0)[0]
    assert torch.equal(pictures, again)
    assert not torch.equal(pictures, world.portraits(identity, torch.arange(3), 1)[0])
    with_glasses = world.portraits(world.glasses(identity), torch.arange(3), 0)[0]
    assert (with_glasses - pictures).abs().max() > 0.2


def test_wild_takes_one_space_or_two(capsys):
    from w2wpp.cli import main

    assert main(["evaluate", "--wild", "a", "b", "c"]) == 1
    assert "Got 3 files" in capsys.readouterr().err
