"""The host's own front end in headless Chromium: a workflow is opened, run and photographed as a user would."""

from __future__ import annotations

import contextlib
import shutil
import urllib.parse
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from .server import PACK_FOLDER, SECONDS, Host

MILLISECONDS = SECONDS * 1000
SCREEN = {
    "width": 1760,
    "height": 860,
}  # fits the examples at a zoom where the nodes show their text
THUMBNAIL_WIDTH = 1200

# What a user would see as red or missing.
TROUBLE = """() => ({
    missing: app.graph.nodes.filter(n => !LiteGraph.registered_node_types[n.type]).map(n => n.type),
    red: app.graph.nodes.filter(n => n.has_errors
        || ['error', 'executionError'].some(s => n.strokeStyles?.[s]?.call(n))).map(n => n.type),
    refused: Object.keys(app.lastNodeErrors ?? {}),
    failed: app.lastExecutionError ? [app.lastExecutionError.exception_message] : [],
    dialogs: [...document.querySelectorAll('[role=dialog]')].map(d => d.innerText),
})"""


def find_chromium() -> str | None:
    return next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )


@contextlib.contextmanager
def open_page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_chromium(), args=["--no-sandbox", "--disable-gpu"]
        )
        try:
            page = browser.new_page(viewport=SCREEN)
            page.set_default_timeout(MILLISECONDS)
            yield page
        finally:
            browser.close()


def open_template(page: Page, host: Host, name: str) -> None:
    """Open an example workflow from the template gallery, by the gallery's own link."""
    query = urllib.parse.urlencode({"template": name, "source": PACK_FOLDER})
    page.goto(f"{host.url}/?{query}")
    page.wait_for_function("() => window.app?.graph?.nodes?.length > 1")
    page.wait_for_timeout(1000)
    page.evaluate(
        "app.extensionManager.setting.set('Comfy.Minimap.Visible', false)"
    )  # it lies on the nodes
    page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(1000)  # the view glides


def trouble(page: Page) -> dict[str, list[Any]]:
    return {kind: found for kind, found in page.evaluate(TROUBLE).items() if found}


def press_run(page: Page, host: Host) -> dict[str, Any]:
    """Press the Run button and wait; returns the history entry."""
    with page.expect_response(
        lambda answer: answer.url.endswith("/prompt") and answer.request.method == "POST"
    ) as sent:
        page.get_by_test_id("queue-button").first.click()
    entry = host.wait(sent.value.json()["prompt_id"])
    page.wait_for_timeout(2000)  # the picture appears in the node
    return entry


def photograph(page: Page, path: Path) -> None:
    """Save what the canvas shows around the nodes as a JPEG."""
    box = page.evaluate(
        """() => {
            const {scale, offset} = app.canvas.ds, b = app.graph.nodes.map(n => n.getBounding());
            const left = Math.min(...b.map(r => r[0])), top = Math.min(...b.map(r => r[1]));
            const right = Math.max(...b.map(r => r[0] + r[2])), bottom = Math.max(...b.map(r => r[1] + r[3]));
            const canvas = app.canvas.canvas.getBoundingClientRect();
            return {x: canvas.x + (left + offset[0]) * scale, y: canvas.y + (top + offset[1]) * scale,
                    width: (right - left) * scale, height: (bottom - top) * scale};
        }"""
    )
    margin = 30  # room for the badges above the nodes
    clip = {
        "x": max(box["x"] - margin, 0),
        "y": max(box["y"] - margin, 0),
        "width": box["width"] + 2 * margin,
        "height": box["height"] + 2 * margin,
    }
    picture = Image.open(BytesIO(page.screenshot(clip=clip))).convert("RGB")
    height = round(picture.height * THUMBNAIL_WIDTH / picture.width)
    picture.resize((THUMBNAIL_WIDTH, height), Image.Resampling.LANCZOS).save(
        path, quality=85, optimize=True
    )
