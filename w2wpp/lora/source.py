"""Where a LoRA's tensors come from: a safetensors file, a .pt or .bin file, or memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..arrays import is_finite
from ..errors import FormatError
from ..files.container import Container, open_container
from ..files.torchfile import load_torch

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
ADAPTERS = tuple(
    name + suffix
    for suffix in (".safetensors", ".bin")
    for name in ("adapter_model", "pytorch_lora_weights")
)


@dataclass(frozen=True, eq=False)
class InMemory:
    """Tensors at hand, with what is asked of a Container."""

    path: Path  # a name for messages
    entries: Mapping[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    def __enter__(self) -> InMemory:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, key: str, *, finite: bool = True) -> Tensor:
        """A tensor as it is stored. Raises FormatError for NaN and infinity if `finite`."""
        tensor = self.entries[key].detach().cpu()
        if finite and not is_finite(tensor):
            raise FormatError(f"{self.path}: the tensor '{key}' holds NaN or infinite numbers.")
        return tensor


Source = Container | InMemory


def open_source(path: str | os.PathLike[str]) -> Source:
    """A LoRA's file, or the one in a folder that diffusers or PEFT wrote."""
    path = adapter_file(path)
    if path.suffix.lower() not in PICKLED:
        return open_container(path)
    return InMemory(path, _tensors(path, load_torch(path)))


def adapter_file(path: str | os.PathLike[str]) -> Path:
    """A LoRA file itself, or the one in a folder that diffusers or PEFT wrote.

    Raises FormatError for a folder without one.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    for found in (path / part / name for part in ("", "unet") for name in ADAPTERS):
        if found.is_file():
            return found
    raise FormatError(f"{path} holds none of {', '.join(ADAPTERS)}, nor does its folder unet.")


def read_numbers(source: Source, key: str) -> Tensor:
    """A tensor in single precision, whatever it is stored in; finite, or an error that names it.

    Raises FormatError for quantised numbers, NaN and infinity.
    """
    stored = source.entries[key].dtype
    if not stored.is_floating_point:
        raise FormatError(
            f"{source.path}: '{key}' is stored as {str(stored).removeprefix('torch.')}, expected "
            "floating-point numbers. A quantised LoRA has to be saved in half precision first."
        )
    tensor = source.read(key, finite=False).float()
    if not is_finite(tensor):
        raise FormatError(f"{source.path}: the tensor '{key}' holds NaN or infinite numbers.")
    return tensor


def _tensors(path: Path, found: Any) -> dict[str, Tensor]:
    """The state dict in what a .pt file holds, which trainers wrap in different ways."""
    for wrapper in ("state_dict", "model_state_dict", "model", "unet", "lora"):
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if isinstance(found, Mapping) and len(found) == 1 and isinstance(_only(found), Mapping):
        found = _only(found)
    if isinstance(found, (list, tuple)):
        raise FormatError(
            f"{path} is a list of tensors without names, as the first LoRA scripts wrote them; "
            "nothing tells which module each belongs to. Convert it with the script's own tool."
        )
    tensors = {}
    if isinstance(found, Mapping):
        tensors = {str(k): t for k, t in found.items() if isinstance(t, Tensor)}
    if not tensors:
        raise FormatError(f"{path} holds no tensors by name, expected a LoRA's state dict.")
    return tensors


def _only(found: Mapping[Any, Any]) -> Any:
    return next(iter(found.values()))
