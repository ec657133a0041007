"""W2W++: identities as points in a space of LoRA weights. This library needs no ComfyUI."""

from .basis import AffineBasis, Basis
from .codecs import CODECS, Posterior, build_codec
from .edits import edit
from .encode import EncodeReport, encode_lora
from .errors import (
    ConfigError,
    DataError,
    FormatError,
    LayoutMismatch,
    ShapeError,
    SpaceMismatch,
    W2WError,
    WriteError,
)
from .identity import Identity, concat, interpolate, load_identity, save_identity
from .inversion import (
    Adam,
    Cma,
    Denoise,
    Hybrid,
    NoiseSchedule,
    Objective,
    Pivotal,
    Progress,
    Solution,
    StopInversion,
    invert,
)
from .lora.files import LoraFile, kohya_tensors, load_lora, lora_of_tensors, save_lora
from .lora.layout import SD15, Layout, Module, transformer_layout
from .space import Space
from .spacefile import load_space, save_space

__version__ = "0.1.0"

__all__ = [
    "CODECS",
    "SD15",
    "Adam",
    "AffineBasis",
    "Basis",
    "Cma",
    "ConfigError",
    "DataError",
    "Denoise",
    "EncodeReport",
    "FormatError",
    "Hybrid",
    "Identity",
    "Layout",
    "LayoutMismatch",
    "LoraFile",
    "Module",
    "NoiseSchedule",
    "Objective",
    "Pivotal",
    "Posterior",
    "Progress",
    "ShapeError",
    "Solution",
    "Space",
    "SpaceMismatch",
    "StopInversion",
    "W2WError",
    "WriteError",
    "build_codec",
    "concat",
    "edit",
    "encode_lora",
    "interpolate",
    "invert",
    "kohya_tensors",
    "load_identity",
    "load_lora",
    "load_space",
    "lora_of_tensors",
    "save_identity",
    "save_lora",
    "save_space",
    "transformer_layout",
]
