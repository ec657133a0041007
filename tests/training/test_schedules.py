"""KL schedules against their closed forms."""

import math

import pytest

from w2wpp import ConfigError
from w2wpp.training.schedules import SCHEDULES, kl_schedule


def weights(name, epochs=range(0, 21), beta=0.4, warmup=10, total=20):
    schedule = kl_schedule(name, beta=beta, warmup=warmup, epochs=total)
    return [schedule(e) for e in epochs]


def test_off_is_the_full_weight_at_once():
    assert weights("off") == [0.4] * 21


def test_linear():
    assert weights("linear") == pytest.approx([0.04 * min(e, 10) for e in range(21)])


def test_sigmoid():
    expected = [0.4 / (1 + math.exp(-12 * (e / 10 - 0.5))) for e in range(21)]
    assert weights("sigmoid") == pytest.approx(expected)
    assert expected[5] == pytest.approx(0.2) and expected[0] < 0.4 / 400


def test_cyclical_rises_four_times():
    fractions = [0, 1.25, 2.5, 4, 5, 6.25, 7.5, 9.9, 10, 15, 16.25, 19, 20]
    expected = [0, 0.2, 0.4, 0.4, 0, 0.2, 0.4, 0.4, 0, 0, 0.2, 0.4, 0.4]
    assert weights("cyclical", fractions) == pytest.approx(expected)


def test_seed_is_the_published_one():
    expected = [0] * 5 + [0.001, 0.002, 0.003, 0.004, 0.005, 0.005, 0.005]
    assert weights("original", range(12)) == pytest.approx(expected)
    assert weights("original", [4.9, 5.9]) == pytest.approx([0, 0.001])  # one step per whole epoch


@pytest.mark.parametrize("name", SCHEDULES)
def test_all_end_at_their_final_weight(name):
    final = 0.005 if name == "original" else 0.4
    assert weights(name, [20])[0] == pytest.approx(final, rel=1e-2)
    assert all(0 <= w <= 0.4 for w in weights(name))


@pytest.mark.parametrize("name", SCHEDULES)
def test_extreme_times_do_not_overflow(name):
    assert math.isfinite(weights(name, [0], warmup=1e-6)[0])


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="'cosine'"):
        weights("cosine")
    for change in ({"beta": -1}, {"beta": math.nan}, {"warmup": 0}, {"total": 0}):
        with pytest.raises(ConfigError, match="beta >= 0"):
            weights("linear", **change)


def test_the_schedule_of_the_original_answers_to_its_older_name():
    arguments = {"beta": 0.4, "warmup": 10.0, "epochs": 20}
    old, new = (kl_schedule(name, **arguments) for name in ("seed", "original"))
    assert [old(e / 2) for e in range(40)] == [new(e / 2) for e in range(40)]
