"""What captions of pictures make of a prompt."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from ...w2wpp.files.captions import with_trigger
from .fingerprints import fingerprint
from .prompts import Prompt


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
