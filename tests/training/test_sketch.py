"""The functional metric: rows are what they say, and components are spent on what the model does."""

import pytest
import torch

from w2wpp.diffusion.schedule import NoiseSchedule
from w2wpp.errors import ConfigError, DataError, ShapeError
from w2wpp.lora.layout import SD15
from w2wpp.training.coefficients import load_coefficients
from w2wpp.training.dataset import write_dataset
from w2wpp.training.fit_basis import fit_coefficients
from w2wpp.training.sketch import functional_metric, load_sketch, save_sketch, sketch

SHAPE = (2, 3, 3)  # of a picture
SCHEDULE = NoiseSchedule(torch.linspace(0.99, 0.01, 100), "eps")


class Model:
    """Its output moves with the LoRA by a known matrix, more so where the picture is bright and the timestep late."""

    def __init__(self, size: int, seen: int) -> None:
        g = torch.Generator().manual_seed(5)
        self.matrix = torch.randn(18, size, generator=g)
        self.matrix[:, seen:] = 0  # nothing that it does depends on the other numbers
        self.calls = 0

    def __call__(self, noisy, timestep, vectors):
        self.calls += len(noisy)
        moved = torch.tanh(vectors @ self.matrix.T).reshape(-1, *SHAPE)
        return noisy + moved * (1 + timestep[:, None, None, None] / 100)

    def gauss_newton(self, w, timesteps):
        """Mean over timesteps of J^T J / outputs at w [P]."""
        slope = 1 - torch.tanh(self.matrix @ w).square()
        jacobian = slope[:, None] * self.matrix
        factor = (1 + torch.arange(timesteps) / 100).square().mean()
        return factor * jacobian.T @ jacobian / 18


@pytest.fixture(scope="module")
def model(layout):
    return Model(layout.size, layout.size // 8)


@pytest.fixture(scope="module")
def pictures():
    return torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(1))


def rows_of(model, pictures, vectors, **options):
    generator = torch.Generator().manual_seed(options.pop("seed", 0))
    return sketch(model, SCHEDULE, pictures, vectors, generator=generator, **options)


def test_rows_are_a_sample_of_the_gauss_newton_matrix(model, pictures, layout):
    w = 0.01 * torch.randn(1, layout.size, generator=torch.Generator().manual_seed(2))
    rows = rows_of(model, pictures, w, rows=6_000, batch=500)
    expected = model.gauss_newton(w[0], 100)
    measured = rows.T @ rows / len(rows)
    assert (measured - expected).norm() / expected.norm() < 0.08
    assert measured.trace() == pytest.approx(expected.trace().item(), rel=0.03)


def test_one_pass_a_row_and_batches_change_nothing_but_rounding(model, pictures, layout):
    w = 0.01 * torch.randn(3, layout.size, generator=torch.Generator().manual_seed(2))
    model.calls = 0
    one = rows_of(model, pictures, w, rows=12, batch=12)
    assert model.calls == 12
    again = rows_of(model, pictures, w, rows=12, batch=12)
    other = rows_of(model, pictures, w, rows=12, batch=12, seed=1)
    assert torch.equal(one, again) and not torch.allclose(one, other)


def test_timesteps_are_spread_over_the_schedule(pictures, layout):
    met = []

    def watch(noisy, timestep, vectors):
        met.extend(timestep.tolist())
        return noisy + vectors.sum(1)[:, None, None, None]

    rows_of(watch, pictures, torch.zeros(1, layout.size), rows=50, batch=7)
    assert sorted(t // 2 for t in met) == list(range(50))


def test_components_are_spent_on_what_the_model_does(model, pictures, layout, tmp_path):
    """People differ in six ways that no picture shows and in three that every picture does. Three components are
    enough for the latter; by parameters alone they go where most numbers vary."""
    g = torch.Generator().manual_seed(8)
    seen = layout.size // 8
    hidden = torch.randn(120, 6, generator=g) @ torch.randn(6, layout.size - seen, generator=g)
    shown = torch.randn(120, 3, generator=g) @ torch.randn(3, seen, generator=g)
    w = 0.01 * torch.cat([shown, hidden], dim=1)
    people = torch.arange(120)
    data = write_dataset(tmp_path / "d.safetensors", w, layout, people, heldout=people >= 100)
    rows = rows_of(model, pictures, data.vectors(data.training_rows), rows=200, batch=100)
    held, errors = data.vectors(data.heldout_rows), {}
    for name, how in (("parameter", "parameter"), ("functional", functional_metric(data, rows))):
        basis = fit_coefficients(data, 3, metric=how).basis
        missed = basis.lift(basis.project(held)) - held
        errors[name] = float((missed @ model.matrix.T).square().sum())
    assert errors["functional"] < 0.01 * errors["parameter"]


def test_both_parts_of_the_metric_have_the_energies_it_promises(model, pictures, dataset):
    training = dataset.vectors(dataset.training_rows)
    rows = rows_of(model, pictures, training, rows=60, batch=60)
    metric = functional_metric(dataset, rows, damping=0.25)
    difference = training - training.mean(0)
    assert (difference @ metric.rows.T).square().sum(1).mean() == pytest.approx(1.0, rel=1e-4)
    assert (difference * metric.scale).square().sum(1).mean() == pytest.approx(0.25, rel=1e-3)


def test_the_rows_that_are_kept_see_what_people_differ_in(model, pictures, dataset):
    """Many rows that see the same few things become as few rows; energies of differences stay."""
    training = dataset.vectors(dataset.training_rows)
    rows = rows_of(model, pictures, training, rows=300, batch=60)
    whole, few = (functional_metric(dataset, rows, keep=n) for n in (300, 24))
    assert few.rows.shape == (24, dataset.layout.size) and len(whole.rows) == 300
    difference = dataset.vectors(dataset.heldout_rows) - training.mean(0)
    energies = [(difference @ m.rows.T).square().sum(1) for m in (whole, few)]
    assert torch.allclose(*energies, rtol=0.05)
    assert (energies[1] <= energies[0] * 1.0001).all()


def test_encoding_a_point_of_the_space_gives_it_back(model, pictures, dataset):
    rows = rows_of(model, pictures, dataset.vectors(dataset.training_rows), rows=60, batch=60)
    basis = fit_coefficients(dataset, 5, metric=functional_metric(dataset, rows)).basis
    c = torch.randn(3, 5, generator=torch.Generator().manual_seed(4))
    assert torch.allclose(basis.project(basis.lift(c)), c, atol=5e-3)


def test_a_sketch_travels_in_a_file(model, pictures, layout, tmp_path):
    rows = rows_of(model, pictures, torch.zeros(1, layout.size), rows=8)
    save_sketch(tmp_path / "s.safetensors", layout, rows, model="toy")
    read = load_sketch(tmp_path / "s.safetensors", layout)
    assert torch.allclose(read, rows, atol=1e-3 * float(rows.abs().max()))
    with pytest.raises(ConfigError, match="layout"):
        load_sketch(tmp_path / "s.safetensors", SD15)


def test_fit_basis_takes_a_sketch(run, model, pictures, dataset, layout, tmp_path):
    write_dataset(
        tmp_path / "data.safetensors",
        dataset.vectors(),
        layout,
        dataset.identity,
        heldout=dataset.heldout,
    )
    rows = rows_of(model, pictures, dataset.vectors(dataset.training_rows), rows=30)
    save_sketch(tmp_path / "s.safetensors", layout, rows)
    fit = ("fit-basis", "data.safetensors", "--components", 4, "-o", "b.safetensors")
    code, _, err = run(*fit, "--metric", "functional")
    assert code == 1 and "--sketch FILE belong together" in err
    code, result, _ = run(*fit, "--metric", "functional", "--sketch", "s.safetensors")
    assert code == 0 and load_coefficients(result["basis"])[1].metric.name == "functional"


@pytest.mark.parametrize(
    ("rows", "damping", "error", "match"),
    [
        (torch.zeros(4, 7), 0.1, ShapeError, "rows"),
        (None, 0.0, ConfigError, "positive damping"),
        (None, 0.1, DataError, "Nothing varies"),
    ],
)
def test_what_makes_no_metric(dataset, rows, damping, error, match):
    rows = torch.zeros(4, dataset.layout.size) if rows is None else rows
    with pytest.raises(error, match=match):
        functional_metric(dataset, rows, damping=damping)


def test_broken_gradients_are_named(pictures, layout):
    def worse(noisy, timestep, vectors):
        return noisy + (vectors.sum(1) * float("inf"))[:, None, None, None]

    with pytest.raises(DataError, match="NaN or infinite"):
        rows_of(worse, pictures, torch.zeros(1, layout.size), rows=2)
