"""Pictures and the user's UNet as an inversion sees them: denoising with LoRAs as an argument.

With host.py the only file that knows the host's internals. For gradients the UNet is a private one: the host makes its
weights in inference mode, where autograd can't use them, patches them in place and may move them away. Without
gradients it is the host's own, with hooks for as long as the block lasts.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_sampling
import comfy.ops
import comfy.utils
import torch
from comfy.ldm.modules.attention import SpatialTransformer, attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..w2wpp import Layout
from ..w2wpp.errors import ConfigError, LayoutMismatch
from . import host

PREFIX = "diffusion_model."
# Numbers in memory at the peak of a step, for each picture, latent pixel and channel of the first block: without
# checkpointing SD 1.5 takes 343 at 64x64, with it 236 (benchmarks/results/inversion_speed.md). Both with room to spare.
KEPT, KEPT_CHECKPOINTED = 500, 300


@dataclass(frozen=True)
class Plan:
    """How the UNet is run; what memory and device allow."""

    device: torch.device
    dtype: torch.dtype
    gradients: bool
    checkpointing: bool
    rows: int  # most pictures that go through at once
    activations: int  # bytes that they take, estimated

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        how = "forward passes"
        if self.gradients:
            how = f"gradients {'with' if self.checkpointing else 'without'} checkpointing"
        return f"{how} on {self.device} in {dtype}, {self.rows} pictures at a time"


def plan(
    model: Any, latents: tuple[int, ...], *, gradients: bool, checkpointing: bool | None = None
) -> Plan:
    """Choose for batches of ``latents`` [N, C, H, W]: as many of them at once as fit into memory, with checkpointing
    if not one does without. ``checkpointing`` overrules that."""
    device = model.load_device
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    count, *shape = latents
    if not gradients:
        each = int(model.memory_required([1, *shape]))
        rows = max(1, min(count, _room(device) // max(each, 1)))
        return Plan(device, dtype, False, False, rows, each * rows)
    if dtype != torch.float32:  # half precision underflows on the way back
        bf16 = comfy.model_management.should_use_bf16(device)
        dtype = torch.bfloat16 if bf16 else torch.float32
    room = _room(device) - _parameters(model) * dtype.itemsize
    config = model.model.model_config.unet_config
    numbers = shape[1] * shape[2] // config.get("fold", 1) ** 2 * config["model_channels"]
    full, less = (dtype.itemsize * kept * numbers for kept in (KEPT, KEPT_CHECKPOINTED))
    if checkpointing is None:
        checkpointing = full > room
    each = less if checkpointing else full
    rows = max(1, min(count, room // each))
    return Plan(device, dtype, True, checkpointing, rows, each * rows)


def _room(device: torch.device) -> int:
    """Bytes to be had on a device: what is free and what the host's models would make free, less a margin."""
    management = comfy.model_management
    free = management.get_free_memory(device)
    if device.type != "cpu":
        loaded = [m for m in management.current_loaded_models if m.device == device]
        free += sum(m.model_loaded_memory() for m in loaded)
    return int(0.8 * free)


def _parameters(model: Any) -> int:
    return sum(p.numel() for p in model.model.diffusion_model.parameters())


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
    def hooked(self) -> Iterator["Denoiser"]:
        """Within the block the UNet's linear layers add the LoRAs of the last call."""
        handles: list[Any] = []
        try:
            for name, module in self._modules.items():
                handles.append(module.register_forward_hook(self._hook(name)))
            yield self
        finally:
            for handle in handles:
                handle.remove()
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

    def _hook(self, name: str) -> Callable:
        """Add scale * (x A^T) B^T in one fused product: x [N, n, in], A [B, r, in], B [B, out, r]."""
        scale = self._layout.scale

        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            down, up = self._lora[name]
            x = inputs[0].reshape(len(down), -1, inputs[0].shape[-1])
            flat = output.reshape(len(up), -1, output.shape[-1])
            low, up = torch.bmm(x, down.mT), up.mT
            if torch.is_grad_enabled():
                return torch.baddbmm(flat, low, up, alpha=scale).reshape(output.shape)
            return flat.baddbmm_(low, up, alpha=scale).reshape(output.shape)

        return add


def _attention(_: Callable, *args: Any, **kwargs: Any) -> Tensor:
    """In place of whatever kernel the host picked: some have no backward, some one that fails when memory is short."""
    return attention_pytorch(*args, **kwargs)


@contextlib.contextmanager
def denoiser(model: Any, layout: Layout, conditioning: list, plan: Plan) -> Iterator[Denoiser]:
    """The UNet of ``model`` with its patches, under a prompt. Nothing stays behind when the block is left."""
    keys = host.check_fit(model, layout)
    _check_inputs(model)
    times = _times(model)
    try:
        if plan.gradients:
            wanted = _parameters(model) * plan.dtype.itemsize + plan.activations
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
        denoise = Denoiser(unet, layout, modules, context, times.to(plan.device), plan)
        if plan.checkpointing:
            denoise.recompute()
        with denoise.hooked():
            yield denoise
    finally:
        unet = denoise = modules = None
        gc.collect()  # checkpointed blocks refer to themselves
        comfy.model_management.soft_empty_cache()


def schedule(model: Any) -> tuple[Tensor, str]:
    """The model's noise schedule: alphas_cumprod [T] in double precision, and what it predicts."""
    sampling = model.get_model_object("model_sampling")
    known = (
        (comfy.model_sampling.V_PREDICTION, "v_prediction"),  # an EPS as well, to the host
        (comfy.model_sampling.EPS, "eps"),
    )
    others = (
        comfy.model_sampling.EDM,
        comfy.model_sampling.X0,
        comfy.model_sampling.ModelSamplingDiscreteEDM,
    )
    kind = next((name for cls, name in known if isinstance(sampling, cls)), None)
    discrete = isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete)
    if kind is None or not discrete or isinstance(sampling, others):
        raise ConfigError(
            f"Inversion knows models that predict eps or v on discrete timesteps; {host.model_name(model)} samples as "
            f"{', '.join(c.__name__ for c in type(sampling).__mro__[1:3])}."
        )
    return 1 / (sampling.sigmas.detach().clone().double() ** 2 + 1), kind


def _times(model: Any) -> Tensor:
    """What the UNet is told for each timestep [T]."""
    sampling = model.get_model_object("model_sampling")
    return sampling.timestep(sampling.sigmas.detach().clone()).float()


def picture_latents(
    model: Any, vae: Any, image: Tensor, mask: Tensor | None, pixels: int
) -> tuple[Tensor, Tensor | None]:
    """Pictures [n, H, W, 3] as the UNet sees them [n, C, h, w], and masks of any size as weights [n, 1, h, w].

    Pictures are scaled to the area of a square with sides of ``pixels``; their shape is kept, up to what the UNet's
    levels can divide.
    """
    count, height, width, _ = image.shape
    scale = pixels / (height * width) ** 0.5
    cell = host.grid(model)
    size = [max(cell, round(side * scale / cell) * cell) for side in (width, height)]
    scaled = comfy.utils.common_upscale(image[..., :3].movedim(-1, 1), *size, "area", "disabled")
    latents = model.model.process_latent_in(vae.encode(scaled.movedim(1, -1)).clone()).float()
    if mask is None:
        return latents, None
    weights = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    if len(weights) not in (1, count):
        raise ConfigError(
            f"There are {count} pictures and {len(weights)} masks; connect one for all, or one for each."
        )
    weights = torch.nn.functional.interpolate(weights, latents.shape[-2:], mode="area").clamp(0, 1)
    weights = weights.expand(count, -1, -1, -1)
    if bool((weights.sum((1, 2, 3)) == 0).any()):
        raise ConfigError("The mask is empty. It should be white where the person is.")
    return latents, weights.to(latents.device)


def paint(
    denoise: Denoiser, noise: Tensor, vector: Tensor, alphas: Tensor, prediction: str, steps: int
) -> Tensor:
    """Latents [N, C, H, W] of a person, vector [1, P], from noise, by DDIM without guidance (Song et al. 2021)."""
    x = noise
    times = torch.linspace(len(alphas) - 1, 0, steps + 1).round().long()[:-1]
    levels = torch.cat([alphas[times], torch.ones(1, dtype=alphas.dtype)])
    for i, time in enumerate(times):
        (a, s), (a_next, s_next) = (
            (float(v.sqrt()), float((1 - v).sqrt())) for v in levels[i : i + 2]
        )
        output = denoise(x, time.expand(len(x)), vector)
        if prediction == "v_prediction":
            x0, eps = a * x - s * output, a * output + s * x
        else:
            x0, eps = (x - s * output) / a, output
        x = a_next * x0 + s_next * eps
    return x


def _check_inputs(model: Any) -> None:
    base = model.model
    wanted = base.model_config.unet_config["in_channels"]
    given = base.latent_format.latent_channels * base.model_config.unet_config.get("fold", 1) ** 2
    if base.concat_keys or wanted != given:
        raise LayoutMismatch(
            f"{host.model_name(model)} is an inpainting model or one like it: its UNet reads {wanted} channels, "
            f"of which {given} are the picture. Invert with the ordinary checkpoint of the same family; the "
            "identity can be applied to the inpainting model afterwards."
        )


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
