"""PCA against numpy's singular value decomposition, and reconstruction scores in the coefficients' space."""

import dataclasses

import numpy as np
import pytest
import torch

from w2wpp import AffineBasis, ConfigError, DataError
from w2wpp.metrics import pooled_r2
from w2wpp.training import dataset as dataset_module
from w2wpp.training.coefficients import (
    load_coefficients,
    project_dataset,
    save_coefficients,
    weight_r2,
)
from w2wpp.training.dataset import VectorDataset
from w2wpp.training.fit_basis import fit_basis


def wide_or_tall(layout, n):
    g = torch.Generator().manual_seed(n)
    w = torch.randn(n, 30, generator=g) @ torch.randn(30, layout.size, generator=g)
    w = 0.1 * w + 0.05 * torch.randn(n, layout.size, generator=g) + 1.0
    w[:, 3] = 2.0  # a parameter that never varies
    return VectorDataset(layout, w, torch.arange(n), torch.arange(n) % 4 == 0)


def svd(w, standardise):
    x = w.double().numpy()
    x = x - x.mean(0)
    std = x.std(0, ddof=1)
    if standardise == "global":
        std = np.full_like(std, np.sqrt((std**2).mean()))
    x = x / np.where(std == 0, 1.0, std)
    _, s, vt = np.linalg.svd(x, full_matrices=False)
    return s / np.sqrt(len(x) - 1), vt


@pytest.mark.parametrize("standardise", ["parameter", "global"])
@pytest.mark.parametrize("n", [60, 500], ids=["gram", "covariance"])
@pytest.mark.parametrize("limit", [8192, 8], ids=["exact", "iteration"])
def test_against_numpy(layout, monkeypatch, standardise, n, limit):
    monkeypatch.setattr(dataset_module, "CHUNK_BYTES", 13 * 4 * layout.size)
    data = wide_or_tall(layout, n)
    basis = fit_basis(data, 8, standardise=standardise, exact_limit=limit)
    w = data.vectors(data.training_rows)
    s, vt = svd(w, standardise)
    assert np.allclose(basis.singular_values.numpy(), s[:8], rtol=1e-4)
    cosine = (basis.components.double().numpy() * vt[:8]).sum(1)
    assert np.allclose(np.abs(cosine), 1.0, atol=1e-3)
    c = basis.project(w)
    assert torch.allclose(c.std(0), torch.ones(8), atol=2e-3)  # whitened on the training rows
    assert torch.allclose(c.mean(0), torch.zeros(8), atol=1e-3)


def test_heldout_rows_are_never_looked_at(layout):
    data = wide_or_tall(layout, 60)
    w = data.vectors()
    w[data.heldout] = 1e6
    other = dataclasses.replace(data, source=w)
    assert torch.equal(fit_basis(data, 5).components, fit_basis(other, 5).components)


def test_signs_are_fixed(layout):
    data = wide_or_tall(layout, 60)
    mean = data.vectors(data.training_rows).mean(0)  # the same for both, and with it the metric
    flipped = dataclasses.replace(data, source=2 * mean - data.vectors())
    a, b = fit_basis(data, 5).components, fit_basis(flipped, 5).components
    assert torch.allclose(a.float(), b.float(), atol=2e-3)


def test_impossible_sizes_are_refused(layout):
    data = wide_or_tall(layout, 20)  # 15 training rows
    with pytest.raises(
        ConfigError, match=r"15 training rows .* support 1 to 14 components. Got 15"
    ):
        fit_basis(data, 15)
    with pytest.raises(ConfigError, match="'row'"):
        fit_basis(data, 2, standardise="row")
    twins = dataclasses.replace(data, source=data.vectors([1, 2, 3]).repeat(7, 1)[:20])
    with pytest.raises(DataError, match="span only 2 directions"):
        fit_basis(twins, 5)


def test_score_on_coefficients_is_the_score_on_vectors(layout):
    """With one common std, standardised and raw R2 are the same number."""
    data = wide_or_tall(layout, 80)
    basis = fit_basis(data, 20, standardise="global")
    c = project_dataset(data, basis)
    cut = torch.cat([c.values[:, :6], torch.zeros(80, 14)], 1)
    score = weight_r2(c.values, cut, basis.singular_values, outside=c.outside)
    w = data.vectors()
    varies = torch.arange(layout.size) != 3
    raw = pooled_r2(w[:, varies], basis.lift(cut)[:, varies], basis.mean[varies])
    assert score == pytest.approx(raw, abs=1e-3)
    assert weight_r2(c.values, c.values, basis.singular_values) == 1.0
    assert weight_r2(c.values, 0 * c.values, basis.singular_values, outside=c.outside) == 0.0


def test_truncated_coefficients_are_those_of_the_truncated_basis(layout):
    data = wide_or_tall(layout, 80)
    basis = fit_basis(data, 20)
    small = project_dataset(data, basis).truncated(6, basis.singular_values)
    expected = project_dataset(data, basis.truncated(6))
    assert torch.allclose(small.values, expected.values, atol=1e-5)
    assert torch.allclose(small.outside, expected.outside, rtol=2e-2)


def test_affine_coefficients_leave_nothing_outside(dataset):
    c = project_dataset(dataset, AffineBasis(dataset.layout.size, scale=10.0))
    assert torch.allclose(c.values, dataset.vectors() * 10)
    assert c.outside.max() < 1e-10


def test_file_round_trip(coefficients, basis, tmp_path):
    save_coefficients(tmp_path / "b", coefficients, basis)
    read, read_basis = load_coefficients(tmp_path / "b")
    for name in ("values", "outside", "identity", "heldout"):
        assert torch.equal(getattr(read, name), getattr(coefficients, name))
    assert all(torch.equal(t, basis.tensors()[k]) for k, t in read_basis.tensors().items())
