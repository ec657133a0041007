"""Noise schedules: what a weighting multiplies the squared error of a prediction by."""

import pytest
import torch

from w2wpp import ConfigError, NoiseSchedule, ShapeError

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
