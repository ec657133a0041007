"""A model of the host's with ordinary weights, for gradients.

The host makes its weights in inference mode, where autograd can't use them, patches them in place and may move them
away. A private diffusion model has the same architecture and the same weights, patches included, as tensors of its
own; they are shared where they are equal to the host's, which nothing here writes to.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.ops
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...w2wpp.errors import ConfigError
from .model import PREFIX, blocks_of, model_name
from .plan import Plan


def private_network(model: Any, plan: Plan) -> nn.Module:
    """The diffusion model of ``model`` with the patches that are on it, in the plan's precision and on its device.

    Raises ConfigError for weights that are kept in another form than as numbers, such as quantised ones.
    """
    theirs = model.model.diffusion_model
    weights = {
        key.removeprefix(PREFIX): _weight(key, entry, plan)
        for key, entry in model.get_key_patches(PREFIX).items()
    }
    config = {**model.model.model_config.unet_config, "dtype": plan.dtype}
    mine = type(theirs)(**config, device="meta", operations=comfy.ops.disable_weight_init)
    try:
        mine.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as e:
        raise ConfigError(
            f"The weights of {model_name(model)} are not kept as plain numbers, so gradients can't pass through them. "
            "Load the model in fp32, bf16 or fp16, or choose the method 'cma', which needs no gradients. "
            f"({str(e).splitlines()[-1].strip()})"
        ) from e
    _take_over_tables(mine, theirs, plan)
    _keep_what_norms_read(mine)
    return mine.requires_grad_(False).eval()


def _weight(key: str, entry: list, plan: Plan) -> Tensor:
    (weight, convert), *patches = entry
    weight = weight.detach()
    as_is = weight.device.type == plan.device.type == "cpu" and weight.dtype == plan.dtype
    if as_is and not patches:
        shared = convert(weight, inplace=False)
        return torch.from_dlpack(shared) if shared.is_inference() else shared
    weight = convert(weight.to(device=plan.device, dtype=torch.float32, copy=True), inplace=True)
    if patches:
        weight = comfy.lora.calculate_weight(patches, weight, key)
    weight = weight.to(plan.dtype)
    return weight.clone() if weight.is_inference() else weight


def _take_over_tables(mine: nn.Module, theirs: nn.Module, plan: Plan) -> None:
    """Tensors that no file holds, such as tables of positions: those that were made without memory."""
    modules = dict(theirs.named_modules())
    for path, module in mine.named_modules():
        for held in (module._buffers, vars(module)):
            empty = [n for n, t in held.items() if isinstance(t, Tensor) and t.is_meta]
            for name in empty:
                held[name] = getattr(modules[path], name).detach().clone().to(plan.device)


def _keep_what_norms_read(network: nn.Module) -> None:
    """Blocks of some transformers normalise their input and then add to it in place, which loses what the way back
    needs: their norms read copies."""
    if isinstance(network, UNetModel):
        return
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(_copy_first)


def _copy_first(_: nn.Module, inputs: tuple) -> tuple | None:
    first, *rest = inputs
    return (first.clone(), *rest) if torch.is_grad_enabled() and first.requires_grad else None


def recompute(network: nn.Module, around: Callable[[Callable], Callable]) -> None:
    """Keep only the inputs of the network's blocks for the way back, and run each block again there.

    ``around(f)`` is f as it would be called now; it brings back for the second run what the caller has changed since.
    """
    unet = isinstance(network, UNetModel)
    for block in blocks_of(network):
        block.forward = _recomputed(block.forward, around, copies=not unet)


def _recomputed(
    forward: Callable, around: Callable[[Callable], Callable], copies: bool
) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        if copies:  # blocks of transformers add to their inputs in place, which a second run would then start from
            args = tuple(map(_copied, args))
            kwargs = {name: _copied(value) for name, value in kwargs.items()}
        return forward(*args, **kwargs)

    def outer(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(
            around(run), *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )

    return outer


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


@contextlib.contextmanager
def in_training() -> Iterator[None]:
    """Within the block the host's models use operations that have gradients, where it has such a switch."""
    management = comfy.model_management
    before = getattr(management, "in_training", None)
    if before is None:
        yield
        return
    management.in_training = True
    try:
        yield
    finally:
        management.in_training = before


def attention(_: Callable, *args: Any, **kwargs: Any) -> Tensor:
    """In place of whatever kernel the host picked: some have no backward, some one that fails when memory is short."""
    return attention_pytorch(*args, **kwargs)


def with_network(model: Any, network: nn.Module, sampling: Any) -> Any:
    """The host's BaseModel around another network and another sampling; what it has besides is shared."""
    base = copy.copy(model.model)
    base._modules = {**base._modules, "diffusion_model": network}
    base._modules.pop("model_sampling", None)
    base.model_sampling = sampling
    if network is not model.model.diffusion_model:
        base.manual_cast_dtype = None  # the network's own precision is what it computes in
    return base
