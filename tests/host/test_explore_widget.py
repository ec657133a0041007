"""The grid of W2W++ Explore in the host's own front end: looked at, clicked, bred, reloaded, shared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import read_workflow
from .server import Host

pytest.importorskip("playwright", reason="the front-end tests need playwright")

from . import browser

pytestmark = pytest.mark.skipif(
    browser.find_chromium() is None, reason="the front-end tests need Chromium"
)
MODES = ("canvas", "nodes 2.0", "app")


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with browser.open_page() as opened:
        yield opened


def open_workflow(page: Any, host: Host, workflow: dict, mode: str) -> None:
    workflow = json.loads(json.dumps(workflow))
    if mode == "app":
        (node,) = [n["id"] for n in workflow["nodes"] if n["type"] == "W2WPP_Explore"]
        (picture,) = [n["id"] for n in workflow["nodes"] if n["type"] == "SaveImage"]
        widgets = ("seed", "radius", "faces")
        workflow["extra"] |= {
            "linearMode": True,
            "linearData": {"inputs": [[node, w] for w in widgets], "outputs": [picture]},
        }
    page.goto(host.url)
    page.wait_for_function("() => window.app?.extensionManager?.setting && window.app.graph")
    page.evaluate(
        "on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", mode == "nodes 2.0"
    )
    page.evaluate("w => app.loadGraphData(w)", workflow)
    page.locator(".w2wpp-explore").wait_for()
    if mode != "app":
        page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        page.wait_for_timeout(800)


def value(page: Any, name: str) -> Any:
    return page.evaluate(
        """name => app.graph.nodes.find(n => n.type === 'W2WPP_Explore')
            .widgets.find(w => w.name === name).value""",
        name,
    )


def wait_for_faces(page: Any, count: int) -> None:
    page.wait_for_function(
        """count => [...document.querySelectorAll('.w2wpp-face img')]
            .filter(i => i.complete && i.naturalWidth).length === count""",
        arg=count,
    )
    page.wait_for_function("() => !document.querySelector('.w2wpp-status').textContent.startsWith('Painting')")


def faces(page: Any) -> list[str]:
    return page.eval_on_selector_all(".w2wpp-face img", "all => all.map(i => i.src.slice(-32))")


def run(page: Any) -> None:
    page.evaluate("app.queuePrompt(0)")


@pytest.mark.parametrize("mode", MODES)
def test_faces_are_looked_at_clicked_and_bred(
    host: Host, page: Any, mode: str, tmp_path: Path
) -> None:
    open_workflow(page, host, read_workflow("explore_faces"), mode)
    run(page)
    wait_for_faces(page, 16)
    page.wait_for_timeout(1500)
    page.screenshot(path=f"/work/notes/scratch-explore/{mode.replace(' ', '-')}.png")
