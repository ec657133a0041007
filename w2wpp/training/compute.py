"""Where and how precisely a training computes: `--device` and `--precision` of every training verb."""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import ConfigError, ResourceError
from ..precision import cpu_has_bf16

T = TypeVar("T")
PRECISIONS = ("fp32", "tf32", "bf16")


@dataclass(frozen=True)
class Compute:
    """A device and the precision of its matrix products.

    fp32  single precision
    tf32  single precision with products of 10 bits and a half, where the device has them (NVIDIA
          from Ampere on); elsewhere the same as fp32
    bf16  products of numbers with 8 bits, added up in single precision; parameters, optimiser
          states, sums over a data set and everything after them stay as they are
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"--precision is one of {', '.join(PRECISIONS)}. Got {self.precision!r}."
            )

    @classmethod
    def pick(cls, device: str | torch.device = "auto", precision: str = "auto") -> Compute:
        """What is asked for; `auto` takes a GPU if there is one, and tf32 on it, else fp32."""
        found = _device(device)
        if precision == "auto":
            precision = "tf32" if found.type == "cuda" else "fp32"
        if precision == "bf16" and not _has_bf16(found):
            warnings.warn(
                f"--precision bf16: {found} has no instructions for it and is many times slower than in fp32.",
                stacklevel=2,
            )
        return cls(found, precision)

    @classmethod
    def mixed(cls, device: str | torch.device = "auto") -> Compute:
        """bf16 where the device multiplies it itself, else fp32: for networks that both precisions train alike."""
        found = _device(device)
        return cls(found, "bf16" if _has_bf16(found) else "fp32")

    @contextlib.contextmanager
    def products(self) -> Iterator[None]:
        """Matrix products in this precision while the block runs."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest" if self.precision == "fp32" else "high")
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                yield
        finally:
            torch.set_float32_matmul_precision(before)

    def run(self, call: Callable[..., T], *args: Any) -> T:
        """call(*args) with products in this precision; for a process of its own."""
        with self.products():
            return call(*args)

    def put(self, t: Tensor) -> Tensor:
        """A tensor on the device; copies from page-locked memory do not wait."""
        return t.to(self.device, non_blocking=t.is_pinned() if t.device.type == "cpu" else False)

    def to_json(self) -> dict[str, Any]:
        """The same as JSON, for reports."""
        name = self.device.type
        if name == "cuda":
            name = torch.cuda.get_device_name(self.device)
        return {"device": name, "precision": self.precision, "torch": torch.__version__}


def add_options(parser: argparse.ArgumentParser) -> None:
    """--device and --precision."""
    parser.add_argument(
        "--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N"
    )
    parser.add_argument(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="of matrix products (default: tf32 on a GPU, fp32 on a CPU)",
    )


@contextlib.contextmanager
def explained(advice: str) -> Iterator[None]:
    """Out of memory or disk in the block becomes one sentence with what to change.

    Raises ResourceError in its place.
    """
    try:
        yield
    except (torch.cuda.OutOfMemoryError, MemoryError) as e:
        raise ResourceError(f"Out of memory. {advice}") from e
    except RuntimeError as e:
        if "can't allocate memory" not in str(e) and "not enough memory" not in str(e):
            raise
        raise ResourceError(f"Out of memory. {advice}") from e


def _has_bf16(device: torch.device) -> bool:
    return torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bf16()


def _device(device: str | torch.device) -> torch.device:
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as e:
        raise ConfigError(f"--device is auto, cpu, cuda or cuda:N. Got {str(device)!r}.") from e
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: this PyTorch sees no GPU. Use --device cpu, or install a build of PyTorch "
            "for your GPU."
        )
    if found.type == "cuda" and found.index is None:
        found = torch.device("cuda", torch.cuda.current_device())  # this rank's, under torchrun
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {found}: there are {torch.cuda.device_count()} GPUs, counted from 0."
        )
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"--device is cpu or cuda; sums over a data set need double precision. Got {found.type!r}."
        )
    return found
