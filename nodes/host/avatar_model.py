"""The avatar base as a model of the host's."""

from __future__ import annotations

from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ...w2wpp.errors import FormatError


class FoldedUNet(UNetModel):
    """The host's UNet on pictures whose pixels are folded into channels inside the forward pass.

    From outside it is a model of 3-channel pictures, which is what the host's sampler and pixel-space VAE expect.
    """

    def __init__(self, *args: Any, fold: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fold = fold

    def _forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        folded = torch.nn.functional.pixel_unshuffle(x, self.fold)
        predicted = super()._forward(folded, *args, **kwargs)
        return torch.nn.functional.pixel_shuffle(predicted, self.fold)


class AvatarPixels(comfy.latent_formats.LatentFormat):
    """Latents that are the pictures themselves, in [-1, 1]."""

    latent_channels = 3
    spacial_downscale_ratio = 1  # the host's spelling
    latent_rgb_factors = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))  # for the preview


class AvatarConfig(comfy.supported_models_base.BASE):
    """What the host must know of the avatar base to sample with it."""

    unet_extra_config: ClassVar[dict[str, Any]] = {}  # BASE would overwrite the number of heads
    latent_format = AvatarPixels
    memory_usage_factor = 0.2
    supported_inference_dtypes = (torch.float32,)


class AvatarModel(comfy.model_base.BaseModel):
    """Named for the error messages; everything it does is the host's."""


def avatar_model(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Any:
    """The avatar base as a MODEL: ``config`` from its file, ``weights`` of the UNet under their diffusers names."""
    settings = AvatarConfig(_unet_config(config, weights))
    # Small enough for single precision, which paints the same picture on every device.
    settings.set_inference_dtype(torch.float32, None)
    schedule = config["schedule"]
    settings.sampling_settings = {
        "beta_schedule": "linear",  # the host's name for what diffusers calls scaled linear
        "linear_start": schedule["beta_start"],
        "linear_end": schedule["beta_end"],
        "timesteps": schedule["steps"],
    }
    model = AvatarModel(
        settings,
        model_type=comfy.model_base.ModelType.V_PREDICTION,
        device="cpu",
        unet_model=FoldedUNet,
    )
    model.picture_size = config["image_size"]
    model.load_model_weights(_host_names(settings.unet_config, weights, model.diffusion_model), "")
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def pixel_vae() -> Any:
    """The host's VAE that only rescales: pictures in [0, 1] to pixels in [-1, 1] and back."""
    return comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})


def empty_pictures(count: int, size: int) -> dict[str, torch.Tensor]:
    """LATENT of ``count`` empty pictures, zeros [count, 3, size, size]."""
    device = comfy.model_management.intermediate_device()
    return {"samples": torch.zeros(count, 3, size, size, device=device)}


def _unet_config(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    channels, layers, fold = config["channels"], config["layers"], config["fold"]
    levels = range(len(channels))
    depth = [int(f"down_blocks.{i}.attentions.0.norm.weight" in weights) for i in levels]
    return {
        "fold": fold,
        "image_size": config["image_size"] // fold,
        "in_channels": 3 * fold**2,
        "out_channels": 3 * fold**2,
        "model_channels": channels[0],
        "channel_mult": [width // channels[0] for width in channels],
        "num_res_blocks": [layers] * len(channels),
        "transformer_depth": [d for d in depth for _ in range(layers)],
        "transformer_depth_output": [d for d in depth for _ in range(layers + 1)],
        "transformer_depth_middle": 1,
        "num_heads": config["heads"],
        "num_head_channels": -1,
        "context_dim": config["context_dim"],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "legacy": False,
        "adm_in_channels": None,
        "use_checkpoint": False,
        "use_temporal_attention": False,
    }


def _host_names(
    unet_config: dict[str, Any], weights: dict[str, torch.Tensor], unet: torch.nn.Module
) -> dict[str, torch.Tensor]:
    """Rename diffusers' weights to the host's; every weight of the UNet has to be there, and no other."""
    names = comfy.utils.unet_to_diffusers(unet_config)
    renamed = {names[name]: weight.float() for name, weight in weights.items() if name in names}
    expected = unet.state_dict().keys()
    if renamed.keys() != expected or len(renamed) != len(weights):
        raise FormatError(
            f"the avatar base holds {len(weights)} UNet weights of which the host knows {len(renamed)}; "
            f"its configuration asks for {len(expected)}"
        )
    return renamed
