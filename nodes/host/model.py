"""What a model of the host's is: its name, its sizes, its noise schedule, and where a layout's modules are in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import comfy.lora
import comfy.model_sampling
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from torch import Tensor, nn

from ...w2wpp import Layout, LinearSchedule, NoiseSchedule
from ...w2wpp.errors import ConfigError, LayoutMismatch
from ...w2wpp.lora.families import join_key, of_text_encoders
from ...w2wpp.lora.hooks import Site

PREFIX = "diffusion_model."
Target = (
    str | tuple
)  # the host's name of a weight, or (name, (dimension, start, length), ...) of a part of one


def check_fit(model: Any, layout: Layout) -> dict[str, Target]:
    """The model's weight for every module of ``layout``, by the module's name; raises unless all are there and fit.

    The host's own map says where a module is, under whatever name its family of models has for it, and for fused
    weights which rows.
    """
    if changes_texts(layout):
        raise ConfigError(
            "This identity's space is of text encoders: it changes a CLIP, not a MODEL. Connect 'clip' to W2W++ Apply "
            "Decoded LoRA, or use a space of the model itself."
        )
    known = {join_key(name): target for name, target in _host_keys(model).items()}
    found, wrong = _placed(layout, known, model.model.state_dict())
    if wrong:
        raise LayoutMismatch(
            f"This identity needs a model of the family {layout.base_model!r} ({len(layout.modules)} weights of the "
            f"layout {layout.name!r}), but the model is {model_name(model)}: {wrong}. Connect the model that the space "
            "was learned on."
        )
    return found


def check_fit_of_texts(clip: Any, layout: Layout) -> dict[str, Target]:
    """The same for a layout of text encoders in a CLIP of the host's."""
    host = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    known = {join_key(name): target for name, target in host.items()}
    found, wrong = _placed(layout, known, clip.cond_stage_model.state_dict())
    if wrong:
        raise LayoutMismatch(
            f"This identity needs the text encoders of the family {layout.base_model!r} ({len(layout.modules)} "
            f"weights), but the CLIP is a {type(clip.cond_stage_model).__name__}: {wrong}. Connect the CLIP of the "
            "checkpoint that the LoRAs are for."
        )
    return found


def changes_texts(layout: Layout) -> bool:
    """Whether a layout's modules are those of text encoders."""
    return of_text_encoders(m.name for m in layout.modules)


def _placed(
    layout: Layout, known: Mapping[str, Target], weights: dict[str, Tensor]
) -> tuple[dict[str, Target], str]:
    """The host's weight for every module, and in words, if anything, what is wrong."""
    found: dict[str, Target] = {}
    missing = misshapen = 0
    for module in layout.modules:
        target = known.get(join_key(module.name))
        if target is None:
            missing += 1
        elif _shape(weights, target) != (module.out_features, module.in_features):
            misshapen += 1
        else:
            found[module.name] = target
    wrong = missing or misshapen
    return found, (
        f"{missing} of them are missing and {misshapen} have another shape" if wrong else ""
    )


def _host_keys(model: Any) -> dict[str, Target]:
    return comfy.lora.model_lora_keys_unet(model.model, {})


def _shape(weights: dict[str, Tensor], target: Target) -> tuple[int, ...] | None:
    """(out, in) of a weight or of the rows meant; a convolution's kernel counts as inputs."""
    key, rows, _ = place_of(target)
    weight = weights.get(key)
    if weight is None or weight.ndim < 2:
        return None
    size_out, size_in = weight.shape[0], weight[0].numel()
    if rows is None:
        return size_out, size_in
    dimension, start, length = rows
    return (length, size_in) if dimension == 0 and start + length <= size_out else None


def place_of(target: Target) -> tuple[str, tuple[int, int, int] | None, Any]:
    """(name of the weight, (dimension, start, length) or None, function or None) as the host's patches have them."""
    if isinstance(target, str):
        return target, None, None
    key, rows, *function = target
    return key, rows, function[0] if function else None


RowOrder = Callable[[Tensor], Tensor]  # what the host does with the rows of B


def sites_of(
    network: nn.Module, targets: Mapping[str, Target]
) -> tuple[dict[str, Site], dict[str, RowOrder]]:
    """The layers of a layout's modules in a network, and the order of rows that the host has for some of them."""
    sites, orders = {}, {}
    for name, target in targets.items():
        key, rows, order = place_of(target)
        path, _, kind = key.removeprefix(PREFIX).rpartition(".")
        if kind != "weight":
            raise ConfigError(
                f"{name} can't be tried out without patching: {key} is no weight of a layer."
            )
        sites[name] = Site(network.get_submodule(path), rows and (rows[1], rows[2]))
        if order is not None:
            orders[name] = order
    return sites, orders


def reorder(lora: dict[str, tuple[Tensor, Tensor]], orders: Mapping[str, RowOrder]) -> None:
    """Brings the rows of B [N, out, r] of some modules into the host's order, in place."""
    for name, order in orders.items():
        down, up = lora[name]
        lora[name] = down, torch.stack([order(rows) for rows in up])


def base_weights(model: Any, layout: Layout) -> Callable[[str], Tensor]:
    """The model's own weight [out, in] of a module of ``layout``, as its checkpoint has it, without any patches."""
    targets = check_fit(model, layout)

    def weight(module: str) -> Tensor:
        key, rows, _ = place_of(targets[module])
        saved = model.backup.get(key)  # of what is patched in memory right now
        found = model.model.state_dict()[key] if saved is None else saved.weight
        found = found.detach().float().cpu().flatten(1)
        return found if rows is None else found.narrow(*rows)

    return weight


def model_name(model: Any) -> str:
    """What the host calls a model: its configuration, such as SD15 or SDXL, and its class."""
    return f"{type(model.model.model_config).__name__} ({type(model.model).__name__})"


def has_frames(base: Any) -> bool:
    """Whether latents of a BaseModel have a dimension for the frames of a video, [N, C, frames, h, w]."""
    return getattr(base.latent_format, "latent_dimensions", 2) == 3


def grid(model: Any) -> int:
    """What the sides of a picture must be multiples of: the factor of the VAE, and of every halving or patch."""
    config = model.model.model_config.unet_config
    if "fold" in config:
        return config["fold"] * 2 ** (len(config["channel_mult"]) - 1)
    # Hosts of 2025 do not say; they know the factor of 8 only.
    pixels = getattr(model.model.latent_format, "spacial_downscale_ratio", 8)
    if "channel_mult" in config:
        return pixels * 2 ** (len(config["channel_mult"]) - 1)
    return pixels * patch_side(model)


def patch_side(model: Any) -> int:
    """Side of the patches that a transformer makes tokens of, in latent pixels; 1 for a UNet."""
    if isinstance(model.model.diffusion_model, UNetModel):
        return 1
    patch = getattr(model.model.diffusion_model, "patch_size", 2)
    return patch if isinstance(patch, int) else patch[-1]


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """What a network consists of, one after the other: residual blocks and transformers of a UNet, or the blocks of a
    transformer."""
    if isinstance(network, UNetModel):
        return [m for m in network.modules() if isinstance(m, ResBlock | SpatialTransformer)]
    lists = [child for child in network.children() if isinstance(child, nn.ModuleList)]
    return [block for blocks in lists for block in blocks]


def usual_size(model: Any) -> int:
    """Side of the square pictures that a model was trained on."""
    if hasattr(model.model, "picture_size"):
        return model.model.picture_size
    config = model.model.model_config.unet_config
    of_2022 = "channel_mult" in config and config.get("adm_in_channels") is None
    return 512 if of_2022 else 1024  # SD 1 and 2; SDXL and what came after it


def noise_schedule(model: Any) -> NoiseSchedule | LinearSchedule:
    """The model's noise schedule, in double precision, timestep by timestep of the table that the host samples from.

    Whatever kind it is, the host's own functions say what noisy pictures and predictions are. Raises ConfigError for a
    model that does not denoise.
    """
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
    sigmas = sampling.sigmas.detach().clone().double().cpu()
    if kind is not None and discrete and not isinstance(sampling, others):
        return NoiseSchedule(1 / (sigmas**2 + 1), kind)
    try:
        return _linear_schedule(sampling, sigmas)
    except ConfigError as e:
        raise ConfigError(
            f"Inversion needs a model that denoises; {model_name(model)} samples as "
            f"{', '.join(c.__name__ for c in type(sampling).__mro__[1:3])}. ({e})"
        ) from e


def _linear_schedule(sampling: Any, sigmas: Tensor) -> LinearSchedule:
    """What the host's functions of a sampling do, told by what they do to a picture and to noise alone."""
    one, zero = torch.ones_like(sigmas), torch.zeros_like(sigmas)
    of_picture = sampling.noise_scaling(sigmas, zero.clone(), one.clone())
    of_noise = sampling.noise_scaling(sigmas, one.clone(), zero.clone())
    noisy = [sampling.calculate_input(sigmas, part) for part in (of_picture, of_noise)]
    # x0 = kept(noisy) + gain * output, so the output that tells x0 is (x0 - kept(noisy)) / gain.
    gain = sampling.calculate_denoised(sigmas, one, zero)
    kept = [sampling.calculate_denoised(sigmas, zero, part) for part in (of_picture, of_noise)]
    target = [(one - kept[0]) / gain, -kept[1] / gain]
    return LinearSchedule(torch.stack(noisy, 1), torch.stack(target, 1))


def check_inputs(model: Any) -> None:
    """Refuse what an inversion can't work with, before anything is loaded."""
    base, config = model.model, model.model.model_config.unet_config
    given = base.latent_format.latent_channels * config.get("fold", 1) ** 2
    wanted = config["in_channels"] if isinstance(base.diffusion_model, UNetModel) else given
    if base.concat_keys or wanted != given:
        raise LayoutMismatch(inpainting(model, wanted, given))
    if getattr(model, "weight_wrapper_patches", None):
        raise ConfigError(
            "This model carries LoRAs that act in a part of the sampling only (a start above 0). Invert with the model "
            "as it was before them."
        )


def inpainting(model: Any, read: int, picture: int) -> str:
    """The message for a model that reads more channels than those of a picture."""
    return (
        f"{model_name(model)} is an inpainting model or one like it: its UNet reads {read} channels, "
        f"of which {picture} are the picture. Invert with the ordinary checkpoint of the same family; the "
        "identity can be applied to the inpainting model afterwards."
    )
