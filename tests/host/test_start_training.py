"""Train Start Network in the running server: it paints, learns, saves, and an interrupted run goes on."""

from __future__ import annotations

import time

import pytest
from PIL import Image

from w2wpp import load_space

from .graphs import AvatarGraph
from .server import REPO, Host, PromptFailed


class TeachingGraph(AvatarGraph):
    def teach(self, **changed) -> str:
        space = self.add("W2WPP_LoadSpace", space="avatars-pca.safetensors")
        inputs = {
            "model": self.model, "vae": [self.loader, 3], "scene_1": [self.loader, 1], "space": [space, 0],
            "people": 240, "save_as": "taught", "seed": 3, "paint_steps": 1, "steps": 3, "look_size": 32, **changed,
        }  # fmt: skip
        return self.add("W2WPP_TrainStartNetwork", **inputs)


def test_a_space_is_taught_and_used(host: Host) -> None:
    graph = TeachingGraph()
    taught = graph.teach()
    portrait = graph.add("W2WPP_ExamplePortrait")
    inverted = graph.add(
        "W2WPP_InvertFromImage", model=graph.model, vae=[graph.loader, 3], positive=[graph.loader, 1],
        space=[taught, 0], image=[portrait, 0], method="adam", steps=1, seed=0, batch=2, learning_rate=0.02,
        prior=-1.0, pivotal=0.0, resolution=0, preview_every=0,
    )  # fmt: skip
    shown = graph.add("PreviewAny", source=[inverted, 2])
    result = host.run(graph.nodes)
    (report,) = result.outputs[taught]["text"]
    assert "Learned from 480 paintings" in report and "saved as taught.safetensors" in report
    assert "Confidence " in result.outputs[shown]["text"][0]
    space = load_space(host.base / "models" / "w2wpp" / "taught.safetensors")
    before = load_space(REPO / "models" / "avatars-pca.safetensors")
    assert space.fingerprint == before.fingerprint and space.start.locates
    assert space.frame is not None and before.frame is None


def test_a_start_that_sees_with_a_vision_model_wants_the_same_one_again(host: Host) -> None:
    def invert(graph: TeachingGraph, space, **connected) -> str:
        portrait = graph.add("W2WPP_ExamplePortrait")
        inverted = graph.add(
            "W2WPP_InvertFromImage", model=graph.model, vae=[graph.loader, 3], positive=[graph.loader, 1],
            space=space, image=[portrait, 0], method="adam", steps=1, seed=0, batch=2, learning_rate=0.02,
            prior=-1.0, pivotal=0.0, resolution=0, preview_every=0, **connected,
        )  # fmt: skip
        return graph.add("PreviewAny", source=[inverted, 2])

    graph = TeachingGraph()
    vision = [graph.add("Probe_ClipVision", seed=1, width=32), 0]
    taught = graph.teach(save_as="sighted", clip_vision=vision)
    shown = invert(graph, [taught, 0], clip_vision=vision)
    result = host.run(graph.nodes)
    (report,) = result.outputs[taught]["text"]
    assert "seen by clip_vision_model, 3 layers of 32" in report
    assert "Confidence " in result.outputs[shown]["text"][0]
    start = load_space(host.base / "models" / "w2wpp" / "sighted.safetensors").start
    assert start.sight.features == 24 + 32 and start.locates
    for given, said in (
        ({}, "3 layers of 32, and none is connected"),
        ({"seed": 2, "width": 32}, "features of test patterns differ"),
        ({"seed": 1, "width": 48}, "it gives 72 features, not 56"),
    ):
        graph = TeachingGraph()
        space = graph.add("W2WPP_LoadSpace", space="sighted.safetensors")
        other = {"clip_vision": [graph.add("Probe_ClipVision", **given), 0]} if given else {}
        invert(graph, [space, 0], **other)
        with pytest.raises(PromptFailed, match=said):
            host.run(graph.nodes)
    graph = TeachingGraph()
    space = graph.add("W2WPP_LoadSpace", space="avatars-pca.safetensors")
    needless = [graph.add("Probe_ClipVision", seed=1, width=32), 0]
    shown = invert(graph, [space, 0], clip_vision=needless)
    assert "'clip_vision' was not needed" in host.run(graph.nodes).outputs[shown]["text"][0]


def test_an_interrupted_run_keeps_its_paintings_and_goes_on(host: Host) -> None:
    graph = TeachingGraph()
    graph.teach(people=400, save_as="", seed=4)
    number = host.post("/prompt", {"prompt": graph.nodes})["prompt_id"]
    before = set(paintings(host))
    while len(set(paintings(host)) - before) < 4:
        time.sleep(0.2)
    host.post("/interrupt", {})
    entry = host.wait(number)
    assert "execution_interrupted" in [kind for kind, _ in entry["status"]["messages"]]
    painted = sorted(set(paintings(host)) - before)
    stamps = [path.stat().st_mtime_ns for path in painted]
    assert Image.open(painted[0]).size == (32, 32)
    graph = TeachingGraph()
    taught = graph.teach(people=240, save_as="", seed=4)
    (report,) = host.run(graph.nodes).outputs[taught]["text"]
    assert "Learned from 480 paintings" in report
    assert [path.stat().st_mtime_ns for path in painted] == stamps


def test_cancelled_while_it_learns_all_paintings_are_kept(host: Host) -> None:
    graph = TeachingGraph()
    graph.teach(
        save_as="", seed=3, steps=1_000_000
    )  # whose paintings may be there from other tests
    began, deadline = time.time(), time.monotonic() + 300
    number = host.post("/prompt", {"prompt": graph.nodes})["prompt_id"]
    # The table is written when the last painting is there; then it learns.
    while not (tables := newest_tables(host)) or tables[0].stat().st_mtime < began:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(4)
    host.post("/interrupt", {})
    entry = host.wait(number)
    assert "execution_interrupted" in [kind for kind, _ in entry["status"]["messages"]]
    stamps = {path: path.stat().st_mtime_ns for path in paintings_of(tables[0])}
    assert len(stamps) == 480
    graph = TeachingGraph()
    taught = graph.teach(save_as="", seed=3, steps=3)
    (report,) = host.run(graph.nodes).outputs[taught]["text"]
    assert "Learned from 480 paintings" in report
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_too_few_people_are_refused_before_anything_is_painted(host: Host) -> None:
    before = paintings(host)
    graph = TeachingGraph()
    graph.teach(people=100, seed=5)
    with pytest.raises(PromptFailed, match=r"240 people at least\. Got 100"):
        host.run(graph.nodes)
    assert paintings(host) == before


def paintings(host: Host):
    return list((host.output / "w2wpp").glob("paintings_*/*.png"))


def newest_tables(host: Host):
    """Tables of painted people, the one written last first."""
    found = (host.output / "w2wpp").glob("paintings_*/painted.csv")
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def paintings_of(table):
    return sorted(table.parent.glob("*.png"))
