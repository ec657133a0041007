"""The pivotal stage on a bowl whose optimum under decay is known."""

import pytest
import torch

from w2wpp import (
    Adam,
    Basis,
    ConfigError,
    Identity,
    Layout,
    Module,
    NoiseSchedule,
    Objective,
    Pivotal,
    Space,
    build_codec,
    invert,
)

D, P = 4, 5
ABAR = torch.linspace(0.99, 0.01, 20)
TARGET = torch.tensor([[0.8, -0.5, 0.3, 1.1]])


def problem():
    """A denoiser that is off by the distance of a vector from the target's: the loss is |z + r - TARGET|^2 / P."""
    v = torch.linalg.qr(torch.randn(P, D, generator=torch.Generator().manual_seed(0))).Q.T
    basis = Basis(torch.zeros(P), torch.ones(P), v, torch.ones(D))
    codec = build_codec({"name": "pca", "coefficient_size": D, "latent_size": D})
    layout = Layout("toy", "toy", (Module("a", 3, 2),), rank=1, alpha=1.0)
    space = Space(layout, basis, codec, torch.zeros(D), torch.ones(D))
    w = space.decode(TARGET)

    def denoise(noisy, timestep, vectors):
        off = (vectors - w).repeat_interleave(len(noisy) // len(vectors), 0)
        return noisy / (1 - ABAR[timestep]).sqrt()[:, None, None, None] + off[:, :, None, None]

    return Objective(space, torch.zeros(1, P, 1, 1), denoise, NoiseSchedule(ABAR, "eps"), draws=4)


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("keep", ["best", "last"])
def test_decay_pulls_the_residual_back_by_its_weight(decay, keep):
    """The slope is 2 (r - target) / P + decay r: zero at r = target (2 / P) / (2 / P + decay)."""
    objective = problem()
    start = Identity(torch.zeros(1, 4), objective.space.fingerprint)
    stage = Pivotal(steps=400, lr=0.05, decay=decay)
    solution = invert(objective, Adam(lr=1e-12), steps=1, start=start, pivotal=stage, keep=keep)
    expected = TARGET * 0.4 / (0.4 + decay)
    torch.testing.assert_close(solution.identity.residual, expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(solution.identity.z, torch.zeros(1, 4))
    assert solution.residual_norm == pytest.approx(float(expected.norm()), rel=0.01)


def test_the_loss_that_is_shown_holds_the_decay():
    objective = problem()
    start = Identity(torch.zeros(1, 4), objective.space.fingerprint)
    losses = {}
    for decay in (0.0, 0.4):
        stage = Pivotal(steps=2, lr=0.5, decay=decay)
        losses[decay] = invert(objective, Adam(lr=1e-12), steps=1, start=start, pivotal=stage)
    # After one step of 0.5 in each coordinate towards the target, |r|^2 = 4 * 0.25.
    free, held = (losses[d].history[-1] for d in (0.0, 0.4))
    assert held - free == pytest.approx(0.5 * 0.4 * 1.0, rel=1e-4)


def test_by_default_it_takes_few_short_steps_held_back_a_little():
    assert (Pivotal().steps, Pivotal().lr, Pivotal().decay) == (4, 0.05, 1e-3)
    assert Pivotal(lr=0.3).optimiser() == Adam(lr=0.3)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"lr": 0.0}, {"decay": -1e-9}, {"lr": float("nan")}]
)
def test_a_stage_that_can_not_be_taken_is_refused(wrong):
    with pytest.raises(ConfigError, match="pivotal stage"):
        Pivotal(**wrong)
    Pivotal(steps=1, lr=1e-9, decay=0.0)
