"""Noise schedules: what a weighting multiplies the squared error of a prediction by."""

import pytest
import torch

from w2wpp import ConfigError, LinearSchedule, NoiseSchedule, ShapeError

SNR = torch.tensor([20.0, 5.1, 4.9, 1.0, 0.25], dtype=torch.float64)
ABAR = SNR / (1 + SNR)


@pytest.mark.parametrize(
    "weighting, eps",
    [
        ("native", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("eps", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("v", [21 / 20, 6.1 / 5.1, 5.9 / 4.9, 2.0, 5.0]),
        ("x0", [1 / 20, 1 / 5.1, 1 / 4.9, 1.0, 4.0]),
        ("min-snr", [5 / 20, 5 / 5.1, 1.0, 1.0, 1.0]),  # gamma = 5 (Hang et al. 2023)
    ],
)
def test_weights_by_hand(weighting, eps):
    eps = torch.tensor(eps, dtype=torch.float64)
    torch.testing.assert_close(NoiseSchedule(ABAR, "eps").weights(weighting), eps)
    # The same error of x0 is SNR for a model of eps and SNR + 1 for one of v.
    v = torch.ones_like(eps) if weighting == "native" else eps * SNR / (SNR + 1)
    torch.testing.assert_close(NoiseSchedule(ABAR, "v_prediction").weights(weighting), v)


@pytest.mark.parametrize("prediction", ["eps", "v_prediction"])
def test_noise_and_target_by_hand(prediction):
    schedule = NoiseSchedule(torch.tensor([0.64, 0.36]), prediction)
    x0, noise = torch.full((2, 1, 1, 1), 2.0), torch.full((2, 1, 1, 1), -1.0)
    noisy, target = schedule.add_noise(x0, noise, torch.tensor([0, 1]))
    torch.testing.assert_close(noisy.flatten(), torch.tensor([1.6 - 0.6, 1.2 - 0.8]))
    v = torch.tensor([0.8 * -1 - 0.6 * 2, 0.6 * -1 - 0.8 * 2])
    expected = {"eps": torch.tensor([-1.0, -1.0]), "v_prediction": v}
    torch.testing.assert_close(target.flatten(), expected[prediction])


def test_refuses():
    with pytest.raises(ConfigError, match="'x0'"):
        NoiseSchedule(ABAR, "x0")
    with pytest.raises(ConfigError, match="'loud'"):
        NoiseSchedule(ABAR, "eps").weights("loud")
    for bad in (
        torch.zeros(0),
        torch.tensor([[0.5]]),
        torch.tensor([0.5, 1.0]),
        torch.tensor([0.0]),
    ):
        with pytest.raises(ShapeError, match="alphas_cumprod"):
            NoiseSchedule(bad, "eps")


def as_linear(schedule):
    """A schedule of alphas, by its coefficients."""
    alpha, sigma = schedule.alphas_cumprod.sqrt(), (1 - schedule.alphas_cumprod).sqrt()
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    target = (zero, one) if schedule.prediction == "eps" else (-sigma, alpha)
    return LinearSchedule(torch.stack([alpha, sigma], 1), torch.stack(target, 1))


def flow(sigmas):
    """Flow matching: (1 - s) x0 + s noise, and the velocity noise - x0."""
    one = torch.ones_like(sigmas)
    return LinearSchedule(torch.stack([1 - sigmas, sigmas], 1), torch.stack([-one, one], 1))


@pytest.mark.parametrize("prediction", ["eps", "v_prediction"])
def test_alphas_are_one_kind_of_coefficients(prediction):
    plain = NoiseSchedule(ABAR, prediction)
    linear = as_linear(plain)
    g = torch.Generator().manual_seed(0)
    x0, noise, output = torch.randn(3, 5, 2, 3, 3, generator=g, dtype=torch.float64)
    timestep = torch.arange(5)
    for mine, theirs in zip(
        linear.add_noise(x0, noise, timestep), plain.add_noise(x0, noise, timestep)
    ):
        torch.testing.assert_close(mine, theirs)
    for t in range(5):
        assert linear.scales(t) == pytest.approx(plain.scales(t))
        torch.testing.assert_close(linear.clean(x0, output, t), plain.clean(x0, output, t))
    for weighting in ("native", "eps", "v", "x0", "min-snr"):
        torch.testing.assert_close(linear.weights(weighting), plain.weights(weighting))


def test_flow_by_hand():
    schedule = flow(torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64))
    x0, noise = torch.full((3, 1, 1, 1), 2.0), torch.full((3, 1, 1, 1), -2.0)
    noisy, target = schedule.add_noise(x0, noise, torch.arange(3))
    assert noisy.flatten().tolist() == [1.0, 0.0, -2.0] and target.flatten().tolist() == [-4.0] * 3
    for t in range(3):
        torch.testing.assert_close(schedule.clean(noisy[t], target[t], t), x0[t])
    # An error of the velocity is one of x0 over s, and one of the noise over 1 - s.
    torch.testing.assert_close(schedule.weights("x0").tolist(), [0.0625, 0.25, 1.0])
    torch.testing.assert_close(schedule.weights("eps").tolist(), [0.5625, 0.25, 0.0])


def test_refuses_what_does_not_denoise():
    good = torch.tensor([[0.5, 0.5]])
    for noisy, target, what in (
        (torch.tensor([[1.0, 0.0]]), good, "hold no noise"),
        (good, 2 * good, "do not tell the picture"),
        (torch.tensor([[float("nan"), 1.0]]), good, "NaN"),
    ):
        with pytest.raises(ConfigError, match=what):
            LinearSchedule(noisy, target)
    with pytest.raises(ShapeError, match=r"\[T, 2\]"):
        LinearSchedule(good, torch.zeros(2, 2))
    with pytest.raises(ConfigError, match="'loud'"):
        flow(torch.tensor([0.5])).weights("loud")
