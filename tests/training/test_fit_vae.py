import dataclasses

import pytest
import torch

from w2wpp import (
    AffineBasis,
    ConfigError,
    DataError,
    Posterior,
    ShapeError,
    load_space,
    save_space,
    transformer_layout,
)
from w2wpp.errors import ResourceError
from w2wpp.training.coefficients import Coefficients, components_among, project_dataset
from w2wpp.training.compute import Compute
from w2wpp.training.config import VaeTraining, original_training
from w2wpp.training.dataset import VectorDataset
from w2wpp.training.fit_basis import fit_basis
from w2wpp.training.fit_vae import fit_vae, linear_space, prior_of
from w2wpp.training.report import collapse_sentence, thinned, without_curves

SHORT = VaeTraining(latent=4, hidden=(16,), epochs=6, batch=16, validation=0.2)


class Stop(Exception):
    pass


def weights(space):
    return torch.cat([p.flatten() for p in space.codec.parameters()])


@pytest.fixture(scope="module")
def curved():
    """600 vectors on a curved surface of 3 dimensions, for which a linear space needs 9."""
    g = torch.Generator().manual_seed(0)
    layout = transformer_layout("tiny", "avatar", [("block", 24)], context_dim=16)
    u = torch.randn(600, 3, generator=g)
    i, j = torch.triu_indices(3, 3)
    features = torch.cat([1.5 * u, 0.5 * (u[:, i] * u[:, j] - (i == j).float())], 1)
    w = features @ torch.randn(9, layout.size, generator=g) / 3
    w = w + 0.2 * torch.randn(w.shape, generator=g)
    data = VectorDataset(layout, w, torch.arange(600), torch.arange(600) % 5 == 0)
    basis = fit_basis(data, 20)
    return project_dataset(data, basis), basis


def test_linear_space_is_pca(dataset, basis):
    space = linear_space(dataset, basis, provenance={"name": "linear"})
    w = dataset.vectors(dataset.training_rows)
    z = space.encode(w).mean
    assert torch.allclose(z, basis.project(w), atol=2e-3)
    assert torch.allclose(z.std(0), torch.ones(basis.n_components), atol=1e-4)
    assert space.name == "linear"
    scores = space.training_report["weight_r2"]
    assert 0.5 < scores["heldout"] < scores["training"] < 1.0


@pytest.mark.parametrize("codec", ["vae-skip", "vae-mlp"])
def test_a_vae_finds_the_curve_that_pca_misses(curved, codec):
    coefficients, basis = curved
    settings = VaeTraining(codec=codec, latent=4, hidden=(64, 64), epochs=150, lr=4e-3, beta=5e-4)
    report = fit_vae(coefficients, basis, settings).training_report
    search = report["early_stopping"]
    pca = {
        k: linear_space(coefficients.truncated(k, basis.singular_values), basis.truncated(k))
        for k in (4, 9)
    }
    r2 = {k: s.training_report["weight_r2"]["heldout"] for k, s in pca.items()}
    found = report["weight_r2"]["heldout"]
    assert found > r2[4] + 0.6 * (r2[9] - r2[4])
    assert report["epochs"] == search["best_epoch"] <= search["epochs"] <= 150
    assert search["best"] < search["start"] and report["active_units"] >= 3


def test_skip_is_never_worse_than_pca_of_its_size(coefficients, basis):
    """Even with a learning rate that ruins it: no training at all is a candidate of the search."""
    settings = dataclasses.replace(SHORT, codec="vae-skip", lr=3.0)
    report = fit_vae(coefficients, basis, settings).training_report
    pca = linear_space(coefficients.truncated(4, basis.singular_values), basis.truncated(4))
    assert report["epochs"] == 0
    expected = pca.training_report["weight_r2"]["heldout"]
    assert report["weight_r2"]["heldout"] == pytest.approx(expected, abs=1e-4)


def test_latents_leave_with_unit_std(coefficients, basis, dataset):
    space = fit_vae(coefficients, basis, SHORT)
    posterior = space.encode(dataset.vectors(dataset.training_rows))
    mean, std = prior_of(posterior)
    assert torch.allclose(mean, torch.zeros(4), atol=1e-3)
    assert torch.allclose(std, torch.ones(4), atol=1e-3)


def test_prior_of_a_collapsed_unit_stays_one():
    mean = torch.stack([torch.randn(5000) * 0.8, torch.zeros(5000)], 1)
    logvar = torch.tensor([0.36, 1.0]).log().expand(5000, 2)
    center, std = prior_of(Posterior(mean, logvar))
    assert torch.allclose(std, torch.ones(2), atol=0.03) and center.abs().max() < 0.05


def test_same_seed_same_bits_another_seed_another_space(coefficients, basis):
    first, again = fit_vae(coefficients, basis, SHORT), fit_vae(coefficients, basis, SHORT)
    other = fit_vae(coefficients, basis, dataclasses.replace(SHORT, seed=1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.provenance == again.provenance
    given = torch.Generator().manual_seed(SHORT.seed)
    assert fit_vae(coefficients, basis, SHORT, generator=given).fingerprint == first.fingerprint


# Everything of a training that draws random numbers.
RANDOM = dataclasses.replace(
    SHORT, codec="vae-skip", dropout=0.2, input_noise=0.1, validation=0.0, seed=3
)


def test_every_random_number_comes_from_the_seed(coefficients, basis):
    """Whatever the state of the global generator, which stays as it was."""
    spaces = []
    for state in (1, 2):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        spaces.append(fit_vae(coefficients, basis, RANDOM))
        assert torch.equal(torch.get_rng_state(), before)
    assert spaces[0].fingerprint == spaces[1].fingerprint
    for change in ({"dropout": 0.0}, {"seed": 4}, {"input_noise": 0.0}):
        other = fit_vae(coefficients, basis, dataclasses.replace(RANDOM, **change))
        assert other.fingerprint != spaces[0].fingerprint


@pytest.mark.parametrize("stage", ["search", "final"])
@pytest.mark.parametrize("patience", [0, 2])
def test_resumed_run_equals_the_uninterrupted_one(
    coefficients, basis, tmp_path, monkeypatch, patience, stage
):
    monkeypatch.setattr("w2wpp.training.fit_vae.CHECKPOINT_EVERY", 2)
    settings = dataclasses.replace(SHORT, codec="vae-mlp", lr=4e-3, patience=patience)
    whole = fit_vae(coefficients, basis, settings)
    path = tmp_path / "run"

    def interrupt(progress):
        if (progress.stage, progress.epoch) == (stage, 3):
            raise Stop

    with pytest.raises(Stop):
        fit_vae(coefficients, basis, settings, callback=interrupt, checkpoint=path)
    seen = []
    resumed = fit_vae(coefficients, basis, settings, callback=seen.append, checkpoint=path)
    assert (seen[0].stage, seen[0].epoch) == (stage, 3)  # taken up after epoch 2
    assert resumed.fingerprint == whole.fingerprint
    assert resumed.training_report == whole.training_report
    finished = fit_vae(coefficients, basis, settings, callback=seen.clear, checkpoint=path)
    assert finished.fingerprint == whole.fingerprint and seen  # no epoch was run again


def test_resumed_dropout_goes_on_with_the_same_masks(coefficients, basis, tmp_path, monkeypatch):
    monkeypatch.setattr("w2wpp.training.fit_vae.CHECKPOINT_EVERY", 2)

    def interrupt(progress):
        if progress.epoch == 3:
            raise Stop

    with pytest.raises(Stop):
        fit_vae(coefficients, basis, RANDOM, callback=interrupt, checkpoint=tmp_path / "run")
    resumed = fit_vae(coefficients, basis, RANDOM, checkpoint=tmp_path / "run")
    assert resumed.fingerprint == fit_vae(coefficients, basis, RANDOM).fingerprint


def test_checkpoint_of_another_run_is_refused(coefficients, basis, tmp_path):
    fit_vae(coefficients, basis, SHORT, checkpoint=tmp_path / "run")
    for other in (dataclasses.replace(SHORT, beta=0.1), dataclasses.replace(SHORT, seed=3)):
        with pytest.raises(ConfigError, match="other settings or data"):
            fit_vae(coefficients, basis, other, checkpoint=tmp_path / "run")


def test_early_stop_says_so(coefficients, basis):
    settings = dataclasses.replace(SHORT, codec="vae-skip", lr=3.0, epochs=50, patience=3)
    search = fit_vae(coefficients, basis, settings).training_report["early_stopping"]
    assert search["epochs"] == 3 and search["best_epoch"] == 0
    assert search["stop_reason"] == "The validation persons did not improve for 3 epochs."


def test_validation_holds_out_persons_and_never_the_test_set(coefficients, basis):
    report = fit_vae(coefficients, basis, SHORT).training_report
    # 24 training persons of two rows each, a fifth of them for the search
    assert report["rows"] == {"training": 48, "heldout": 12}
    assert report["early_stopping"]["rows"] == {"training": 38, "validation": 10}
    changed = coefficients.values.clone()
    changed[coefficients.heldout] = 99.0
    other = fit_vae(dataclasses.replace(coefficients, values=changed), basis, SHORT)
    assert torch.equal(weights(other), weights(fit_vae(coefficients, basis, SHORT)))


def test_heavy_kl_collapses_and_the_report_says_so(coefficients, basis):
    heavy = VaeTraining(codec="vae-mlp", latent=4, hidden=(16,), epochs=60, beta=10.0, kl="off")
    report = fit_vae(
        coefficients, basis, dataclasses.replace(heavy, lr=1e-2, validation=0.0)
    ).training_report
    assert report["active_units"] == 0
    assert report["collapse"].startswith("Posterior collapse: none of the 4 latent units")
    assert max(report["kl_per_unit"]) < 0.05
    free = dataclasses.replace(heavy, lr=1e-2, free_bits=0.5, validation=0.0, epochs=200)
    kept = fit_vae(coefficients, basis, free).training_report
    assert kept["kl_total"] > 4 * 0.3  # a KL below half a nat per unit costs nothing


@pytest.mark.parametrize("kl", ["off", "linear", "cyclical", "sigmoid", "original"])
def test_every_schedule_trains(coefficients, basis, kl):
    seen = []
    fit_vae(coefficients, basis, dataclasses.replace(SHORT, kl=kl, warmup=3), callback=seen.append)
    assert [p.epoch for p in seen if p.stage == "search"] == [1, 2, 3, 4, 5, 6]
    assert seen[0].beta == {"off": 1e-3, "sigmoid": pytest.approx(2.5e-6, rel=0.1)}.get(kl, 0)


def test_original_recipe_on_raw_vectors(dataset, tmp_path):
    affine = AffineBasis(dataset.layout.size, scale=10.0)
    recipe = original_training(latent=4, hidden=(16, 8), epochs=3)
    space = fit_vae(dataset, affine, recipe, provenance={"name": "as it was"})
    save_space(space, tmp_path / "s")
    read = load_space(tmp_path / "s")
    assert read.codec.name == "original" and read.basis.config() == affine.config()
    assert space.decode(torch.randn(2, 4)).abs().max() <= 0.1  # tanh / 10
    assert read.training_report["settings"]["kl"] == "original"


def test_report_travels_in_the_file(coefficients, basis, tmp_path):
    space = fit_vae(coefficients, basis, SHORT, provenance={"name": "x", "licence": "Apache-2.0"})
    save_space(space, tmp_path / "s")
    read = load_space(tmp_path / "s")
    assert read.provenance == space.provenance
    report = read.training_report
    assert report["settings"] == SHORT.to_json() and report["seed"] == 0
    assert len(report["early_stopping"]["history"]) == 6 and len(report["kl_per_unit"]) == 4
    assert read.name == "x" and read.licence == "Apache-2.0"


def test_half_precision_loses_nothing_between_memory_and_file(coefficients, basis, tmp_path):
    space = fit_vae(coefficients, basis, dataclasses.replace(SHORT, codec="vae-mlp"))
    assert torch.equal(weights(space), weights(space).half().float())
    z = torch.randn(3, 4)
    save_space(space, tmp_path / "s")
    assert torch.equal(load_space(tmp_path / "s").decode(z), space.decode(z))


def test_bad_requests_are_refused(coefficients, basis):
    for change in (
        {"latent": 0},
        {"lr": 0.0},
        {"validation": 1.0},
        {"monitor": "luck"},
        {"beta": -1},
    ):
        with pytest.raises(ConfigError):
            VaeTraining(**change)
    with pytest.raises(ConfigError, match="linear_space"):
        fit_vae(coefficients, basis, dataclasses.replace(SHORT, codec="pca"))
    with pytest.raises(ConfigError, match="d <= K"):
        fit_vae(coefficients, basis, dataclasses.replace(SHORT, latent=13))
    with pytest.raises(ShapeError, match="project the data set again"):
        fit_vae(coefficients, basis.truncated(3), SHORT)
    nan = dataclasses.replace(coefficients, values=coefficients.values * float("nan"))
    with pytest.raises(DataError, match="NaN"):
        fit_vae(nan, basis, SHORT)
    with pytest.raises(DataError, match="holds no person"):
        fit_vae(coefficients, basis, dataclasses.replace(SHORT, validation=1e-3))
    with pytest.raises(DataError, match="diverged in epoch 1"):
        fit_vae(coefficients, basis, dataclasses.replace(SHORT, codec="vae-mlp", lr=1e30))


def test_persons_of_the_search_are_strangers_to_its_components(coefficients, basis):
    """As for a basis that never saw them: the chosen rows alone decide on the components."""
    c, s = coefficients.values, basis.singular_values
    chosen = torch.arange(60) % 3 > 0
    found, scales = components_among(c, s, chosen)
    x = (c * s).double()
    _, singular, v = torch.linalg.svd(x[chosen] - x[chosen].mean(0), full_matrices=False)
    assert torch.allclose(scales.double(), singular / 39**0.5, rtol=1e-4)
    cosine = torch.nn.functional.cosine_similarity
    expected = (x - x[chosen].mean(0)) @ v.T
    assert cosine((found * scales).double(), expected, dim=0).abs().min() > 0.999
    assert torch.allclose(found[chosen].std(0), torch.ones(len(scales)), atol=1e-3)
    moved = c.clone()
    moved[~chosen] += 1.0
    assert torch.equal(components_among(moved, s, chosen)[1], scales)


def test_coefficients_must_not_mix_persons(coefficients):
    with pytest.raises(DataError, match="by identity"):
        Coefficients(
            coefficients.layout,
            coefficients.values,
            coefficients.outside,
            coefficients.identity,
            torch.arange(60) % 2 == 0,
        )


def test_history_is_thinned_evenly():
    history = [{"epoch": i, "loss": i / 3} for i in range(1000)]
    short = thinned(history, 100)
    assert len(short) == 100 and (short[0]["epoch"], short[-1]["epoch"]) == (0, 999)
    assert short[1]["loss"] == 3.33333
    assert len(thinned(history[:7], 100)) == 7 and thinned([], 100) == []


def test_printed_reports_hold_no_curves():
    report = {"a": 1, "history": [1], "early_stopping": {"best": 2, "history": [2]}}
    assert without_curves(report) == {"a": 1, "early_stopping": {"best": 2}}


def test_collapse_sentences():
    assert collapse_sentence(8, 8).startswith("No posterior collapse")
    assert collapse_sentence(7, 8).startswith("Some latent units are unused: 7 of 8")
    assert collapse_sentence(3, 8).startswith("Partial posterior collapse: 3 of 8")


def test_the_default_batch_grows_with_the_set():
    sizes = {2: 2, 800: 128, 8192: 256, 20_000: 512, 64_974: 1024, 10**6: 2048}
    sizes[8192 - 1] = 128
    for rows, batch in sizes.items():
        assert VaeTraining().batch_of(rows) == batch
    assert VaeTraining(batch=0).batch_of(500) == 500
    assert VaeTraining(batch=64).batch_of(10**6) == 64


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precisions_agree_and_repeat(coefficients, basis, precision):
    compute, whole = Compute.pick("cpu", precision), dataclasses.replace(SHORT, validation=0.0)
    a, b = (fit_vae(coefficients, basis, whole, compute=compute) for _ in range(2))
    assert a.fingerprint == b.fingerprint  # same seed and device, same bits
    plain = fit_vae(coefficients, basis, whole)
    assert (a.fingerprint == plain.fingerprint) == (precision == "fp32")
    r2 = [s.training_report["weight_r2"]["training"] for s in (a, plain)]
    assert r2[0] == pytest.approx(r2[1], abs=0.02)
    assert a.training_report["computed"]["precision"] == precision


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_and_cpu_agree(coefficients, basis):
    compute = Compute.pick("cuda", "fp32")
    a, b = (fit_vae(coefficients, basis, SHORT, compute=compute) for _ in range(2))
    assert a.fingerprint == b.fingerprint
    cpu = fit_vae(coefficients, basis, SHORT)
    r2 = [s.training_report["weight_r2"]["training"] for s in (a, cpu)]
    assert r2[0] == pytest.approx(r2[1], abs=0.02)  # other noise, the same training


def test_the_report_has_pca_of_the_same_size_beside(coefficients, basis):
    report = fit_vae(coefficients, basis, SHORT).training_report
    d = SHORT.latent
    pca = linear_space(coefficients.truncated(d, basis.singular_values), basis.truncated(d))
    expected = pca.training_report["weight_r2"]
    assert set(report["weight_r2_of_pca"]) == set(expected)
    for name, value in expected.items():
        assert report["weight_r2_of_pca"][name] == pytest.approx(value, abs=5e-3)


def test_out_of_memory_is_one_sentence_with_what_to_change(coefficients, basis, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."
        )

    monkeypatch.setattr("w2wpp.training.fit_vae.Run", fail)
    with pytest.raises(ResourceError, match=r"^Out of memory\. .*--batch"):
        fit_vae(coefficients, basis, SHORT)
    monkeypatch.setattr("w2wpp.training.fit_vae.Run", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit_vae(coefficients, basis, SHORT)
