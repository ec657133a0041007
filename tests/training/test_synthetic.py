"""The synthetic twin: the same rows however they are asked for, with the structure that is planted."""

import pytest
import torch

from w2wpp import SD15, ConfigError, transformer_layout
from w2wpp.training.config import VaeTraining
from w2wpp.training.dataset import load_dataset
from w2wpp.training.fit_basis import fit_coefficients
from w2wpp.training.fit_vae import fit_vae
from w2wpp.training.synthetic import BLOCK, STATEMENT, synthetic_dataset


@pytest.fixture(scope="module")
def small():
    blocks = [(f"down_blocks.0.attentions.{i}.transformer_blocks.0", 32) for i in range(2)]
    return transformer_layout("small", "avatar", blocks, context_dim=24)


def test_a_row_is_the_same_in_every_company(small):
    data = synthetic_dataset(3 * BLOCK, small, seed=4)
    all_rows = data.vectors()
    assert torch.equal(data.vectors([300, 5, 6, 7, 130]), all_rows[[300, 5, 6, 7, 130]])
    assert torch.equal(data.columns(torch.tensor([5, 300]), 10, 90), all_rows[[5, 300], 10:90])
    longer = synthetic_dataset(20 * BLOCK, small, seed=4)
    assert torch.equal(longer.vectors(torch.arange(3 * BLOCK)), all_rows)
    assert not torch.equal(synthetic_dataset(3 * BLOCK, small, seed=5).vectors(), all_rows)


def test_its_spectrum_falls_to_a_floor(small):
    data = synthetic_dataset(4000, small, heldout=0.0)
    fitted = fit_coefficients(data, small.size - 20, metric="parameter")
    variance = fitted.basis.singular_values.square()
    r = data.source.r
    assert variance[0] > 20 * variance[r]  # a spectrum above noise
    assert variance[r + 2 :].mean() == pytest.approx(0.3, rel=0.2)  # the floor
    assert variance[r + 2] / variance[-10] < 5  # as flat as 4,000 rows of noise are


def test_a_vae_finds_what_pca_can_not(small):
    """Clusters and a curve are planted, so a codec that bends must hold more of people never seen."""
    data = synthetic_dataset(3000, small, heldout=0.2)
    fitted = fit_coefficients(data, 40, metric="parameter")
    training = VaeTraining(latent=6, epochs=20, beta=1e-4, validation=0.0)
    report = fit_vae(fitted.coefficients, fitted.basis, training).training_report
    assert report["weight_r2"]["heldout"] > report["weight_r2_of_pca"]["heldout"] + 0.01


def test_the_command_writes_what_it_says(run, dataset, small, tmp_path):
    (tmp_path / "layout.json").write_text(__import__("json").dumps(small.to_json()))
    rows = ("synthesize", "--rows", 200, "--layout", "layout.json", "--seed", 3)
    code, result, _ = run(*rows, "-o", "a.safetensors")
    assert code == 0 and result["source"] == STATEMENT and result["rows"] == 200
    read = load_dataset("a.safetensors")
    assert torch.equal(read.vectors(), synthetic_dataset(200, small, seed=3).vectors())
    assert "synthetic" in read.provenance["source"]
    run(*rows, "--half", "-o", "h.safetensors")
    half = load_dataset("h.safetensors")
    assert torch.equal(half.vectors(), read.vectors().half().float())
    size = [(tmp_path / f"{n}.safetensors").stat().st_size for n in "ah"]
    assert size[1] < 0.6 * size[0]


def test_the_true_layout_is_drawn_in_pieces():
    data = synthetic_dataset(64_974, SD15)
    w = data.vectors([0, 1, 64_973])
    assert w.shape == (3, 99_648) and bool(torch.isfinite(w).all())
    same, other = (torch.corrcoef(w - data.source._mean)[0, i] for i in (1, 2))
    assert same > other + 0.2  # two rows of one person


def test_no_rows_are_refused(small):
    with pytest.raises(ConfigError, match="one row"):
        synthetic_dataset(0, small)
