"""Weights of the reduced models (probe), by the original code's names, and the random LoRAs that tests make of them."""

from collections.abc import Iterator

import torch
from torch import Tensor

RANKS = (1, 2, 3, 4)

# [out, in] of some linear weights, and [out, in, height, width] of convolutions.
INVERTED = {
    "SDXL": {
        "input_blocks.1.0.in_layers.2": (32, 32, 3, 3),
        "input_blocks.4.1.transformer_blocks.1.attn2.to_k": (64, 2048),
        "middle_block.1.proj_in": (128, 128),
        "output_blocks.5.1.transformer_blocks.0.attn1.to_out.0": (64, 64),
        "output_blocks.7.0.skip_connection": (32, 64, 1, 1),
        "output_blocks.8.0.out_layers.3": (32, 32, 3, 3),
    },
    "SD3": {
        "joint_blocks.0.x_block.attn.qkv": (384, 128),
        "joint_blocks.1.context_block.attn.qkv": (384, 128),
        "joint_blocks.1.x_block.mlp.fc1": (512, 128),
    },
    "Flux": {
        "double_blocks.0.img_attn.qkv": (288, 96),
        "double_blocks.1.txt_mlp.0": (384, 96),
        "single_blocks.1.linear1": (672, 96),
        "single_blocks.0.linear2": (96, 480),
    },
    "QwenImage": {
        "transformer_blocks.0.attn.to_q": (96, 96),
        "transformer_blocks.1.img_mlp.net.2": (96, 384),
    },
    "WAN21_T2V": {
        "blocks.0.self_attn.q": (96, 96),
        "blocks.1.ffn.0": (128, 96),
    },
}


def random_loras(family: str) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """A LoRA {weight: (A, B)} of each rank, a scale of 1 / rank still to come; kernels as the weights have them."""
    g = torch.Generator().manual_seed(5)
    for rank in RANKS:
        lora = {}
        for name, (size_out, size_in, *kernel) in INVERTED[family].items():
            down = torch.randn(rank, size_in, *kernel, generator=g)
            up = torch.randn(size_out, rank, *[1] * len(kernel), generator=g)
            lora[name] = (down / down[0].numel() ** 0.5, up)
        yield lora
