"""The sampler: against an exact solution, and against the implementation that everybody uses."""

from itertools import pairwise

import pytest
import torch

from w2wpp.diffusion.sampler import sample
from w2wpp.diffusion.schedule import LinearSchedule, NoiseSchedule
from w2wpp.errors import ConfigError

MEAN, STD = 0.7, 0.4
ABAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)


def of_a_gaussian(schedule):
    """What a perfect model of N(MEAN, STD^2) predicts."""

    def predict(x, timestep):
        alpha, sigma = schedule.scales(int(timestep[0]))
        x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
        eps = (x - alpha * x0) / sigma
        return eps if schedule.prediction == "eps" else alpha * eps - sigma * x0

    return predict


def exact(noise, schedule):
    """Where the probability flow of that Gaussian ends (Song et al. 2021, eq. 13)."""
    alpha, sigma = schedule.scales(len(schedule) - 1)
    spread = (alpha**2 * STD**2 + sigma**2) ** 0.5
    return MEAN + STD * (noise - alpha * MEAN) / spread


@pytest.mark.parametrize("prediction", ["eps", "v_prediction"])
def test_follows_the_flow_the_closer_the_more_steps(prediction):
    schedule = NoiseSchedule(ABAR, prediction)
    noise = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    errors = [
        float(
            (sample(of_a_gaussian(schedule), noise, schedule, n) - exact(noise, schedule))
            .abs()
            .max()
        )
        for n in (5, 10, 20, 40)
    ]
    assert errors[-1] < 0.1 and all(b < 0.7 * a for a, b in pairwise(errors)), errors


@pytest.mark.parametrize("steps", [1, 2, 8, 20])
def test_is_what_diffusers_has(steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="linspace",
    )
    scheduler.set_timesteps(steps)
    schedule = NoiseSchedule(ABAR, "v_prediction")
    predict = of_a_gaussian(schedule)
    x = noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    for timestep in scheduler.timesteps:
        x = scheduler.step(predict(x, timestep.expand(3)), timestep, x).prev_sample
    torch.testing.assert_close(sample(predict, noise, schedule, steps), x, rtol=1e-4, atol=1e-4)


def test_asks_the_model_once_a_step_from_most_noise_to_least():
    schedule, asked = NoiseSchedule(ABAR, "eps"), []

    def predict(x, timestep):
        asked.append(timestep.tolist())
        return x

    sample(predict, torch.ones(2, 1, 1, 1), schedule, 4)
    assert [t[0] for t in asked] == [999, 749, 500, 250] and all(len(t) == 2 for t in asked)


def test_refuses_no_steps():
    with pytest.raises(ConfigError, match="at least one step"):
        sample(lambda x, t: x, torch.ones(1, 1, 1, 1), NoiseSchedule(ABAR, "eps"), 0)


def test_a_flow_model_is_followed_from_nothing_but_noise():
    sigmas = torch.linspace(0.001, 1, 1000, dtype=torch.float64)
    one = torch.ones_like(sigmas)
    schedule = LinearSchedule(torch.stack([1 - sigmas, sigmas], 1), torch.stack([-one, one], 1))

    def predict(x, timestep):
        alpha, sigma = schedule.scales(int(timestep[0]))
        x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
        return (x - x0) / sigma

    noise = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    errors = [
        float((sample(predict, noise, schedule, n) - exact(noise, schedule)).abs().max())
        for n in (5, 10, 20, 40)
    ]
    assert errors[-1] < 0.1 and all(b < 0.7 * a for a, b in pairwise(errors)), errors
