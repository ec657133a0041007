"""The avatar base: a tiny text-to-image diffusion model with a vocabulary of a few words.

It is built like SD 1.5 where it matters for identities in weight space: a UNet with self- and cross-attention,
classifier-free guidance, the same noise schedule. Differences: pictures instead of latents (folded 2x2, so that
the UNet runs at 16x16), v-prediction, and a prompt of four tokens from a learned table instead of a text encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from ...errors import ConfigError
from ...files.container import Container, open_container, write_container
from .renderer import BACKGROUNDS, IMAGE_SIZE, LIGHTS, SMILES, TRAITS

FORMAT = "w2wpp.avatar_base"
SLOTS = ("person", "background", "smile", "light")
# The first word of each slot is the empty one: the unconditional prompt is four empty words.
VOCABULARY = (("", "person"), ("", *BACKGROUNDS), ("", *SMILES), ("", *LIGHTS))


@dataclass(frozen=True)
class AvatarConfig:
    """Architecture of the avatar base. Stored as JSON in its file."""

    fold: int = 2  # pixels folded into channels per side
    channels: tuple[int, ...] = (64, 128)  # multiples of 32: the UNet normalises in 32 groups
    layers: int = 1  # residual blocks per level
    context_dim: int = 64  # size of a token
    heads: int = 4  # attention heads
    image_size: int = IMAGE_SIZE
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
        width = 3 * config.fold**2
        # diffusers reaches its models through a lazy module, of which type checkers see nothing.
        unet: Any = UNet2DConditionModel(
            sample_size=config.image_size // config.fold,
            in_channels=width,
            out_channels=width,
            block_out_channels=tuple(config.channels),
            layers_per_block=config.layers,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            mid_block_type="UNetMidBlock2DCrossAttn",
            cross_attention_dim=config.context_dim,
            attention_head_dim=config.heads,
        )
        # Sequences of 64 and 4 tokens: plain products are 1.4 times as fast as the CPU's flash attention backward.
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
    def device(self) -> torch.device:
        """Where it computes. Pictures come from anywhere and go back there."""
        return self.alphas_cumprod.device

    def prompt(self, words: Tensor, *, person: bool = True) -> Tensor:
        """Tokens of a prompt: word indices [B, 3] (background, smile, light; -1 for none) -> [B, 4, context]."""
        first = torch.full((len(words), 1), 0 if person else -1)
        rows = torch.cat([first, words.cpu()], dim=1) + 1 + self._slot_offsets()
        return self.tokens(rows.to(self.device))

    def unconditional(self, count: int) -> Tensor:
        """The empty prompt [B, 4, context]."""
        return self.prompt(torch.full((count, 3), -1), person=False)

    def described(self, prompt: Tensor, identity: Tensor, told: Tensor) -> Tensor:
        """Describe the person of ``prompt`` [B, 4, context]: identity [B, 20], told [B, 20] in {0, 1}."""
        note = self.describe(torch.cat([identity * told, told], dim=1).to(self.device))
        return torch.cat([prompt[:, :1] + note[:, None], prompt[:, 1:]], dim=1)

    def _slot_offsets(self) -> Tensor:
        sizes = torch.tensor([0, *map(len, self.config.vocabulary[:-1])])
        return sizes.cumsum(0)

    def forward(self, noisy: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        """Predict v from noisy pictures [B, 3, H, W], timesteps [B] and prompts [B, 4, context]."""
        folded = F.pixel_unshuffle(noisy.to(self.device), self.config.fold)
        output = self.unet(folded, timestep.to(self.device), encoder_hidden_states=prompt).sample
        return F.pixel_shuffle(output, self.config.fold).to(noisy.device)

    def add_noise(self, pictures: Tensor, noise: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy pictures and the v they should give back (Salimans & Ho 2022, appendix D)."""
        abar = self.alphas_cumprod[timestep.to(self.device)].to(pictures.device)
        alpha = abar.sqrt()[:, None, None, None]
        sigma = (1 - abar).sqrt()[:, None, None, None]
        return alpha * pictures + sigma * noise, alpha * noise - sigma * pictures


def word_indices(background: str = "", smile: str = "", light: str = "") -> Tensor:
    """Indices [3] of three words for ``AvatarBase.prompt``; the empty word is -1."""
    picked = []
    for slot, word, words in zip(SLOTS[1:], (background, smile, light), VOCABULARY[1:]):
        if word not in words:
            raise ConfigError(
                f"Unknown {slot} {word!r}: expected one of {', '.join(words[1:])}, or nothing"
            )
        picked.append(words.index(word) - 1)
    return torch.tensor(picked)


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
