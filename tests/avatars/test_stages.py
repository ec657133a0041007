"""The stages of the miniature world: each has what it reads, all write to one place, and shipping wipes nothing."""

import importlib
import json
from dataclasses import replace

import pytest
import torch

from w2wpp import load_space, save_space
from w2wpp.avatars import places
from w2wpp.avatars.places import MODELS, ROOT, World
from w2wpp.avatars.stages import (
    BASE,
    DATASET,
    EMBEDDER,
    NAMED,
    SHIPPED,
    STAGES,
    commands_for,
    require_inputs,
)
from w2wpp.errors import ConfigError
from w2wpp.files.container import open_container, write_container
from w2wpp.spacefile import save_start
from w2wpp.start_network import StartNetwork

pytest.importorskip("diffusers")
from w2wpp.avatars.build.spaces import DEFAULT, LINEAR, ship
from w2wpp.avatars.world.renderer import TRAITS


def test_each_stage_reads_what_earlier_ones_wrote():
    written: set[str] = set()
    for stage in STAGES:
        assert set(stage.inputs) <= written, stage.name
        assert set(stage.ships) & set(SHIPPED) <= {*SHIPPED} and stage.outputs
        written |= {*stage.outputs, *stage.ships}
    assert {f"models/{p.name}" for p in MODELS.glob("*.safetensors")} <= written


def test_a_missing_input_names_the_command_that_makes_it(tmp_path):
    world = World(models=tmp_path / "m", work=tmp_path / "w", results=tmp_path / "r")
    with pytest.raises(ConfigError, match=r"avatar-base.*which is not there.*'w2wpp avatars base'"):
        require_inputs(NAMED["loras"], world)
    with pytest.raises(ConfigError, match="loras-common"):
        require_inputs(NAMED["spaces"], world, given=[BASE, EMBEDDER])
    require_inputs(NAMED["spaces"], world, given=[BASE, EMBEDDER, DATASET])
    assert commands_for(SHIPPED[0]) == (
        "avatars spaces --ship",
        "avatars start --ship",
        "avatars teach --keep-answers --ship",
        "avatars directions --ship",
    )


def test_figures_go_to_one_place_whatever_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    again = importlib.reload(places)
    assert again.World().at("results/world.json") == ROOT / "benchmarks/results/world.json"
    assert again.World().at("work/base.ckpt") == ROOT / "world/base.ckpt"


@pytest.fixture
def shelf(make_space, dataset, tmp_path):
    """(data set with the traits, folder of trained spaces, folder that ships)."""
    labels = torch.randn(len(dataset), len(TRAITS), generator=torch.Generator().manual_seed(0))
    people = replace(dataset, labels=labels, label_names=TRAITS)
    trained, models = tmp_path / "spaces", tmp_path / "models"
    trained.mkdir()
    models.mkdir()

    for name, codec in ((DEFAULT.name, "vae-skip"), (LINEAR.name, "pca")):
        space = make_space(codec).with_(directions={}, provenance={})
        save_space(space, trained / f"{name}.safetensors")
    return people, trained, models


def test_shipping_spaces_keeps_their_directions_and_start_networks(shelf):
    people, trained, models = shelf
    ship(people, trained, models)
    path = models / "avatars.safetensors"
    space = load_space(path)
    smile, start = torch.ones(space.latent_size), StartNetwork(space.latent_size, size=8, width=8)
    about = {**space.provenance, "directions": {"method": "test"}}
    save_space(space.with_(directions={"smile": smile}, provenance=about), path)
    save_start(path, path, start.eval())
    assert list(load_space(path).directions) == ["smile"]  # a start network wipes no directions
    ship(people, trained, models)
    again = load_space(path)
    assert torch.equal(again.directions["smile"], smile)
    assert again.provenance["directions"] == {"method": "test"} and again.start is not None
    assert again.name == "Avatars" and again.fingerprint == space.fingerprint


def test_other_latents_are_shipped_only_if_told_to(shelf):
    people, trained, models = shelf
    ship(people, trained, models)
    path = models / "avatars.safetensors"
    space = load_space(path)
    save_space(space.with_(directions={"smile": torch.ones(space.latent_size)}), path)
    before = {p.name: p.read_bytes() for p in models.iterdir()}
    moved = torch.full((space.latent_size,), 0.5)
    other = replace(load_space(trained / f"{DEFAULT.name}.safetensors"), prior_mean=moved)
    save_space(other, trained / f"{DEFAULT.name}.safetensors")
    with pytest.raises(ConfigError, match=r"holds directions for other latents.*--replace"):
        ship(people, trained, models)
    assert {p.name: p.read_bytes() for p in models.iterdir()} == before
    ship(people, trained, models, replace=True)
    assert load_space(path).directions == {} and load_space(path).fingerprint == other.fingerprint


def test_a_start_network_is_added_and_everything_else_stays(make_space, tmp_path):
    space, path = make_space("vae-skip"), tmp_path / "space.safetensors"
    save_space(space, path)
    file = open_container(path)
    tensors = {**{n: file.read(n) for n in file.entries}, "later.weights": torch.ones(3)}
    config = {**json.loads(file.metadata["config"]), "later": {"kind": "net"}}
    write_container(path, tensors, format="w2wpp.space", config=config)
    for width in (8, 16):  # the second replaces the first, whose weights have other names or sizes
        network = StartNetwork(space.latent_size, size=8, width=width).eval()
        save_start(path, path, network)
    after = open_container(path, "w2wpp.space")
    assert all(torch.equal(after.read(n), t) for n, t in tensors.items())
    assert after.config["later"] == {"kind": "net"}
    loaded = load_space(path)
    assert loaded.start.config == network.config and loaded.fingerprint == space.fingerprint
    with pytest.raises(ConfigError, match="start network 3"):
        save_start(path, path, StartNetwork(3, size=8, width=8))
