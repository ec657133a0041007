"""Names for what a picture depends on: the same contents have the same name, in another run of the host too."""

from __future__ import annotations

import hashlib
import types
import uuid
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor, nn

WHOLE = 1 << 14  # numbers of a tensor up to which all are read
SAMPLES = 64  # of a larger one, evenly spread

_tokens: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def fingerprint(*things: Any) -> str:
    """32 hex digits over numbers, texts, tensors, modules, and tables and lists of them.

    Anything else counts as itself, for as long as it lives: what can't be compared is never taken for the same.
    """
    digest = hashlib.sha256()
    for thing in things:
        _feed(digest, thing)
    return digest.hexdigest()[:32]


def model_fingerprint(model: Any) -> str:
    """Of a MODEL: its weights as they are without patches, the patches, and whatever else was set on it."""
    weights = {
        key: [entry[0][0], *(patch[:4] for patch in entry[1:])]
        for key, entry in model.get_key_patches("diffusion_model.").items()
    }
    parts = ("object_patches", "wrappers", "callbacks", "injections", "weight_wrapper_patches")
    extras = {name: getattr(model, name, None) for name in parts}
    return fingerprint(type(model.model).__name__, weights, model.model_options, extras)


def vae_fingerprint(vae: Any) -> str:
    """Of a VAE: its weights, not what the host notes beside them when it loads them."""
    network = getattr(vae, "first_stage_model", None)
    if not isinstance(network, nn.Module):
        return fingerprint(vae)
    return fingerprint(type(network).__name__, network.state_dict())


def _feed(digest: Any, thing: Any) -> None:
    digest.update(f"{type(thing).__name__}:".encode())
    if thing is None or isinstance(thing, bool | int | float | str | torch.dtype | torch.device):
        digest.update(f"{thing!r};".encode())
    elif isinstance(thing, Tensor):
        _feed_tensor(digest, thing)
    elif isinstance(thing, Mapping):
        for key in sorted(thing, key=str):
            digest.update(f"{key!s}=".encode())
            _feed(digest, thing[key])
    elif isinstance(thing, list | tuple):
        digest.update(f"{len(thing)};".encode())
        for item in thing:
            _feed(digest, item)
    elif isinstance(thing, WeightAdapterBase):
        _feed(digest, thing.weights)
    elif isinstance(thing, nn.Module):
        plain = {k: v for k, v in vars(thing).items() if isinstance(v, int | float | str)}
        plain.pop("training", None)
        _feed(digest, [[c.__name__ for c in type(thing).__mro__], plain, thing.state_dict()])
    else:
        digest.update(_token(thing).encode())


def _feed_tensor(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{list(tensor.shape)} {tensor.dtype};".encode())
    numbers = tensor.detach()
    if numbers.numel() > WHOLE:
        places = torch.linspace(0, numbers.numel() - 1, SAMPLES, dtype=torch.float64).long()
        where = torch.unravel_index(places.to(numbers.device), numbers.shape)
        numbers = numbers[where]
    if numbers.numel():
        digest.update(numbers.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)


def _token(thing: Any) -> str:
    if (
        isinstance(thing, types.FunctionType)
        and not thing.__closure__
        and "<" not in thing.__qualname__
    ):
        return f"{thing.__module__}.{thing.__qualname__}"
    try:
        return _tokens.setdefault(thing, uuid.uuid4().hex)
    except TypeError:  # can't be hashed, or referred to weakly
        return uuid.uuid4().hex
