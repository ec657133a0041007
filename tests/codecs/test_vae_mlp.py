"""The plain VAE against its equations, on whitened coefficients and on raw vectors."""

import pytest
import torch
from torch.nn.functional import leaky_relu

from w2wpp import build_codec

K, D = 6, 3
SCALES = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.2, 0.1])


def build(name):
    made = build_codec({"name": name, "coefficient_size": K, "latent_size": D, "hidden": [8, 5]})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator))
    return made.eval().requires_grad_(False)


def through(layers, x):
    for layer in layers:
        linear = layer[0]
        x = leaky_relu(x @ linear.weight.T + linear.bias, 0.01)
    return x


@pytest.mark.parametrize("name, gain", [("vae-mlp", SCALES / 4.0), ("original", torch.ones(K))])
def test_the_gain_undoes_the_whitening_and_raw_vectors_have_none(name, gain):
    codec = build(name)
    codec.adapt(SCALES, torch.full((K,), 1 / K), beta=1e-3)
    assert ("gain" in codec.state_dict()) == (name == "vae-mlp")
    c = torch.randn(5, K, generator=torch.Generator().manual_seed(1))
    h = through(codec.encoder, c * gain)
    posterior = codec.encode(c)
    torch.testing.assert_close(posterior.mean, h @ codec.fc_mu.weight.T + codec.fc_mu.bias)
    logvar = h @ codec.fc_var.weight.T + codec.fc_var.bias
    torch.testing.assert_close(posterior.logvar, logvar)


def test_the_decoder_is_the_encoder_backwards_without_a_gain():
    codec = build("vae-mlp")
    codec.adapt(SCALES, torch.full((K,), 1 / K), beta=1e-3)
    z = torch.randn(5, D, generator=torch.Generator().manual_seed(1))
    h = through(codec.decoder, z @ codec.decoder_input.weight.T + codec.decoder_input.bias)
    last = codec.final_layer[0]
    torch.testing.assert_close(codec.decode(z), h @ last.weight.T + last.bias)
    assert [layer[0].weight.shape for layer in codec.decoder] == [(8, 5)]


def test_without_hidden_layers_it_is_linear():
    codec = build_codec({"name": "vae-mlp", "coefficient_size": K, "latent_size": D, "hidden": []})
    z = torch.randn(2, D, generator=torch.Generator().manual_seed(1))
    middle = 0.5 * (codec.decode(z[:1]) + codec.decode(z[1:]))
    torch.testing.assert_close(codec.decode(z.mean(0, keepdim=True)), middle)
    assert codec.final_layer[0].weight.shape == (K, K)


def test_its_usual_widths():
    made = build_codec({"name": "vae-mlp", "coefficient_size": K, "latent_size": D})
    assert made.config["hidden"] == [512, 256]
