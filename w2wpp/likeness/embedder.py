"""Face embedders as a plug: pictures in, unit vectors out; those that are ONNX files run by onnxruntime, an extra."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, DataError, FormatError
from ..files.opened import OpenedFile

AT_ONCE = 16  # pictures
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
SPANS = {  # what a model takes for black and white
    "-1..1": lambda x: x,  # most: facenet, ArcFace and its kin
    "0..1": lambda x: (x + 1) / 2,
    "0..255": lambda x: (x + 1) * 127.5,
}


class Embedder(Protocol):
    """Who can tell people apart."""

    @property
    def name(self) -> str:
        """For the report."""

    @property
    def size(self) -> int:
        """Pixels per side that it wants."""

    def embed(self, faces: Tensor) -> Tensor:
        """Cropped faces [n, 3, S, S] in [-1, 1], RGB -> unit vectors [n, E]."""


class Session(Protocol):
    """What is used of onnxruntime's InferenceSession."""

    def get_inputs(self) -> Sequence[Any]:
        """Each with a name, a shape and a type."""

    def run(self, outputs: Any, feed: Mapping[str, Any]) -> Sequence[Any]:
        """Arrays of all outputs."""


class OnnxEmbedder:
    """A model with one input, pictures [n, 3, S, S] or [n, S, S, 3], whose first output is the embedding [n, E]."""

    def __init__(
        self,
        session: Session,
        name: str,
        *,
        span: str = "-1..1",
        bgr: bool = False,
        size: int | None = None,
    ) -> None:
        """`size` is for models that take pictures of any size. Raises ConfigError for a model of another kind."""
        if span not in SPANS:
            raise ConfigError(f"Pixels lie in {', '.join(SPANS)}. Got {span!r}.")
        inputs = session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type not in TYPES:
            told = ", ".join(f"{i.name} {list(i.shape)} {i.type}" for i in inputs)
            raise ConfigError(
                f"{name}: an embedder has one input, pictures as floating point numbers in four dimensions. Got "
                f"{told or 'none'}."
            )
        (pictures,) = inputs
        self.name, self._session, self._input = name, session, pictures
        self._span, self._bgr = span, bgr
        self._channels_last = pictures.shape[3] == 3 and pictures.shape[1] != 3
        sides = pictures.shape[1:3] if self._channels_last else pictures.shape[2:4]
        known = {side for side in sides if isinstance(side, int) and side > 0}
        if len(known) > 1:
            raise ConfigError(f"{name}: an embedder takes square pictures. Got {list(sides)}.")
        if not known and size is None:
            raise ConfigError(
                f"{name} takes pictures of any size; say with --embedder-size what it was trained on."
            )
        if known and size not in (None, *known):
            raise ConfigError(
                f"{name} takes pictures of {known.pop()} pixels per side, not {size}."
            )
        self.size: int = known.pop() if known else size  # type: ignore[assignment]
        first = pictures.shape[0]
        self._fixed = isinstance(first, int) and first > 0
        self._rows: int = first if self._fixed else AT_ONCE

    @classmethod
    def open(cls, path: str | os.PathLike[str], **settings: Any) -> OnnxEmbedder:
        """Of a file. Raises FormatError for what onnxruntime can't read, ModuleNotFoundError without onnxruntime."""
        import onnxruntime

        path = Path(path)
        OpenedFile(path).close()  # says what is there instead, if it is no file
        try:
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as e:  # its errors have no base class of their own
            reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            raise FormatError(
                f"{path} is no ONNX model that onnxruntime can run ({reason})."
            ) from e
        return cls(session, path.stem, **settings)

    def embed(self, faces: Tensor) -> Tensor:
        """Cropped faces [n, 3, S, S] in [-1, 1], RGB -> unit vectors [n, E].

        Raises DataError where the model gives no finite vector for each.
        """
        shown = SPANS[self._span](faces.float())
        shown = shown.flip(1) if self._bgr else shown
        shown = shown.movedim(1, -1) if self._channels_last else shown
        array = np.ascontiguousarray(shown.cpu().numpy().astype(TYPES[self._input.type]))
        parts = []
        for start in range(0, len(array), self._rows):
            some = array[start : start + self._rows]
            missing = self._rows - len(some) if self._fixed else 0
            whole = np.concatenate([some, *[some[-1:]] * missing]) if missing else some
            found = self._session.run(None, {self._input.name: whole})[0]
            parts.append(torch.from_numpy(np.asarray(found, np.float32))[: len(some)].flatten(1))
        seen = torch.cat(parts) if parts else torch.zeros(0, 1)
        if len(seen) != len(faces) or not bool(torch.isfinite(seen).all()):
            raise DataError(
                f"{self.name} gave {list(seen.shape)} for {len(faces)} faces, or numbers that are not finite: is its "
                "first output the embedding?"
            )
        if bool((seen.norm(dim=1) == 0).any()):
            raise DataError(f"{self.name} gave an embedding of zeros.")
        return F.normalize(seen, dim=1)
