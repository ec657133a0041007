"""Checkpoints of the original w2w++, against their architectures written again in plain torch."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from w2wpp import SD15, load_space, save_space
from w2wpp.imports.original import read_vae

from .conftest import generator

LATENT = 5


class Vanilla(nn.Module):
    """Linear (batch norm) LeakyReLU, twice; heads; and back, tanh at the end. It reads w * 10."""

    def __init__(self, p, norms):
        super().__init__()

        def layer(i, o):
            return nn.Sequential(
                *[nn.Linear(i, o), *([nn.BatchNorm1d(o)] if norms else []), nn.LeakyReLU(0.01)]
            )

        self.encoder = nn.Sequential(layer(p, 12), layer(12, 8))
        self.fc_mu, self.fc_var = nn.Linear(8, LATENT), nn.Linear(8, LATENT)
        self.decoder_input = nn.Linear(LATENT, 8)
        self.decoder = nn.Sequential(layer(8, 12))
        self.final_layer = nn.Sequential(nn.Linear(12, p), nn.Tanh())

    def encode(self, w):
        h = self.encoder(w * 10)
        return self.fc_mu(h), self.fc_var(h)

    def decode(self, z):
        return self.final_layer(self.decoder(self.decoder_input(z))) / 10


class Block(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.block = nn.Sequential(
            nn.Linear(h, h), nn.ReLU(), nn.LayerNorm(h), nn.Linear(h, h), nn.LayerNorm(h)
        )

    def forward(self, x):
        return x + self.block(x)


class Residual(nn.Module):
    """It reads weights scaled from their published range to [-1, 1]."""

    def __init__(self, p, norms=False):
        super().__init__()

        def pair(i, m, o):
            return nn.Sequential(nn.Linear(i, m), nn.ReLU(), nn.Linear(m, o))

        self.first_layer = pair(p, 14, 10)
        self.encoder = nn.ModuleList(Block(10) for _ in range(3))
        self.fc_mu, self.fc_var = pair(10, 10, LATENT), pair(10, 10, LATENT)
        self.decoder_input = nn.Linear(LATENT, 10)
        self.decoder = nn.ModuleList(Block(10) for _ in range(3))
        self.final_layer = pair(10, 16, p)

    def encode(self, w):
        h = self.first_layer(2 * (w + 0.094693) / 0.186591 - 1)
        for block in self.encoder:
            h = block(h)
        return self.fc_mu(h), self.fc_var(h)

    def decode(self, z):
        h = self.decoder_input(z)
        for block in self.decoder:
            h = block(h)
        return (self.final_layer(h) + 1) / 2 * 0.186591 - 0.094693


def trained(kind, p, norms):
    """A network in a state that training could leave it in; batch norms have seen data."""
    torch.manual_seed(1)
    network = kind(p, norms)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3.0)
    return network.eval()


def wrapped(network, how):
    state = network.state_dict()
    if how == "plain":
        return state
    if how == "model":
        return {"model_state_dict": state, "epoch": 3}
    judge = nn.Linear(3, 1).state_dict() if how == "with discriminator" else None
    return {"vae_state_dict": state, "discriminator_state_dict": judge, "epoch": 7}


CASES = [
    (Vanilla, False, "plain"),
    (Vanilla, False, "model"),
    (Vanilla, True, "plain"),
    (Vanilla, True, "model"),
    (Residual, False, "with discriminator"),
    (Residual, False, "without discriminator"),
]


@pytest.mark.parametrize("kind, norms, how", CASES)
def test_a_checkpoint_computes_what_the_original_computes(tmp_path, layout, kind, norms, how):
    network = trained(kind, layout.size, norms)
    torch.save(wrapped(network, how), tmp_path / "vae.pt")
    read = read_vae(tmp_path / "vae.pt", layout=layout)
    save_space(read, tmp_path / "space.safetensors")
    w = 0.05 * torch.randn(9, layout.size, generator=generator())
    z = torch.randn(9, LATENT, generator=generator(1))
    with torch.no_grad():
        mean, logvar = network.encode(w)
        for space in (read, load_space(tmp_path / "space.safetensors")):
            posterior = space.encode(w)
            torch.testing.assert_close(posterior.mean, mean, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(posterior.logvar, logvar, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(space.decode(z), network.decode(z), atol=1e-6, rtol=1e-4)
    assert space.codec.hidden == ((12, 8) if kind is Vanilla else (10, 10, 10))
    assert "academic" in space.licence and space.trigger_prompt == "sks person"
    report = space.training_report
    assert report.get("epoch") == {"plain": None, "model": 3}.get(how, 7)
    if "discriminator" in how:
        assert report["discriminator"] is (how == "with discriminator")


def test_the_command_at_full_size(run):
    network = trained(Vanilla, SD15.size, True)
    torch.save(network.state_dict(), "vae.pt")
    code, result, _ = run("import-vae", "vae.pt", "-o", "space.safetensors")
    assert code == 0 and (result["codec"], result["latent_size"]) == ("original", LATENT)
    space = load_space("space.safetensors")
    z = torch.randn(2, LATENT, generator=generator(1))
    torch.testing.assert_close(space.decode(z), network.decode(z), atol=1e-6, rtol=1e-4)
    code, result, _ = run("sample", "space.safetensors", "--seed", 1, "-o", "id.safetensors")
    assert code == 0 and result["latent_size"] == LATENT


def changed(change):
    state = trained(Vanilla, SD15.size, True).state_dict()
    change(state)
    return state


def put(key, value):
    return lambda state: state.update({key: value})


BAD = {
    "object": (lambda: {"model": Path("x")}, "pickled Python objects"),
    "tensor": (lambda: torch.ones(3), "holds no state dict"),
    "other": (lambda: {"conv.weight": torch.ones(3)}, "is no VAE of the original"),
    "norm": (lambda: changed(lambda s: s.pop("encoder.1.1.running_var")), "encoder.1.1 is incomplete"),
    "missing": (lambda: changed(lambda s: s.pop("final_layer.0.bias")), "e.g. final_layer.0.bias"),
    "unknown": (lambda: changed(put("more", torch.ones(2))), "e.g. more"),
    "shape": (lambda: changed(put("fc_var.weight", torch.ones(4, 8))), "fc_var.weight is [4, 8]"),
    "nan": (lambda: changed(put("fc_mu.bias", torch.full((5,), torch.nan))), "NaN or infinite"),
    "size": (lambda: trained(Vanilla, 50, False).state_dict(), "50 numbers, the layout 'sd15' has 99,648"),
    "no head": (lambda: changed(lambda s: s.pop("fc_mu.weight")), "lacks the linear layer fc_mu"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_are_one_sentence_and_nothing_is_written(run, case):
    make, message = BAD[case]
    torch.save(make(), "vae.pt")
    code, result, err = run("import-vae", "vae.pt", "-o", "space.safetensors")
    assert code == 1 and result is None
    assert err.startswith("w2wpp: ") and err.count("\n") == 1 and message in err, err
    assert not Path("space.safetensors").exists()


def test_a_truncated_checkpoint(run):
    torch.save(trained(Vanilla, 50, False).state_dict(), "vae.pt")
    data = Path("vae.pt").read_bytes()
    Path("vae.pt").write_bytes(data[: len(data) // 2])
    code, _, err = run("import-vae", "vae.pt", "-o", "space.safetensors")
    assert code == 1 and "truncated or no PyTorch file" in err and err.count("\n") == 1


def test_the_folded_norm_is_the_formula():
    """One linear layer and one norm by hand: y = (W x + b - m) g / sqrt(v + eps) + s."""
    from w2wpp.imports.original import without_batch_norm

    g = generator(4)
    w, b, m, s = (torch.randn(*n, generator=g) for n in ((3, 4), (3,), (3,), (3,)))
    v, gain = torch.rand(3, generator=g) + 0.1, torch.rand(3, generator=g)
    norm = {"running_mean": m, "running_var": v, "weight": gain, "bias": s}
    stored = {"a.0.weight": w, "a.0.bias": b, "a.1.num_batches_tracked": torch.tensor(3)}
    folded = without_batch_norm({**stored, **{f"a.1.{k}": t for k, t in norm.items()}})
    x = torch.randn(6, 4, generator=g)
    expected = F.batch_norm(x @ w.T + b, m, v, gain, s)
    assert sorted(folded) == ["a.0.bias", "a.0.weight"]
    torch.testing.assert_close(x @ folded["a.0.weight"].T + folded["a.0.bias"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("wrap", ["model", "compiled", "parallel and compiled"])
def test_checkpoints_as_trainers_wrap_them(tmp_path, wrap, dtype):
    torch.manual_seed(0)
    state = {k: t.to(dtype) for k, t in Vanilla(SD15.size, norms=False).state_dict().items()}
    prefix = {"model": "", "compiled": "_orig_mod."}.get(wrap, "module._orig_mod.")
    stored = {prefix + k: t for k, t in state.items()}
    torch.save(
        {"model": stored, "optimizer": {"state": {}}} if wrap == "model" else stored,
        tmp_path / "vae.pt",
    )
    space = read_vae(tmp_path / "vae.pt")
    model = Vanilla(SD15.size, norms=False)
    model.load_state_dict({k: t.float() for k, t in state.items()})
    z = torch.randn(2, LATENT, generator=generator(1))
    torch.testing.assert_close(space.decode(z), model.decode(z))
