"""Every codec through one contract, then what is special about each."""

import pytest
import torch
from torch import nn

from w2wpp import CODECS, ConfigError, ShapeError, build_codec
from w2wpp.codecs.base import Posterior

K = 12
CONFIGS = {
    "pca": {"latent_size": K},
    "curved": {"latent_size": 5, "hidden": [16]},
    "vae-skip": {"latent_size": 5, "hidden": [16, 8]},
    "vae-mlp": {"latent_size": 5, "hidden": [16, 8]},
    "original": {"latent_size": 5, "hidden": [16, 8]},
    "original-residual": {"latent_size": 5, "hidden": [16, 16]},
    "tokens": {"latent_size": 5, "hidden": [8, 8], "segments": [3, 5, 4]},
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return {"name": request.param, "coefficient_size": K, **CONFIGS[request.param]}


@pytest.fixture
def codec(config):
    torch.manual_seed(0)
    return build_codec(config).eval()


def test_every_registered_codec_is_tested():
    assert set(CONFIGS) == set(CODECS)


def test_shapes(codec, config):
    posterior = codec.encode(torch.randn(3, K))
    assert posterior.mean.shape == posterior.logvar.shape == (3, config["latent_size"])
    assert codec.decode(posterior.mean).shape == (3, K)
    assert torch.isfinite(posterior.kl()).all()


def test_config_rebuilds_the_architecture(codec):
    again = build_codec(codec.config)
    again.load_state_dict(codec.state_dict(), strict=True)
    c = torch.randn(2, K)
    again.eval()
    assert torch.equal(again.encode(c).mean, codec.encode(c).mean)
    assert again.config == codec.config


def test_rows_are_independent(codec):
    c = torch.randn(4, K)
    alone = torch.cat([codec.decode(codec.encode(row[None]).mean) for row in c])
    assert torch.allclose(codec.decode(codec.encode(c).mean), alone, atol=1e-5)


def test_gradients_reach_latents(codec, config):
    z = torch.zeros(1, config["latent_size"], requires_grad=True)
    with torch.no_grad():
        for p in codec.parameters():
            p.add_(0.01)
    codec.decode(z).sum().backward()
    assert torch.isfinite(z.grad).all() and z.grad.abs().sum() > 0


def test_wrong_sizes_are_refused(codec):
    with pytest.raises(ShapeError, match="K = 12"):
        codec.encode(torch.zeros(2, K + 1))
    with pytest.raises(ShapeError, match="d ="):
        codec.decode(torch.zeros(codec.latent_size))


@pytest.mark.parametrize("name", ["original", "original-residual"])
def test_files_keep_the_older_names_which_fingerprints_depend_on(name):
    """A codec of the release that said "seed" opens, and one of today opens there."""
    config = {"coefficient_size": K, **CONFIGS[name]}
    older = name.replace("original", "seed")
    for given in (name, older):
        codec = build_codec({"name": given, **config})
        assert codec.name == name and codec.config["name"] == older


def test_unknown_names_and_options_are_refused():
    with pytest.raises(ConfigError, match="'gan'; this release has pca"):
        build_codec({"name": "gan"})
    with pytest.raises(ConfigError, match="depth"):
        build_codec({"name": "vae-mlp", "coefficient_size": 4, "latent_size": 2, "depth": 3})
    with pytest.raises(ConfigError, match="truncate"):
        build_codec({"name": "pca", "coefficient_size": 4, "latent_size": 2})
    with pytest.raises(ConfigError, match="d <= K"):
        build_codec({"name": "vae-skip", "coefficient_size": 4, "latent_size": 5})


def test_skip_starts_exactly_at_pca():
    codec = build_codec({"name": "vae-skip", "coefficient_size": K, "latent_size": 5}).eval()
    codec.adapt(torch.linspace(3, 0.1, K), torch.full((K,), 1 / K), 1e-3)
    c = torch.randn(7, K)
    posterior = codec.encode(c)
    truncated = torch.cat([c[:, :5], torch.zeros(7, K - 5)], 1)
    assert torch.equal(posterior.mean, c[:, :5])
    assert torch.equal(codec.decode(posterior.mean), truncated)


def test_tokens_start_at_pca_of_raw_numbers():
    g = torch.Generator().manual_seed(0)
    c = 3 + torch.randn(40, 5, generator=g) @ torch.randn(5, K, generator=g)
    codec = build_codec({"name": "tokens", "coefficient_size": K, **CONFIGS["tokens"]}).eval()
    codec.learn_from(c)
    posterior = codec.encode(c)
    assert torch.allclose(codec.decode(posterior.mean), c, atol=1e-3)
    assert torch.allclose(posterior.mean.square().mean(0), torch.ones(5), atol=1e-3)
    flat = 3 + torch.randn(40, 2, generator=g) @ torch.randn(2, K, generator=g)
    codec.learn_from(flat)  # of fewer directions than latents
    posterior = codec.encode(flat)
    assert torch.allclose(codec.decode(posterior.mean), flat, atol=1e-3)
    assert posterior.mean[:, 2:].abs().max() == 0


def test_tokens_attend_to_each_other():
    """What one module holds moves what is written of all."""
    torch.manual_seed(0)
    codec = build_codec({"name": "tokens", "coefficient_size": K, **CONFIGS["tokens"]}).eval()
    with torch.no_grad():
        for p in codec.parameters():
            p.add_(0.1 * torch.randn_like(p))
        codec.encoder_linear.weight.zero_()
    c = torch.zeros(1, K, requires_grad=True)
    (codec.decode(codec.encode(c).mean)[0, :3].sum()).backward()
    assert all(part.abs().sum() > 0 for part in c.grad.split([3, 5, 4], dim=1))


@pytest.mark.parametrize(
    ("options", "match"),
    [({"segments": [3, 5, 5]}, "add up to K"), ({"hidden": [6, 6]}, "multiple of 4")],
)
def test_tokens_that_do_not_fit_are_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        build_codec({"name": "tokens", "coefficient_size": K, **CONFIGS["tokens"], **options})


def test_skip_starts_at_the_best_variance_of_a_linear_codec():
    """Against a grid: w v + beta / (2 d) (v - log v) for each unit."""
    weight, beta, d = torch.tensor([0.6, 0.3, 0.05, 1e-5]), 2e-3, 3
    codec = build_codec({"name": "vae-skip", "coefficient_size": 4, "latent_size": d})
    codec.adapt(torch.ones(4), weight, beta)
    v = torch.logspace(-6, 0.5, 20_001)[:, None]
    cost = weight[:d] * v + beta / (2 * d) * (v - v.log())
    best = v[cost.argmin(0)].flatten()
    found = codec.encode(torch.zeros(1, 4)).logvar.exp().flatten()
    assert torch.allclose(found, best, rtol=1e-2)


def test_original_has_the_keys_and_the_shape_of_the_published_checkpoints():
    codec = build_codec({"name": "original", "coefficient_size": 30, "latent_size": 8}).eval()
    shapes = {k: tuple(t.shape) for k, t in codec.state_dict().items()}
    weights = {k: s for k, s in shapes.items() if k.endswith("weight")}
    assert weights == {
        "encoder.0.0.weight": (2048, 30),
        "encoder.1.0.weight": (1024, 2048),
        "fc_mu.weight": (8, 1024),
        "fc_var.weight": (8, 1024),
        "decoder_input.weight": (1024, 8),
        "decoder.0.0.weight": (2048, 1024),
        "final_layer.0.weight": (30, 2048),
    }
    assert all(k.endswith(("weight", "bias")) for k in shapes)
    assert codec.decode(100 * torch.randn(2, 8)).abs().max() <= 1.0
    h = torch.randn(3, 30)
    for layer in (0, 1):
        linear = codec.encoder[layer][0]
        h = nn.functional.leaky_relu(h @ linear.weight.T + linear.bias, 0.01)
    torch.manual_seed(0)
    assert codec.fc_mu(h).shape == (3, 8)


def test_kl_against_torch():
    p = Posterior(torch.randn(4, 3), torch.randn(4, 3))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(p.mean, p.std), normal(0.0, 1.0))
    assert torch.allclose(p.kl(), expected, atol=1e-6)
