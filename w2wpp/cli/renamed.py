"""Choices that had another name once: scripts that say it still run."""

from __future__ import annotations

from collections.abc import Callable, Mapping


def renamed(older: Mapping[str, str]) -> Callable[[str], str]:
    """For argparse's `type`: what the user wrote, or today's name of it."""

    def name(text: str) -> str:
        return older.get(text, text)

    return name
