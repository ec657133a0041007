"""A real ComfyUI server with this pack in it, in folders of its own, driven over HTTP as a front end would."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

REPO = Path(__file__).resolve().parents[2]
PROBE = Path(__file__).parent / "probe"  # nodes for the tests only
PACK_FOLDER = "W2W-plus.plus"  # a dash and a dot: a folder that was unzipped and renamed
PACK_ENTRIES = (
    "__init__.py", "nodes", "w2wpp", "models", "web", "locales", "example_workflows", "subgraphs",
)  # fmt: skip
SECONDS = 900  # for a start or a prompt; far more than either takes, for machines that are busy


class HostMissing(Exception):
    """No ComfyUI to test against; the message says where it was looked for."""


class PromptFailed(Exception):
    """The server refused a prompt or a node raised; the message holds what it said."""


def find_host() -> tuple[Path, Path]:
    """Folder of a ComfyUI checkout and the Python that runs it."""
    folder = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI")
    if not (folder / "main.py").exists():
        raise HostMissing(f"{folder} holds no ComfyUI; set COMFYUI_PATH to a checkout")
    named = os.environ.get("COMFYUI_PYTHON")
    tried = [Path(named)] if named else _usual_interpreters(folder)
    for python in tried:
        if python.exists():
            return folder, python
    raise HostMissing(
        f"no Python for {folder}: tried {', '.join(map(str, tried))}; set COMFYUI_PYTHON"
    )


def _usual_interpreters(folder: Path) -> list[Path]:
    homes = (folder.parent / "venv", folder / ".venv", folder / "venv")
    return [home / where for home in homes for where in ("bin/python", "Scripts/python.exe")]


@dataclass
class Result:
    """What a finished prompt left behind: the history entry, and the output folder that its files are in."""

    outputs: dict[str, dict[str, Any]]
    output_folder: Path

    def pictures(self, node: str | None = None) -> list[np.ndarray]:
        """Saved pictures [H, W, 3] uint8, of one node or of all of them in order."""
        in_order = sorted(self.outputs, key=lambda name: [int(n) for n in name.split(":")])
        nodes = [node] if node else in_order  # ids of nodes inside a subgraph are two numbers
        shown = [image for n in nodes for image in self.outputs.get(n, {}).get("images", [])]
        saved = [image for image in shown if image["type"] == "output"]
        paths = [self.output_folder / image["subfolder"] / image["filename"] for image in saved]
        return [np.asarray(Image.open(path).convert("RGB")) for path in paths]


class Host:
    """A running server."""

    def __init__(self, base: Path, port: int, log: Path) -> None:
        self.base, self.port, self.log_path = base, port, log
        self.url = f"http://127.0.0.1:{port}"

    @property
    def output(self) -> Path:
        return self.base / "output"

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=SECONDS) as answer:
            return answer.read()

    def json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def post(self, path: str, data: dict[str, Any]) -> Any:
        body = json.dumps(data).encode()
        request = urllib.request.Request(
            self.url + path, body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return json.loads(answer.read() or b"null")

    def forget(self) -> None:
        """Drop cached results and unload models, so that the next prompt computes everything anew."""
        self.post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(2)  # the server acts on it between prompts

    def run(self, graph: dict[str, Any], seconds: float = SECONDS) -> Result:
        """Queue a prompt in API format and wait for its end, at most so long."""
        try:
            answer = self.post("/prompt", {"prompt": graph})
        except urllib.error.HTTPError as refusal:
            raise PromptFailed(refusal.read().decode()) from None
        entry = self.wait(answer["prompt_id"], seconds)
        if answer["node_errors"]:  # of one output; others ran
            raise PromptFailed(json.dumps(answer["node_errors"]))
        if entry["status"]["status_str"] != "success":
            raise PromptFailed(_what_went_wrong(entry))
        return Result(entry["outputs"], self.output)

    def wait(self, prompt_id: str, seconds: float = SECONDS) -> dict[str, Any]:
        """The history entry of a prompt, once it has ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            entry = self.json(f"/history/{prompt_id}").get(prompt_id)
            if (entry and entry["status"]["completed"]) or (
                entry and entry["status"]["status_str"] == "error"
            ):
                return entry
            time.sleep(0.2)
        raise TimeoutError(f"prompt {prompt_id} did not end within {seconds} s")


def _what_went_wrong(entry: dict[str, Any]) -> str:
    for kind, details in entry["status"]["messages"]:
        if kind == "execution_error":
            return f"{details['node_type']}: {details['exception_type']}: {details['exception_message']}"
    return json.dumps(entry["status"])


def lay_out(base: Path, probe: Path) -> None:
    """Folders of a fresh install with this pack copied in, and the probe nodes beside it."""
    nodes = base / "custom_nodes"
    pack = nodes / PACK_FOLDER
    for folder in ("models/w2wpp", "input", "output", "user", "temp"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    pack.mkdir(parents=True)
    for name in PACK_ENTRIES:
        source = REPO / name
        if source.is_dir():
            shutil.copytree(source, pack / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, pack / name)
    shutil.copytree(probe, nodes / "probe", ignore=shutil.ignore_patterns("__pycache__"))


@contextlib.contextmanager
def serving(base: Path) -> Iterator[Host]:
    """Run the server on ``base`` until the block ends."""
    folder, python = find_host()
    port = _free_port()
    log = base / "server.log"
    command = [
        str(python), "main.py", "--cpu", "--port", str(port), "--base-directory", str(base), "--disable-auto-launch",
        "--disable-api-nodes", "--database-url", "sqlite:///:memory:", "--preview-method", "none",
    ]  # fmt: skip
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=stream, stderr=stream
        )
        try:
            host = Host(base, port, log)
            _await_start(host, process)
            yield host
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _await_start(host: Host, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"ComfyUI ended with {process.returncode}:\n{host.log()[-4000:]}")
        with contextlib.suppress(OSError):
            host.get("/system_stats")
            return
        time.sleep(0.5)
    raise TimeoutError(f"ComfyUI did not answer within {SECONDS} s:\n{host.log()[-4000:]}")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
