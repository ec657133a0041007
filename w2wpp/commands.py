"""How the command line is called where this package lies, for messages that name a command."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def command(arguments: str) -> str:
    """A line that can be pasted into a terminal, in any folder: "info FILE" ->
    "/path/to/python /path/to/pack/w2wpp info FILE".

    In a clone among the host's nodes there is neither a script on the path nor a module that `-m` would find; where
    the script was called, it is known to work and shorter.
    """
    if Path(sys.argv[0]).stem == "w2wpp" and Path(sys.argv[0]).is_file():
        return f"w2wpp {arguments}"
    return f"{_quoted(sys.executable or 'python')} {_quoted(PACKAGE)} {arguments}"


def installation(extra: str) -> str:
    """The line that installs what an extra of this package names: from the checkout that this is, if it is one."""
    checkout = (PACKAGE.parent / "pyproject.toml").is_file()
    what = f"{PACKAGE.parent if checkout else 'w2wpp'}[{extra}]"
    return f"{_quoted(sys.executable or 'python')} -m pip install {_quoted(what, always=True)}"


def _quoted(part: str | Path, *, always: bool = False) -> str:
    """As the shells of this system want it; some of them read brackets as a pattern."""
    text = str(part)
    if os.name == "nt":
        return f'"{text}"' if always or " " in text else text
    return f"'{text}'" if always and "'" not in text else shlex.quote(text)
