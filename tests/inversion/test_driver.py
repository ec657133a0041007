"""invert(): optimisers on problems with a known optimum, stopping, resuming, and what failures leave behind."""

import dataclasses

import numpy as np
import pytest
import torch

from w2wpp import Basis, Identity, Layout, Module, Space, build_codec
from w2wpp.codecs import Codec
from w2wpp.errors import ConfigError, DataError, FormatError, ShapeError, SpaceMismatch
from w2wpp.inversion import (
    Adam,
    Cma,
    Multistart,
    NoiseSchedule,
    Objective,
    Pivotal,
    StopInversion,
    invert,
)
from w2wpp.inversion.driver import COMPARISONS

D, K = 4, 4


def make_space():
    layout = Layout("toy", "toy", (Module("a", 3, 2),), rank=1, alpha=1.0)
    generator = torch.Generator().manual_seed(0)
    v = torch.linalg.qr(torch.randn(layout.size, K, generator=generator)).Q.T
    basis = Basis(torch.zeros(layout.size), torch.ones(layout.size), v, torch.ones(K))
    codec = build_codec({"name": "pca", "coefficient_size": K, "latent_size": D})
    return Space(layout, basis, codec, torch.zeros(D), torch.ones(D))


class Bowl:
    """A denoiser whose loss is |w - w*|^2 / 4 plus noise: its prediction is off by the distance."""

    def __init__(self, space, target, noise=0.0):
        self.w = space.decode(target)[0].detach()
        self.noise, self.calls = noise, 0
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self, noisy, timestep, vectors):
        self.calls += 1
        off = (vectors - self.w).repeat_interleave(len(noisy) // len(vectors), 0)  # [N, P]
        jitter = 1 + self.noise * torch.randn(len(off), 1, generator=self.generator)
        value = (off * jitter)[:, :, None, None] if self.noise else off[:, :, None, None]
        return self.truth(noisy, timestep) + value.expand(-1, -1, 1, 1)

    def truth(self, noisy, timestep):  # eps of a picture of zeros
        return noisy / (1 - ABAR[timestep]).sqrt()[:, None, None, None]


ABAR = torch.linspace(0.99, 0.01, 20)
TARGET = torch.tensor([[0.8, -0.5, 0.3, 1.1]])


def problem(noise=0.0, people=1, *, picture=0.0, abar=ABAR, prediction="eps", model="", **options):
    space = make_space()
    bowl = Bowl(space, TARGET, noise)
    bowl.fingerprint = model
    pictures = torch.full((people, 1, space.layout.size, 1, 1), picture)
    schedule = NoiseSchedule(abar, prediction)
    return Objective(space, pictures, bowl, schedule, **{"draws": 4, **options}), bowl


CASES = {
    "adam": (Adam(lr=0.1), 80, 0.05),
    "separable": (Cma(population=8), 60, 0.05),
    "full": (Cma(population=8, mode="full"), 60, 0.05),
    "multistart": (Multistart(starts=6, spread=0.5, adam=Adam(lr=0.1)), 80, 0.05),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_finds_the_optimum(name, noise):
    optimiser, steps, tolerance = CASES[name]
    objective, _ = problem(noise, people=2)
    solution = invert(objective, optimiser, steps=steps, keep="last" if noise else "best")
    torch.testing.assert_close(
        solution.identity.z, TARGET.expand(2, -1), rtol=0, atol=tolerance * (3 if noise else 1)
    )
    assert solution.stop_reason == f"all {steps} steps made"
    assert solution.evaluations == objective.evaluations
    assert len(solution.history) == steps


def test_numpys_global_generator_is_left_alone():
    np.random.seed(5)
    expected = np.random.rand(3)
    np.random.seed(5)
    invert(problem()[0], Cma(), steps=3)
    assert np.array_equal(np.random.rand(3), expected)


def test_the_best_point_is_kept_when_the_run_gets_worse():
    objective, _ = problem()
    start = Identity(TARGET, objective.space.fingerprint)
    solution = invert(objective, Adam(lr=0.5, anneal=False), steps=5, start=start)
    assert torch.equal(solution.identity.z, TARGET)
    last = invert(objective, Adam(lr=0.5, anneal=False), steps=5, start=start, keep="last")
    assert not torch.equal(last.identity.z, TARGET) or last.loss == [0.0]


def test_fresh_draws_are_compared_by_draws_kept_aside_and_counted():
    objective, _ = problem(fresh=True)
    solution = invert(objective, Adam(), steps=5)
    assert solution.evaluations == 5 * (4 + COMPARISONS)
    # Where the last point is kept anyway, nothing is spent on comparing.
    assert invert(objective, Adam(), steps=5, keep="last").evaluations == 5 * 4


def test_who_keeps_the_last_point_is_shown_the_latest():
    """Losses under other noise in every step do not compare: the luckiest step's point is not the best."""
    objective, _ = problem(fresh=True)
    shown = []
    solution = invert(
        objective, Adam(lr=0.5), steps=6, keep="last", callback=lambda p: shown.append(p.best.z)
    )
    assert torch.equal(shown[-1], solution.identity.z)
    assert len({tuple(z.flatten().tolist()) for z in shown}) == 6


@pytest.mark.parametrize("how", ["raise", "return"])
def test_a_callback_can_stop(how):
    seen = []

    def callback(progress):
        seen.append(progress)
        if progress.step == 3:
            if how == "raise":
                raise StopInversion
            return False

    solution = invert(problem()[0], Adam(), steps=10, pivotal=Pivotal(), callback=callback)
    assert len(seen) == 3 and "stopped" in solution.stop_reason
    assert seen[-1].evaluations == 12 and seen[-1].steps == 14


@pytest.mark.parametrize("optimiser", [Adam(), Cma(), Multistart()], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("at", [1, 3, 5, 7])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, optimiser, at):
    settings = {"steps": 5, "pivotal": Pivotal(steps=3), "seed": 4}
    expected = invert(problem(fresh=True)[0], optimiser, **settings)

    def callback(progress):
        if progress.step == at:
            raise KeyboardInterrupt

    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        invert(problem(fresh=True)[0], optimiser, **settings, callback=callback, checkpoint=path)
    again = invert(problem(fresh=True)[0], optimiser, **settings, checkpoint=path)
    assert torch.equal(again.identity.z, expected.identity.z)
    assert torch.equal(again.identity.residual, expected.identity.residual)
    assert again.history == expected.history and again.evaluations == expected.evaluations
    assert not path.exists()


OTHERS = {
    "settings": lambda: (problem(), Adam(lr=0.2), {}),
    "pictures": lambda: (problem(picture=0.1), Adam(), {}),
    "mask": lambda: (problem(mask=torch.full((1, 1, 1, 1), 0.5)), Adam(), {}),
    "prior": lambda: (problem(prior=0.1), Adam(), {}),
    "weighting": lambda: (problem(weighting="v"), Adam(), {}),
    "target": lambda: (problem(prediction="v_prediction"), Adam(), {}),
    "schedule": lambda: (problem(abar=ABAR * 0.9), Adam(), {}),
    "draws": lambda: (problem(draws=5), Adam(), {}),
    "seed": lambda: (problem(), Adam(), {"seed": 1}),
    "keep": lambda: (problem(), Adam(), {"keep": "last"}),
    "model": lambda: (problem(model="another"), Adam(), {}),
    "start": lambda: (problem(), Adam(), {"start": Identity(TARGET, make_space().fingerprint)}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_inversion_is_refused(tmp_path, other):
    path = tmp_path / "run.safetensors"

    def callback(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        invert(problem()[0], Adam(), steps=5, callback=callback, checkpoint=path)
    (objective, _), optimiser, options = OTHERS[other]()
    with pytest.raises(FormatError, match="other pictures, or with other settings"):
        invert(objective, optimiser, steps=5, checkpoint=path, **options)
    assert len(invert(problem()[0], Adam(), steps=5, checkpoint=path).history) == 5


class Half(Codec):
    name = "half"

    def _decode(self, z):
        return torch.cat([z, torch.zeros_like(z)], dim=1)


def test_the_pivotal_stage_reaches_what_the_latent_may_not():
    """The latent has two of the four directions; the residual has all of them."""
    objective, _ = problem()
    small = dataclasses.replace(
        objective.space, codec=Half(K, 2), prior_mean=torch.zeros(2), prior_std=torch.ones(2)
    )
    objective.space = small
    alone = invert(objective, Adam(), steps=80)
    torch.testing.assert_close(alone.identity.z, TARGET[:, :2], rtol=0, atol=0.05)
    freed = invert(objective, Adam(), steps=80, pivotal=Pivotal(steps=80, lr=0.1, decay=1e-4))
    assert freed.loss[0] < alone.loss[0] / 10
    assert freed.residual_norm == pytest.approx(float(TARGET[:, 2:].norm()), rel=0.1)
    held = invert(objective, Adam(), steps=80, pivotal=Pivotal(steps=80, lr=0.1, decay=1.0))
    assert 0 < held.residual_norm < freed.residual_norm / 1.5


def test_a_failing_denoiser_passes_through_and_leaves_nothing():
    objective, bowl = problem()
    calls = bowl.__class__.__call__

    def failing(noisy, timestep, vectors):
        if bowl.calls >= 3:
            raise MemoryError("no more")
        return calls(bowl, noisy, timestep, vectors)

    objective.denoise = failing
    before = {n: t.clone() for n, t in objective.space.tensors().items()}
    enabled = torch.is_grad_enabled()
    with pytest.raises(MemoryError):
        invert(objective, Adam(), steps=10)
    assert torch.is_grad_enabled() == enabled
    assert all(torch.equal(t, before[n]) for n, t in objective.space.tensors().items())
    assert not any(t.requires_grad for t in (objective.space.prior_mean, objective.space.prior_std))
    objective.denoise = bowl
    assert invert(objective, Adam(), steps=2).history  # and it can be used again


def test_gradients_work_inside_inference_mode():
    space_of = make_space()
    space = dataclasses.replace(space_of, prior_std=torch.full((D,), 1.0))
    with torch.inference_mode():
        objective, _ = problem()
        objective.space = space
        z = invert(objective, Adam(), steps=3).identity.z
    torch.testing.assert_close(z, invert(problem()[0], Adam(), steps=3).identity.z)


def test_a_loss_that_is_no_number_is_an_error():
    objective, _ = problem()
    objective.denoise = lambda noisy, timestep, vectors: noisy * float("nan") + vectors.sum()
    with pytest.raises(DataError, match="became NaN or infinite"):
        invert(objective, Adam(), steps=3)


def test_refuses():
    objective, _ = problem(people=2)
    with pytest.raises(ConfigError):
        invert(objective, Adam(), steps=0)
    with pytest.raises(SpaceMismatch):
        invert(objective, Adam(), steps=1, start=Identity(torch.zeros(1, D), "another"))
    with pytest.raises(ShapeError):
        start = Identity(torch.zeros(3, D), objective.space.fingerprint)
        invert(objective, Adam(), steps=1, start=start)
    for bad in (
        lambda: Adam(lr=0),
        lambda: Cma(mode="wild"),
        lambda: Multistart(starts=0),
        lambda: Pivotal(steps=0),
    ):
        with pytest.raises(ConfigError):
            bad()


DIRECTIONS = torch.linalg.qr(torch.randn(D, 2, generator=torch.Generator().manual_seed(8))).Q.T


@pytest.mark.parametrize("optimiser, steps, near", CASES.values(), ids=CASES)
def test_along_directions_the_best_point_of_their_span_is_found(optimiser, steps, near):
    """The loss is a bowl about the target, so the best point is its projection, and the rest stays at the start."""
    objective, _ = problem()
    begin = torch.tensor([[0.1, 0.2, -0.3, 0.4]])
    start = Identity(begin, objective.space.fingerprint)
    found = invert(objective, optimiser, steps=steps, start=start, along=DIRECTIONS).identity.z
    best = begin + (TARGET - begin) @ DIRECTIONS.T @ DIRECTIONS
    assert float((found - best).norm()) < 2 * near
    rest = torch.eye(D) - DIRECTIONS.T @ DIRECTIONS
    torch.testing.assert_close(found @ rest, begin @ rest, atol=1e-5, rtol=0)


def test_along_directions_a_run_is_taken_up_to_the_same_bits(tmp_path):
    def run(checkpoint=None, stop=None, along=DIRECTIONS):
        def callback(progress):
            assert progress.best.z.shape == (1, D)
            if progress.step == stop:
                raise KeyboardInterrupt

        return invert(
            problem(fresh=True)[0], Adam(lr=0.1), steps=6, along=along, pivotal=Pivotal(steps=2), callback=callback,
            checkpoint=checkpoint,
        )  # fmt: skip

    whole, file = run(), tmp_path / "run.safetensors"
    for stop in (3, 7):  # within either stage
        with pytest.raises(KeyboardInterrupt):
            run(file, stop)
        with pytest.raises(FormatError, match="other pictures, or with other settings"):
            run(file, along=None)
        again = run(file)
        assert torch.equal(again.identity.z, whole.identity.z)
        assert torch.equal(again.identity.residual, whole.identity.residual)
        assert again.history == whole.history and not file.exists()


@pytest.mark.parametrize(
    "along, error",
    [
        (torch.eye(3), ShapeError),
        (torch.zeros(0, D), ShapeError),
        (torch.ones(2, D), ConfigError),
        (torch.full((1, D), torch.nan), ConfigError),
    ],
)
def test_odd_directions_are_refused(along, error):
    with pytest.raises(error, match="Directions to move along"):
        invert(problem()[0], Adam(), steps=1, along=along)
