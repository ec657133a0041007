"""Every example workflow in the host's own front end: nothing missing, nothing red, Run gives the picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .conftest import named, runnable_names, workflow_names
from .server import Host, Result

pytest.importorskip("playwright", reason="the front-end tests need playwright")

from . import browser

pytestmark = pytest.mark.skipif(
    browser.find_chromium() is None, reason="the front-end tests need Chromium"
)


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with browser.open_page() as opened:
        yield opened


@pytest.mark.parametrize("mode", ("canvas", "nodes 2.0"))
@pytest.mark.parametrize("name", [n for n in runnable_names() if not n.endswith(".app")])
def test_workflow_opens_runs_and_keeps_its_nodes_apart(
    host: Host, page: Any, name: str, mode: str
) -> None:
    browser.open_template(page, host, name, vue=mode == "nodes 2.0")
    assert browser.trouble(page) == {} and browser.overlaps(page) == []
    entry = browser.press_run(page, host)
    assert entry["status"]["status_str"] == "success"
    assert browser.trouble(page) == {} and browser.overlaps(page) == []
    assert len(Result(entry["outputs"], host.output).pictures()) == 1 or mode == "nodes 2.0"
    if mode == "canvas":
        shown = page.evaluate(
            "app.graph.nodes.filter(n => n.type === 'SaveImage').map(n => n.imgs?.[0]?.naturalWidth ?? 0)"
        )
        assert min(shown) > 100


def test_the_sd15_workflow_opens_and_says_what_is_missing(host: Host, page: Any) -> None:
    browser.open_template(page, host, named("Draw a person for Stable Diffusion 1.5"))
    assert "missing" not in browser.trouble(page)
    page.get_by_test_id("queue-button").first.click()
    page.wait_for_function("() => app.lastNodeErrors")
    errors = page.evaluate("() => JSON.stringify(app.lastNodeErrors)")
    assert "There is no space 'w2w.safetensors'" in errors
    assert "https://huggingface.co/snap-research/weights2weights" in errors


def test_a_broken_workflow_would_be_noticed(host: Host, page: Any) -> None:
    browser.open_template(page, host, workflow_names()[0])
    # On a busy machine the front end may still be filling in the template's values: hold on to ours.
    page.evaluate(
        """() => {
            const node = app.graph.nodes.find(n => n.type === 'W2WPP_LoadSpace');
            const spoil = () => { node.widgets[0].value = 'no-such-space.safetensors'; };
            spoil();
            setInterval(spoil, 50);
        }"""
    )
    page.get_by_test_id("queue-button").first.click()
    page.wait_for_function("() => app.lastNodeErrors")
    found = browser.trouble(page)
    assert found["red"] == ["W2WPP_LoadSpace"] and len(found["refused"]) == 1


def test_a_node_that_is_not_installed_would_be_noticed(host: Host, page: Any) -> None:
    browser.open_template(page, host, workflow_names()[0])
    page.evaluate("() => { app.graph.nodes[0].type = 'W2WPP_NoSuchNode'; }")
    assert browser.trouble(page)["missing"] == ["W2WPP_NoSuchNode"]
