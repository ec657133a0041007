"""The benchmark of inversions: what its figures mean, and that a part of it can be scored again."""

import pytest
import torch

pytest.importorskip("diffusers", reason="the miniature world needs diffusers")

from w2wpp.avatars.measure import evaluation
from w2wpp.avatars.measure import inversion_benchmark as benchmark
from w2wpp.avatars.places import MODELS
from w2wpp.errors import ConfigError, DataError

PEOPLE = 4


def scores(id_score, prompt_adherence, pose):
    values = {"id_score": id_score, "prompt_adherence": prompt_adherence, "pose": pose}
    each = {name: torch.full((PEOPLE,), value) for name, value in values.items()}
    return {**each, "evaluations": 8, "seconds": 0.5, "residual_norm": 0.0}


OWN = {
    **scores(0.6, 0.9, 0.6),
    "prompt_adherence_nobody": torch.full((PEOPLE,), 0.9),
    "pose_nobody": torch.full((PEOPLE,), 0.8),
}


def summary(**parts):
    return benchmark.summary(
        {n: benchmark.rows()[n] for n in parts}, {n: {0: p} for n, p in parts.items()}
    )


def test_editability_is_relative_to_pictures_of_nobody_and_at_most_one():
    copied = benchmark.editability(scores(0.9, 0.45, 0.2), OWN)
    assert torch.allclose(copied, torch.full((PEOPLE,), (0.5 + 0.25) / 2))
    assert torch.allclose(benchmark.editability(scores(0.1, 1.0, 0.9), OWN), torch.ones(PEOPLE))


def test_summary_compares_every_row_with_own_loras_and_the_default():
    result = summary(own_lora=OWN, w2wpp=scores(0.5, 0.9, 0.8), start=scores(0.4, 0.9, 0.8))
    assert result["own_lora"] == pytest.approx(0.6) and result["w2wpp_edit"] == pytest.approx(1.0)
    assert result["evaluations"] == 8
    assert result["rows"]["start"]["below_default"]["mean"] == pytest.approx(0.1)
    assert result["rows"]["w2wpp"]["above_own_lora"]["mean"] == pytest.approx(-0.1)


def test_rows_scored_again_replace_their_old_ones_and_keep_the_others():
    before = summary(own_lora=OWN, w2wpp=scores(0.5, 0.9, 0.8), cma=scores(0.3, 0.9, 0.8))
    after = summary(own_lora=OWN, w2wpp=scores(0.55, 0.9, 0.8), start=scores(0.4, 0.9, 0.8))
    both = benchmark.merged(before, after)
    assert both["w2wpp"] == pytest.approx(0.55) and both["cma"] == pytest.approx(0.3)
    assert list(both["rows"]) == [n for n in benchmark.rows() if n in both["rows"]]
    assert set(both["rows"]) == {"own_lora", "w2wpp", "start", "cma"}


def material(people):
    files = ("avatar-base", "avatar-embedder", "avatars-heldout")
    base, embedder, heldout = (MODELS / f"{name}.safetensors" for name in files)
    return benchmark.Material(
        base, embedder, heldout, {"avatars": MODELS / "avatars.safetensors"}, people
    )


def test_no_one_is_scored_on_whom_recipes_were_chosen():
    chosen = material(50).scored()
    assert len(chosen) == 50 and int(chosen.min()) >= benchmark.TUNING
    with pytest.raises(DataError, match="161 are asked for"):
        material(161).scored()


def test_an_unknown_row_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match="No row 'magic'"):
        benchmark.run_benchmark(material(50), only=["magic"])


def test_results_of_earlier_releases_are_read():
    """Their rows and columns had other names."""
    result = summary(
        own_lora=OWN, original_cma=scores(0.2, 0.9, 0.7), multistart=scores(0.5, 0.9, 0.7)
    )
    older = {"original_cma": "seed_cma", "multistart": "hybrid"}
    before = {"rows": {older.get(name, name): row for name, row in result["rows"].items()}}
    again = benchmark.merged(before, {"rows": {}})
    assert list(again["rows"]) == list(benchmark.merged(result, {"rows": {}})["rows"])
    assert again["rows"]["multistart"] == result["rows"]["multistart"]
    assert "| NFE |" in benchmark.table(again)
    rows = {"own LoRA": {"token_obedience": {"mean": 0.5, "low": 0.4, "high": 0.6}}}
    today = {"own LoRA": {"prompt_adherence": rows["own LoRA"]["token_obedience"]}}
    assert evaluation.table(rows) == evaluation.table(today)
    assert "prompt adherence" in evaluation.table(today).splitlines()[0]
