"""Checkpoints of the original w2w++: its vanilla and its residual VAE, as spaces on raw vectors."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..basis import AffineBasis
from ..codecs import Codec, build_codec
from ..errors import FormatError
from ..files.torchfile import load_torch
from ..lora.layout import SD15, Layout
from ..space import Space
from .w2w import LICENCE, TRIGGER_PROMPT

VANILLA_SCALE = 10.0  # it reads w * 10 and ends in tanh
RESIDUAL_LEAST, RESIDUAL_RANGE = -0.094693, 0.186591  # it reads 2 (w - least) / range - 1
NORM_EPSILON = 1e-5  # torch's default for batch norms
Weights = dict[str, Tensor]


def read_vae(path: str | os.PathLike[str], *, layout: Layout = SD15, name: str = "") -> Space:
    """The space of a checkpoint. Sizes come from its tensors; its prior is the N(0, I) it was trained for.

    Raises FormatError for any other checkpoint, or one for another layout.
    """
    stored, parts = _weights(path)
    if "first_layer.0.weight" in stored:
        codec, basis = _residual(path, stored), _residual_basis(layout.size)
    elif "encoder.0.0.weight" in stored:
        codec = _vanilla(path, without_batch_norm(stored))
        basis = AffineBasis(layout.size, scale=VANILLA_SCALE)
    else:
        raise FormatError(
            f"{path} is no VAE of the original w2w++: it has neither encoder.0.0.weight (vanilla) nor "
            f"first_layer.0.weight (residual). Its first weight is {next(iter(stored), 'none')}."
        )
    if codec.coefficient_size != layout.size:
        raise FormatError(
            f"{path} was trained on vectors of {codec.coefficient_size:,} numbers, the layout "
            f"'{layout.name}' has {layout.size:,}. Name the layout of its LoRAs with --layout."
        )
    facts = {
        "name": name or "original VAE",
        "version": "1",
        "licence": LICENCE,
        "trigger_prompt": TRIGGER_PROMPT,
        "made_by": "w2wpp import-vae",
        "prior": "N(0, I), as the original samples",
        "training_report": {"codec": codec.config, **parts},
    }
    d = codec.latent_size
    return Space(layout, basis, codec, torch.zeros(d), torch.ones(d), facts)


def without_batch_norm(stored: Weights) -> Weights:
    """Weights of the same function without batch norms, which are affine once training is over.

    A norm at X.1 follows the linear layer at X.0: y = (x - mean) g / sqrt(var + eps) + b.

    Raises FormatError for a batch norm without its statistics.
    """
    folded = dict(stored)
    for key in stored:
        if not key.endswith(".1.running_mean"):
            continue
        at = key.removesuffix(".1.running_mean")
        norm = {n: folded.pop(f"{at}.1.{n}", None) for n in _NORM}
        folded.pop(f"{at}.1.num_batches_tracked", None)
        if norm["running_var"] is None or f"{at}.0.weight" not in folded:
            raise FormatError(f"The batch norm {at}.1 is incomplete. Get the checkpoint again.")
        mean, var = norm["running_mean"].double(), norm["running_var"].double()  # type: ignore[union-attr]
        gain = torch.ones_like(mean) if norm["weight"] is None else norm["weight"].double()
        shift = torch.zeros_like(mean) if norm["bias"] is None else norm["bias"].double()
        gain = gain / torch.sqrt(var + NORM_EPSILON)
        weight = folded[f"{at}.0.weight"].double()
        bias = folded.get(f"{at}.0.bias", torch.zeros(len(weight))).double()
        folded[f"{at}.0.weight"] = (weight * gain[:, None]).float()
        folded[f"{at}.0.bias"] = ((bias - mean) * gain + shift).float()
    return folded


_NORM = ("running_mean", "running_var", "weight", "bias")


def _vanilla(path: str | os.PathLike[str], stored: Weights) -> Codec:
    depth = _count(stored, r"encoder\.(\d+)\.0\.weight")
    widths = [_out(path, stored, f"encoder.{i}.0") for i in range(depth)]
    sizes = {
        "coefficient_size": _in(path, stored, "encoder.0.0"),
        "latent_size": _out(path, stored, "fc_mu"),
    }
    return _filled(path, {"name": "original", **sizes, "hidden": widths}, stored)


def _residual(path: str | os.PathLike[str], stored: Weights) -> Codec:
    blocks = _count(stored, r"encoder\.(\d+)\.block\.0\.weight")
    width = _out(path, stored, "first_layer.2")
    heads = ("first_layer.0", "fc_mu.0", "fc_var.0", "final_layer.0", "encoder.0.block.0")
    config = {
        "name": "original-residual",
        "coefficient_size": _in(path, stored, "first_layer.0"),
        "latent_size": _out(path, stored, "fc_mu.2"),
        "hidden": [width] * blocks,
        "inner": [_out(path, stored, name) for name in heads],
    }
    return _filled(path, config, stored)


def _residual_basis(size: int) -> AffineBasis:
    return AffineBasis(size, shift=RESIDUAL_LEAST + RESIDUAL_RANGE / 2, scale=2 / RESIDUAL_RANGE)


def _weights(path: str | os.PathLike[str]) -> tuple[Weights, dict[str, Any]]:
    """The VAE's state dict, and what the checkpoint says beside it."""
    data = load_torch(path)
    about: dict[str, Any] = {}
    if isinstance(data, Mapping):
        for key in ("vae_state_dict", "model_state_dict", "state_dict", "model", "vae"):
            if isinstance(data.get(key), Mapping):
                about = {k: v for k, v in data.items() if k == "epoch" and isinstance(v, int)}
                if "discriminator_state_dict" in data:
                    about["discriminator"] = data["discriminator_state_dict"] is not None
                data = data[key]
                break
    if not isinstance(data, Mapping) or not all(isinstance(t, Tensor) for t in data.values()):
        raise FormatError(
            f"{path} holds no state dict of a VAE. Save model.state_dict() with torch.save."
        )
    # Of models that were compiled or trained in parallel.
    stored = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(k)): t for k, t in data.items()}
    for key, t in stored.items():
        if t.is_floating_point() and not bool(torch.isfinite(t.float()).all()):
            raise FormatError(
                f"{path}: {key} holds NaN or infinite numbers; its training diverged."
            )
    return stored, about


def _filled(path: str | os.PathLike[str], config: Mapping[str, Any], stored: Weights) -> Codec:
    with torch.device("meta"):
        codec = build_codec(config)
    expected = codec.state_dict()
    odd = sorted(stored.keys() ^ expected.keys())
    if odd:
        raise FormatError(
            f"{path}: {len(odd)} weights are missing or unknown for this architecture, e.g. {odd[0]}."
        )
    for key, t in expected.items():
        if stored[key].shape != t.shape:
            raise FormatError(
                f"{path}: {key} is {list(stored[key].shape)}, expected {list(t.shape)}."
            )
    codec.load_state_dict({k: t.float() for k, t in stored.items()}, strict=True, assign=True)
    return codec.requires_grad_(False).eval()


def _count(stored: Weights, pattern: str) -> int:
    numbers = {int(m[1]) for key in stored if (m := re.fullmatch(pattern, key))}
    return len(numbers)


def _matrix(path: str | os.PathLike[str], stored: Weights, name: str) -> Tensor:
    t = stored.get(f"{name}.weight")
    if t is None or t.ndim != 2 or t.numel() == 0:
        raise FormatError(f"{path} lacks the linear layer {name}. Get the checkpoint again.")
    return t


def _out(path: str | os.PathLike[str], stored: Weights, name: str) -> int:
    return _matrix(path, stored, name).shape[0]


def _in(path: str | os.PathLike[str], stored: Weights, name: str) -> int:
    return _matrix(path, stored, name).shape[1]
