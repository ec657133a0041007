"""The user's UNet as an inversion sees it: denoising with LoRAs as an argument.

For gradients the UNet is a private one: the host makes its
weights in inference mode, where autograd can't use them, patches them in place and may move them away. Without
gradients it is the host's own, with hooks for as long as the block lasts.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.ops
import torch
from comfy.ldm.modules.attention import SpatialTransformer, attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...w2wpp import Layout
from ...w2wpp.errors import ConfigError
from ...w2wpp.lora.hooks import hooked
from .model import Target, check_fit, check_inputs, times
from .plan import Plan, count_parameters

PREFIX = "diffusion_model."


class Denoiser:
    """``denoise(noisy [N, C, H, W], timestep [N], vectors [B, P])`` -> prediction [N, C, H, W].

    Rows are ordered by LoRA, N a multiple of B.
    """

    def __init__(
        self,
        unet: nn.Module,
        layout: Layout,
        modules: dict[str, nn.Module],
        context: Tensor,
        times: Tensor,
        plan: Plan,
    ) -> None:
        self.plan = plan
        self._unet, self._layout, self._modules = unet, layout, modules
        self._context = context  # [1, tokens, channels]
        self._times = times  # [T] as the UNet wants them
        self._lora: dict[str, tuple[Tensor, Tensor]] = {}
        self._options: dict[str, Any] = {}
        if plan.gradients:
            self._options["optimized_attention_override"] = _attention

    def __call__(self, noisy: Tensor, timestep: Tensor, vectors: Tensor) -> Tensor:
        place = {"device": self.plan.device, "dtype": self.plan.dtype}
        self._lora = self._layout.unpack(vectors.to(**place))
        times = self._times[timestep.to(self._times.device)]
        context = self._context.expand(len(noisy), -1, -1)
        predicted = self._unet(
            noisy.to(**place), times, context=context, transformer_options=dict(self._options)
        )
        return predicted.float()

    @contextlib.contextmanager
    def hooked(self) -> Iterator[Denoiser]:
        """Within the block the UNet's linear layers add the LoRAs of the last call."""
        try:
            with hooked(self._modules, lambda name: self._lora[name], self._layout.scale):
                yield self
        finally:
            self._lora = {}
            del self._unet, self._modules  # whoever still holds the denoiser holds no weights

    def recompute(self) -> None:
        """Keep only the inputs of the UNet's blocks for the way back, and run each block again there."""
        for block in self._unet.modules():
            if isinstance(block, ResBlock | SpatialTransformer):
                block.forward = self._recomputed(block.forward)

    def _recomputed(self, forward: Callable) -> Callable:
        def outer(*args: Any, **kwargs: Any) -> Tensor:
            lora = self._lora  # of this call; a later one may come before the way back

            def inner(*args: Any, **kwargs: Any) -> Tensor:
                before, self._lora = self._lora, lora
                try:
                    return forward(*args, **kwargs)
                finally:
                    self._lora = before

            return checkpoint(inner, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return outer


def _attention(_: Callable, *args: Any, **kwargs: Any) -> Tensor:
    """In place of whatever kernel the host picked: some have no backward, some one that fails when memory is short."""
    return attention_pytorch(*args, **kwargs)


def _whole_weights(targets: dict[str, Target]) -> dict[str, str]:
    """Refuses modules that are rows of a weight which the host fuses: a hook sees the output of the whole."""
    whole = {name: key for name, key in targets.items() if isinstance(key, str)}
    if len(whole) < len(targets):
        raise ConfigError(
            f"Inversion can't yet reach {len(targets) - len(whole)} modules of this space, which the model keeps "
            "fused into larger weights. Apply Decoded LoRA can."
        )
    return whole


@contextlib.contextmanager
def denoiser(model: Any, layout: Layout, conditioning: list, plan: Plan) -> Iterator[Denoiser]:
    """The UNet of ``model`` with its patches, under a prompt. Nothing stays behind when the block is left."""
    keys = _whole_weights(check_fit(model, layout))
    check_inputs(model)
    moments = times(model)
    try:
        if plan.gradients:
            wanted = count_parameters(model) * plan.dtype.itemsize + plan.activations
            comfy.model_management.free_memory(wanted, plan.device)
            unet = _private_unet(model, plan)
        else:
            comfy.model_management.load_models_gpu([model], memory_required=plan.activations)
            unet = model.model.diffusion_model
        names = {
            m.name: keys[m.name].removeprefix(PREFIX).removesuffix(".weight")
            for m in layout.modules
        }
        modules = {name: unet.get_submodule(path) for name, path in names.items()}
        context = _context(conditioning).to(device=plan.device, dtype=plan.dtype)
        denoise = Denoiser(unet, layout, modules, context, moments.to(plan.device), plan)
        if plan.checkpointing:
            denoise.recompute()
        with denoise.hooked():
            yield denoise
    finally:
        unet = denoise = modules = None
        gc.collect()  # checkpointed blocks refer to themselves
        comfy.model_management.soft_empty_cache()


def _context(conditioning: list) -> Tensor:
    """The prompt's tokens [1, tokens, channels]."""
    if len(conditioning) != 1 or len(conditioning[0][0]) != 1:
        raise ConfigError(
            f"Inversion takes one prompt. Got {len(conditioning)} combined ones; connect a single CLIP Text Encode."
        )
    return conditioning[0][0].detach().clone()


def _private_unet(model: Any, plan: Plan) -> nn.Module:
    """A UNet whose weights are ordinary tensors with the model's patches in them; they are shared where they are equal
    to the host's, which nothing here writes to."""
    weights = {
        key.removeprefix(PREFIX): _weight(key, entry, plan)
        for key, entry in model.get_key_patches(PREFIX).items()
    }
    config = {**model.model.model_config.unet_config, "dtype": plan.dtype}
    kind = type(model.model.diffusion_model)
    unet = kind(**config, device="meta", operations=comfy.ops.disable_weight_init)
    unet.load_state_dict(weights, strict=True, assign=True)
    return unet.requires_grad_(False).eval()


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
