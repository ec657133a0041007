"""Official files in miniature: the real P = 99,648 with few components and few people."""

import pytest
import torch

from w2wpp import SD15

K, PEOPLE = 6, 50


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def dimensions(spelling):
    """weight_dimensions.pt: {key: (flat shape, tensor shape)}."""
    table = {}
    for m in SD15.modules:
        a = ((m.in_features,), torch.Size([1, m.in_features]))
        b = ((m.out_features,), torch.Size([m.out_features, 1]))
        down, up = {
            "peft": (
                f"base_model.model.{m.name}.lora_A.weight",
                f"base_model.model.{m.name}.lora_B.weight",
            ),
            "adapter": (
                f"unet.{m.name}.lora_A.default.weight",
                f"unet.{m.name}.lora_B.default.weight",
            ),
            "kohya": (
                f"lora_unet_{m.name.replace('.', '_')}.lora_down.weight",
                f"lora_unet_{m.name.replace('.', '_')}.lora_up.weight",
            ),
            "slashes": (
                f"unet/{m.name.replace('.', '/')}/lora/down",
                f"unet/{m.name.replace('.', '/')}/lora/up",
            ),
            "run together": (
                f"lora_unet_{m.name}_lora_down.weight",
                f"lora_unet_{m.name}_lora_up.weight",
            ),
            "own": (f"{len(table)}", f"{len(table) + 1}"),
        }[spelling]
        table[down], table[up] = a, b
    return table


@pytest.fixture(scope="session")
def official():
    """What the files of a folder hold, {name: value}."""
    g = generator(3)
    p = SD15.size
    std = 0.01 + 0.02 * torch.rand(p, generator=g)
    std[[5, 70_000]] *= -1
    std[11] = 0.0
    v = torch.linalg.qr(torch.randn(p, K, generator=g)).Q
    spread = torch.tensor([30.0, 20.0, 12.0, 7.0, 4.0, 2.0])
    coefficients = torch.randn(PEOPLE, K, generator=g) * spread + 0.3 * spread
    return {
        "mean.pt": 0.01 * torch.randn(p, generator=g),
        "std.pt": std,
        "V.pt": v.contiguous(),
        "proj_1000pc.pt": coefficients,
        "weight_dimensions.pt": dimensions("peft"),
    }


@pytest.fixture
def folder(official, tmp_path):
    """The files, written; the test may change them."""
    path = tmp_path / "w2w"
    path.mkdir()
    for name, value in official.items():
        torch.save(value, path / name)
    return path
