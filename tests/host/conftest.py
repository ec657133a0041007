"""The server that all host tests share, and what they ask of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from .server import PROBE, REPO, Host, HostMissing, find_host, lay_out, serving

collect_ignore = ["probe"]  # imports the host's modules: it runs inside the server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    try:
        find_host()
    except HostMissing as reason:
        for item in here:
            item.add_marker(pytest.mark.skip(reason=f"no ComfyUI: {reason}"))


def pytest_report_header() -> str:
    try:
        return "ComfyUI: {} run by {}".format(*find_host())
    except HostMissing as reason:
        return f"ComfyUI: the host tests are skipped, because {reason}"


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    base = tmp_path_factory.mktemp("comfyui")
    lay_out(base, PROBE)
    with serving(base) as running:
        yield running


@pytest.fixture(scope="session")
def object_info(host: Host) -> dict:
    return host.json("/object_info")


def workflow_names() -> list[str]:
    """All example workflows, by their files: a number, and a title, which for an App ends in ".app"."""
    return sorted(path.stem for path in (REPO / "example_workflows").glob("*.json"))


def title(name: str) -> str:
    """A workflow's name without its number."""
    return name.split(" ", 1)[1]


def named(wanted: str) -> str:
    """The workflow with a title, whatever its number."""
    (name,) = [name for name in workflow_names() if title(name) == wanted]
    return name


def runnable_names() -> list[str]:
    """Those that run from a fresh install; the others need files that users download."""
    return [name for name in workflow_names() if "Stable Diffusion" not in name]


def read_workflow(name: str) -> dict:
    return json.loads((REPO / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
