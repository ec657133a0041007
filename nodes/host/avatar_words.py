"""The avatar base's few words as a CLIP of the host's, so that its own text nodes make prompts for the avatar model."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.sd
import torch
from torch import Tensor, nn

KEY = "words"  # of the one list of tokens


def avatar_clip(vocabulary: Sequence[Sequence[str]], table: Tensor) -> Any:
    """CLIP of a table [words of all slots, context]. The first word of each slot in ``vocabulary`` is the empty one."""
    return comfy.sd.CLIP(
        SimpleNamespace(
            params={}, clip=lambda **_: WordTable(table), tokenizer=lambda **_: Words(vocabulary)
        )
    )


class Words:
    """Tokens of a text: for each slot its first word that the text holds, or the empty one. Other words say nothing."""

    def __init__(self, vocabulary: Sequence[Sequence[str]]) -> None:
        self._rows: list[dict[str, int]] = []
        start = 0
        for words in vocabulary:
            self._rows.append({word: start + i for i, word in enumerate(words)})
            start += len(words)
        self._known = ", ".join(w for words in vocabulary for w in words if w)

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, **_: Any
    ) -> dict[str, list[list[tuple[int, float]]]]:
        """{"words": [a row of the table and its weight for each slot]}."""
        said = re.findall(r"[^\W\d_]+", text.lower())
        found = [next((w for w in said if w in rows), "") for rows in self._rows]
        if said and not any(found):
            logging.warning(
                f"The avatar model knows no word of {text[:200]!r}. It knows: {self._known}."
            )
        return {KEY: [[(rows[word], 1.0) for rows, word in zip(self._rows, found)]]}

    def state_dict(self) -> Mapping[str, Tensor]:
        """Nothing that a checkpoint would hold."""
        return {}


class WordTable(nn.Module):
    """What the host asks of a text encoder, of a table of words."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.words = nn.Embedding.from_pretrained(table)
        self.dtypes = {table.dtype}
        self.disable_offload = True  # nothing to stream

    def encode_token_weights(self, tokens: dict[str, Any]) -> tuple[Tensor, None]:
        """([1, slots, context], no pooled output)"""
        rows = torch.tensor([[row for row, _ in slots] for slots in tokens[KEY]])
        device = comfy.model_management.intermediate_device()
        return self.words(rows.to(self.words.weight.device)).to(device), None

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """Has none."""

    def reset_clip_options(self) -> None:
        """Has none."""

    def load_sd(self, sd: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """(missing, unexpected) of a checkpoint's weights; there are none for a table that ships."""
        return [], list(sd)
