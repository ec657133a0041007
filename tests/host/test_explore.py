"""W2W++ Explore through the server: the library's people, painted once, kept, and marked into attributes."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

import w2wpp
from w2wpp.attributes import load_attributes
from w2wpp.family import Family, people_of, write_family

from .graphs import AvatarGraph, Link
from .server import REPO, Host, PromptFailed

SPACE = "avatars.safetensors"


class ExploreGraph(AvatarGraph):
    def explore(self, *, space: str = SPACE, guided: bool = False, **widgets: object) -> str:
        opened = self.add("W2WPP_LoadSpace", space=space)
        values = {
            "seed": 7, "count": 4, "truncation": 1.0, "radius": 0.4, "chosen": 0, "attribute": "", "family": "",
            "run_on_click": True, "steps": 8, "cfg": 2.0, "picture_seed": 0, "size": 0, **widgets,
        }  # fmt: skip
        if guided:
            values["negative"] = [self.loader, 2]
        return self.add(
            "W2WPP_Explore", space=[opened, 0], model=self.model, positive=[self.loader, 1],
            vae=[self.loader, 3], **values,
        )  # fmt: skip


def shown(result, node: str) -> dict:
    return result.outputs[node]["w2wpp"][0]


def face(host: Host, key: str) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(host.get(f"/w2wpp/faces/{key}"))).convert("RGB"))


def library(family: Family, **settings) -> w2wpp.Identity:
    space = w2wpp.load_space(REPO / "models" / SPACE)
    return people_of(family, space, **settings)


def saved(host: Host, graph: AvatarGraph, identity: Link, name: str) -> w2wpp.Identity:
    node = graph.add("W2WPP_SaveIdentity", identity=identity, filename_prefix=name)
    label = host.run(graph.nodes).outputs[node]["text"][0].removeprefix("saved ")
    return w2wpp.load_identity(host.output / "w2wpp" / label.removesuffix(" [output]"))


def test_the_chosen_and_all_candidates_are_the_librarys_people(host: Host) -> None:
    family = Family().bred("like", [2], radius=0.3, keep=[2]).bred("cross", [0, 2], radius=0.3)
    graph = ExploreGraph()
    node = graph.explore(seed=41, count=5, chosen=3, family=write_family(family))
    people = library(family, seed=41).grid(5)
    torch.testing.assert_close(saved(host, graph, [node, 1], "all").z, people.z, rtol=0, atol=0)
    torch.testing.assert_close(
        saved(host, graph, [node, 0], "one").z, people.z[3:4], rtol=0, atol=0
    )


def test_a_face_is_the_picture_that_the_graph_paints_of_that_person(host: Host) -> None:
    graph = ExploreGraph()
    node = graph.explore(seed=5, count=6, chosen=4, guided=True, steps=12)
    painted = graph.paint([graph.apply([node, 0]), 0], seed=0)
    result = host.run(graph.nodes)
    (picture,) = result.pictures(painted)
    faces = [face(host, key).astype(int) for key in shown(result, node)["keys"]]
    away = [np.abs(f - picture.astype(int)).mean() for f in faces]
    assert away[4] < 1.0 and min(a for i, a in enumerate(away) if i != 4) > 3.0


def test_faces_are_painted_once_and_found_again_by_another_server_start(host: Host) -> None:
    graph = ExploreGraph()
    node = graph.explore(seed=99, count=16)
    host.forget()  # what the host does when it loads a model must not be taken for another model
    started = time.monotonic()
    keys = shown(host.run(graph.nodes), node)["keys"]
    first = time.monotonic() - started
    host.forget()
    graph.nodes[node]["inputs"]["chosen"] = 3  # the node itself has to run again
    started = time.monotonic()
    again = host.run(graph.nodes)
    second = time.monotonic() - started
    assert shown(again, node)["keys"] == keys and len(set(keys)) == 16
    print(f"16 avatars: {first:.1f} s, from the cache {second:.1f} s")
    assert second < first
    stored = host.base / "user" / "__w2wpp" / "faces"
    assert {f"{key}.png" for key in keys} <= {p.name for p in stored.iterdir()}


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"steps": 5}, {"picture_seed": 3}, {"truncation": 0.5}, {"guided": True}],
    ids=str,
)
def test_whatever_changes_a_face_changes_its_name(host: Host, change: dict) -> None:
    keys = []
    for settings in ({}, change):
        graph = ExploreGraph()
        node = graph.explore(**{"count": 2, **settings})
        keys += shown(host.run(graph.nodes), node)["keys"]
    assert len(set(keys)) == 4


def test_a_model_with_another_lora_in_it_has_other_faces(host: Host) -> None:
    keys = []
    for strength in (0.0, 1.0, 0.5):
        graph = ExploreGraph()
        if strength:
            graph.model = [graph.apply(graph.sample(3), strength), 0]
        node = graph.explore(count=1)
        keys += shown(host.run(graph.nodes), node)["keys"]
    assert len(set(keys)) == 3


def test_the_grid_is_one_picture_with_every_face(host: Host) -> None:
    graph = ExploreGraph()
    node = graph.explore(count=5)
    sheet = graph.add("SaveImage", images=[node, 2], filename_prefix="grid")
    result = host.run(graph.nodes)
    (picture,) = result.pictures(sheet)
    assert picture.shape[1] > 3 * 128 and picture.std() > 20
    first = np.asarray(
        Image.fromarray(face(host, shown(result, node)["keys"][0])).resize((128, 128), 3)
    )
    assert np.abs(picture[4:132, 4:132].astype(int) - first)[8:-8, 8:-8].mean() < 2


def test_marks_become_an_attribute_beside_the_space(host: Host) -> None:
    family = Family(plus=((0, 1), (0, 2), (0, 5)), minus=((0, 0), (0, 3)), id="test")
    graph = ExploreGraph()
    node = graph.explore(count=8, attribute="zestful", family=write_family(family))
    told = shown(host.run(graph.nodes), node)["told"]
    assert "'zestful': 3 faces against 2" in told and "models/w2wpp/" in told
    (path,) = (host.base / "models" / "w2wpp").glob("avatars-*.attributes.safetensors")
    kept = load_attributes(path)
    people = library(family, seed=7).grid(8).z
    difference = people[[1, 2, 5]].mean(0) - people[[0, 3]].mean(0)
    direction = kept.directions["zestful"]
    assert float(torch.cosine_similarity(direction, difference, dim=0)) > 0.8
    own = w2wpp.load_space(REPO / "models" / SPACE).directions
    readings = torch.linalg.pinv(torch.stack(list(own.values()), 1).double()).T
    assert float((direction.double() @ readings).abs().max()) < 1e-4
    # Listed at once, used by name, and made again without another write.
    info = host.json("/object_info/W2WPP_EditIdentity")["W2WPP_EditIdentity"]
    assert "zestful" in json.dumps(info["input"]["required"]["attribute"])
    edited = graph.add("W2WPP_EditIdentity", identity=[node, 0], attribute="zestful", strength=2.0)
    found = saved(host, graph, [edited, 0], "edited")
    torch.testing.assert_close(found.z, people[:1] + 2 * direction)
    stamp = path.stat().st_mtime_ns
    graph.nodes[node]["inputs"]["chosen"] = 1
    assert "is an attribute" in shown(host.run(graph.nodes), node)["told"]
    assert path.stat().st_mtime_ns == stamp
    # Another exploration doesn't overwrite it.
    graph.nodes[node]["inputs"]["family"] = write_family(
        Family(plus=((0, 1),), minus=((0, 0),), id="other")
    )
    with pytest.raises(PromptFailed, match="'zestful' already"):
        host.run(graph.nodes)
    # Nor does anyone a shipped one.
    graph.nodes[node]["inputs"]["attribute"] = "beard"
    with pytest.raises(PromptFailed, match="'beard' already"):
        host.run(graph.nodes)


def test_cancel_in_the_middle_leaves_what_is_painted(host: Host) -> None:
    graph = ExploreGraph()
    node = graph.explore(seed=1234, count=16, steps=60)
    stored = host.base / "user" / "__w2wpp" / "faces"
    before = {p.name for p in stored.glob("*.png")} if stored.exists() else set()
    number = host.post("/prompt", {"prompt": graph.nodes})["prompt_id"]
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if stored.exists() and len({p.name for p in stored.glob("*.png")} - before) >= 4:
            break
        time.sleep(0.05)
    host.post("/interrupt", {})
    entry = host.wait(number)
    assert entry["status"]["status_str"] == "error"  # as the host calls it
    painted = {p.name for p in stored.glob("*.png")} - before
    assert 4 <= len(painted) < 16
    times = {name: (stored / name).stat().st_ino for name in painted}
    keys = shown(host.run(graph.nodes), node)["keys"]
    assert painted <= {f"{key}.png" for key in keys}
    assert times == {name: (stored / name).stat().st_ino for name in painted}  # not painted again


@pytest.mark.parametrize(
    "widgets, said",
    [
        ({"chosen": 4}, "no face number 4.*from 0 to 3"),
        ({"family": "{"}, "family tree is not JSON"),
        ({"family": '{"v":9}'}, "version 9"),
        ({"attribute": "x" * 99}, "name of an attribute"),
    ],
)
def test_what_can_not_be_is_refused_in_words(host: Host, widgets: dict, said: str) -> None:
    graph = ExploreGraph()
    graph.explore(**widgets)
    with pytest.raises(PromptFailed, match=said):
        host.run(graph.nodes)


@pytest.mark.parametrize("key", ["0" * 32, "..%2f..%2fsecret", "a.png", "A" * 32])
def test_only_faces_are_served(host: Host, key: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        host.get(f"/w2wpp/faces/{key}")
    assert refused.value.code == 404
