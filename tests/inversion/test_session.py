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
from w2wpp.inversion.reread import reread
from w2wpp.inversion.shown import shown
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


def taught(space, strengths=(3.0, 1.0, 0.1)):
    """The same space with a start network that says what shows: three directions, ever weaker."""
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(5))).Q
    start = StartNetwork(D, rank=D, size=8, width=8, features=8).eval()
    weights = {**space.start.state_dict(), "spread": torch.diag(torch.tensor(strengths)) @ turn}
    start.load_state_dict(weights)
    return replace(space, start=start), turn


def test_what_shows_is_told_by_its_energy(space):
    """Strengths of 3, 1 and .1 have energies of 1, .11 and .0011 of the strongest."""
    here, turn = taught(space)
    for energy, count in ((1.0, 1), (0.2, 1), (0.1, 2), (0.001, 3)):
        found = shown(here.start, energy)
        assert len(found) == count
        torch.testing.assert_close((found @ turn.T).abs(), torch.eye(D)[:count], atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="no start network that says what does"):
        shown(space.start, 0.5)
    for energy in (0.0, 1.5):
        with pytest.raises(ConfigError, match="share of the strongest"):
            shown(here.start, energy)


def test_steps_go_only_along_what_shows(space):
    here, turn = taught(space)
    made = session(here, PICTURES, replace(SHORT, shown=0.1), faces=PICTURES)
    moved = made.solve(denoise, SCHEDULE).identity.z - made.start.z
    assert float((moved @ turn[2]).abs()) < 1e-5 < float((moved @ turn[:2].T).abs().min())
    everywhere = session(here, PICTURES, SHORT, faces=PICTURES).solve(denoise, SCHEDULE)
    assert float(((everywhere.identity.z - made.start.z) @ turn[2]).abs()) > 1e-3
    assert "along what shows by 0.1" in str(made.recipe)
    with pytest.raises(ConfigError, match="no start network that says"):
        session(space, PICTURES, replace(SHORT, shown=0.1), faces=PICTURES).solve(denoise, SCHEDULE)


def test_reading_again_makes_up_for_a_reader_that_answers_too_close_to_the_average():
    """It reads half of what there is, and a bit to one side: by hand, z + .8 ((.5 * truth + .3) - (.5 z + .3))."""
    truth = torch.tensor([[1.0, -2.0]])

    def read(z):
        return 0.5 * z + 0.3

    wanted = read(truth)
    once = reread(wanted, wanted, read, times=1, rate=0.8)
    torch.testing.assert_close(once, wanted + 0.4 * (truth - wanted))
    often = reread(wanted, wanted, read, times=60, rate=0.8)
    torch.testing.assert_close(often, truth, atol=1e-4, rtol=0)
    assert torch.equal(reread(wanted, wanted, read, times=0, rate=0.8), wanted)
    for times, rate in ((-1, 0.5), (1, 0.0), (1, 1.5)):
        with pytest.raises(ConfigError, match="read again"):
            reread(wanted, wanted, read, times=times, rate=rate)
        with pytest.raises(ConfigError):
            replace(SHORT, rereads=times, reread_rate=rate)


def test_a_recipe_that_reads_again_paints_each_person_in_their_own_latent(space):
    recipe = replace(SHORT, steps=0, rereads=2, reread_rate=0.5)
    made = session(space, PICTURES[:, None], recipe, faces=PICTURES[:, None])
    seen = []

    def decode(latents):
        seen.append(latents)
        return latents

    for rows in (None, 1):
        seen.clear()
        found = made.solve(denoise, SCHEDULE, decode=decode, micro_batch=rows)
        assert [t.shape for t in seen] == [(2, 3, 8, 8)] * 2
        assert found.evaluations == 2 * 8
        z = made.start.z
        for painted in seen:
            z = z + 0.5 * (made.start.z - space.start_from(painted).z)
        torch.testing.assert_close(found.identity.z, z)
        assert found.identity.provenance["rereads"] == 2
    # The painting is that of the person's own vector, from the same noise for both.
    first = made.painted(denoise, SCHEDULE, made.start.z[:1])
    torch.testing.assert_close(made.painted(denoise, SCHEDULE, made.start.z)[:1], first)
    longer = replace(made, recipe=replace(recipe, steps=3))
    assert longer.solve(denoise, SCHEDULE, decode=decode).evaluations == 2 * 8 + 3 * 2
    for odd in (replace(made, faces=None), replace(made, start=None)):
        with pytest.raises(ConfigError, match="reads the start again"):
            odd.solve(denoise, SCHEDULE, decode=decode)
    with pytest.raises(ConfigError, match="reads the start again"):
        made.solve(denoise, SCHEDULE)
