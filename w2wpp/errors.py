"""What this library refuses, in one family: catch `W2WError`, its text is meant for the user."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator


class W2WError(ValueError):
    """Base class. Messages say what was received, what was expected and what to do next."""


class FormatError(W2WError):
    """A file is not what it claims to be: truncated, another format, a future version, NaN."""


class MissingFileError(FormatError, FileNotFoundError):
    """There is nothing at a path, or a link that leads nowhere."""


class LayoutMismatch(W2WError):
    """LoRA weights do not fit a layout: modules are missing, unknown or of another shape."""


class SpaceMismatch(W2WError):
    """An identity meets a space that it was not made in."""


class ShapeError(W2WError):
    """A tensor has the wrong shape for the operation."""


class ConfigError(W2WError):
    """A setting is out of its range or unknown."""


class DataError(W2WError):
    """A training set cannot support what is asked of it."""


class WriteError(W2WError, OSError):
    """A file could not be written: no space, no permission. What was there before is as it was."""


def check_finite(what: str, **numbers: float) -> None:
    """Refuse NaN and infinities, which many a comparison lets through."""
    odd = [f"{name} = {value}" for name, value in numbers.items() if not math.isfinite(value)]
    if odd:
        raise ConfigError(f"{what} takes finite numbers. Got {', '.join(odd)}.")


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Taking apart what a file holds: whatever goes wrong inside means that the file cannot be read.

    `what` begins the sentence: "face.safetensors: the configuration of this identity".

    Raises FormatError in its place.
    """
    try:
        yield
    except W2WError as e:
        if isinstance(e, FormatError) and str(e).startswith(what.partition(": ")[0]):
            raise  # it names the file already
        raise FormatError(f"{what} cannot be read: {e}") from e
    except KeyError as e:
        raise FormatError(f"{what} cannot be read: it lacks {e}.") from e
    except (
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        OverflowError,
        RuntimeError,  # torch's name for what does not fit; also of too deep a nesting
        MemoryError,
    ) as e:
        raise FormatError(f"{what} cannot be read ({type(e).__name__}: {e}).") from e


class ResourceError(W2WError):
    """Memory or disk do not suffice; the text says what to change."""
