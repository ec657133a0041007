"""What the pack puts beside its nodes in the host's own front end: tiles of the gallery, Apps, and blueprints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from .conftest import named, read_workflow, workflow_names
from .server import PACK_FOLDER, REPO, Host, Result

pytest.importorskip("playwright", reason="the front-end tests need playwright")

from . import browser

pytestmark = pytest.mark.skipif(
    browser.find_chromium() is None, reason="the front-end tests need Chromium"
)
BLUEPRINTS = sorted(path.stem for path in (REPO / "subgraphs").glob("*.json"))
APPS = [name for name in workflow_names() if name.endswith(".app")]


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with browser.open_page() as opened:
        opened.set_default_timeout(240_000)
        yield opened


def test_the_first_tile_of_the_pack_opens_from_the_gallery(host: Host, page: Any) -> None:
    browser.open_front_end(page, host)
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    first = workflow_names()[0]
    search = page.get_by_role("dialog").get_by_role("textbox").first
    search.fill(first)
    page.get_by_role("dialog").get_by_text(first, exact=True).first.click()
    page.wait_for_function("app.graph.nodes.some(n => n.type === 'W2WPP_Explore')")
    assert browser.trouble(page) == {}


@pytest.mark.parametrize("name", APPS)
def test_an_app_opens_without_a_graph_and_gives_its_picture(
    host: Host, page: Any, name: str
) -> None:
    workflow = read_workflow(name)
    browser.open_template(page, host, name)
    panel = {"W2WPP_Explore": ".w2wpp-explore", "W2WPP_Sliders": ".w2wpp-sliders"}
    types = {node["type"] for node in workflow["nodes"]}
    (selector,) = [css for kind, css in panel.items() if kind in types]
    page.locator(selector).first.wait_for()
    (saver,) = workflow["extra"]["linearData"]["outputs"]
    entry = browser.press_run(page, host)
    assert entry["status"]["status_str"] == "success"
    assert len(Result(entry["outputs"], host.output).pictures(str(saver))) == 1


def test_blueprints_are_served_with_the_packs_name(host: Host) -> None:
    if not BLUEPRINTS:
        pytest.fail("no blueprints")
    served = [
        entry
        for entry in host.json("/global_subgraphs").values()
        if entry["info"]["node_pack"] == f"custom_nodes.{PACK_FOLDER}"
    ]
    assert sorted(entry["name"] for entry in served) == BLUEPRINTS


# Whether the node library lists a blueprint.
LISTED = """name => document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s.get('nodeDef')
    .nodeDefs.some(d => d.name.startsWith('SubgraphBlueprint.') && d.display_name === name)"""


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_a_blueprint_is_found_in_the_library_and_paints(host: Host, page: Any, name: str) -> None:
    browser.open_front_end(page, host)
    page.wait_for_function(LISTED, arg=name, timeout=120_000)
    blueprint = json.loads((REPO / "subgraphs" / f"{name}.json").read_text(encoding="utf-8"))
    graph = read_workflow(named("Draw a person who does not exist"))
    page.evaluate("w => app.loadGraphData(w)", {**graph, "definitions": blueprint["definitions"]})
    page.evaluate(
        """kind => {
            const of = type => app.graph.nodes.find(n => n.type === type);
            const [avatar, apply, sampler] = ['W2WPP_LoadAvatarModel', 'W2WPP_ApplyDecodedLora', 'KSampler'].map(of);
            const node = LiteGraph.createNode(kind);
            app.graph.add(node);
            const into = (source, output, name) => {
                const slot = node.inputs.findIndex(i => i.name === name);
                if (slot >= 0) source.connect(source.outputs.findIndex(o => o.name === output), node, slot);
            };
            for (const name of ['model', 'vae', 'positive']) into(avatar, name, name);
            if (node.inputs.some(i => i.name === 'image')) {
                const portrait = LiteGraph.createNode('W2WPP_ExamplePortrait');
                app.graph.add(portrait);
                for (const name of ['image', 'mask']) into(portrait, name, name);
            }
            app.graph.remove(apply);
            app.graph.remove(of('W2WPP_SampleIdentity'));
            node.connect(node.outputs.findIndex(o => o.name === 'model'), sampler, 0);
        }""",
        blueprint["definitions"]["subgraphs"][0]["id"],
    )
    page.wait_for_timeout(500)
    assert browser.trouble(page) == {}
    entry = browser.press_run(page, host)
    assert entry["status"]["status_str"] == "success"
    (picture,) = Result(entry["outputs"], host.output).pictures()
    assert picture.std() > 10
