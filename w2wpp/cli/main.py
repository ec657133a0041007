"""Verbs register themselves; this file parses, prints and turns errors into exit codes.

Results go to standard output (as one JSON object with --json), everything else to standard error.
Exit codes: 0, 1 for what is wrong with the user's input, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from .. import __version__
from ..commands import installation
from ..errors import W2WError
from . import avatars, collections, identities, imports, likeness, training
from .arguments import check_arguments

# Each has register(subparsers); a parser's default `run` takes the arguments and returns the result.
MODULES = (identities, collections, training, imports, likeness, avatars)
MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # torch's words for it
EXTRAS = {  # what is installed by which extra of this package
    "diffusers": "avatars",
    "matplotlib": "avatars",
    "PIL": "avatars",
    "onnxruntime": "likeness",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (of this process by default); returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        check_arguments(args)
        result = args.run(args)
    except (W2WError, OSError) as e:
        print(f"w2wpp: {_readable(e)}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as e:
        extra = EXTRAS.get((e.name or "").split(".")[0])
        if extra is None:
            raise
        print(f"w2wpp: '{args.verb}' needs {e.name}: {installation(extra)}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, MemoryError) and not any(word in str(e) for word in MEMORY):
            raise
        print(f"w2wpp: '{args.verb}' needs more memory than there is: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("w2wpp: interrupted", file=sys.stderr)
        return 130
    if result:
        _print(json.dumps(result, allow_nan=False) if args.json else _text(result))
    return 0


def _readable(error: Exception) -> str:
    """One line that a terminal can show, whatever names and contents of files it quotes."""
    line = " ".join(str(error).split())
    short = re.sub(r"\S{300,}", lambda m: f"{m[0][:80]}...{m[0][-40:]}", line)
    return short.encode("utf-8", "backslashreplace").decode("utf-8")


def _print(text: str) -> None:
    """On standard output, which may be a pipe that wanted only the first lines (`w2wpp info FILE | head`)."""
    try:
        print(text, flush=True)
    except UnicodeEncodeError:  # a terminal that knows only some characters
        plain = sys.stdout.encoding or "ascii"
        print(text.encode(plain, "backslashreplace").decode(plain), flush=True)
    except BrokenPipeError:
        # Python flushes once more on its way out, and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="w2wpp", description="Identities as points in a space of LoRA weights."
    )
    parser.add_argument("--version", action="version", version=f"w2wpp {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for module in MODULES:
        module.register(verbs)
    for verb in verbs.choices.values():
        with contextlib.suppress(argparse.ArgumentError):  # a verb may declare it itself
            verb.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _text(result: Mapping[str, Any]) -> str:
    """One line per entry, nested tables indented."""
    lines = []
    for key, value in result.items():
        if isinstance(value, Mapping):
            lines.append(f"{key}:")
            lines += [f"  {line}" for line in _text(value).splitlines()]
        elif isinstance(value, (list, tuple)):
            lines.append(f"{key}: {', '.join(str(v) for v in value)}")
        else:
            lines.append(f"{key}: {value}")
    return "\n".join(lines)
