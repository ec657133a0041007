"""The whole comparison on planted people: a studio that reads traits off vectors, and a model that shows them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, replace

import pytest
import torch

pytest.importorskip("diffusers")
from w2wpp import ConfigError
from w2wpp.avatars.build.spaces import DEFAULT, W2W, Candidate, Model, Workshop, candidates
from w2wpp.avatars.measure import evaluation
from w2wpp.avatars.measure.comparison import Amounts, Plan, compare, full_plan, harder_plan
from w2wpp.avatars.measure.comparison_report import report, table, write
from w2wpp.avatars.measure.population import crowd_row, reference_row, unit
from w2wpp.avatars.world.studio import Shots
from w2wpp.diffusion.schedule import NoiseSchedule
from w2wpp.training.dataset import VectorDataset, write_dataset

TRAITS = ("jaw", "nose", "lips", "brow", "glasses")
SCHEDULE = NoiseSchedule(torch.linspace(0.99, 0.01, 100), "eps")
AMOUNTS = Amounts(people=30, crowd=40, judged=40)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Readable:
    """Not a studio, but reads like one: traits are some numbers of the vector, and the scene's noise."""

    pictures: int = 4
    seed: int = 0
    reader: float = 0.1  # its noise
    judge: float | None = None

    def photograph(self, vectors, layout, *, same=False):
        seen = vectors[:, None, : len(TRAITS)].expand(-1, self.pictures, -1)
        noise = torch.stack(
            [
                torch.randn(seen.shape[1:], generator=generator(self.seed + i))
                for i in range(len(seen))
            ]
        )
        empty = torch.zeros(*seen.shape[:2], 4)
        shots = Shots(seen + self.reader * noise, empty, empty)
        if self.judge is not None:
            object.__setattr__(
                shots, "independent", Shots(seen + self.judge * noise.flip(1), empty, empty)
            )
        return shots


@dataclass(frozen=True)
class Shown:
    """A model whose outputs [B, 1, 2, 4] are moved by the first eight numbers of a LoRA and by no others."""

    def __call__(self, noisy, timestep, vectors):
        moved = vectors[:, :8].reshape(-1, 1, 2, 4)
        return noisy + moved.repeat_interleave(len(noisy) // len(vectors), 0)


MODEL = Model(Shown(), SCHEDULE, torch.randn(6, 1, 2, 4, generator=generator(3)))


@pytest.fixture(scope="module")
def people(layout):
    """200 people: five traits in the first numbers, one of two kinds, three more numbers that bend with them, and
    large differences elsewhere that no picture shows."""
    g = generator(0)
    traits = torch.randn(200, 5, generator=g)
    traits[:, 4] = torch.where(torch.rand(200, generator=g) < 0.5, -1.2, 1.2) + 0.2 * traits[:, 4]
    w = 0.02 * torch.randn(200, layout.size, generator=g)
    w[:, :5] += traits
    w[:, 5:8] += 0.5 * torch.stack(
        [traits[:, 0] * traits[:, 1], traits[:, 2].square() - 1, traits[:, 4].sign()], 1
    )
    hidden = torch.randn(200, 12, generator=g) @ torch.randn(12, layout.size - 8, generator=g)
    w[:, 8:] += hidden
    ids = torch.arange(200)
    return VectorDataset(layout, w, ids, ids >= 160, traits, TRAITS)


PLAN = Plan(
    [Candidate("pca", m, 16) for m in ("parameter", "functional")]
    + [Candidate("curved", "functional", 16)],
    (replace(W2W, latent=16), replace(DEFAULT, latent=16)),
    (Candidate("pca", "functional", 16),),
    (60, 100, 160),
)


@pytest.fixture(scope="module")
def compared(people, tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    studio = Readable(judge=0.2)
    lines = []
    found = compare(studio, people, MODEL, folder, PLAN, amounts=AMOUNTS, callback=lines.append)
    return found, folder, lines


@pytest.fixture(scope="module")
def result(compared, people):
    return report(compared[0], people, amounts=AMOUNTS)


def test_what_counts_in_pictures_decides_and_not_what_varies_most(result):
    rows = result["rows"]
    assert rows["own"]["id_score"]["mean"] > 0.95 and rows["own"]["weight_r2"]["mean"] == 1
    assert rows["pca-functional-16"]["share"]["mean"] > 0.98
    assert rows["mean"]["id_score"]["mean"] < 0.3 > rows["another's"]["id_score"]["mean"]
    assert rows["own"]["outputs_lost"]["mean"] == 0 and rows["mean"].get("outputs_lost") is None
    assert rows["pca-functional-16"]["outputs_lost"]["mean"] < 0.05
    assert (
        rows["pca-functional-16"]["outputs_lost"]["mean"]
        <= rows["pca-parameter-16"]["outputs_lost"]["mean"]
    )


def test_goals_are_paired_and_come_from_both_readers(result, compared):
    scores = compared[0].rebuilt
    for suffix in ("", "_independent"):
        gap = torch.tensor(scores["curved-functional-16"][f"id_score{suffix}"])
        gap = gap - torch.tensor(scores["pca-parameter-16"][f"id_score{suffix}"])
        mean, low, high = result[f"default_minus_w2w{suffix}"]["16"]
        half = 1.96 * float(gap.std()) / len(gap) ** 0.5
        assert mean == pytest.approx(float(gap.mean()), abs=1e-6)
        assert high - low == pytest.approx(2 * half, rel=1e-4)
        assert list(result[f"nonlinear_minus_linear{suffix}"]) == ["16"]
        assert result[f"best_linear{suffix}"]["16"].startswith("pca-")
        low, high = result[f"share_best_interval{suffix}"]
        assert low <= result[f"share_best{suffix}"] <= high
    assert (
        "share_d32" not in result and "harder_share_best" not in result
    )  # of what was not measured


def test_crowds_have_the_floor_beside_them(result):
    crowds = result["crowds"]
    assert set(crowds) == {"own", "pca-parameter-16", "curved-functional-16-flow"}
    for suffix in ("", "_independent"):
        own = crowds["own"]
        assert own[f"energy{suffix}"]["low"] < 0 < own[f"energy{suffix}"]["high"]
        assert 0.5 < result[f"consistency_share{suffix}"] < 1.3
        assert len(result[f"energy_ratio_interval{suffix}"]) == 2
    glasses = crowds["own"]["traits"]["glasses"]
    assert glasses["bimodality"] > 0.7 and glasses["undecided"]["mean"] < 0.1
    assert crowds["pca-parameter-16"]["traits"]["glasses"]["undecided"]["mean"] > 0.15
    assert result["crowd"] == "curved-functional-16-flow"


def test_a_learning_curve_ends_with_everybody(result, compared):
    curve = result["curve"]["pca-functional"]
    assert list(curve) == ["60", "100", "160"]
    assert curve["160"]["id_score"] == result["rows"]["pca-functional-16"]["id_score"]


def test_what_is_kept_is_not_made_again_and_what_changed_is(people, compared):
    found, folder, _ = compared
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    lines = []
    again = compare(
        Readable(judge=0.2), people, MODEL, folder, PLAN, amounts=AMOUNTS, callback=lines.append
    )
    assert again.rebuilt == found.rebuilt and again.drawn == found.drawn and lines == []
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    fewer = compare(
        Readable(judge=0.2), people, MODEL, folder, replace(PLAN, drawn=(), curve=()),
        amounts=replace(AMOUNTS, people=20), callback=lines.append,
    )  # fmt: skip
    assert len(fewer.rebuilt["own"]["id_score"]) == 20 and len(lines) == len(fewer.rebuilt)


def test_results_are_written_as_json_tables_and_plots(result, compared, tmp_path):
    harder = replace(compared[0], drawn={}, curve={})
    both = result | {"harder_rows": result["rows"], "harder_share_best": 1.0}
    assert harder.minutes == compared[0].minutes
    written = write(both, tmp_path / "spaces.json")
    names = {str(p.relative_to(tmp_path)) for p in written}
    assert names == {
        "spaces.json", "spaces.md", "spaces-harder.md", "spaces-crowds.md", "spaces-curve.md",
        "spaces/sizes.png", "spaces/sizes-harder.png", "spaces/people.png",
    }  # fmt: skip
    kept = json.loads((tmp_path / "spaces.json").read_text())
    assert kept["default_minus_w2w"] == result["default_minus_w2w"]
    lines = (tmp_path / "spaces.md").read_text().splitlines()
    assert lines == table(result["rows"]).splitlines() and len(lines) == 2 + len(result["rows"])
    assert all(line.count("|") == lines[0].count("|") for line in lines)


def test_two_data_sets_give_both_goals(compared, people):
    result = report(compared[0], people, harder=compared[0], amounts=AMOUNTS)
    assert result["harder_share_best"] == result["share_best"]
    assert result["harder_rows"] == result["rows"]
    assert result["core_minutes"] == pytest.approx(2 * compared[0].minutes, abs=0.11)


def test_the_full_plan_names_what_the_page_promises():
    families = {c.family for c in full_plan().rebuilt}
    assert families >= {
        "pca-parameter", "pca-raw", "pca-update", "pca-functional", "curved-functional", "vae-skip-parameter",
        "vae-skip-functional", "vae-skip-functional-outputs", "tokens", "original", "original-residual-discriminator",
    }  # fmt: skip
    names = [c.name for c in full_plan().rebuilt]
    assert len(set(names)) == len(names) and DEFAULT in full_plan().drawn
    assert {c.latent for c in full_plan().rebuilt if c.family == "pca-parameter"} == {
        16,
        32,
        64,
        128,
        256,
    }
    assert set(harder_plan().rebuilt) <= set(candidates()) and len(full_plan().curve) == 3


@pytest.mark.parametrize(
    "candidate", [c for c in candidates((4,)) if c.codec != "pca"], ids=lambda c: c.name
)
def test_every_candidate_can_be_made(people, candidate, tmp_path, monkeypatch):
    """With few epochs: what is made is a space of its size that reconstructs something."""
    from w2wpp.avatars.build import spaces

    quick = spaces._vae(candidate) if candidate.codec not in ("curved",) else None
    if quick is not None:
        hidden = {"tokens": (8,), "original": (16,), "original-residual": (16,)}.get(
            candidate.codec
        )
        quick = replace(quick, epochs=2, validation=0.0, **({"hidden": hidden} if hidden else {}))
        monkeypatch.setattr(spaces, "_vae", lambda c: quick)
    space = Workshop(people, MODEL).make(candidate)
    assert space.latent_size == 4 and space.name == f"avatars {candidate.name}"
    assert torch.isfinite(space.decode(space.encode(people.vectors([0, 1])).mean)).all()


def test_without_a_model_only_what_needs_none_is_made(people, compared):
    workshop = Workshop(people, None)
    assert workshop.can_make(Candidate("curved", "update", 32))
    assert not workshop.can_make(Candidate("pca", "functional", 32))
    most = Candidate("curved", "parameter", 126)  # of 160 people, judged among 128
    assert workshop.can_make(most) and not workshop.can_make(replace(most, latent=127))
    assert not workshop.can_make(Candidate("pca", "update", 160))
    with pytest.raises(ConfigError, match="needs the base model"):
        workshop.make(Candidate("pca", "functional", 32))


def test_too_few_people_are_named(people, tmp_path):
    with pytest.raises(ConfigError, match="41 held-out people"):
        compare(
            Readable(), people, None, tmp_path, Plan([Candidate("pca", "raw", 4)]),
            amounts=replace(AMOUNTS, crowd=41),
        )  # fmt: skip


def test_a_crowd_of_copies_is_found_out(people):
    """Drawn people who are training people, and real ones who are not."""
    labels = people.labels
    known, strangers = (unit(labels[r]) for r in (people.training_rows, people.heldout_rows))
    studio = Readable(pictures=2, reader=0.02)
    real = studio.photograph(people.vectors(people.heldout_rows), people.layout)
    copies = studio.photograph(people.vectors(people.training_rows[:40]), people.layout)
    row = crowd_row(copies, real, known, strangers, TRAITS)
    assert row["nearest_above_strangers"]["low"] > 0
    assert reference_row(real, known, strangers, TRAITS)["nearest_training"]["mean"] < 0.98
    assert "energy_independent" not in row  # a studio of one reader


def test_evaluate_scores_a_file_beside_the_references(people, compared, tmp_path, monkeypatch):
    """Without pictures: everything that `w2wpp evaluate` puts into a row, and the table of it."""
    data = tmp_path / "data.safetensors"
    write_dataset(
        data, people.vectors(), people.layout, people.identity, heldout=people.heldout, labels=people.labels,
        label_names=TRAITS,
    )  # fmt: skip

    class Planted(evaluation.Protocol):
        def studio(self):
            return Readable(pictures=self.pictures, judge=0.2)

    monkeypatch.setattr(evaluation, "_known_faces", lambda d: unit(d.labels[d.training_rows]))
    fields = {f.name for f in dataclasses.fields(evaluation.Protocol)}
    paths = {name: data for name in fields & {"base", "embedder", "models"}}
    protocol = Planted(dataset=data, people=20, sampled=16, paths=3, path_steps=5, **paths)
    rows, real = evaluation.reference_rows(protocol)
    path = compared[1] / "spaces" / "pca-functional-16.safetensors"
    rows["pca"] = evaluation.judge_space(path, protocol, real)
    for suffix in ("", "_independent"):
        assert rows["pca"][f"id_score{suffix}"]["mean"] > 0.9
        assert (
            rows["own LoRA"][f"energy{suffix}"]["low"]
            < 0
            < rows["own LoRA"][f"energy{suffix}"]["high"]
        )
        assert rows["another's LoRA"][f"id_score{suffix}"]["mean"] < 0.5
    lines = evaluation.table(rows).splitlines()
    assert len(lines) == 6 and all(line.count("|") == lines[0].count("|") for line in lines)
    assert "energy" in lines[0] and "Frechet" not in lines[0]
