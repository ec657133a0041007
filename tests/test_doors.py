"""NaN and infinities are refused at the door: where a number comes in, not where it has done its harm."""

import dataclasses
import math

import pytest
import torch

from w2wpp import (
    Adam,
    AffineBasis,
    Cma,
    ConfigError,
    Multistart,
    Pivotal,
    W2WError,
    edit,
    interpolate,
    save_lora,
)
from w2wpp.inversion.recipes import FROM_AVERAGE
from w2wpp.training.config import VaeTraining

BAD = [math.nan, math.inf, -math.inf]

DOORS = {
    "Adam.lr": lambda x: Adam(lr=x),
    "Adam.betas": lambda x: Adam(betas=(0.9, x)),
    "Cma.sigma": lambda x: Cma(sigma=x),
    "Multistart.spread": lambda x: Multistart(spread=x),
    "Multistart.scales": lambda x: Multistart(scales=(1.0, x)),
    "Pivotal.lr": lambda x: Pivotal(lr=x),
    "Pivotal.decay": lambda x: Pivotal(decay=x),
    "Recipe.rate": lambda x: FROM_AVERAGE["adam"].adjusted(rate=x),
    "Recipe.prior": lambda x: FROM_AVERAGE["adam"].adjusted(prior=x),
    "Recipe.pivotal": lambda x: FROM_AVERAGE["adam"].adjusted(pivotal=x),
    "AffineBasis.scale": lambda x: AffineBasis(3, scale=x),
    "AffineBasis.shift": lambda x: AffineBasis(3, shift=x),
    **{
        f"VaeTraining.{f.name}": lambda x, n=f.name: VaeTraining(**{n: x})
        for f in dataclasses.fields(VaeTraining)
        if isinstance(f.default, float)
    },
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("door", DOORS)
def test_settings(door, bad):
    with pytest.raises(ConfigError):
        DOORS[door](bad)


@pytest.mark.parametrize("bad", BAD)
def test_numbers_that_meet_a_space(make_space, layout, tmp_path, bad):
    space = make_space("pca")
    g = torch.Generator().manual_seed(0)
    person = space.sample(1, generator=g)
    attempts = [
        lambda: space.sample(1, generator=g, truncation=bad),
        lambda: edit(person, space, {"smile": bad}),
        lambda: interpolate(person, person, positions=[0.0, bad]),
        lambda: dataclasses.replace(layout, alpha=bad),
        lambda: dataclasses.replace(space, prior_std=torch.full((12,), bad)),
        lambda: dataclasses.replace(space, directions={"smile": torch.full((12,), bad)}),
        lambda: dataclasses.replace(person, z=torch.full((1, 12), bad)),
        lambda: dataclasses.replace(person, residual=torch.full((1, 12), bad)),
        lambda: save_lora(
            {n: (a + bad, b) for n, (a, b) in layout.unpack(torch.zeros(layout.size)).items()},
            tmp_path / "x",
            alpha=4.0,
        ),
    ]
    for attempt in attempts:
        with pytest.raises(W2WError):
            attempt()
    assert list(tmp_path.iterdir()) == []


def test_a_person_too_far_out_gives_no_weights(make_space):
    space = make_space("pca")
    person = space.sample(1, generator=torch.Generator().manual_seed(0))
    far = dataclasses.replace(person, z=person.z * 1e38)
    with pytest.raises(ConfigError, match="lies too far from the people"):
        far.vectors(space)
