"""What verbs return, and where they say how it goes."""

from __future__ import annotations

import sys
from typing import Any

Result = dict[str, Any]  # JSON


def log(line: str) -> None:
    """A line on standard error: standard output is for results."""
    print(line, file=sys.stderr, flush=True)
