"""What a model of the host's is: its name, its sizes, its noise schedule, and where a layout's modules are in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.lora
import comfy.model_sampling
from torch import Tensor

from ...w2wpp import Layout, NoiseSchedule
from ...w2wpp.errors import ConfigError, LayoutMismatch
from ...w2wpp.lora.families import join_key

Target = (
    str | tuple
)  # the host's name of a weight, or (name, (dimension, start, length), ...) of a part of one


def check_fit(model: Any, layout: Layout) -> dict[str, Target]:
    """The model's weight for every module of ``layout``, by the module's name; raises unless all are there and fit.

    The host's own map says where a module is, under whatever name its family of models has for it, and for fused
    weights which rows.
    """
    known = {join_key(name): target for name, target in _host_keys(model).items()}
    weights = model.model.state_dict()
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
    if missing or misshapen:
        raise LayoutMismatch(
            f"This identity needs a model of the family {layout.base_model!r} ({len(layout.modules)} weights of the "
            f"layout {layout.name!r}), but the model is {model_name(model)}: {missing} of them are missing and "
            f"{misshapen} have another shape. Connect the model that the space was learned on."
        )
    return found


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


def grid(model: Any) -> int:
    """What the sides of a picture must be multiples of for its UNet: the factor of the VAE, and of every halving."""
    config = model.model.model_config.unet_config
    if "fold" in config:
        return config["fold"] * 2 ** (len(config["channel_mult"]) - 1)
    return 8 * 2 ** (len(config["channel_mult"]) - 1)


def usual_size(model: Any) -> int:
    """Side of the square pictures that a model was trained on."""
    return getattr(model.model, "picture_size", 512)


def noise_schedule(model: Any) -> NoiseSchedule:
    """The model's noise schedule, in double precision. Raises ConfigError for one that inversion does not know."""
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
            f"Inversion knows models that predict eps or v on discrete timesteps; {model_name(model)} samples as "
            f"{', '.join(c.__name__ for c in type(sampling).__mro__[1:3])}."
        )
    return NoiseSchedule(1 / (sampling.sigmas.detach().clone().double() ** 2 + 1), kind)


def times(model: Any) -> Tensor:
    """What the UNet is told for each timestep [T]."""
    sampling = model.get_model_object("model_sampling")
    return sampling.timestep(sampling.sigmas.detach().clone()).float()


def check_inputs(model: Any) -> None:
    """Refuse what an inversion can't work with, before anything is loaded."""
    base = model.model
    wanted = base.model_config.unet_config["in_channels"]
    given = base.latent_format.latent_channels * base.model_config.unet_config.get("fold", 1) ** 2
    if base.concat_keys or wanted != given:
        raise LayoutMismatch(
            f"{model_name(model)} is an inpainting model or one like it: its UNet reads {wanted} channels, "
            f"of which {given} are the picture. Invert with the ordinary checkpoint of the same family; the "
            "identity can be applied to the inpainting model afterwards."
        )
