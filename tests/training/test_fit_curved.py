"""The curved codec: finds what depends on its latents, and is PCA where nothing does."""

import pytest
import torch

from w2wpp import ConfigError, DataError, load_space, save_space, transformer_layout
from w2wpp.training.coefficients import Coefficients, project_dataset
from w2wpp.training.dataset import VectorDataset
from w2wpp.training.fit_basis import fit_basis
from w2wpp.training.fit_curved import CurvedTraining, fit_curved
from w2wpp.training.fit_vae import linear_space

FEW = CurvedTraining(latent=3, centres=200)


def people(curvature, rows=300, noise=0.15):
    """Vectors about a surface of 3 dimensions that is bent into 3 others as much as said, a fifth held out."""
    g = torch.Generator().manual_seed(0)
    layout = transformer_layout("tiny", "avatar", [("block", 24)], context_dim=16)
    u = torch.randn(rows, 3, generator=g)
    bent = torch.stack([u[:, 0] * u[:, 1], u[:, 1].square() - 1, u[:, 2].sign() * 0.8], 1)
    surface = torch.cat([2 * u, curvature * bent], 1) @ torch.randn(6, layout.size, generator=g)
    w = surface / 3 + noise * torch.randn(rows, layout.size, generator=g)
    ids = torch.arange(rows)
    data = VectorDataset(layout, w, ids, ids % 5 == 0)
    basis = fit_basis(data, 12, metric="raw")
    return project_dataset(data, basis), basis


@pytest.fixture(scope="module")
def bent():
    return people(0.8)


def held_r2(space):
    return space.training_report["weight_r2"]["heldout"]


def test_it_finds_what_pca_of_its_size_cuts_off(bent):
    coefficients, basis = bent
    linear = {
        d: linear_space(coefficients.truncated(d, basis.singular_values), basis.truncated(d))
        for d in (3, 6)
    }
    space = fit_curved(coefficients, basis, FEW)
    low, high = held_r2(linear[3]), held_r2(linear[6])
    assert held_r2(space) > low + 0.6 * (high - low)
    assert space.training_report["missed_of_linear"] < 0.6


def test_where_nothing_bends_it_is_pca(bent):
    coefficients, basis = people(0.0)
    space = fit_curved(coefficients, basis, FEW)
    linear = linear_space(coefficients.truncated(3, basis.singular_values), basis.truncated(3))
    assert held_r2(space) >= held_r2(linear) - 1e-3
    nothing = torch.tensor([[0.0, 0.0, 0.0]])
    assert space.codec.decode(nothing)[0, 3:].abs().max() < 0.1


def test_the_judges_take_no_part(bent):
    """What the report promises is what held-out people, whom nobody looked at, get."""
    coefficients, basis = bent
    space = fit_curved(coefficients, basis, FEW)
    held = coefficients.values[coefficients.heldout]
    rest, found = held[:, 3:], space.codec.decode(held[:, :3])[:, 3:]
    s = basis.singular_values[3:]
    share = ((rest - found) * s).square().sum() / (rest * s).square().sum()
    assert space.training_report["missed_of_linear"] == pytest.approx(float(share), abs=0.12)


def test_latents_are_those_of_pca_and_survive_a_file(bent, tmp_path):
    coefficients, basis = bent
    space = fit_curved(coefficients, basis, FEW)
    assert torch.equal(space.codec.encode(coefficients.values).mean, coefficients.values[:, :3])
    save_space(space, tmp_path / "s.safetensors")
    again = load_space(tmp_path / "s.safetensors")
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(3))
    assert torch.equal(again.decode(z), space.decode(z)) and again.fingerprint == space.fingerprint


def test_far_away_it_is_linear_again(bent):
    space = fit_curved(*bent, FEW)
    z = 1e3 * torch.ones(1, 3)
    assert space.codec.decode(z)[0, 3:].abs().max() == 0


def test_more_rows_than_centres_is_the_same_regression(bent):
    """Both sides of the least squares problem give one answer."""
    coefficients, basis = bent
    wide, tall = (
        fit_curved(
            coefficients,
            basis,
            CurvedTraining(latent=3, centres=n, widths=(2.0,), penalties=(1e-2,)),
        )
        for n in (230, 60)
    )
    c = coefficients.values[~coefficients.heldout]
    k, r = wide.codec.features(c[:, :3]).double(), (c[:, 3:] * basis.singular_values[3:]).double()
    for space in (wide, tall):
        k = space.codec.features(c[:, :3]).double()
        penalty = 1e-2 * k.square().sum(1).mean() * torch.eye(k.shape[1])
        expected = torch.linalg.solve(k.T @ k + penalty, k.T @ r) / basis.singular_values[3:]
        assert torch.allclose(space.codec.map.weight.T.double(), expected, atol=2e-3)


def test_what_cannot_be_fitted_is_refused(bent):
    coefficients, basis = bent
    with pytest.raises(ConfigError, match="more components"):
        fit_curved(coefficients, basis, CurvedTraining(latent=12))
    few = Coefficients(
        coefficients.layout,
        coefficients.values[:12],
        coefficients.outside[:12],
        coefficients.identity[:12],
        coefficients.heldout[:12],
    )
    with pytest.raises(DataError, match="20 training rows"):
        fit_curved(few, basis, FEW)
    with pytest.raises(ConfigError, match="above zero"):
        CurvedTraining(widths=(0.0,))


def test_train_fits_one_from_the_command_line(run, bent, tmp_path):
    from w2wpp.training.coefficients import save_coefficients

    save_coefficients(tmp_path / "b.safetensors", *bent)
    train = ("train", "b.safetensors", "--codec", "curved", "--latent", 3, "-o", "s.safetensors")
    code, result, _ = run(*train, "--hidden", 64)
    assert code == 0 and result["training"]["missed_of_linear"] < 0.7
    assert load_space(tmp_path / "s.safetensors").codec.config["hidden"] == [64]
    code, _, err = run(*train, "--epochs", 5)
    assert code == 1 and "nothing to set by --epochs" in err
