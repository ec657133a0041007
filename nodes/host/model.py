"""What a model of the host's is: its name, its sizes, its noise schedule, and where a layout's modules are in it."""

from __future__ import annotations

from typing import Any

import comfy.lora
import comfy.model_sampling
import comfy.utils
from torch import Tensor

from ...w2wpp import Layout, NoiseSchedule
from ...w2wpp.errors import ConfigError, LayoutMismatch


def check_fit(model: Any, layout: Layout) -> dict[str, str]:
    """The model's weight for every module of ``layout``, by the module's name; raises unless all are there and fit."""
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    found = {}
    missing = misshapen = 0
    for module in layout.modules:
        key = keys.get(lora_key(module.name))
        expected = (module.out_features, module.in_features)
        if not isinstance(key, str):  # absent, or a slice of a fused weight
            missing += 1
        elif tuple(comfy.utils.get_attr(model.model, key).shape) != expected:
            misshapen += 1
        else:
            found[module.name] = key
    if missing or misshapen:
        raise LayoutMismatch(
            f"This identity needs a model of the family {layout.base_model!r} ({len(layout.modules)} attention weights "
            f"of the layout {layout.name!r}), but the model is {model_name(model)}: {missing} of them are missing and "
            f"{misshapen} have another shape. Connect the model that the space was learned on."
        )
    return found


def lora_key(module: str) -> str:
    """What kohya's files, and the host's map of keys, call a module."""
    return "lora_unet_" + module.replace(".", "_")


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
    base = model.model
    wanted = base.model_config.unet_config["in_channels"]
    given = base.latent_format.latent_channels * base.model_config.unet_config.get("fold", 1) ** 2
    if base.concat_keys or wanted != given:
        raise LayoutMismatch(
            f"{model_name(model)} is an inpainting model or one like it: its UNet reads {wanted} channels, "
            f"of which {given} are the picture. Invert with the ordinary checkpoint of the same family; the "
            "identity can be applied to the inpainting model afterwards."
        )
