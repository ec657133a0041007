"""The ground truth: pictures depend on every trait and every word, and on nothing else."""

import pytest
import torch

from w2wpp.avatars.world.renderer import (
    TRAITS,
    Nuisance,
    render,
    sample_identities,
    sample_nuisance,
)


def _scene(count: int, **changes: int) -> Nuisance:
    """``count`` times the same plain photograph."""
    word = {"background": 0, "smile": 1, "light": 1, **changes}
    words = {name: torch.full((count,), value) for name, value in word.items()}
    return Nuisance(**words, pose=torch.zeros(count, 4), jitter=torch.zeros(count, 3))


def test_same_seed_same_pictures():
    first, second = (
        render(sample_identities(4, generator=g), sample_nuisance(4, generator=g))
        for g in (torch.Generator().manual_seed(3), torch.Generator().manual_seed(3))
    )
    assert torch.equal(first, second)
    assert first.shape == (4, 3, 32, 32) and first.abs().max() <= 1


def test_pictures_do_not_depend_on_the_chunk():
    g = torch.Generator().manual_seed(5)
    identity, nuisance = sample_identities(7, generator=g), sample_nuisance(7, generator=g)
    whole = render(identity, nuisance)
    torch.testing.assert_close(whole, render(identity, nuisance, chunk=2))


@pytest.mark.parametrize("trait", TRAITS)
def test_every_trait_shows(trait):
    identity = torch.zeros(2, len(TRAITS))
    identity[1, TRAITS.index(trait)] = 2.0
    plain, changed = render(identity, _scene(2))
    assert (plain - changed).abs().max() > 0.05


@pytest.mark.parametrize("word", [{"background": 3}, {"smile": 2}, {"light": 0}])
def test_every_word_shows(word):
    identity = torch.zeros(1, len(TRAITS))
    changed = render(identity, _scene(1, **word))
    assert (render(identity, _scene(1)) - changed).abs().max() > 0.2


def test_identities_of_another_count_are_refused():
    with pytest.raises(ValueError, match=r"expected identities of shape \(2, 20\)"):
        render(torch.zeros(3, len(TRAITS)), _scene(2))
