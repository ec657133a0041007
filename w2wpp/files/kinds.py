"""What a file is that is not what it should be, told by its first bytes or by its mode."""

from __future__ import annotations

import re
import stat

SEEN = 512  # bytes that are enough to tell

_MODES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link in a circle",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_PICKLE = "a pickle, which could run any code and is not opened"
_TORCH = "a PyTorch file (.pt, .bin, .ckpt)"
_PAGE = "a web page: the download gave a log-in or an error page in the place of the file"
_STARTS = (
    (rb"version https://git-lfs\.github\.com/spec/", "a Git LFS pointer: it only names the file. "
     "Run 'git lfs pull' in the folder it came from"),
    (rb"(\.\./)*(\.git/annex/objects/|/annex/objects/)", "a git-annex pointer: it only names the file"),
    (rb"\x80[\x02-\x05]", _PICKLE),
    (rb"[(\]}]?[cd(]\w+[ \n].*\n", _PICKLE),  # protocol 0
    (rb"PK\x03\x04.{26}[\w .-]+/(data\.pkl|byteorder|\.format_version)", _TORCH),
    (rb"PK\x03\x04", "a zip archive, or " + _TORCH),
    (rb"\x1f\x8b", "a gzip archive: unpack it first"),
    (rb"7z\xbc\xaf|Rar!", "an archive: unpack it first"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|BM", "a picture"),
    (rb"GGUF", "a GGUF file"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"\x89HDF", "an HDF5 file"),
    (rb"%PDF", "a PDF"),
    (rb"\s*<\?xml", "an XML document, perhaps the error message of a server"),
    (rb"\s*[\[{]", "JSON text, perhaps the error message of a server"),
)  # fmt: skip


def kind_of_mode(mode: int) -> str:
    """What something in a folder is that is not a regular file."""
    return _MODES.get(stat.S_IFMT(mode), "no regular file")


def kind_of_bytes(head: bytes) -> str:
    """What a file is by its first bytes; nothing where they don't tell."""
    if not head:
        return "empty: the download or the writing of it was cut off"
    if not head.strip(b"\0") and len(head) >= 64:
        return "only zeros: the download or the writing of it was cut off"
    if re.match(rb"(\xef\xbb\xbf)?\s*(<!doctype html|<html|<head|<body|<!--)", head, re.IGNORECASE):
        return _PAGE
    for pattern, what in _STARTS:
        if re.match(pattern, head, re.DOTALL):
            return what
    return "a text file" if _is_text(head) else ""


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as e:
        if e.reason != "unexpected end of data":
            return False
        text = head[: e.start].decode("utf-8")  # SEEN cut a character in two
    return all(c.isprintable() or c.isspace() for c in text)
