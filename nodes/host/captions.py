"""What pictures' own words make of a prompt: a text file beside a picture, as trainers of LoRAs have them."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...w2wpp.errors import FormatError
from .fingerprints import fingerprint
from .prompts import Prompt

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


def clip_fingerprint(clip: Any) -> str:
    """Of a CLIP: its weights, the patches on them, and how it is asked."""
    weights = {
        key: [entry[0][0], *(patch[:4] for patch in entry[1:])]
        for key, entry in clip.get_key_patches().items()
    }
    kind = type(clip.cond_stage_model).__name__
    return fingerprint(kind, weights, clip.layer_idx, clip.tokenizer_options)


class Captions:
    """Captions as prompts for a model.

    What ``positive`` carries beside its words (guidance, sizes) each caption's prompt carries, too.
    """

    def __init__(
        self, clip: Any, positive: list, trigger: str, prompt: Callable[[list], Prompt]
    ) -> None:
        self._clip, self._positive, self._trigger, self._prompt = clip, positive, trigger, prompt
        # The same words are the same prompt, as long as somebody trains on it.
        self._known: weakref.WeakValueDictionary[str, Prompt] = weakref.WeakValueDictionary()

    def prompts(self, captions: Sequence[str]) -> list[Prompt]:
        """One for each picture; a picture without words is trained under ``positive``."""
        found = []
        for caption in captions:
            text = with_trigger(self._trigger, caption) if caption else ""
            prompt = self._known.get(text) or self._prompt(self._conditioning(text))
            self._known[text] = prompt
            found.append(prompt)
        return found

    def _conditioning(self, text: str) -> list:
        if not text:
            return self._positive
        beside = self._positive[0][1]
        encoded = self._clip.encode_from_tokens_scheduled(self._clip.tokenize(text))
        return [[cond, {**beside, **own}] for cond, own in encoded]
