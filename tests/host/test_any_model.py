"""Inversion on models of every family: reduced ones with random weights, in the host and in the running server."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from w2wpp import load_identity, load_space

from .graphs import Graph, Link
from .server import REPO, Host, PromptFailed, find_host
from .weights import INVERTED, RANKS, random_loras

TAUGHT = {"SDXL": 160, "SD3": 200, "Flux": 250, "QwenImage": 200}  # steps


@pytest.fixture(scope="module")
def found(host: Host) -> dict[str, dict]:
    folder, python = find_host()
    command = [python, REPO / "tests/host/denoising.py", folder, REPO]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", INVERTED)
@pytest.mark.parametrize("spelled", ["whole", "parts"])
def test_predictions_and_gradients_are_the_hosts(found: dict, family: str, spelled: str) -> None:
    facts = found[f"{family}, {spelled}"]
    split = spelled == "parts" and family in ("SD3", "Flux")
    assert (facts["modules"] > len(INVERTED[family])) == split
    assert facts["off"] < 5e-6 and facts.get("rows_off", 0.0) < 5e-6
    plain, checkpointed = map(np.array, facts["gradients"])
    np.testing.assert_allclose(checkpointed, plain, rtol=1e-4, atol=1e-6)
    scale = np.abs(plain).max()
    np.testing.assert_allclose(plain, facts["differences"], rtol=0.02, atol=0.02 * scale)


class FamilyGraph(Graph):
    """A space of four LoRAs for a reduced model, a picture of 64 pixels, and an inversion."""

    def __init__(self, host: Host, family: str) -> None:
        super().__init__()
        folder = f"inverted-{family}"
        write_collection(host.base / "models" / "loras" / folder, family)
        made = self.add(
            "W2WPP_SpaceFromLoras",
            folder=folder,
            files="",
            save_as="",
            rank=16,
            components=0,
            cut=0,
        )
        self.space: Link = [made, 0]
        portrait = self.add("W2WPP_ExamplePortrait")
        scaled = self.add(
            "ImageScale",
            image=[portrait, 0],
            upscale_method="area",
            width=64,
            height=64,
            crop="disabled",
        )
        self.image: Link = [scaled, 0]
        self.family = family

    def model(self, family: str = "") -> str:
        return self.add("Probe_ReducedModel", family=family or self.family)

    def invert(self, base: str, **changed: Any) -> str:
        inputs = {
            "model": [base, 0], "vae": [base, 2], "positive": [base, 1], "space": self.space, "image": self.image,
            "method": "adam", "steps": 2, "seed": 0, "batch": 8, "learning_rate": 0.1, "prior": 0.0, "pivotal": 0.0,
            "resolution": 64, "preview_every": 0, "framing": "off", **changed,
        }  # fmt: skip
        inverted = self.add("W2WPP_InvertFromImage", **inputs)
        self.shown = self.add("PreviewAny", source=[inverted, 2])
        return inverted


def write_collection(folder: Path, family: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for rank, lora in zip(RANKS, random_loras(family)):
        tensors = {}
        for weight, (down, up) in lora.items():
            key = f"diffusion_model.{weight}"
            tensors[f"{key}.lora_down.weight"] = down
            tensors[f"{key}.lora_up.weight"] = up
            tensors[f"{key}.alpha"] = torch.tensor(1.0)
        save_file(tensors, folder / f"{rank}.safetensors")


@pytest.mark.parametrize("family", TAUGHT)
def test_a_planted_lora_is_found_again(host: Host, family: str) -> None:
    graph = FamilyGraph(host, family)
    drawn = graph.add("W2WPP_SampleIdentity", space=graph.space, seed=3, truncation=1.0, count=1)
    planted = graph.add(
        "Probe_PlantedModel",
        family=family,
        image=graph.image,
        identity=[drawn, 0],
        steps=TAUGHT[family],
    )
    inverted = graph.invert(planted, steps=60)
    for name, node in (("planted", drawn), ("found", inverted)):
        graph.add("W2WPP_SaveIdentity", identity=[node, 0], filename_prefix=f"{name}-{family}")
    result = host.run(graph.nodes)
    assert "gradients without checkpointing on cpu" in result.outputs[graph.shown]["text"][0]
    z, z_found = (
        load_identity(next((host.output / "w2wpp").glob(f"{name}-{family}_*"))).z[0]
        for name in ("planted", "found")
    )
    assert (z_found - z).norm() < 0.35 * z.norm(), (z, z_found)


@pytest.mark.parametrize("family", ["SDXL", "Flux"])
def test_a_model_says_which_modules_of_a_collection_matter(host: Host, family: str) -> None:
    folder = f"weighed-{family}"
    write_collection(host.base / "models" / "loras" / folder, family)
    graph = FamilyGraph(host, family)
    base = graph.model()
    latent = graph.add("VAEEncode", pixels=graph.image, vae=[base, 2])
    common = {"folder": folder, "files": "", "rank": 16, "components": 0, "cut": 0}
    asked = {"model": [base, 0], "positive": [base, 1], "latent": [latent, 0]}
    made = graph.add("W2WPP_SpaceFromLoras", save_as=f"weighed-{family}", **common, **asked)
    report = host.run(graph.nodes).outputs[made]["text"][0]
    assert "modules count by how much their change changes what the model gives" in report
    space = load_space(host.base / "models" / "w2wpp" / f"weighed-{family}.safetensors")
    weights = space.basis.module_weights
    assert (weights > 0.09).all() and weights.max() > 1.2 * weights.min()

    without = graph.add("W2WPP_SpaceFromLoras", save_as="", **common, model=[base, 0])
    graph.add("PreviewAny", source=[without, 2])
    with pytest.raises(PromptFailed, match="connect positive and latent as well"):
        host.run(graph.nodes)


def state(host: Host, graph: FamilyGraph, base: str) -> dict:
    graph.add("Probe_State", model=[base, 0], file="any-model.json")
    host.run(graph.nodes)
    return json.loads((host.output / "any-model.json").read_text())


@pytest.mark.parametrize("method", ["adam", "cma"])
def test_cancel_leaves_nothing_behind(host: Host, method: str) -> None:
    before, after = (FamilyGraph(host, "Flux") for _ in range(2))
    fresh = state(host, before, before.model())
    graph = FamilyGraph(host, "Flux")
    graph.invert(graph.model(), steps=10000, method=method, learning_rate=0.0)
    kept = set((host.output / "w2wpp").glob("unfinished*"))
    number = host.post("/prompt", {"prompt": graph.nodes})["prompt_id"]
    for _ in range(600):
        time.sleep(0.2)
        if host.json("/queue")["queue_running"] and graph_is_running(host, number):
            break
    time.sleep(3)
    host.post("/interrupt", {})
    entry = host.wait(number)
    assert "execution_interrupted" in [kind for kind, _ in entry["status"]["messages"]]
    assert len(set((host.output / "w2wpp").glob("unfinished*")) - kept) == 1
    assert state(host, after, after.model()) == fresh
    assert not fresh["in_training"] and fresh["hooks"] == fresh["forwards"] == 0


def graph_is_running(host: Host, number: str) -> bool:
    return any(entry[1] == number for entry in host.json("/queue")["queue_running"])


def regional(graph: FamilyGraph, base: str) -> dict:
    area = graph.add(
        "ConditioningSetArea", conditioning=[base, 1], width=64, height=64, x=0, y=0, strength=1.0
    )
    return {"positive": [area, 0]}


def combined(graph: FamilyGraph, base: str) -> dict:
    both = graph.add("ConditioningCombine", conditioning_1=[base, 1], conditioning_2=[base, 1])
    return {"positive": [both, 0]}


def late(graph: FamilyGraph, base: str) -> dict:
    both = graph.add("ConditioningSetTimestepRange", conditioning=[base, 1], start=0.2, end=1.0)
    return {"positive": [both, 0]}


def foreign(graph: FamilyGraph, base: str) -> dict:
    return {"model": [graph.model("SDXL"), 0]}


def other_vae(graph: FamilyGraph, base: str) -> dict:
    return {"vae": [graph.model("SDXL"), 2]}


@pytest.mark.parametrize(
    "change, reason",
    [
        (regional, "whole picture.*carries a region"),
        (combined, "takes one prompt. Got 2"),
        (late, "carries a start"),
        (foreign, "(?s)needs a model of the family.*SDXL.*missing"),
        (other_vae, "latents of 16 channels; this VAE gives"),
    ],
)
def test_what_does_not_fit_is_refused_and_named(host: Host, change: Any, reason: str) -> None:
    graph = FamilyGraph(host, "Flux")
    base = graph.model()
    graph.invert(base, **change(graph, base))
    with pytest.raises(PromptFailed, match=reason):
        host.run(graph.nodes)


def test_guidance_and_sizes_reach_the_model(host: Host) -> None:
    """Flux is told the guidance, SDXL the size of the picture: other numbers, another loss."""
    losses = []
    for guidance in (1.0, 8.0):
        graph = FamilyGraph(host, "Flux")
        base = graph.model()
        guided = graph.add("FluxGuidance", conditioning=[base, 1], guidance=guidance)
        graph.invert(base, positive=[guided, 0])
        losses.append(host.run(graph.nodes).outputs[graph.shown]["text"][0].split("Loss ")[1])
    assert losses[0].split()[0] != losses[1].split()[0]
