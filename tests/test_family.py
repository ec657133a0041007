"""A family of people: the same text and seed, the same people; breeding keeps them people."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from w2wpp.errors import ConfigError, DataError, FormatError, ShapeError, SpaceMismatch
from w2wpp.family import Family, Generation, people_of, read_family, write_family
from w2wpp.identity import Identity

GOLDEN = (
    '{"v":1,"at":3,"g":[{"k":"new"},{"k":"like","p":0,"r":0.4,"of":[5],"keep":[5],"lock":[5]},'
    '{"k":"cross","p":1,"of":[0,5],"keep":[0,5]},{"k":"new","p":2,"keep":[5]}],"plus":[[1,2]],"minus":[]}'
)


@pytest.fixture(scope="module")
def pca(make_space):
    return make_space("pca")


def grown(seed=3):
    return Family().bred("like", [5], radius=0.4, keep=[5])


def test_the_first_generation_is_what_the_space_samples(pca):
    drawn = pca.sample(4, generator=torch.Generator().manual_seed(3), truncation=0.8)
    found = people_of(Family(), pca, seed=3, truncation=0.8).grid(4)
    assert torch.equal(found.z, drawn.z)


def test_people_are_the_same_bits_wherever_the_text_is_read(pca):
    z = people_of(read_family(GOLDEN), pca, seed=11).grid(6).z
    assert torch.equal(z, people_of(read_family(GOLDEN), pca, seed=11).grid(6).z)
    # Written down once: another machine, or another release, has to give these.
    golden = torch.tensor([[2.26193, -1.25066, 0.1873], [-0.84518, -0.92548, 0.6596]])
    torch.testing.assert_close(z[[0, 5], :3], golden, atol=1e-5, rtol=0)


def test_nobody_depends_on_how_many_are_looked_at(pca):
    family = read_family(GOLDEN)
    many = people_of(family, pca, seed=1).grid(16)
    for n in (1, 3, 9):
        assert torch.equal(people_of(family, pca, seed=1).grid(n).z, many.z[:n])
    people = people_of(family, pca, seed=1)
    people.grid(2)  # what is known of few must not stand in for many
    assert torch.equal(people.grid(16).z, many.z)


def test_radius_goes_from_the_parent_to_strangers(pca):
    def child(radius):
        family = Family().bred("like", [2], radius=radius)
        return people_of(family, pca, seed=5).grid(8).z

    parent = people_of(Family(), pca, seed=5).grid(3).z[2]
    distances = [float((child(r) - parent).norm(dim=1).mean()) for r in (0.0, 0.2, 0.5, 1.0)]
    assert distances[0] < 1e-6 and distances == sorted(distances)


def test_breeding_keeps_people_as_far_from_the_average_as_they_were(make_space):
    space, family = make_space("pca"), Family()
    for kind, of in (("like", [1]), ("cross", [0, 3]), ("like", [4]), ("cross", [1, 2])):
        family = family.bred(kind, of, radius=0.6)
    # Over many families, because a child's length is near its parents', not near that of everybody.
    sizes = [people_of(family, space, seed=s).grid(8).z.square().mean() for s in range(60)]
    assert 0.9 < float(torch.stack(sizes).mean()) < 1.1


def test_a_cross_takes_every_latent_from_one_parent_or_the_other(pca):
    family = Family().bred("cross", [1, 4], radius=0.4)
    before, z = (people_of(f, pca, seed=9).grid(8).z for f in (Family(), family))
    from_one, from_other = z == before[1], z == before[4]
    assert bool((from_one | from_other).all())
    assert 0.2 < float(from_one.float().mean()) < 0.8


def test_kept_and_locked_people_stay_in_their_cells_and_have_one_origin(pca):
    family = grown()
    locked = replace(family.generations[1], lock=(0, 5))
    family = Family((family.generations[0], locked), 1).bred("like", [3], radius=0.5, keep=[3])
    people = people_of(family, pca, seed=4)
    first, second, third = (people.grid(9, generation=g).z for g in range(3))
    assert torch.equal(second[5], first[5]) and torch.equal(third[5], first[5])
    assert torch.equal(third[0], second[0]) and torch.equal(third[3], second[3])
    assert family.origin((2, 5)) == (0, 5) and family.origin((2, 3)) == (1, 3)
    assert family.generations[2].lock == (0, 5)


def test_a_tree_keeps_what_was_bred_before_going_back(pca):
    family = grown()
    back = replace(family, at=0)
    other = back.bred("like", [1], radius=0.3)
    assert other.generations[1] == family.generations[1] and other.path() == [0, 2]
    people = people_of(other, pca, seed=4)
    assert not torch.equal(people.grid(4).z, people.grid(4, generation=1).z)


def test_a_family_around_somebody_starts_with_them_and_carries_their_residual(pca):
    residual = torch.ones(1, pca.basis.n_components)
    someone = Identity(torch.full((1, pca.latent_size), 0.5), pca.fingerprint, residual)
    grid = people_of(Family(), pca, seed=0, radius=0.3, around=someone).grid(4)
    assert torch.equal(grid.z[0], someone.z[0]) and torch.equal(grid.residual[0], residual[0])
    assert bool((grid.residual[1:] < 1).all()) and bool((grid.residual[1:] > 0.9).all())
    child = people_of(Family().bred("like", [0], radius=0.6), pca, seed=0, around=someone).grid(2)
    torch.testing.assert_close(child.residual, torch.full_like(child.residual, 0.8))
    with pytest.raises(SpaceMismatch):
        people_of(Family(), pca, seed=0, around=Identity(someone.z, "other"))
    with pytest.raises(ShapeError, match="around one person"):
        people_of(
            Family(), pca, seed=0, around=Identity(torch.zeros(2, pca.latent_size), pca.fingerprint)
        )


def test_marks_are_people_once_and_the_rest_stands_in_for_minus(pca):
    family = replace(grown(), plus=((0, 5), (1, 5), (1, 2)))
    plus, minus = people_of(family, pca, seed=6).marked(9)
    assert len(plus) == 2
    assert len(minus) == 9 + 9 - 1 - 2  # two grids that share one person, without the marked
    with pytest.raises(DataError, match=r"marked with \+"):
        people_of(Family(), pca, seed=6).marked(9)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["new", "like", "cross"]), st.integers(0, 255), st.integers(0, 255)
        ),
        max_size=6,
    ),
    st.floats(0, 1),
)
def test_text_and_family_are_inverse(steps, radius):
    family = Family()
    for kind, a, b in steps:
        of = {"new": [], "like": [a], "cross": [a, b]}[kind]
        family = family.bred(kind, of, radius=radius, keep=[b])
    assert read_family(write_family(family)) == family
    assert read_family("  ") == Family()


def test_a_long_line_of_parents_is_no_deeper_than_python_recurses(pca):
    g = (Generation(), *(Generation("like", n, (0,), 0.1) for n in range(900)))
    assert len(people_of(Family(g, 900), pca, seed=0).grid(2)) == 2


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda t: t | {"v": 2}, "version 2"),
        (lambda t: t | {"at": 4}, "from 0 to 3"),
        (lambda t: t | {"at": True}, "True"),
        (lambda t: t | {"g": []}, "cannot be read"),
        (lambda t: t | {"g": [{"k": "clone"}], "at": 0, "plus": []}, "no generation is 'clone'"),
        (lambda t: t | {"g": [{"k": "new", "p": 0}], "at": 0, "plus": []}, "generation 0"),
        (lambda t: t | {"g": [*t["g"][:1], {"k": "like", "p": 1, "of": [0], "r": 0.1}]}, "1"),
        (lambda t: t | {"g": [*t["g"][:1], {"k": "like", "p": 0, "of": [0]}]}, "radius"),
        (lambda t: t | {"g": [*t["g"][:1], {"k": "cross", "p": 0, "of": [0]}]}, "takes 2"),
        (lambda t: t | {"g": [*t["g"][:1], {"k": "like", "p": 0, "of": [0], "r": 2}]}, "radius"),
        (lambda t: t | {"g": [*t["g"][:1], {"k": "new", "p": 0, "keep": [-1]}]}, "-1"),
        (lambda t: t | {"minus": [[1, 2]]}, "at once"),
        (lambda t: {k: v for k, v in t.items() if k != "at"}, "cannot be read"),
        (lambda t: [t], "cannot be read"),
    ],
)  # fmt: skip
def test_a_text_that_is_no_family_is_refused_in_words(spoil, said):
    with pytest.raises(FormatError, match=said):
        read_family(json.dumps(spoil(json.loads(GOLDEN))))


@pytest.mark.parametrize("text", ["{", "nonsense", "[1e999]", "\\ud800"])
def test_what_is_no_json_is_refused(text):
    with pytest.raises(FormatError, match="family tree"):
        read_family(text)


def test_settings_outside_their_range_are_refused(pca):
    for wrong in ({"truncation": -1.0}, {"truncation": float("nan")}, {"radius": 1.5}):
        with pytest.raises(ConfigError, match="truncation"):
            people_of(Family(), pca, seed=0, **wrong)
