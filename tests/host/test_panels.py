"""The panels of Sliders and Load Identity in the host's own front end: looked at, moved, clicked, reloaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .conftest import named, read_workflow
from .graphs import AvatarGraph
from .server import Host

pytest.importorskip("playwright", reason="the front-end tests need playwright")

from . import browser

pytestmark = pytest.mark.skipif(
    browser.find_chromium() is None, reason="the front-end tests need Chromium"
)
MODES = ("canvas", "nodes 2.0")


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with browser.open_page() as opened:
        opened.set_default_timeout(240_000)
        yield opened


def load(page: Any, workflow: dict) -> None:
    page.evaluate("w => app.loadGraphData(w)", workflow)
    page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(800)


def value(page: Any, node: str, widget: str) -> Any:
    return page.evaluate(
        """([type, name]) => app.graph.nodes.find(n => n.type === type)
            .widgets.find(w => w.name === name).value""",
        [node, widget],
    )


def move(page: Any, number: int, to: float) -> None:
    """Drag a slider, as far as the page can tell."""
    page.locator(".w2wpp-slider input[type=range]").nth(number).evaluate(
        "(e, to) => { e.value = to; e.dispatchEvent(new Event('input')); }", to
    )


@pytest.mark.parametrize("mode", MODES)
def test_sliders_are_moved_typed_into_and_reset(host: Host, page: Any, mode: str) -> None:
    browser.open_template(page, host, named("Change a face with sliders"), vue=mode == "nodes 2.0")
    rows = page.locator(".w2wpp-slider")
    rows.first.wait_for()
    assert rows.count() == 8 and page.locator(".w2wpp-sliders").count() == 1
    assert page.locator(".w2wpp-strip").is_hidden()
    for name in ("attribute_1", "strength_1"):  # the panel stands for the plain widgets
        assert page.get_by_label(name, exact=True).count() == 0
    chosen = page.eval_on_selector_all(".w2wpp-slider select", "all => all.map(s => s.value)")
    assert chosen[0] == value(page, "W2WPP_Sliders", "attribute_1") and len(set(chosen)) == 8

    move(page, 2, -1.5)
    assert value(page, "W2WPP_Sliders", "strength_3") == -1.5
    typed = page.locator(".w2wpp-slider input[type=number]").nth(2)
    assert typed.input_value() == "-1.5"
    typed.fill("0.7")
    typed.press("Enter")
    assert value(page, "W2WPP_Sliders", "strength_3") == 0.7

    select = page.locator(".w2wpp-slider select").nth(2)
    select.select_option("none")
    assert value(page, "W2WPP_Sliders", "attribute_3") == "none"
    assert page.locator(".w2wpp-slider input[type=range]").nth(2).is_disabled()
    select.select_option(chosen[2])
    page.locator(".w2wpp-slider button").first.click()
    assert value(page, "W2WPP_Sliders", "strength_1") == 0
    page.locator(".w2wpp-sliders .w2wpp-bar button").click()
    assert {value(page, "W2WPP_Sliders", f"strength_{i}") for i in range(1, 9)} == {0}


@pytest.mark.parametrize("mode", MODES)
def test_a_run_marks_where_people_are_and_shows_before_and_after(
    host: Host, page: Any, mode: str
) -> None:
    browser.open_template(page, host, named("Change a face with sliders"), vue=mode == "nodes 2.0")
    page.locator(".w2wpp-slider").first.wait_for()
    move(page, 3, 1.0 if mode == "canvas" else 1.5)  # another run in each mode
    assert browser.press_run(page, host)["status"]["status_str"] == "success"
    painted = "[...document.querySelectorAll('.w2wpp-strip img')].every(i => i.complete && i.naturalWidth)"
    page.wait_for_function(painted)
    before, after = page.eval_on_selector_all(".w2wpp-strip img", "all => all.map(i => i.src)")
    assert before != after
    spans = page.eval_on_selector_all(
        ".w2wpp-people", "all => all.map(e => [e.hidden, e.style.left, e.style.right])"
    )
    assert not any(hidden for hidden, *_ in spans)
    # 95 % of people lie within 4 of the 12 standard deviations that a slider spans.
    shares = [100 - float(left[:-1]) - float(right[:-1]) for _, left, right in spans]
    assert all(10 < share < 34 for share in shares) and max(shares) > 33

    saved = page.evaluate("app.graph.serialize()")
    load(page, saved)  # what the run said survives a reload
    page.wait_for_function(painted)
    assert [before, after] == page.eval_on_selector_all(
        ".w2wpp-strip img", "all => all.map(i => i.src)"
    )


def save_somebody(host: Host, name: str, seed: int, *, with_picture: bool) -> str:
    """Save a person; returns the name that Load Identity lists."""
    graph = AvatarGraph()
    who = graph.sample(seed)
    extra = {}
    if with_picture:
        saved = graph.nodes[graph.paint([graph.apply(who), 0], prefix="panel")]
        extra["image"] = saved["inputs"]["images"]
    node = graph.add("W2WPP_SaveIdentity", identity=who, filename_prefix=name, **extra)
    return host.run(graph.nodes).outputs[node]["text"][0].removeprefix("saved ")


@pytest.mark.parametrize("mode", MODES)
def test_saved_people_are_chosen_by_their_pictures(host: Host, page: Any, mode: str) -> None:
    folder = "panel-" + mode.replace(" ", "")
    painted = save_somebody(host, f"{folder}/anna", 61, with_picture=True)
    bare = save_somebody(host, f"{folder}/bob", 62, with_picture=False)
    workflow = read_workflow(named("Draw a person who does not exist"))
    browser.open_front_end(page, host, vue=mode == "nodes 2.0")
    load(page, workflow)
    page.evaluate(
        """() => {
            const node = LiteGraph.createNode('W2WPP_LoadIdentity');
            const sample = app.graph.nodes.find(n => n.type === 'W2WPP_SampleIdentity');
            const apply = app.graph.nodes.find(n => n.type === 'W2WPP_ApplyDecodedLora');
            app.graph.add(node);
            node.pos = [...sample.pos];
            app.graph.nodes.find(n => n.type === 'W2WPP_LoadSpace').connect(0, node, 0);
            node.connect(0, apply, apply.inputs.findIndex(i => i.name === 'identity'));
            app.graph.remove(sample);
        }"""
    )
    button = page.locator(f".w2wpp-saved button[title='{painted}']")
    button.wait_for()
    button.scroll_into_view_if_needed()  # pictures out of sight are not fetched
    page.wait_for_function(
        "file => document.querySelector(`.w2wpp-saved button[title='${file}'] img`)?.naturalWidth > 0",
        arg=painted,
    )
    unseen = page.locator(f".w2wpp-saved button[title='{bare}']")
    unseen.scroll_into_view_if_needed()
    unseen.locator(".w2wpp-empty").wait_for()
    button.click()
    assert value(page, "W2WPP_LoadIdentity", "file") == painted
    assert button.get_attribute("aria-checked") == "true"
    button.press("ArrowRight")
    second = value(page, "W2WPP_LoadIdentity", "file")
    assert second != painted
    assert page.locator(".w2wpp-saved button[aria-checked=true]").get_attribute("title") == second
    button.click()
    entry = browser.press_run(page, host)
    assert entry["status"]["status_str"] == "success" and browser.trouble(page) == {}

    later = save_somebody(host, f"{folder}/carla", 63, with_picture=False)
    assert page.locator(f".w2wpp-saved button[title='{later}']").count() == 0
    page.evaluate("app.refreshComboInNodes()")  # what R does
    page.locator(f".w2wpp-saved button[title='{later}']").wait_for()
    assert value(page, "W2WPP_LoadIdentity", "file") == painted
