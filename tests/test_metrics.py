"""Metrics against closed forms."""

import pytest
import torch
import torch.nn.functional as F

from w2wpp import metrics


def test_estimate_is_the_normal_interval():
    value = metrics.estimate(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    half = 1.96 * (5 / 3) ** 0.5 / 2
    assert value.mean == 2.5 and value.count == 4
    assert value.low == pytest.approx(2.5 - half) and value.high == pytest.approx(2.5 + half)


def test_ratio_of_proportional_values_has_no_spread_when_paired():
    values = torch.rand(50, generator=torch.Generator().manual_seed(0)) + 0.5
    paired = metrics.ratio_estimate(0.8 * values, values, paired=True)
    unpaired = metrics.ratio_estimate(0.8 * values, values, paired=False)
    assert paired.low == pytest.approx(0.8, abs=1e-6) and paired.high == pytest.approx(
        0.8, abs=1e-6
    )
    assert unpaired.low < 0.8 < unpaired.high


def test_consistency_and_likeness_are_means_over_pairs():
    shots = F.normalize(torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(0)), dim=-1)
    cosines = torch.einsum("imd,jnd->ijmn", shots, shots)
    for i in range(5):
        own = cosines[i, i]
        off_diagonal = own[~torch.eye(3, dtype=torch.bool)]
        torch.testing.assert_close(metrics.consistency(shots)[i], off_diagonal.mean())
        others = torch.stack([cosines[i, j] for j in range(5) if j != i])
        torch.testing.assert_close(metrics.likeness_between(shots)[i], others.mean())


def test_explained_variance_of_the_mean_is_zero_and_of_the_truth_one():
    truth = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    mean = truth.mean(0)
    torch.testing.assert_close(
        metrics.explained_variance(truth, mean.expand_as(truth), mean), torch.zeros(6)
    )
    torch.testing.assert_close(metrics.explained_variance(truth, truth, mean), torch.ones(6))
    assert metrics.pooled_r2(truth, truth, mean) == 1


def test_roughness_of_an_even_path_is_one_and_of_a_jump_its_number_of_steps():
    even = torch.linspace(0, 1, 5)[None, :, None].expand(1, 5, 2)
    jump = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])[None, :, None]
    assert metrics.path_roughness(even).item() == pytest.approx(1)
    assert metrics.path_roughness(jump).item() == pytest.approx(4)


def test_ridge_regression_finds_a_linear_map():
    g = torch.Generator().manual_seed(0)
    inputs, weights = torch.randn(60, 8, generator=g), torch.randn(8, 3, generator=g)
    targets = inputs @ weights + 5
    mean, found, offset = metrics.ridge_regression(inputs, targets, 1e-9)
    torch.testing.assert_close((inputs - mean) @ found + offset, targets, atol=1e-3, rtol=1e-3)


def test_streamed_moments_are_those_of_all_rows():
    """Also far from zero, where squares about zero would cancel."""
    x = 1000 + torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    sums = metrics.ColumnSums(x[0])
    for part in x.split(7):
        before = part.clone()
        sums.add(part)
        assert torch.equal(part, before)
    mean, squares = sums.about_the_mean(len(x))
    torch.testing.assert_close(mean, x.double().mean(0))
    torch.testing.assert_close((squares / 49).sqrt(), x.double().std(0), rtol=1e-6, atol=0)
