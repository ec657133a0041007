"""The command line `w2wpp`: every verb; nothing but parsing arguments and printing results."""

import sys
from collections.abc import Sequence

from .. import MISSING, __version__

if not MISSING:
    from .main import build_parser, main
else:

    def main(argv: Sequence[str] | None = None) -> int:
        """What is left without PyTorch: the version, and how to get the rest."""
        if "--version" in (sys.argv[1:] if argv is None else argv):
            print(f"w2wpp {__version__}")
            return 0
        print(f"w2wpp: {MISSING}", file=sys.stderr)
        return 1


__all__ = ["build_parser", "main"]
