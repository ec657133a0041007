"""Where a person stands on the attributes of a space."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from w2wpp import edit
from w2wpp.edits import readings


def test_an_edit_raises_its_own_reading_by_its_strength_and_no_other(make_space):
    space = make_space("pca")
    fingerprint = space.fingerprint
    steps = torch.randn(3, space.latent_size, generator=torch.Generator().manual_seed(1))
    space = replace(space, directions=dict(zip("abc", steps)))
    assert space.fingerprint == fingerprint
    who = space.sample(1, generator=torch.Generator().manual_seed(2))
    before, after = readings(who, space), readings(edit(who, space, {"b": 1.5}), space)
    assert after["b"] - before["b"] == pytest.approx(1.5, abs=1e-5)
    assert all(after[name] == pytest.approx(before[name], abs=1e-5) for name in "ac")


def test_a_space_without_attributes_reads_nothing(make_space):
    space = replace(make_space("pca"), directions={})
    assert readings(space.sample(1, generator=torch.Generator()), space) == {}
