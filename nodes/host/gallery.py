"""Painted faces, kept by what they depend on: in memory, on the disk as far as there is room, and for the browser."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import threading
from collections import OrderedDict
from io import BytesIO
from pathlib import Path

import folder_paths
import numpy as np
import torch
from aiohttp import web
from PIL import Image, UnidentifiedImageError
from server import PromptServer

from ...w2wpp.errors import W2WError
from ...w2wpp.files.writing import replacing
from ...w2wpp.identity import load_pictures
from . import folders

ON_DISK = 128 << 20  # bytes
IN_MEMORY = 32 << 20
CHECK_EVERY = 64  # faces, because a full folder holds many thousand small ones
ROUTES = ("/w2wpp/faces/{key}", "/w2wpp/identities", "/w2wpp/identities/picture")
KEY = re.compile(r"[0-9a-f]{32}")

_memory: OrderedDict[str, bytes] = OrderedDict()
_lock = threading.Lock()
_written = itertools.count()


def get_face(key: str) -> torch.Tensor | None:
    """A picture [H, W, 3] of bytes, or None if it was not painted or is gone."""
    data = _read(key)
    if data is None:
        return None
    try:
        with Image.open(BytesIO(data)) as file:
            return torch.from_numpy(np.asarray(file.convert("RGB")).copy())
    except (OSError, UnidentifiedImageError):
        return None


def put_face(key: str, picture: torch.Tensor) -> None:
    """Keep a picture under its key, in memory and on disk."""
    data = png(picture)
    _remember(key, data)
    path = _path(key)
    with contextlib.suppress(OSError):  # a full or read-only disk: memory has to do
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(data)
        if next(_written) % CHECK_EVERY == 0:
            _make_room(path.parent)


def png(picture: torch.Tensor) -> bytes:
    """A picture [H, W, 3] of bytes as a file."""
    out = BytesIO()
    Image.fromarray(picture.numpy()).save(out, "PNG", compress_level=4)
    return out.getvalue()


def register_routes() -> None:
    """Serve faces and the pictures of identity files to the nodes' widgets."""
    routes = PromptServer.instance.routes
    taken = {getattr(route, "path", None) for route in routes}
    for path, answer in zip(ROUTES, (_answer_face, _answer_identities, _answer_picture)):
        if path not in taken:  # a second copy of this pack would keep the server from starting
            routes.get(path)(answer)


async def _answer_face(request: web.Request) -> web.Response:
    key = request.match_info["key"]
    data = _read(key) if KEY.fullmatch(key) else None
    if data is None:
        return web.Response(status=404, text="This face is not painted, or no longer kept.")
    # The name stands for the contents, so it never has to be asked for again.
    headers = {"Cache-Control": "private, max-age=31536000, immutable"}
    return web.Response(body=data, content_type="image/png", headers=headers)


async def _answer_identities(request: web.Request) -> web.Response:
    """The identity files that can be loaded, with their stamps."""
    files = folders.identity_files()
    return web.json_response(
        [{"file": n, "stamp": folders.file_stamp(p)} for n, p in files.items()]
    )


async def _answer_picture(request: web.Request) -> web.Response:
    try:
        pictures = load_pictures(folders.identity_path(request.query.get("file", "")))
    except (W2WError, OSError) as e:
        return web.Response(status=404, text=str(e))
    if pictures is None:
        return web.Response(status=404, text="This identity was saved without a picture.")
    return web.Response(body=png(pictures[0]), content_type="image/png")


def _folder() -> Path:
    """Under the host's user folder, where it serves nothing by itself."""
    return Path(folder_paths.get_user_directory(), "__w2wpp", "faces")


def _path(key: str) -> Path:
    return _folder() / f"{key}.png"


def _read(key: str) -> bytes | None:
    with _lock:
        if key in _memory:
            _memory.move_to_end(key)
            return _memory[key]
    path = _path(key)
    try:
        data = path.read_bytes()
    except OSError:
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # the least recently seen go first
    _remember(key, data)
    return data


def _remember(key: str, data: bytes) -> None:
    with _lock:
        _memory[key] = data
        _memory.move_to_end(key)
        while sum(map(len, _memory.values())) > IN_MEMORY:
            _memory.popitem(last=False)


def _make_room(folder: Path) -> None:
    """Remove the least recently seen faces until a tenth of the room is free."""
    with os.scandir(folder) as entries:
        found = [(e.stat(), e.path) for e in entries if e.name.endswith(".png")]
    total = sum(status.st_size for status, _ in found)
    if total <= ON_DISK:
        return
    for status, path in sorted(found, key=lambda pair: pair[0].st_mtime):
        with contextlib.suppress(OSError):
            os.unlink(path)
        total -= status.st_size
        if total <= 0.9 * ON_DISK:
            return
