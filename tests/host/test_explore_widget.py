"""The grid of W2W++ Explore in the host's own front end: looked at, clicked, bred, reloaded, shared."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from w2wpp.family import Family, read_family

from .conftest import named, read_workflow
from .server import PROBE, REPO, SECONDS, Host, lay_out, serving

pytest.importorskip("playwright", reason="the front-end tests need playwright")

from . import browser

pytestmark = pytest.mark.skipif(
    browser.find_chromium() is None, reason="the front-end tests need Chromium"
)
MODES = ("canvas", "nodes 2.0", "app")


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with browser.open_page() as opened:
        opened.set_default_timeout(240_000)
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
    browser.open_front_end(page, host, vue=mode == "nodes 2.0")
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


def run(page: Any) -> None:
    page.evaluate("app.queuePrompt(0)")


def wait_for_faces(page: Any, count: int = 16) -> list[str]:
    """Until as many are painted and shown; returns their names."""
    page.wait_for_function(
        """count => [...document.querySelectorAll('.w2wpp-face img')]
            .filter(i => i.complete && i.naturalWidth).length === count
            && /chosen|:/.test(document.querySelector('.w2wpp-status').textContent)
            && !/^Painting/.test(document.querySelector('.w2wpp-status').textContent)""",
        arg=count,
    )
    return page.eval_on_selector_all(".w2wpp-face img", "all => all.map(i => i.src.slice(-32))")


def face(page: Any, number: int) -> Any:
    return page.locator(".w2wpp-face").nth(number)


def press(page: Any, text: str) -> None:
    page.locator(".w2wpp-explore button", has_text=text).first.click()


def newest(host: Host) -> Path | None:
    return max((host.output / "w2wpp").glob("explored*.png"), default=None)


def pictures_saved(host: Host) -> int:
    return len(list((host.output / "w2wpp").glob("explored*.png")))


def wait_for_picture(page: Any, host: Host, before: Path | None) -> None:
    deadline = time.monotonic() + SECONDS
    while newest(host) == before:
        assert time.monotonic() < deadline, "no picture was saved"
        page.wait_for_timeout(50)


def workflow(*, picture: int = 0) -> dict:
    """The example, with a picture of its own, or the host would show the one that it has."""
    opened = read_workflow(named("Choose a face by looking"))
    (sampler,) = [n for n in opened["nodes"] if n["type"] == "KSampler"]
    sampler["widgets_values"][0] = picture
    return opened


@pytest.mark.parametrize("mode", MODES)
def test_faces_are_looked_at_clicked_and_bred(host: Host, page: Any, mode: str) -> None:
    open_workflow(page, host, workflow(picture=1 + MODES.index(mode)), mode)
    before = newest(host)
    run(page)
    first = wait_for_faces(page)
    wait_for_picture(page, host, before)
    assert len(set(first)) == 16 and value(page, "family") == ""

    before = newest(host)
    face(page, 5).click()  # chooses, and its picture follows
    wait_for_picture(page, host, before)
    assert value(page, "chosen") == 5
    assert page.locator("[role=gridcell][aria-selected=true] .w2wpp-number").inner_text() == "5"

    press(page, "More like this")
    page.wait_for_function(CHANGED, arg=first)
    children = wait_for_faces(page)
    assert children[5] == first[5]
    assert not set(children[:5] + children[6:]) & set(first)
    assert json.loads(value(page, "family"))["g"][1]["of"] == [5]

    press(page, "Back")
    assert wait_for_faces(page) == first and value(page, "chosen") == 5


CHANGED = """before => { const all = [...document.querySelectorAll('.w2wpp-face img')].map(i => i.src.slice(-32));
    return all.length === before.length && all.some((name, i) => name !== before[i]); }"""


def test_two_are_crossed_kept_and_marked_into_an_attribute(host: Host, page: Any) -> None:
    open_workflow(page, host, workflow(), "canvas")
    run(page)
    first = wait_for_faces(page)
    press(page, "Cross with")
    face(page, 9).click()
    page.wait_for_function(CHANGED, arg=first)
    children = wait_for_faces(page)
    assert (children[0], children[9]) == (first[0], first[9])

    page.locator(".w2wpp-cell").nth(3).hover()
    page.locator(".w2wpp-cell").nth(3).locator("button", has_text="\u2665").click()
    press(page, "New faces")
    page.wait_for_function(CHANGED, arg=children)
    strangers = wait_for_faces(page)
    assert [i for i in range(16) if strangers[i] == children[i]] == [3]

    for cell, sign in ((0, "+"), (1, "+"), (2, "\u2212")):
        page.locator(".w2wpp-cell").nth(cell).hover()
        page.locator(".w2wpp-cell").nth(cell).locator("button", has_text=sign).click()
    page.locator(".w2wpp-explore input").fill("charm")
    press(page, "Make slider")
    page.wait_for_function(
        "() => document.querySelector('.w2wpp-status').textContent.includes(\"'charm'\")"
    )
    assert list((host.base / "models" / "w2wpp").glob("avatars-*.attributes.safetensors"))
    page.wait_for_function(  # the lists of the other nodes follow by themselves
        """() => {
            const list = LiteGraph.createNode('W2WPP_EditIdentity').widgets[0].options.values;
            return (typeof list === 'function' ? list() : list).includes('charm');
        }"""
    )


def test_the_grid_is_reached_and_told_without_a_mouse(host: Host, page: Any) -> None:
    open_workflow(page, host, workflow(), "canvas")
    page.evaluate(
        """() => {
            const node = app.graph.nodes.find(n => n.type === 'W2WPP_Explore');
            node.widgets.find(w => w.name === 'run_on_click').value = false;
        }"""
    )
    run(page)
    first = wait_for_faces(page)
    in_order = "all => all.filter(b => b.tabIndex === 0).map(b => b.getAttribute('aria-label'))"
    assert page.eval_on_selector_all(".w2wpp-face", in_order) == ["Face 0, chosen"]
    face(page, 0).focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowLeft", "ArrowLeft", "End", "ArrowUp"):
        page.keyboard.press(key)
    # 0, 1, 5, 9, 8, 7, 15, 11
    page.keyboard.press("Enter")
    assert value(page, "chosen") == 11
    page.keyboard.press("+")
    page.keyboard.press("l")
    assert page.eval_on_selector_all(".w2wpp-face", in_order) == [
        "Face 11, chosen, kept, marked plus"
    ]
    page.keyboard.press("m")
    page.wait_for_function(CHANGED, arg=first)
    assert wait_for_faces(page)[11] == first[11]
    page.keyboard.press("Backspace")
    assert wait_for_faces(page) == first
    assert len(page.evaluate("app.graph.nodes.map(n => n.id)")) == 9  # no key reached the canvas
    roles = "all => all.map(e => e.getAttribute('role'))"
    assert (
        page.eval_on_selector_all(".w2wpp-faces, .w2wpp-row, .w2wpp-cell", roles).count("row") == 4
    )
    assert all(
        page.eval_on_selector_all(
            ".w2wpp button", "all => all.map(b => (b.textContent + (b.ariaLabel ?? '')).trim())"
        )
    )


def test_a_reload_and_another_server_show_the_same_faces(
    host: Host, page: Any, tmp_path: Path
) -> None:
    open_workflow(page, host, workflow(), "canvas")
    run(page)
    first = wait_for_faces(page)
    face(page, 2).click()
    press(page, "More like this")
    page.wait_for_function(CHANGED, arg=first)
    children = wait_for_faces(page)
    saved = page.evaluate("app.graph.serialize()")
    family = value(page, "family")

    open_workflow(page, host, saved, "canvas")  # no run: the faces come from the pack's route
    assert wait_for_faces(page) == children
    assert (value(page, "family"), value(page, "chosen")) == (family, 2)

    lay_out(tmp_path, PROBE)
    with serving(tmp_path) as elsewhere:
        open_workflow(page, elsewhere, saved, "nodes 2.0")
        page.wait_for_function(
            "() => document.querySelector('.w2wpp-status').textContent.includes('press Run')"
        )
        run(page)
        assert wait_for_faces(page) == children


def test_a_click_paints_one_picture_and_says_what_it_took(host: Host, page: Any) -> None:
    open_workflow(page, host, workflow(picture=50), "canvas")
    before = newest(host)
    run(page)
    wait_for_faces(page)
    wait_for_picture(page, host, before)
    clicks, paintings = [], []
    for number in (4, 7, 10, 13, 6):
        before, saved, started = newest(host), pictures_saved(host), time.monotonic()
        # As the browser has it: the driver's own click waits for the page to hold still first.
        face(page, number).evaluate("button => button.click()")
        wait_for_picture(page, host, before)
        clicks.append(time.monotonic() - started)
        page.wait_for_timeout(500)
        assert pictures_saved(host) == saved + 1
        # Somebody else's picture without the node in between: another LoRA in the model, the same sampling.
        before, started = newest(host), time.monotonic()
        page.evaluate(
            """strength => {
                const node = app.graph.nodes.find(n => n.type === 'W2WPP_ApplyDecodedLora');
                node.widgets[0].value = strength;
                app.queuePrompt(0);
            }""",
            1 - number / 100,
        )
        wait_for_picture(page, host, before)
        paintings.append(time.monotonic() - started)
        page.wait_for_timeout(500)
    ratio = statistics.median(c / p for c, p in zip(clicks, paintings))
    print(
        f"click to picture {min(clicks):.2f} s, painting {min(paintings):.2f} s, ratio {ratio:.2f}"
    )


def test_the_family_tree_in_the_browser_is_the_librarys(page: Any) -> None:
    source = (REPO / "web" / "js" / "family.js").read_text(encoding="utf-8")
    steps = [["like", [5], 0.4, [5]], ["cross", [0, 5], 0.25, [0, 5]], ["new", [], 0.4, []]]
    page.goto("about:blank")
    text = page.evaluate(
        """async ([source, steps]) => {
            const js = await import(URL.createObjectURL(new Blob([source], {type: 'text/javascript'})));
            let family = js.readFamily('');
            for (const step of steps) family = js.bred(js.toggleLock(family, 7), ...step);
            family = js.toggleMark(js.toggleMark(family, 7, 'plus'), 3, 'minus');
            return js.writeFamily(family);
        }""",
        [source, steps],
    )
    family = Family()
    for i, (kind, of, radius, keep) in enumerate(steps):
        here = family.generations[family.at]
        lock = (7,) if i % 2 == 0 else ()
        generations = list(family.generations)
        generations[family.at] = replace(here, lock=lock, radius=here.radius if i else 0.4)
        family = replace(family, generations=tuple(generations))
        family = family.bred(kind, of, radius=radius, keep=keep)
    family = replace(family, plus=(family.origin((3, 7)),), minus=((3, 3),))
    assert read_family(text) == family


@pytest.mark.parametrize("name", sorted(p.name for p in (REPO / "web" / "js").glob("*.js")))
def test_the_scripts_parse_and_use_nothing_that_is_frowned_upon(page: Any, name: str) -> None:
    source = (REPO / "web" / "js" / name).read_text(encoding="utf-8")
    page.goto("about:blank")
    error = page.evaluate(
        """async source => {
            const alone = source.replace(/^import .*$/gm, '');
            try {
                await import(URL.createObjectURL(new Blob([alone], {type: 'text/javascript'})));
            } catch (e) {
                return e instanceof SyntaxError ? e.message : '';
            }
            return '';
        }""",
        source,
    )
    assert error == ""
    for word in (
        "innerHTML",
        "eval(",
        "console.",
        "debugger",
        "var ",
        "http:",
        "https:",
        " == ",
        "document.write",
    ):
        assert word not in source
