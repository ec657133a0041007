"""The host's own front end in headless Chromium: a workflow is opened, run and photographed as a user would."""

from __future__ import annotations

import contextlib
import shutil
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


WELCOMED = {  # or what greets new users lies over the graph
    "Comfy.TutorialCompleted": True,
    "Comfy.OnboardingCoachmarks.Seen": ["appMode", "firstRun"],
    "Comfy.Workflow.Persist": False,
}


def open_front_end(page: Page, host: Host, *, vue: bool = False) -> None:
    """The front end with nothing in its way, on the canvas or with Nodes 2.0."""
    host.post(
        "/settings", {**WELCOMED, "Comfy.VueNodes.Enabled": vue, "Comfy.Minimap.Visible": False}
    )
    page.goto(host.url)
    page.wait_for_function("() => window.app?.extensionManager?.setting && window.app.graph")


def open_template(
    page: Page, host: Host, name: str, *, vue: bool = False, as_graph: bool = False
) -> None:
    """Open an example workflow as the gallery does: its file from the pack's templates, loaded as a new graph.

    With `as_graph` an App shows its graph, too.
    """
    open_front_end(page, host, vue=vue)
    page.evaluate(
        """async ([pack, name, asGraph]) => {
            const address = `/api/workflow_templates/${pack}/${encodeURIComponent(name)}.json`;
            const workflow = await (await fetch(address)).json();
            if (asGraph) delete workflow.extra.linearMode;
            await app.loadGraphData(workflow, true, true, name);
        }""",
        [PACK_FOLDER, name, as_graph],
    )
    page.wait_for_timeout(1000)
    page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(1000)  # the view glides


def trouble(page: Page) -> dict[str, list[Any]]:
    return {kind: found for kind, found in page.evaluate(TROUBLE).items() if found}


def press_run(page: Page, host: Host) -> dict[str, Any]:
    """Press the Run button, or do what an App's does, and wait; returns the history entry."""
    with page.expect_response(
        lambda answer: answer.url.endswith("/prompt") and answer.request.method == "POST"
    ) as sent:
        button = page.get_by_test_id("queue-button").first
        if button.is_visible():
            button.click()
        else:  # an App's has another name in every version
            page.evaluate("app.queuePrompt(0)")
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
    _save(page.screenshot(clip=clip), path)


def show(page: Page, selector: str, path: Path) -> None:
    """Save what an element shows, such as the faces of a widget, as a JPEG."""
    element = page.locator(selector).first
    page.wait_for_function(
        "s => [...document.querySelectorAll(`${s} img`)].every(i => i.complete && i.naturalWidth)",
        arg=selector,
    )
    _save(element.screenshot(), path)


def _save(screenshot: bytes, path: Path) -> None:
    picture = Image.open(BytesIO(screenshot)).convert("RGB")
    height = round(picture.height * THUMBNAIL_WIDTH / picture.width)
    picture.resize((THUMBNAIL_WIDTH, height), Image.Resampling.LANCZOS).save(
        path, quality=85, optimize=True
    )


# Pairs of nodes whose boxes meet, as the front end draws them: titles included.
OVERLAPS = """() => {
    const boxes = app.graph.nodes.map(n => {
        const element = document.querySelector(`[data-node-id="${n.id}"]`);
        if (element) {
            const {x, y, width, height} = element.getBoundingClientRect();
            return [n.title, x, y, width, height];
        }
        return [n.title, ...n.getBounding()];
    });
    const meet = ([, x, y, w, h], [, x2, y2, w2, h2]) => x < x2 + w2 && x2 < x + w && y < y2 + h2 && y2 < y + h;
    return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => meet(a, b)).map(b => [a[0], b[0]]));
}"""


def overlaps(page: Page) -> list[list[str]]:
    """Titles of nodes that lie on one another."""
    return page.evaluate(OVERLAPS)
