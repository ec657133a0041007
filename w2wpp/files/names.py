"""Names that people give to files, held to one rule everywhere: what works on Windows works on any system."""

from __future__ import annotations

import re

from ..errors import ConfigError
from .writing import is_leftover

LONGEST = 150  # characters, folders included: Windows takes 260 with the path in front and the number behind
LONGEST_PART = 200  # bytes in UTF-8; file systems take 255 with the number and the ending

_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f\x7f-\x9f]')
_DEVICE = re.compile(
    r"(con|prn|aux|nul|com[0-9\u00b9\u00b2\u00b3]|lpt[0-9\u00b9\u00b2\u00b3]|conin\$|conout\$) *(\..*)?",
    re.I,
)


def portable_name(name: str, default: str) -> str:
    """A relative name with slashes between its folders; a name of nothing, or of a folder, gets the default.

    Raises for what some system could not store or would store under another name.
    """
    text = name.strip().replace("\\", "/")
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if not parts or text.endswith("/"):
        parts.append(default)
    for part in parts:
        reason = _why_not(part)
        if reason:
            raise ConfigError(
                f"The name {name[:LONGEST]!r} can't be that of a file on every system: {reason}. Choose another."
            )
    whole = "/".join(parts)
    if len(whole) > LONGEST:
        raise ConfigError(
            f"The name {name[:40]!r}... has {len(whole)} characters; at most {LONGEST} fit everywhere."
        )
    return whole


def _why_not(part: str) -> str:
    """What is wrong with the name of one file or folder; nothing if it is fine."""
    try:
        size = len(part.encode("utf-8"))
    except UnicodeEncodeError:
        return "it holds half a character"
    if found := _FORBIDDEN.search(part):
        return f"it holds {found[0]!r}"
    if part.endswith((".", " ")):
        return f"{part[-20:]!r} ends with a dot or a space"
    if _DEVICE.fullmatch(part):
        return f"{part!r} is the name of a device on Windows"
    if size > LONGEST_PART:
        return f"{part[:20]!r}... takes {size} bytes, at most {LONGEST_PART} fit"
    return "it looks like a temporary file" if is_leftover(part) else ""
