"""A session: which recipe and which start an inversion gets, and that it is the same inversion from everywhere."""

from dataclasses import replace

import pytest
import torch

from w2wpp import Basis, Identity, Layout, Module, Space, build_codec
from w2wpp.errors import ConfigError
from w2wpp.inversion import (
    FROM_AVERAGE,
    FROM_GUESS,
    METHODS,
    Adam,
    NoiseSchedule,
    Objective,
    Recipe,
    invert,
    recipe_for,
    session,
)
from w2wpp.start_network import StartNetwork

D = 3
LAYOUT = Layout("toy", "toy", (Module("a", 3, 2),), rank=1, alpha=1.0)
SCHEDULE = NoiseSchedule(torch.linspace(0.99, 0.01, 20), "eps")
PICTURES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SHORT = Recipe(Adam(lr=0.1), 3, {"draws": 2, "fresh": True}, keep="last")


def denoise(noisy, timestep, vectors):
    v = vectors.repeat_interleave(len(noisy) // len(vectors), 0)
    return noisy * v[:, :1, None, None].tanh() + v[:, 1:4, None, None]


@pytest.fixture(scope="module")
def space():
    generator = torch.Generator().manual_seed(1)
    v = torch.linalg.qr(torch.randn(LAYOUT.size, D, generator=generator)).Q.T
    basis = Basis(torch.zeros(LAYOUT.size), torch.ones(LAYOUT.size), v, torch.ones(D))
    codec = build_codec({"name": "pca", "coefficient_size": D, "latent_size": D})
    torch.manual_seed(2)
    start = StartNetwork(D, size=8, width=8, features=8).eval()
    return Space(LAYOUT, basis, codec, torch.zeros(D), torch.ones(D), start=start)


@pytest.mark.parametrize("method", METHODS)
def test_a_guessed_start_gets_the_short_recipe_and_any_other_the_long_one(space, method):
    somebody = Identity(torch.ones(1, D), space.fingerprint)
    assert recipe_for(space, method) == FROM_GUESS[method]
    assert recipe_for(space, method, somebody) == FROM_AVERAGE[method]
    assert recipe_for(replace(space, start=None), method) == FROM_AVERAGE[method]
    with pytest.raises(ConfigError, match="adam, cma, multistart"):
        recipe_for(space, "newton")


def test_several_pictures_of_one_person_make_one_guess(space):
    both = session(space, PICTURES, "adam", faces=PICTURES)
    each = space.start_from(PICTURES).z
    torch.testing.assert_close(both.start.z, each.mean(0, keepdim=True))
    people = session(space, PICTURES[:, None], "adam", faces=PICTURES[:, None])
    torch.testing.assert_close(people.start.z, each)


def test_starts_where_it_is_told(space):
    somebody = Identity(torch.ones(1, D), space.fingerprint)
    assert session(space, PICTURES, "adam", faces=PICTURES, start=somebody).start is somebody
    mean = replace(SHORT, start="mean")
    assert session(space, PICTURES, mean, faces=PICTURES).start is None
    assert session(space, PICTURES, SHORT).start is None  # nothing to guess from
    with pytest.raises(ConfigError, match="'amortised' or 'mean'"):
        session(space, PICTURES, replace(SHORT, start="nowhere"), faces=PICTURES)


def test_without_a_picture_to_guess_from_the_way_is_long(space):
    blind, seeing = (
        session(space, PICTURES, "adam"),
        session(space, PICTURES, "adam", faces=PICTURES),
    )
    assert blind.start is None and blind.recipe == recipe_for(replace(space, start=None), "adam")
    assert seeing.start is not None and seeing.recipe == recipe_for(space, "adam")
    assert blind.recipe.steps > seeing.recipe.steps


def test_is_invert_with_the_recipes_numbers(space):
    made = session(space, PICTURES, SHORT, faces=PICTURES, seed=4, prior=0.3, steps=5)
    found = made.solve(denoise, SCHEDULE)
    objective = Objective(
        space, PICTURES, denoise, SCHEDULE, seed=4, draws=2, fresh=True, prior=0.3
    )
    expected = invert(objective, Adam(lr=0.1), steps=5, start=made.start, keep="last", seed=4)
    assert torch.equal(found.identity.z, expected.identity.z) and len(found.history) == 5
    assert found.identity.provenance["start"]["made_by"] == "start network"


def test_no_steps_are_the_start_itself(space):
    made = session(space, PICTURES, replace(SHORT, steps=0), faces=PICTURES)
    found = made.solve(denoise, SCHEDULE)
    assert found.identity is made.start and found.evaluations == 0
    with pytest.raises(ConfigError, match="at least one step"):
        session(space, PICTURES, replace(SHORT, steps=0)).solve(denoise, SCHEDULE)


@pytest.mark.parametrize("method", METHODS)
def test_recipes_know_what_their_optimiser_needs(method):
    for recipe in (FROM_GUESS[method], FROM_AVERAGE[method]):
        assert recipe.gradients == (method != "cma")
        assert recipe.adjusted(pivotal=0.5).gradients
        assert recipe.fresh == recipe.objective.get("fresh", False)
        assert recipe.draws == recipe.objective["draws"]


def test_the_gain_is_what_a_person_spares_of_the_average_ones_loss(space):
    made = session(space, PICTURES[:, None], SHORT)
    found = made.solve(denoise, SCHEDULE).identity
    gains = made.gain(denoise, SCHEDULE, found)
    assert len(gains) == 2
    average = Identity(torch.zeros(1, D), space.fingerprint)
    assert made.gain(denoise, SCHEDULE, average) == pytest.approx([0, 0])
    better = made.gain(
        denoise,
        SCHEDULE,
        session(space, PICTURES[:, None], replace(SHORT, steps=60))
        .solve(denoise, SCHEDULE)
        .identity,
    )
    assert all(b > g for b, g in zip(better, gains)) and min(better) > 0


def test_masked_pixels_are_hidden_from_a_start_that_was_taught_so(space):
    mask = torch.ones(1, 1, 4, 4)
    mask[..., :2] = 0
    painted_over = PICTURES.clone()
    painted_over[..., :3] = 9.0  # under the mask, but for where its edge is blended
    taught = StartNetwork(D, size=8, width=8, features=8, hides=True).eval()
    taught.load_state_dict(space.start.state_dict())
    for start, alike in ((taught, True), (space.start, False)):
        here = replace(space, start=start)
        one, other = (
            session(here, PICTURES, SHORT, faces=faces, mask=mask).start.z
            for faces in (PICTURES, painted_over)
        )
        assert torch.allclose(one, other, atol=1e-5) == alike
