"""Recipes: every method has one for both kinds of start, and every number of it can be set."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from w2wpp.errors import ConfigError
from w2wpp.inversion import FROM_AVERAGE, FROM_GUESS, Pivotal, recipe_for
from w2wpp.inversion.adam import Adam
from w2wpp.inversion.cma import Cma
from w2wpp.inversion.multistart import Multistart

KINDS = {"adam": Adam, "cma": Cma, "multistart": Multistart}


def rate(optimiser):
    return {Adam: "lr", Cma: "sigma"}.get(type(optimiser)) or "adam"


@pytest.mark.parametrize("recipes", [FROM_GUESS, FROM_AVERAGE], ids=["guess", "average"])
@pytest.mark.parametrize("method", KINDS)
def test_every_number_can_be_set(recipes, method):
    before = recipes[method]
    after = before.adjusted(steps=20, draws=3, rate=0.7, prior=0.5, pivotal=0.25)
    assert isinstance(before.optimiser, KINDS[method])
    found = getattr(after.optimiser, rate(after.optimiser))
    assert (found.lr if method == "multistart" else found) == 0.7
    assert after.steps == 20 and after.pivotal.steps == 5
    assert after.objective == {**before.objective, "draws": 3, "prior": 0.5}
    assert "20 steps of 3" in str(after) and "pivotal 0.25" in str(after)


@pytest.mark.parametrize("recipes", [FROM_GUESS, FROM_AVERAGE], ids=["guess", "average"])
@pytest.mark.parametrize("method", KINDS)
def test_nothing_set_changes_nothing(recipes, method):
    assert recipes[method].adjusted() == recipes[method]


def test_a_pivotal_stage_keeps_its_share_when_steps_change():
    recipe = replace(FROM_AVERAGE["adam"], steps=50, pivotal=Pivotal(steps=10))
    assert recipe.adjusted(steps=100).pivotal == Pivotal(steps=20)
    assert recipe.adjusted(pivotal=0.0).pivotal is None


def test_scripts_that_say_hybrid_get_multistart():
    space = SimpleNamespace(start=None)
    assert recipe_for(space, "hybrid") == recipe_for(space, "multistart")


def test_the_numbers_that_were_chosen():
    """On people whom no figure scores, so a change wants measuring: benchmarks/results/inversion-tried.md."""
    near = {name: recipe.optimiser for name, recipe in FROM_GUESS.items()}
    assert near == {
        "adam": Adam(lr=0.02, betas=(0.9, 0.99), anneal=True),
        "cma": Cma(population=8, sigma=0.05, mode="separable"),
        "multistart": Multistart(starts=4, scales=(0.9, 1.1), spread=0.05, adam=Adam(lr=0.02)),
    }
    far = {name: recipe.optimiser for name, recipe in FROM_AVERAGE.items()}
    assert far == {
        "adam": Adam(lr=0.1),
        "cma": Cma(population=8, sigma=0.3),
        "multistart": Multistart(starts=4, scales=(0.7, 1.3), spread=0.5, adam=Adam(lr=0.1)),
    }
    assert [r.steps for r in (*FROM_GUESS.values(), *FROM_AVERAGE.values())] == [
        12,
        8,
        12,
        400,
        80,
        100,
    ]
    assert [r.objective["draws"] for r in (*FROM_GUESS.values(), *FROM_AVERAGE.values())] == [
        8,
        4,
        8,
        1,
        8,
        4,
    ]


def test_a_missing_package_is_named_with_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(ConfigError, match="pip install cma"):
        Cma().begin(torch.zeros(1, 4), steps=1, seed=0)
