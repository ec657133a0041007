"""Several people as one."""

from __future__ import annotations

import pytest
import torch

from w2wpp import interpolate
from w2wpp.errors import ConfigError, ShapeError, SpaceMismatch
from w2wpp.identity import Identity
from w2wpp.mix import mix


def people(n, d=32, seed=0, length=None):
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z = z if length is None else length * z / z.norm(dim=1, keepdim=True)
    return [Identity(row[None].float(), "space") for row in z]


@pytest.mark.parametrize("mode", ["slerp", "lerp"])
@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_a_mix_of_two_of_one_length_is_where_the_walk_between_them_is(mode, t):
    a, b = people(2, length=5.0)
    walked = interpolate(a, b, positions=[t], mode=mode)
    torch.testing.assert_close(mix([a, b], [1 - t, t], mode=mode).z, walked.z, atol=1e-5, rtol=0)


def test_weights_count_relative_to_one_another_and_the_order_does_not():
    a, b, c = people(3)
    mixed = mix([a, b, c], [1.0, 2.0, 3.0])
    torch.testing.assert_close(mixed.z, mix([a, b, c], [0.1, 0.2, 0.3]).z)
    torch.testing.assert_close(mixed.z, mix([c, a, b], [3.0, 1.0, 2.0]).z)


def test_one_person_comes_out_as_they_are():
    a, b = people(2)
    a = Identity(a.z, "space", torch.ones(1, 4), {"seed": 1})
    for mixed in (mix([a], [0.3]), mix([a, b], [2.0, 0.0]), mix([b, a], [0.0, 1.0])):
        assert mixed is a


def test_a_mix_of_many_is_as_far_from_the_average_person_as_they_are():
    many = people(6, d=128)
    lengths = torch.stack([i.z.norm() for i in many])
    assert float(mix(many, [1.0] * 6).z.norm()) == pytest.approx(float(lengths.mean()), rel=1e-5)
    assert float(mix(many, [1.0] * 6, mode="lerp").z.norm()) < 0.6 * float(lengths.mean())


def test_an_identity_of_several_people_shares_its_weight_among_them():
    a, b, c = people(3)
    crowd = Identity(torch.cat([b.z, c.z]), "space")
    torch.testing.assert_close(mix([a, crowd], [1.0, 1.0]).z, mix([a, b, c], [2.0, 1.0, 1.0]).z)


def test_residuals_are_averaged_and_missing_ones_are_zero():
    a, b = people(2)
    a = Identity(a.z, "space", torch.full((1, 4), 2.0))
    torch.testing.assert_close(mix([a, b], [3.0, 1.0]).residual, torch.full((1, 4), 1.5))


def test_opposites_and_the_average_person_are_mixed_along_the_line():
    (a,) = people(1)
    torch.testing.assert_close(mix([a, Identity(-a.z, "space")], [1.0, 1.0]).z, 0 * a.z)
    nobody = Identity(torch.zeros_like(a.z), "space")
    torch.testing.assert_close(mix([a, nobody], [1.0, 1.0]).z, a.z / 2)


def test_the_mean_on_the_sphere_is_where_the_pulls_cancel():
    many = people(5, length=1.0)
    weights = [0.1, 0.3, 0.2, 0.25, 0.15]
    z = mix(many, weights).z.double()[0]
    pull = torch.zeros_like(z)
    for w, i in zip(weights, many):
        u = i.z.double()[0]
        angle = torch.acos((u @ z).clamp(-1, 1))
        pull += w * angle * (u - (u @ z) * z) / torch.sin(angle)
    assert float(pull.norm()) < 1e-5


def test_what_is_no_mix_is_refused_in_words():
    a, b = people(2)
    with pytest.raises(ConfigError, match="All weights"):
        mix([a, b], [0.0, 0.0])
    with pytest.raises(ConfigError, match="-1"):
        mix([a, b], [-1.0, 2.0])
    with pytest.raises(ConfigError, match="nan"):
        mix([a, b], [float("nan"), 2.0])
    with pytest.raises(ShapeError, match="3 for 2"):
        mix([a, b], [1.0, 1.0, 1.0])
    with pytest.raises(SpaceMismatch):
        mix([a, Identity(b.z, "another")], [1.0, 1.0])
