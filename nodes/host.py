"""The only file that knows the host's internals: folders, model patches, the avatar base as a model of the host's."""

from __future__ import annotations

import contextlib
import functools
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, ClassVar

import comfy.latent_formats
import comfy.lora
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sd
import comfy.supported_models_base
import comfy.utils
import folder_paths
import latent_preview
import numpy as np
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from PIL import Image
from safetensors import SafetensorError, safe_open
from server import PromptServer

import nodes  # the host's, not this package

from ..w2wpp import Layout, load_space
from ..w2wpp.errors import ConfigError, FormatError, LayoutMismatch, W2WError

PACK = Path(__file__).parent.parent
BUNDLED = PACK / "models"
CATEGORY = "w2wpp"  # the folder under the host's models/, and its name in extra_model_paths.yaml
PATTERN = "*.safetensors"
SD15_HELP = (
    "A space for Stable Diffusion 1.5 is made from the official weights2weights files, for non-commercial use: "
    "download the folder 'files' of https://huggingface.co/snap-research/weights2weights and run "
    "'w2wpp import-w2w files -o models/w2wpp/w2w.safetensors'."
)


# Folders


def register_folders() -> None:
    """Look for spaces in models/w2wpp/ and wherever extra_model_paths.yaml says, then among those the pack ships."""
    own = os.path.join(folder_paths.models_dir, CATEGORY)
    with contextlib.suppress(OSError):  # a read-only models folder still leaves the bundled spaces
        os.makedirs(own, exist_ok=True)
    known, _ = folder_paths.folder_names_and_paths.get(CATEGORY, ([], set()))
    folders = list(dict.fromkeys([*known, own, str(BUNDLED)]))
    folder_paths.folder_names_and_paths[CATEGORY] = (folders, {".safetensors"})


def register_help() -> None:
    """Serve the help pages where the front end looks: under the pack's folder name up to its first dot.

    The host itself serves them under the whole name, which differs for a release unzipped as "w2wpp-0.1.0".
    """
    nodes.EXTENSION_WEB_DIRS.setdefault(PACK.name.partition(".")[0], str(PACK / "web"))


def space_names() -> list[str]:
    """Names of the files that hold spaces, or may: one that can't be read stays, so that loading it says why."""
    return [name for name, path in _model_files().items() if _may_hold_space(path)]


def space_path(name: str) -> str:
    if name not in space_names():
        raise ConfigError(
            f"There is no space {name!r} in models/{CATEGORY}/. Installed are: {', '.join(space_names()) or 'none'}. "
            f"{SD15_HELP} Then press R to refresh the lists."
        )
    return _model_files()[name]


def space_header(name: str) -> SpaceHeader:
    path = space_path(name)
    return _space_header(path, file_stamp(path))


def attribute_names() -> list[str]:
    """The attributes that at least one of the installed spaces can edit."""
    return sorted({a for name in space_names() for a in space_header(name).attributes})


def lora_names() -> list[str]:
    return folder_paths.get_filename_list("loras")


def lora_path(name: str) -> str:
    if name not in lora_names():
        raise ConfigError(
            f"There is no LoRA {name!r} in models/loras/. Press R to refresh the list."
        )
    return folder_paths.get_full_path_or_raise("loras", name)


def identity_files() -> dict[str, str]:
    """Paths of the identity files that can be loaded, by the name that a user sees."""
    saved, given = _output_folder(), Path(folder_paths.get_input_directory())
    found = {
        f"{path.relative_to(saved).as_posix()} [output]": path for path in saved.rglob(PATTERN)
    }
    found |= {f"{path.name} [input]": path for path in given.glob(PATTERN)}
    roots = (saved.resolve(), given.resolve())
    inside = {n: str(p) for n, p in found.items() if any(map(p.resolve().is_relative_to, roots))}
    inside |= {f"{name} [models]": path for name, path in _model_files().items()}
    return {name: inside[name] for name in sorted(inside) if _holds_identity(inside[name])}


def identity_path(name: str) -> str:
    files = identity_files()
    if name not in files:
        raise ConfigError(
            f"There is no identity file {name!r}. Save one with W2W++ Save Identity, or put one into input/, "
            f"output/{CATEGORY}/ or models/{CATEGORY}/, then press R to refresh the list."
        )
    return files[name]


def new_identity_file(prefix: str) -> tuple[Path, str]:
    """A path in the output folder where nothing is yet, and its name as `identity_files` will list it."""
    root = _output_folder()
    prefix = prefix.strip().replace("\\", "/") or "identity"
    if PureWindowsPath(prefix).drive or not (root / prefix).resolve().is_relative_to(
        root.resolve()
    ):
        raise ConfigError(
            f"Identities are saved in the output folder only; the prefix {prefix!r} leads out of it."
        )
    folder, name, number, _, _ = folder_paths.get_save_image_path(prefix, str(root))
    while (path := Path(folder, f"{name}_{number:05}_.safetensors")).exists():
        number += 1
    return path, f"{path.relative_to(root).as_posix()} [output]"


def _model_files() -> dict[str, str]:
    names = folder_paths.get_filename_list(CATEGORY)
    paths = {name: folder_paths.get_full_path(CATEGORY, name) for name in names}
    return {name: path for name, path in paths.items() if path}  # a link may lead nowhere


def _output_folder() -> Path:
    return Path(folder_paths.get_output_directory(), CATEGORY)


def refusal(find: Callable[[str], object], value: str | None) -> bool | str:
    """What a node's validate_inputs answers: why the value is not there, or True. A linked value comes later."""
    try:
        if value is not None:
            find(value)
    except W2WError as e:
        return str(e)
    return True


def file_stamp(path: str | Path) -> str:
    """Changes whenever the file does."""
    status = os.stat(path)
    return f"{status.st_mtime_ns}-{status.st_size}"


def _may_hold_space(path: str) -> bool:
    return _stored_format(path, file_stamp(path)) in ("w2wpp.space", None)


def _holds_identity(path: str) -> bool:
    return _stored_format(path, file_stamp(path)) == "w2wpp.identity"


@dataclass(frozen=True)
class SpaceHeader:
    """What the lists need to know of a space."""

    fingerprint: str = ""
    attributes: tuple[str, ...] = ()


@functools.lru_cache(maxsize=1024)
def _space_header(path: str, stamp: str) -> SpaceHeader:
    """Nothing of a space that can't be read. ``stamp`` keys the cache."""
    try:
        space = load_space(path)
    except W2WError:
        return SpaceHeader()
    return SpaceHeader(space.fingerprint, tuple(space.directions))


@functools.lru_cache(maxsize=1024)
def _stored_format(path: str, stamp: str) -> str | None:
    """What a safetensors file says it is; None where it says nothing. ``stamp`` keys the cache."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format")
    except (OSError, SafetensorError):
        return None


# Tensors


@contextlib.contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Leave the inference mode in which the host runs every node, still without gradients.

    What is computed inside it can be kept by a space and later be part of a differentiable computation, which tensors
    made in inference mode can't.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


def read_picture(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """IMAGE [1, H, W, 3] and MASK [1, H, W] of a picture file; the mask is its opacity."""
    with Image.open(path) as file:
        pixels = torch.from_numpy(np.asarray(file.convert("RGBA")).copy()).float() / 255
    return pixels[None, ..., :3], pixels[None, ..., 3]


# Progress


class Watch:
    """The progress bar, the preview and the text of the running node, and whether Cancel was pressed."""

    def __init__(self, model: Any, node: str) -> None:
        self._node = node
        self._previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
        self._bar = comfy.utils.ProgressBar(1)

    @property
    def shows_previews(self) -> bool:
        return self._previewer is not None

    def show(self, step: int, steps: int, text: str, latents: torch.Tensor | None = None) -> None:
        """``latents`` [1, C, H, W], as the model sees them, become the preview. Raises if Cancel was pressed."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        preview = None
        if latents is not None and self._previewer is not None:
            preview = self._previewer.decode_latent_to_preview_image("JPEG", latents)
        self._bar.update_absolute(step, steps, preview)
        self.tell(text)

    def tell(self, text: str) -> None:
        """Write on the node."""
        PromptServer.instance.send_progress_text(text, self._node)


# Patches


def patched(
    model: Any, layout: Layout, lora: dict[str, torch.Tensor], strength: float, start: float = 0.0
) -> Any:
    """A copy of ``model`` with a LoRA in kohya's spelling added; the model itself is not changed.

    Raises unless every module of ``layout`` is in the model with the layout's shape, because the host only logs what
    it can't place. Strength 0 adds nothing at all, so that not even rounding differs from the bare model. With
    ``start`` the LoRA only acts from that share of the sampling on.
    """
    check_fit(model, layout)
    copy = model.clone()
    if strength == 0:
        return copy
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(lora, keys)
    added = (
        _delay(copy, patches, strength, start) if start > 0 else copy.add_patches(patches, strength)
    )
    if len(added) != len(layout.modules):
        raise LayoutMismatch(
            f"{model_name(model)} took {len(added)} of the {len(layout.modules)} LoRA weights of the layout "
            f"{layout.name!r}"
        )
    return copy


class _Gate:
    """Open while the model is asked about noise at or below the level at which ``start`` of the sampling is over."""

    def __init__(self, start: float) -> None:
        self.start, self.is_open = start, False

    def __call__(
        self, apply_model: Any, x: torch.Tensor, sigma: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        level = apply_model.class_obj.model_sampling.percent_to_sigma(self.start)
        self.is_open = float(sigma.max()) <= level
        return apply_model(x, sigma, *args, **kwargs)


@dataclass(frozen=True)
class _DelayedPatch:
    """What the host asks for a weight each time it is used: the patched one while the gate is open."""

    gate: _Gate
    key: str
    patch: tuple

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        if not self.gate.is_open:
            return weight
        return comfy.lora.calculate_weight([self.patch], weight.clone(), self.key, weight.dtype)


def _delay(model: Any, patches: dict[str, Any], strength: float, start: float) -> list[str]:
    """Add patches that act from ``start`` of the sampling on; returns the keys of the weights.

    The weights themselves stay as they are and are patched while they are used. The host's weight hooks would do it
    otherwise, but they sit on conditionings, and need a second copy of a model that is streamed to the GPU.
    """
    gate = _Gate(start)
    known = model.model_state_dict()
    added = [key for key in patches if key in known]
    for key in added:
        patch = (strength, patches[key], 1.0, None, None)
        model.add_weight_wrapper(key, _DelayedPatch(gate, key, patch))
    model.add_wrapper(comfy.patcher_extension.WrappersMP.APPLY_MODEL, gate)
    # Or the host takes the weights that it has loaded for another copy, without wrappers, for this one's.
    model.patches_uuid = uuid.uuid4()
    return added


def check_fit(model: Any, layout: Layout) -> dict[str, str]:
    """The model's weight for every module of ``layout``, by the module's name; raises unless all are there and fit."""
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    found = {}
    missing = misshapen = 0
    for module in layout.modules:
        key = keys.get("lora_unet_" + module.name.replace(".", "_"))
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


# The avatar base


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
