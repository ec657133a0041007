"""The avatar base: a small latent text-to-image diffusion model with a vocabulary of a few words.

It is built like SD 1.5 where it matters for identities in weight space: a UNet with self- and cross-attention on
latents of an autoencoder with f = 8 and four channels, classifier-free guidance, the same noise schedule.
Differences: v-prediction, and a prompt of five tokens from a learned table instead of a text encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from ...diffusion.schedule import NoiseSchedule
from ...errors import ConfigError
from ...files.container import Container, open_container, write_container
from .renderer import IMAGE_SIZE
from .scene import TRAITS, WORDS
from .vae import FACTOR, LATENT_CHANNELS

FORMAT = "w2wpp.avatar_base"
SLOTS = ("person", *WORDS)
# The first word of each slot is the empty one: the unconditional prompt is five empty words.
VOCABULARY = (("", "person"), *(("", *words) for words in WORDS.values()))


@dataclass(frozen=True)
class AvatarConfig:
    """Architecture of the avatar base. Stored as JSON in its file."""

    family: str = "avatar-128"  # what LoRAs and spaces say that they are for
    channels: tuple[int, ...] = (64, 128)  # multiples of 32: the UNet normalises in 32 groups
    layers: int = 1  # residual blocks per level
    context_dim: int = 64  # size of a token
    heads: int = 4  # attention heads
    latent_channels: int = LATENT_CHANNELS
    latent_size: int = IMAGE_SIZE // FACTOR
    prediction: str = "v_prediction"
    schedule: dict[str, float | int | str] = field(
        default_factory=lambda: {
            "beta_start": 0.00085, "beta_end": 0.012, "kind": "scaled_linear", "steps": 1000
        }
    )  # fmt: skip
    vocabulary: tuple[tuple[str, ...], ...] = VOCABULARY
    slots: tuple[str, ...] = SLOTS


class AvatarBase(nn.Module):
    """The UNet, its token table and its noise schedule."""

    alphas_cumprod: Tensor

    def __init__(self, config: AvatarConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or AvatarConfig()
        # diffusers reaches its models through a lazy module, of which type checkers see nothing.
        unet: Any = UNet2DConditionModel(
            sample_size=config.latent_size,
            in_channels=config.latent_channels,
            out_channels=config.latent_channels,
            block_out_channels=tuple(config.channels),
            layers_per_block=config.layers,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            mid_block_type="UNetMidBlock2DCrossAttn",
            cross_attention_dim=config.context_dim,
            attention_head_dim=config.heads,
        )
        # Sequences of 64 and 5 tokens: plain products are 1.4 times as fast as the CPU's flash attention backward.
        unet.set_attn_processor(AttnProcessor())
        self.unet = unet
        self.tokens = nn.Embedding(sum(map(len, config.vocabulary)), config.context_dim)
        # A caption may describe the face, as captions of real photographs do: traits and which of them are told.
        self.describe = nn.Linear(2 * len(TRAITS), config.context_dim, bias=False)
        schedule = config.schedule
        root = torch.linspace(
            float(schedule["beta_start"]) ** 0.5, float(schedule["beta_end"]) ** 0.5, int(schedule["steps"]),
            dtype=torch.float64,
        )  # fmt: skip
        self.register_buffer("alphas_cumprod", (1 - root**2).cumprod(0).float(), persistent=False)

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule that it was trained with."""
        return NoiseSchedule(self.alphas_cumprod, self.config.prediction)

    def prompt(self, words: Tensor, *, person: bool = True) -> Tensor:
        """Tokens of a prompt: word indices [B, 4] in the order of ``WORDS``, -1 for none -> [B, 5, context]."""
        first = torch.full((len(words), 1), 0 if person else -1)
        rows = torch.cat([first, words], dim=1) + 1 + self._slot_offsets()
        return self.tokens(rows)

    def unconditional(self, count: int) -> Tensor:
        """The empty prompt [B, 5, context]."""
        return self.prompt(torch.full((count, len(WORDS)), -1), person=False)

    def described(self, prompt: Tensor, identity: Tensor, told: Tensor) -> Tensor:
        """Describe the person of ``prompt`` [B, 5, context]: identity [B, 20], told [B, 20] in {0, 1}."""
        note = self.describe(torch.cat([identity * told, told], dim=1))
        return torch.cat([prompt[:, :1] + note[:, None], prompt[:, 1:]], dim=1)

    def _slot_offsets(self) -> Tensor:
        sizes = torch.tensor([0, *map(len, self.config.vocabulary[:-1])])
        return sizes.cumsum(0)

    def forward(self, noisy: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        """Predict v from noisy latents [B, 4, h, w], timesteps [B] and prompts [B, 5, context]."""
        return self.unet(noisy, timestep, encoder_hidden_states=prompt).sample


def word_indices(**words: str) -> Tensor:
    """Indices [4] of words by slot, such as ``smile="smiling"``, for ``AvatarBase.prompt``; left out ones are -1."""
    for slot, word in words.items():
        if slot not in WORDS:
            raise ConfigError(f"Unknown word slot {slot!r}: expected one of {', '.join(WORDS)}")
        if word and word not in WORDS[slot]:
            choices = ", ".join(WORDS[slot])
            raise ConfigError(f"Unknown {slot} {word!r}: expected one of {choices}, or nothing")
    picked = [(slot, words.get(slot, "")) for slot in WORDS]
    return torch.tensor([WORDS[slot].index(word) if word else -1 for slot, word in picked])


def save_base(
    base: AvatarBase, path: str | Path, provenance: Mapping[str, Any] | None = None
) -> None:
    """Write the base in half precision, with its configuration in the metadata."""
    tensors = {name: value.detach().half() for name, value in base.state_dict().items()}
    tensors["tokens"] = tensors.pop("tokens.weight")
    tensors["describe"] = tensors.pop("describe.weight")
    config = {**asdict(base.config), "provenance": dict(provenance or {})}
    write_container(path, tensors, format=FORMAT, config=config)


def load_base(path: str | Path) -> AvatarBase:
    """Read a base written by ``save_base``; weights come back in fp32, frozen and in evaluation mode."""
    file = open_container(path, FORMAT)
    base = AvatarBase(_config(file))
    for name, value in base.state_dict().items():
        stored = name.removesuffix(".weight") if name.startswith(("tokens", "describe")) else name
        file.require(stored, tuple(value.shape), torch.float16)
        value.copy_(file.read(stored))
    return base.requires_grad_(False).eval()


def _config(file: Container) -> AvatarConfig:
    def freeze(value: object) -> object:
        return tuple(map(freeze, value)) if isinstance(value, list) else value

    known = {field.name for field in fields(AvatarConfig)}
    values: dict[str, Any] = {k: freeze(v) for k, v in file.config.items() if k in known}
    return AvatarConfig(**values)
