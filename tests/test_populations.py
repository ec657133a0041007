"""Crowds whose distances are known: of one kind, shifted, copied, narrowed, in two groups."""

import pytest
import torch

from w2wpp import DataError
from w2wpp.populations import (
    bimodality,
    coverage,
    density,
    difference_estimate,
    energy_distance,
    floor_of,
    modes_of,
    neighbourhoods,
    ratio_of_distances,
    undecided,
)


def crowd(count, seed, shift=0.0, size=5):
    return shift + torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def test_energy_distance_is_a_mean_over_pairs_of_different_people():
    x, y = crowd(4, 0), crowd(3, 1)

    def mean(a, b, same):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (same and i == j)]
        return sum(float((a[i] - b[j]).norm()) for i, j in pairs) / len(pairs)

    expected = 2 * mean(x, y, False) - mean(x, x, True) - mean(y, y, True)
    assert energy_distance(x, y).value == pytest.approx(expected, abs=1e-6)


def test_two_crowds_of_one_kind_are_at_distance_zero_within_their_errors():
    """Without bias and with an error that is neither far too small nor far too large."""
    found = [energy_distance(crowd(60, 2 * i), crowd(60, 2 * i + 1)) for i in range(200)]
    values = torch.tensor([d.value for d in found])
    assert abs(values.mean()) < 3 * values.std() / len(values) ** 0.5
    errors = torch.tensor([d.error for d in found])
    assert 0.7 < errors.mean() / values.std() < 2.5


def test_the_error_of_a_clear_distance_is_its_spread_over_samples():
    found = [energy_distance(crowd(60, 2 * i), crowd(60, 2 * i + 1, shift=0.5)) for i in range(200)]
    values = torch.tensor([d.value for d in found])
    errors = torch.tensor([d.error for d in found])
    assert values.mean() > 5 * values.std() / len(values) ** 0.5
    assert errors.mean() == pytest.approx(values.std().item(), rel=0.15)


def test_one_dimension_against_the_closed_form():
    """Between N(0, 1) and N(m, 1): 2 E|N(m, 2)| - 2 E|N(0, 2)|."""
    m = torch.tensor(1.5, dtype=torch.float64)
    folded = 2 / torch.pi**0.5 * torch.exp(-m.square() / 4) + m * torch.erf(m / 2)
    expected = 2 * folded - 2 * 2 / torch.pi**0.5
    found = energy_distance(crowd(3000, 0, size=1), crowd(3000, 1, shift=1.5, size=1))
    assert abs(found.value - expected) < 4 * found.error


def test_the_ratio_of_distances_has_the_interval_that_repetition_shows():
    covered = 0
    true = energy_distance(crowd(4000, 7, shift=0.5), crowd(4000, 8)).value
    true /= energy_distance(crowd(4000, 9, shift=1.0), crowd(4000, 8)).value
    for i in range(60):
        real = crowd(80, 1000 + i)
        near = energy_distance(crowd(80, 2000 + i, shift=0.5), real)
        far = energy_distance(crowd(80, 3000 + i, shift=1.0), real)
        ratio = ratio_of_distances(near, far)
        covered += ratio.low < true < ratio.high
    assert covered >= 52


def test_a_ratio_to_nothing_is_unbounded():
    real = crowd(40, 0)
    ratio = ratio_of_distances(
        energy_distance(crowd(40, 1, 1.0), real), energy_distance(crowd(40, 2), real)
    )
    assert ratio.low == -float("inf") and ratio.high == float("inf")


def test_halves_of_a_crowd_are_at_distance_zero():
    floor = floor_of(crowd(100, 0), splits=50)
    assert floor.low < 0 < floor.high and abs(floor.mean) < 0.05


def test_coverage_and_density_by_hand():
    """Real people at 0, 1, 3 on a line reach 1, 1, 2 with k = 1; somebody at 0.9 is near the first two."""
    real, sampled = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.9], [9.0]])
    assert coverage(sampled, real, neighbours=1).tolist() == [1, 1, 0]
    assert density(sampled, real, neighbours=1).tolist() == [2, 0]


def test_dropped_groups_cost_coverage_and_crowding_raises_density():
    real = torch.cat([crowd(60, 0), crowd(60, 1, shift=8.0)])
    alike = torch.cat([crowd(60, 2), crowd(60, 3, shift=8.0)])
    dropped, narrow = crowd(120, 4), torch.cat([0.3 * crowd(60, 5), 8 + 0.3 * crowd(60, 6)])
    assert coverage(alike, real).mean() > 0.85
    assert coverage(dropped, real).mean() < 0.55
    assert density(alike, real).mean() == pytest.approx(1.0, abs=0.2)
    assert density(narrow, real).mean() > 1.5
    reference = neighbourhoods(real)
    assert 0.7 < reference["coverage"] <= 1 and reference["density"] == pytest.approx(1, abs=0.2)
    assert neighbourhoods(real, alike)["coverage"] == pytest.approx(reference["coverage"], abs=0.07)
    assert neighbourhoods(real, dropped)["coverage"] < 0.6 * reference["coverage"]
    assert set(neighbourhoods(real[:6], alike[:3])) == {
        "coverage",
        "density",
    }  # of very few people too


def test_two_groups_are_bimodal_and_a_gaussian_is_not():
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(4000, generator=g)
    split = torch.where(torch.rand(4000, generator=g) < 0.4, -2.0, 3.0) + 0.3 * normal
    assert bimodality(normal) == pytest.approx(1 / 3, abs=0.02)
    assert bimodality(torch.rand(4000, generator=g)) == pytest.approx(5 / 9, abs=0.02)
    assert bimodality(split) > 0.85
    low, high = modes_of(split)
    assert low == pytest.approx(-2, abs=0.05) and high == pytest.approx(3, abs=0.05)
    assert undecided(split, (low, high)).mean() < 0.01
    assert undecided(normal, modes_of(normal)).mean() > 0.25
    assert undecided(torch.tensor([-1.9, 0.4, 0.6, 3.0]), (-2.0, 3.0)).tolist() == [0, 1, 1, 0]


def test_a_difference_between_other_people_has_both_their_errors():
    found = difference_estimate(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.0, 2.0]))
    half = 1.96 * (4 / 3 + 2 / 2) ** 0.5
    assert (found.mean, found.count) == (2.0, 2)
    assert found.high - found.mean == pytest.approx(half)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: energy_distance(crowd(1, 0), crowd(3, 0)), "two people"),
        (lambda: energy_distance(crowd(3, 0), crowd(3, 0, size=4)), r"\[3, 5\] and \[3, 4\]"),
        (lambda: energy_distance(crowd(3, 0) / 0, crowd(3, 0)), "NaN"),
        (lambda: coverage(crowd(3, 0), crowd(3, 1), neighbours=3), "1 to 2 neighbours"),
        (lambda: floor_of(crowd(3, 0)), "4 people"),
        (lambda: modes_of(torch.zeros(3)), "4 people"),
        (
            lambda: ratio_of_distances(
                energy_distance(crowd(3, 0), crowd(3, 1)), energy_distance(crowd(3, 0), crowd(4, 1))
            ),
            "one crowd",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(call, match):
    with pytest.raises(DataError, match=match):
        call()
