"""The skip VAE against its equations."""

import pytest
import torch
from torch.nn.functional import pad

from w2wpp import build_codec
from w2wpp.codecs.base import Dropout

K, D = 6, 3
SCALES = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.2, 0.1])
GAIN = SCALES / 4.0


@pytest.fixture
def codec():
    made = build_codec(
        {"name": "vae-skip", "coefficient_size": K, "latent_size": D, "hidden": [8]}
    ).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    made.adapt(SCALES, torch.full((K,), 1 / K), beta=1e-3)
    return made.requires_grad_(False)


def test_the_gain_is_each_scale_relative_to_the_largest(codec):
    torch.testing.assert_close(codec.gain, GAIN)


def test_the_encoder_sees_coefficients_times_the_gain_and_the_shortcut_does_not(codec):
    c = torch.randn(5, K, generator=torch.Generator().manual_seed(1))
    h = torch.nn.functional.silu((c * GAIN) @ codec.encoder[0].weight.T + codec.encoder[0].bias)
    mean = c[:, :D] + (c * GAIN) @ codec.encoder_linear.weight.T + codec.fc_mu(h)
    posterior = codec.encode(c)
    torch.testing.assert_close(posterior.mean, mean)
    torch.testing.assert_close(posterior.logvar, codec.fc_var(h).clamp(-30.0, 20.0))


def test_the_decoder_adds_its_networks_times_the_gain(codec):
    z = torch.randn(5, D, generator=torch.Generator().manual_seed(1))
    h = torch.nn.functional.silu(z @ codec.decoder[0].weight.T + codec.decoder[0].bias)
    learned = codec.decoder_linear(z) + h @ codec.final_layer.weight.T
    torch.testing.assert_close(codec.decode(z), pad(z, (0, K - D)) + learned * GAIN)


def test_dropout_keeps_the_mean_and_draws_where_it_is_told():
    layer, h = Dropout(0.25), torch.ones(4, 5000)
    layer.generator = torch.Generator().manual_seed(1)
    first = layer(h)
    torch.testing.assert_close(first.unique(), torch.tensor([0.0, 4 / 3]))
    assert float(first.mean()) == pytest.approx(1.0, abs=0.02)
    layer.generator = torch.Generator().manual_seed(1)
    assert torch.equal(layer(h), first)
    assert torch.equal(layer.eval()(h), h)


def test_nothing_is_dropped_unless_asked_for():
    made = build_codec({"name": "vae-skip", "coefficient_size": K, "latent_size": D})
    assert made.config["dropout"] == 0.0 and made.config["hidden"] == [256]


def test_with_as_many_latents_as_coefficients_nothing_is_cut_and_nothing_is_padded():
    made = build_codec(
        {"name": "vae-skip", "coefficient_size": K, "latent_size": K, "hidden": [8]}
    ).eval()
    c = torch.randn(4, K, generator=torch.Generator().manual_seed(1))
    assert torch.equal(made.encode(c).mean, c) and torch.equal(made.decode(c), c)
    with torch.no_grad():
        made.decoder_linear.bias.fill_(1.0)
    torch.testing.assert_close(made.decode(c), c + 1.0)


@pytest.mark.parametrize("beta, floor", [(0.0, 1e-6), (-1.0, 1e-6), (1e-3, 1e-3)])
def test_the_posterior_does_not_collapse_without_a_penalty(beta, floor):
    made = build_codec({"name": "vae-skip", "coefficient_size": K, "latent_size": D})
    weight = torch.full((K,), 0.5)
    made.adapt(SCALES, weight, beta)
    t = floor / (2 * D)
    torch.testing.assert_close(made.fc_var.bias.detach(), torch.full((D,), t / (0.5 + t)).log())


def test_posteriors_stay_within_what_single_precision_holds(codec):
    far = codec.encode(1e6 * torch.randn(20, K, generator=torch.Generator().manual_seed(1)))
    assert float(far.logvar.min()) == -30.0 and float(far.logvar.max()) == 20.0
