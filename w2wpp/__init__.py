"""W2W++: identities as points in a space of LoRA weights. This library needs no ComfyUI.

    import torch, w2wpp

    space = w2wpp.load_space(w2wpp.shipped())                 # the avatars that ship
    people = space.sample(4, generator=torch.Generator().manual_seed(7), truncation=0.8)
    w = people.vectors(space)                                 # [4, P]
    w2wpp.save_lora(space.layout.unpack(w[0]), "face.safetensors", alpha=space.layout.alpha)

Letters, the same everywhere: N LoRAs, P numbers of a LoRA's vector, K components of a basis, d numbers of a latent,
B rows of a batch. Tensors and numpy arrays of any precision are taken; single precision is returned. Everything that
is refused raises a `W2WError`, whose text is meant for the user.

From LoRA files to a space of your own: `write_dataset`, `fit_basis`, `project_dataset`, `fit_vae` or `linear_space`,
`space_directions`. From files of others: `open_w2w` and `write_w2w_space`, `read_coefficients`, `read_vae`.
"""

__version__ = "0.1.0"
MISSING = ""  # a sentence for the user, where a package that all of this needs is not installed

try:
    from .basis import AffineBasis, Basis
    from .bundle import shipped
    from .codecs import CODECS, Posterior, build_codec
    from .edits import edit
    from .encode import EncodeReport, encode_lora
    from .errors import (
        ConfigError,
        DataError,
        FormatError,
        LayoutMismatch,
        MissingFileError,
        ShapeError,
        SpaceMismatch,
        W2WError,
        WriteError,
    )
    from .identity import Identity, concat, interpolate, load_identity, save_identity
    from .imports.identity import read_coefficients
    from .imports.original import read_vae
    from .imports.w2w import open_w2w
    from .imports.w2w_space import write_w2w_space
    from .inversion import (
        Adam,
        Cma,
        Denoise,
        LinearSchedule,
        Multistart,
        NoiseSchedule,
        Objective,
        Pivotal,
        Progress,
        Solution,
        StopInversion,
        invert,
    )
    from .lora.files import LoraFile, load_lora, lora_of_tensors
    from .lora.layout import SD15, Layout, Module, transformer_layout
    from .lora.write import kohya_tensors, save_lora
    from .space import Space
    from .spacefile import load_space, save_space
    from .training.coefficients import Coefficients, project_dataset
    from .training.config import VaeTraining
    from .training.dataset import VectorDataset, load_dataset, write_dataset
    from .training.directions import space_directions
    from .training.fit_basis import fit_basis
    from .training.fit_vae import fit_vae, linear_space
except ModuleNotFoundError as e:
    # Inside ComfyUI all of these are there; elsewhere an extra brings them, because a pack that lists them as
    # requirements would have the host's own replaced.
    if e.name not in ("torch", "numpy", "safetensors", "einops"):
        raise
    from .commands import installation

    MISSING = f"This needs {e.name}, which is not installed: {installation('standalone')}"

    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(f"w2wpp.{name}: {MISSING}")


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
    "Multistart",
    "Identity",
    "Layout",
    "LayoutMismatch",
    "LinearSchedule",
    "LoraFile",
    "MissingFileError",
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
    "Coefficients",
    "VaeTraining",
    "VectorDataset",
    "fit_basis",
    "fit_vae",
    "linear_space",
    "load_dataset",
    "open_w2w",
    "project_dataset",
    "read_coefficients",
    "read_vae",
    "shipped",
    "space_directions",
    "write_dataset",
    "write_w2w_space",
]
