"""The directions that ship change what they are named after, and the measurement of it can tell."""

import json
from pathlib import Path

import pytest
import torch

from w2wpp import edit, load_space
from w2wpp.avatars.measure.directions import Faces, measure_directions, passes, people, table
from w2wpp.avatars.world.renderer import TRAITS
from w2wpp.avatars.world.studio import open_studio
from w2wpp.training.dataset import load_dataset
from w2wpp.training.directions import Directions

MODELS = Path(__file__).resolve().parents[3] / "models"


@pytest.fixture(scope="module")
def studio():
    return open_studio(
        MODELS / "avatar-base.safetensors", MODELS / "avatar-embedder.safetensors", pictures=1
    )


def test_edits_of_the_shipped_space_change_what_they_say(studio):
    space = load_space(MODELS / "avatars.safetensors")
    linear = load_space(MODELS / "avatars-pca.safetensors")
    assert {"hair_length", "skin_tone"} <= set(linear.directions) <= set(space.directions)
    crowd = space.sample(4, generator=torch.Generator().manual_seed(3))
    changes = {"beard": 2.0, "hair_lightness": -2.0}  # several at once
    before, after = (
        studio.photograph(x.vectors(space), space.layout).traits.mean((0, 1))
        for x in (crowd, edit(crowd, space, changes))
    )
    moved = dict(zip(TRAITS, (after - before).tolist()))
    assert moved["beard"] > 0.6 and moved["hair_lightness"] < -0.6
    others = [abs(v) for trait, v in moved.items() if trait not in changes]
    assert max(others) < min(moved["beard"], -moved["hair_lightness"])


def test_the_measurement_tells_a_direction_from_its_opposite_and_from_none(studio):
    space = load_space(MODELS / "avatars.safetensors")
    dataset = load_dataset(MODELS / "avatars-heldout.safetensors")
    crowd = people(space, dataset, 4, seed=1)
    assert len(crowd) == 4 and crowd.space_fingerprint == space.fingerprint
    names = ("beard", "glasses")
    vectors = torch.stack([space.directions["beard"], -space.directions["glasses"]])
    found = Directions(names, vectors, torch.ones(2), torch.ones(2))
    rows = measure_directions(space, found, found, studio, crowd)
    assert rows["beard"]["debiased"]["change"]["low"] > 0.2
    assert rows["glasses"]["debiased"]["change"]["high"] < 0 and not rows["glasses"]["passes"]
    assert rows["beard"]["debiased_minus_naive"]["leak_share"]["mean"] == 0
    kept = rows["beard"]["debiased"]["id_without"]["mean"]
    assert kept > rows["beard"]["same_person_id_without"]["mean"]
    json.dumps(rows, allow_nan=False)
    assert len(table(rows).splitlines()) == 4


def test_what_ships_has_to_grow_at_every_step():
    row = {"steps": [{"low": 0.1}, {"low": 0.2}], "leak_share": {"high": 0.3}}
    assert passes(row)
    assert not passes({**row, "steps": [{"low": 0.1}, {"low": -0.01}]})
    assert not passes({**row, "leak_share": {"high": 0.6}})


def test_slopes_are_per_unit_of_strength():
    traits = torch.stack([torch.full((2, 20), float(s)) for s in (-2, 0, 2)])
    assert torch.equal(Faces((-2.0, 0.0, 2.0), traits).slopes(), torch.ones(2, 20))
