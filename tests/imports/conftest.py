"""Official files in miniature: the real P = 99,648 with few components and few people."""

import pytest
import torch

from w2wpp import SD15

K, PEOPLE = 6, 50  # of the fixture `official`


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


@pytest.fixture
def folder(official, tmp_path):
    """The files, written; the test may change them."""
    path = tmp_path / "w2w"
    path.mkdir()
    for name, value in official.items():
        torch.save(value, path / name)
    return path
