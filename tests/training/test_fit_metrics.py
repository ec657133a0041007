"""Bases under every metric: the routes agree, encoding is least squares, work is counted and can be resumed."""

import dataclasses

import numpy as np
import pytest
import torch

from w2wpp import ConfigError, DataError, Space, build_codec, encode_lora, load_space, save_space
from w2wpp.errors import ResourceError
from w2wpp.training import by_gram
from w2wpp.training import checkpoint as checkpoint_module
from w2wpp.training import dataset as dataset_module
from w2wpp.training import fit_basis as module
from w2wpp.training.coefficients import load_coefficients, project_dataset, save_coefficients
from w2wpp.training.compute import Compute
from w2wpp.training.dataset import VectorDataset, write_dataset
from w2wpp.training.fit_basis import fit_basis, fit_coefficients
from w2wpp.weight_metric import METRICS, SketchMetric

NAMES = (*METRICS, "sketch")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(layout, n=70, noise=0.05):
    w = 0.1 * draw(n, 20, seed=n) @ draw(20, layout.size, seed=1)
    w = w + noise * draw(n, layout.size, seed=2) + draw(layout.size, seed=3)
    return VectorDataset(layout, w, torch.arange(n), torch.arange(n) % 5 == 0)


def metric(layout, name):
    if name != "sketch":
        return name
    return SketchMetric(0.3 * draw(layout.size).abs(), draw(9, layout.size, seed=5), "sketch")


def reference(data, metric_of, k):
    """Singular values and coefficients [N, K] by numpy, from features of all rows."""
    w, train = data.vectors().double(), data.training_rows
    mean, std = w[train].mean(0), w[train].std(0)
    if getattr(metric_of, "name", metric_of) == "raw":
        std = torch.full_like(std, float(std.square().mean().sqrt()))
    bound = module._metric(data, metric_of, None).at(mean, std)
    x = ((w - mean) / std).float()
    f = torch.cat([bound.local(x), bound.extra(x)], 1).double().numpy()
    _, s, vt = np.linalg.svd(f[train], full_matrices=False)
    s = s / np.sqrt(len(train) - 1)
    return s[:k], f @ vt[:k].T / s[:k]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("route", ["gram", "covariance", "iteration"])
def test_every_route_under_every_metric(layout, monkeypatch, name, route):
    n = 700 if route == "covariance" else 70
    data = make(layout, n)
    monkeypatch.setattr(dataset_module, "CHUNK_BYTES", 13 * 4 * layout.size)
    monkeypatch.setattr(by_gram, "BLOCK_BYTES", 40 * 4 * n)
    chosen = metric(layout, name)
    limit = 8 if route == "iteration" else 8192
    fitted = fit_coefficients(data, 6, metric=chosen, exact_limit=limit, tolerance=1e-7)
    assert fitted.report["route"] == route and fitted.report["metric"] == name
    s, c = reference(data, chosen, 6)
    basis = fitted.basis
    assert np.allclose(basis.singular_values.numpy(), s, rtol=2e-4)
    found = fitted.coefficients.values.double().numpy()
    assert np.allclose(np.abs((found * c).mean(0)), (c * c).mean(0), rtol=2e-3)
    again = project_dataset(data, basis)
    assert torch.allclose(again.values, fitted.coefficients.values, atol=5e-3)
    assert torch.allclose(again.outside, fitted.coefficients.outside, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_encoding_is_least_squares_under_the_metric(layout, name):
    data = make(layout)
    chosen = metric(layout, name)
    basis = fit_basis(data, 6, metric=chosen)
    bound = basis.metric.at(basis.mean, basis.std)
    w = data.vectors(data.heldout_rows)
    x = basis.standardise(w - basis.mean)
    d = basis.components.float()
    f = [torch.cat([bound.local(t), bound.extra(t)], 1).double() for t in (x, d)]
    expected = torch.linalg.lstsq(f[1].T, f[0].T).solution.T
    assert torch.allclose((basis.project(w) * basis.singular_values).double(), expected, atol=2e-2)
    inner = f[1] @ f[1].T
    assert torch.allclose(inner, torch.eye(6, dtype=torch.float64), atol=2e-3)
    missed = (f[0] - (basis.project(w) * basis.singular_values).double() @ f[1]).square().sum(1)
    assert torch.allclose(
        project_dataset(data, basis).outside[data.heldout].double(), missed, rtol=1e-2
    )


def test_updates_know_no_gauge_and_parameters_do(layout):
    """The same LoRAs with A and B factored otherwise: same spectrum, same held-out share."""
    data = make(layout)
    turned = {}
    for i, (name, (a, b)) in enumerate(layout.unpack(data.vectors()).items()):
        x = torch.eye(layout.rank) * 10 ** (i % 3 - 1) + 0.1 * draw(
            layout.rank, layout.rank, seed=i
        )
        turned[name] = (torch.linalg.inv(x) @ a, b @ x)
    other = dataclasses.replace(data, source=layout.pack(turned))
    outcomes = {}
    for name in ("update", "parameter"):
        a, b = (fit_coefficients(d, 6, metric=name) for d in (data, other))
        s = [f.basis.singular_values / f.basis.singular_values[0] for f in (a, b)]
        same = torch.allclose(*s, rtol=1e-3)
        agree = (a.coefficients.values * b.coefficients.values).mean(0).abs()
        own = a.coefficients.values.square().mean(0)
        outcomes[name] = same and torch.allclose(agree, own, rtol=1e-2)
    assert outcomes == {"update": True, "parameter": False}


def test_update_is_the_default_and_older_names_stay(layout):
    data = make(layout)
    assert fit_basis(data, 4).metric.name == "update"
    assert fit_basis(data, 4, standardise="parameter").metric.name == "parameter"
    a, b = fit_basis(data, 4, standardise="global"), fit_basis(data, 4, metric="raw")
    assert torch.equal(a.components, b.components) and bool((a.std == a.std[0]).all())
    with pytest.raises(ConfigError, match="means the metric 'raw'"):
        fit_basis(data, 4, standardise="global", metric="update")
    with pytest.raises(ConfigError, match="parameter, raw, update"):
        fit_basis(data, 4, metric="functional")


@pytest.mark.parametrize("name", ["update", "sketch"])
def test_files_keep_what_encoding_needs(layout, tmp_path, name):
    data = make(layout)
    fitted = fit_coefficients(data, 5, metric=metric(layout, name))
    save_coefficients(tmp_path / "b", fitted.coefficients, fitted.basis)
    _, read = load_coefficients(tmp_path / "b")
    w = data.vectors([1, 5])
    assert read.metric.name == name
    assert torch.equal(read.project(w), fitted.basis.project(w))
    codec = build_codec({"name": "pca", "coefficient_size": 5, "latent_size": 5})
    space = Space(layout, read, codec, torch.zeros(5), torch.ones(5))
    save_space(space, tmp_path / "s")
    loaded = load_space(tmp_path / "s")
    assert torch.equal(loaded.encode(w).mean, space.encode(w).mean)
    small = loaded.basis.truncated(2)
    assert torch.allclose(small.project(w), read.project(w)[:, :2], atol=1e-6)
    moved = loaded.to("cpu")
    assert torch.equal(moved.encode(w).mean, space.encode(w).mean)


def test_a_lora_of_another_gauge_finds_its_place_under_the_update_metric(layout):
    data = make(layout, noise=0.0)
    basis = fit_basis(data, 12)
    codec = build_codec({"name": "pca", "coefficient_size": 12, "latent_size": 12})
    space = Space(layout, basis, codec, torch.zeros(12), torch.ones(12))
    z = draw(1, 12, seed=9)
    lora = layout.unpack(space.decode(z)[0])
    tensors = {}
    for i, (name, (a, b)) in enumerate(lora.items()):
        x = torch.eye(layout.rank) + 0.3 * draw(layout.rank, layout.rank, seed=i)
        tensors[f"unet.{name}.lora_A.weight"] = torch.linalg.inv(x) @ a * layout.scale
        tensors[f"unet.{name}.lora_B.weight"] = b @ x
    identity, report = encode_lora(space, tensors)
    assert report.update_error < 0.02
    assert torch.allclose(identity.z, z, atol=0.05)


class Counted:
    """A file of vectors that counts the numbers read."""

    def __init__(self, container):
        self.container, self.numbers = container, 0

    def read_rows(self, name, start, stop):
        rows = self.container.read_rows(name, start, stop)
        self.numbers += rows.numel()
        return rows

    def read_columns(self, name, rows, start, stop):
        self.numbers += len(rows) * (stop - start)
        return self.container.read_columns(name, rows, start, stop)


@pytest.mark.parametrize("route", ["gram", "covariance", "iteration"])
def test_the_data_are_read_twice_and_once_an_iteration(layout, tmp_path, monkeypatch, route):
    n = 900 if route == "covariance" else 90
    monkeypatch.setattr(dataset_module, "CHUNK_BYTES", 17 * 4 * layout.size)
    monkeypatch.setattr(by_gram, "BLOCK_BYTES", 40 * 4 * n)
    memory = make(layout, n)
    memory = dataclasses.replace(memory, heldout=torch.zeros(n, dtype=torch.bool))
    stored = write_dataset(tmp_path / "d", memory.vectors(), layout, memory.identity)
    counted = Counted(stored.source)
    data = dataclasses.replace(stored, source=counted)
    fitted = fit_coefficients(data, 6, exact_limit=8 if route == "iteration" else 8192)
    reads = counted.numbers / (n * layout.size)
    allowed = 2 + fitted.report.get("iterations", 0)
    assert reads <= allowed + 0.6  # a few rows more name the run and give sums an origin
    assert fitted.report["reads"] == allowed


def test_a_flat_tail_is_captured(layout):
    """Noise of nearly equal variance everywhere: what subspace iteration loses most of."""
    data = make(layout, n=150, noise=1.0)
    exact = fit_coefficients(data, 20, metric="parameter")
    found = fit_coefficients(data, 20, metric="parameter", exact_limit=8)
    assert found.report["route"] == "iteration" and found.report["converged"]
    a, b = (f.report["captured_variance"] for f in (exact, found))
    assert (a - b) / a < 1e-4
    ratio = found.basis.singular_values / exact.basis.singular_values
    assert (ratio - 1).abs().max() < 1e-3


def test_an_iteration_that_is_cut_short_says_so(layout):
    report = fit_coefficients(make(layout, 150, 1.0), 20, exact_limit=8, max_iterations=3).report
    assert report["converged"] is False and report["iterations"] <= 4


@pytest.mark.parametrize("route", ["gram", "covariance", "iteration"])
def test_killed_and_resumed_gives_the_same_bits(layout, tmp_path, monkeypatch, route):
    n = 700 if route == "covariance" else 70
    monkeypatch.setattr(dataset_module, "CHUNK_BYTES", 37 * 4 * layout.size)
    monkeypatch.setattr(by_gram, "BLOCK_BYTES", 40 * 4 * n)
    monkeypatch.setattr(checkpoint_module, "EVERY", 0.0)
    data = make(layout, n, noise=0.3)
    limit = 8 if route == "iteration" else 8192
    whole = fit_coefficients(data, 6, exact_limit=limit)
    saves = []
    save = checkpoint_module.save_checkpoint

    def save_and_die(*args):
        save(*args)
        saves.append(1)
        if len(saves) in (1, 3):
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_module, "save_checkpoint", save_and_die)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fit_coefficients(data, 6, exact_limit=limit, checkpoint=tmp_path / "c")
    again = fit_coefficients(data, 6, exact_limit=limit, checkpoint=tmp_path / "c")
    assert torch.equal(again.basis.components, whole.basis.components)
    assert torch.equal(again.coefficients.values, whole.coefficients.values)
    with pytest.raises(ConfigError, match="other settings or data"):
        fit_coefficients(data, 5, exact_limit=limit, checkpoint=tmp_path / "c")


def test_bf16_products_stay_close(layout):
    data = make(layout, 150, 0.3)
    low = Compute.pick("cpu", "bf16")
    for limit in (8, 8192):
        a = fit_coefficients(data, 5, exact_limit=limit, metric="parameter")
        b = fit_coefficients(data, 5, exact_limit=limit, metric="parameter", compute=low)
        assert torch.allclose(a.basis.singular_values, b.basis.singular_values, rtol=2e-2)
        assert not torch.equal(a.basis.singular_values, b.basis.singular_values)


def test_devices_and_precisions_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match="fp32, tf32, bf16"):
        Compute.pick("cpu", "fp8")
    with pytest.raises(ConfigError, match="auto, cpu, cuda"):
        Compute.pick("gpu0")
    with pytest.raises(ConfigError, match="double precision"):
        Compute.pick("meta")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="sees no GPU"):
            Compute.pick("cuda")


def test_rows_that_do_not_vary_are_refused(layout):
    w = draw(1, layout.size).repeat(30, 1)
    data = VectorDataset(layout, w, torch.arange(30), torch.zeros(30, dtype=torch.bool))
    for limit in (8, 8192):
        with pytest.raises((DataError, ConfigError), match=r"vary|varies|span only"):
            fit_basis(data, 3, exact_limit=limit)
        with pytest.raises(DataError, match=r"vary|span only"):
            fit_basis(data, 3, exact_limit=limit, metric="parameter")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("limit", [8, 8192], ids=["iteration", "gram"])
def test_gpu_and_cpu_agree(layout, limit):
    data, gpu = make(layout, 150, 0.3), Compute.pick("cuda", "fp32")
    a, b = (fit_coefficients(data, 5, exact_limit=limit, compute=gpu) for _ in range(2))
    assert torch.equal(a.basis.components, b.basis.components)
    cpu = fit_coefficients(data, 5, exact_limit=limit)
    assert torch.allclose(a.basis.singular_values, cpu.basis.singular_values, rtol=1e-3)


def test_out_of_memory_is_one_sentence_with_what_to_change(layout, monkeypatch):
    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(module, "by_gram", fail)
    with pytest.raises(ResourceError, match=r"^Out of memory\. .*--components"):
        fit_basis(make(layout), 3)
