"""A miniature of everything: a layout of 8 modules, 60 LoRA vectors with structure, and one space per codec."""

import json

import pytest
import torch

from w2wpp import SD15, AffineBasis, Space, build_codec, transformer_layout
from w2wpp.cli import main
from w2wpp.training.coefficients import project_dataset
from w2wpp.training.dataset import VectorDataset
from w2wpp.training.fit_basis import fit_basis

CODECS = ("pca", "vae-skip", "vae-mlp", "original")
COMPONENTS, LATENT = 12, 5


def pytest_addoption(parser):
    """How long the tests of damaged files and killed writers take; more for a release."""
    parser.addoption("--mutants", type=int, default=2000, help="damaged files to read")
    parser.addoption("--kills", type=int, default=60, help="writers to kill")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def layout():
    blocks = [(f"down_blocks.1.attentions.{i}.transformer_blocks.0", 8) for i in range(2)]
    return transformer_layout("tiny", "avatar", blocks, context_dim=6, rank=2, alpha=4.0)


@pytest.fixture(scope="session")
def dataset(layout):
    """60 rows of 30 persons, two each, 6 persons held out; low-dimensional plus noise."""
    g = generator(1)
    w = torch.randn(60, 10, generator=g) @ torch.randn(10, layout.size, generator=g)
    w = 0.01 * w + 0.003 * torch.randn(w.shape, generator=g) + 0.02
    identity = torch.arange(60) // 2
    labels = torch.randn(60, 2, generator=g)
    return VectorDataset(layout, w, identity, identity % 5 == 0, labels, ("age", "smile"))


@pytest.fixture(scope="session")
def basis(dataset):
    return fit_basis(dataset, COMPONENTS)


@pytest.fixture(scope="session")
def coefficients(dataset, basis):
    return project_dataset(dataset, basis)


@pytest.fixture(scope="session")
def official():
    """What a folder of official files holds, {name: value}: the real P, few components, few people."""
    g = generator(3)
    p = SD15.size
    std = 0.01 + 0.02 * torch.rand(p, generator=g)
    std[[5, 70_000]] *= -1
    std[11] = 0.0
    v = torch.linalg.qr(torch.randn(p, 6, generator=g)).Q
    spread = torch.tensor([30.0, 20.0, 12.0, 7.0, 4.0, 2.0])
    coefficients = torch.randn(50, 6, generator=g) * spread + 0.3 * spread
    dimensions = {}
    for m in SD15.modules:
        name = f"base_model.model.{m.name}"
        dimensions[f"{name}.lora_A.weight"] = ((m.in_features,), torch.Size([1, m.in_features]))
        dimensions[f"{name}.lora_B.weight"] = ((m.out_features,), torch.Size([m.out_features, 1]))
    return {
        "mean.pt": 0.01 * torch.randn(p, generator=g),
        "std.pt": std,
        "V.pt": v.contiguous(),
        "proj_1000pc.pt": coefficients,
        "weight_dimensions.pt": dimensions,
    }


@pytest.fixture(scope="session")
def make_space(layout, basis):
    """A space with random weights for a codec's name."""

    def make(name, **provenance):
        g = generator(2)
        parts = AffineBasis(layout.size, scale=10.0) if name == "original" else basis
        d = parts.n_components if name == "pca" else LATENT
        options = {} if name == "pca" else {"hidden": [16]}
        sizes = {"coefficient_size": parts.n_components, "latent_size": d}
        codec = build_codec({"name": name, **sizes, **options})
        for p in codec.parameters():
            p.data = 0.1 * torch.randn(p.shape, generator=g)
        codec.requires_grad_(False).eval()
        directions = {"smile": torch.randn(d, generator=g)}
        mean, std = 0.1 * torch.randn(d, generator=g), 0.5 + torch.rand(d, generator=g)
        return Space(layout, parts, codec, mean, std, {"name": name, **provenance}, directions)

    return make


@pytest.fixture(params=CODECS)
def space(request, make_space):
    return make_space(request.param)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*arguments) -> (exit code, parsed JSON or None, standard error), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        code = main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else None, err

    return call
