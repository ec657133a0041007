"""What a picture shows in words: a text file beside it, as trainers of LoRAs have them."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import FormatError

ENDING = ".txt"  # of kohya's trainer and of the host's own image-text folders
LONGEST = 1 << 16  # bytes; what is longer is no caption


def caption_file(picture: Path) -> Path:
    """Where the caption of a picture is, if it has one."""
    return picture.with_suffix(ENDING)


def caption_of(picture: Path) -> str:
    """The words of a picture, on one line; none where no file is beside it. Raises FormatError for what is no text."""
    path = caption_file(picture)
    if not path.is_file():
        return ""
    title = f"{path.parent.name}/{path.name}"
    try:
        if path.stat().st_size > LONGEST:
            raise FormatError(f"{title} is too long for a caption ({path.stat().st_size:,} bytes).")
        return " ".join(path.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as e:
        raise FormatError(
            f"{title} can't be read as a caption: {e}. Save it as text in UTF-8, or take it away."
        ) from e


def with_trigger(trigger: str, caption: str) -> str:
    """A caption after the words that call everybody up, unless it has them itself."""
    trigger = " ".join(trigger.split())
    # As words: "sks" is not called up by "asks".
    holds = re.search(rf"(?<!\w){re.escape(trigger.casefold())}(?!\w)", caption.casefold())
    return caption if not trigger or holds else f"{trigger}, {caption}"
