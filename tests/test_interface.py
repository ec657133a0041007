"""Spaces and identities as values of Python: arrays, devices, indexing, printing, pickling."""

import copy
import pickle

import numpy as np
import pytest
import torch

from w2wpp import (
    ConfigError,
    DataError,
    Identity,
    ShapeError,
    interpolate,
    load_space,
    save_space,
)
from w2wpp.arrays import is_finite

DTYPES = [np.float16, np.float32, np.float64, np.int64]


def rows(size, count=2):
    return np.round(np.random.default_rng(0).normal(size=(count, size)), 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_arrays_are_as_good_as_tensors(space, dtype):
    z = rows(space.latent_size).astype(dtype)
    residual = rows(space.basis.n_components).astype(dtype)
    w = rows(space.layout.size).astype(dtype)
    t = [torch.tensor(a) for a in (z, residual, w)]
    for given in (z, residual, w), t:
        decoded, mean = space.decode(*given[:2]), space.encode(given[2]).mean
        assert decoded.dtype == mean.dtype == torch.float32
        assert torch.equal(decoded, space.decode(t[0].float(), t[1].float()))
        assert torch.equal(mean, space.encode(t[2].float()).mean)
        assert torch.equal(space.lift(given[1]), space.lift(t[1].float()))
    unpacked = space.layout.unpack(w)
    assert all(torch.equal(space.layout.pack(unpacked), t[2]) for _ in range(1))
    people = Identity(z, space.fingerprint, residual)
    assert torch.equal(people.vectors(space), space.decode(z, residual))


def test_an_identity_does_not_share_memory_with_an_array(space):
    z = rows(space.latent_size)
    people = Identity(z, space.fingerprint)
    z[:] = 0
    assert people.z.abs().sum() > 0


def test_arrays_that_are_reversed_or_read_only_will_do(space):
    z = rows(space.latent_size)[::-1]
    z.flags.writeable = False
    assert torch.equal(space.decode(z), space.decode(torch.tensor(z.copy())))


@pytest.mark.parametrize(
    "bad, kind",
    [
        ([[0.0] * 5], "list"),
        (np.array([["a"]]), "array of <U1"),
        (np.ones((1, 5), bool), "array of bool"),
        (torch.ones(1, 5, dtype=torch.complex64), "complex64"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused_by_name(make_space, bad, kind):
    space = make_space("vae-skip")
    calls = {
        "latents": lambda: space.decode(bad),
        "vectors": lambda: space.encode(bad),
        "coefficients": lambda: space.lift(bad),
        "vectors [P] or": lambda: space.layout.unpack(bad),
        "latents [B, d]": lambda: Identity(bad, space.fingerprint),
    }
    for what, call in calls.items():
        with pytest.raises(ShapeError) as e:
            call()
        assert what in str(e.value) and kind in str(e.value)


def test_numbers_that_are_not_finite_are_refused(make_space):
    space = make_space("vae-skip")
    w = np.zeros((1, space.layout.size))
    w[0, 3] = np.inf
    with pytest.raises(DataError, match="NaN or infinite"):
        space.encode(w)


PEOPLE = Identity(torch.arange(5.0)[:, None], "a" * 32, 10 * torch.arange(5.0)[:, None])


@pytest.mark.parametrize(
    "index, expected",
    [
        (2, [2]),
        (-1, [4]),
        (np.int64(3), [3]),
        (torch.tensor(3), [3]),
        (slice(None, None, 2), [0, 2, 4]),
        ([3, 0, 3, -1], [3, 0, 3, 4]),
        ((1, 2), [1, 2]),
        (np.array([4, 1]), [4, 1]),
        (torch.tensor([0, -2]), [0, 3]),
        ([True, False, False, True, False], [0, 3]),
        (torch.arange(5) > 2, [3, 4]),
        (np.arange(5) < 1, [0]),
        ([], []),
        (range(1, 3), [1, 2]),
    ],
)
def test_identities_are_picked_as_rows_of_an_array_are(index, expected):
    found = PEOPLE[index]
    assert found.z.flatten().tolist() == expected and found.provenance["rows"] == expected
    assert found.residual.flatten().tolist() == [10 * i for i in expected]


@pytest.mark.parametrize(
    "index, error",
    [
        (5, IndexError),
        ([0, -6], IndexError),
        ([True, False], IndexError),
        (1.0, ShapeError),
        ([0.5], ShapeError),
        ("0", ShapeError),
        ([[0]], ShapeError),
        (torch.zeros(1, 1, dtype=torch.long), ShapeError),
        (None, ShapeError),
        ((slice(None), 0), ShapeError),
        ([True, 1], ShapeError),
    ],
)
def test_other_indices_are_refused(index, error):
    with pytest.raises(error):
        PEOPLE[index]


@pytest.mark.parametrize(
    "positions", [[0.25, 0.5], (0.25, 0.5), np.array([0.25, 0.5]), torch.tensor([0.25, 0.5])]
)
def test_positions_of_a_walk_may_be_an_array(positions):
    walk = interpolate(PEOPLE[1], PEOPLE[3], positions=positions, mode="lerp")
    assert walk.z.flatten().tolist() == [1.5, 2.0]


@pytest.mark.parametrize("positions", [[], ["a"], 0.5, [[0.5]], [float("nan")], np.array(None)])
def test_other_positions_are_refused(positions):
    with pytest.raises(ConfigError, match="positions"):
        interpolate(PEOPLE[1], PEOPLE[3], positions=positions)


def test_everything_prints_in_one_line(space):
    people = space.sample(3, generator=torch.Generator().manual_seed(0))
    for value in (space, people, space.basis, space.layout):
        assert "\n" not in repr(value) and len(repr(value)) < 160
    assert repr(space) == (
        f"Space('{space.name}', for avatar, {space.codec.name}, d={space.latent_size}, "
        f"K={space.basis.n_components}, P={space.layout.size}, 1 directions)"
    )
    text = f"Identity(3 x d={space.latent_size}, space {space.fingerprint[:8]}, made by sample)"
    assert repr(people) == text


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
@pytest.mark.parametrize("opened", [False, True])
def test_a_space_travels_to_other_processes(space, tmp_path, how, opened):
    """Also one that still has its weights in a file, which the copy does not need."""
    path = tmp_path / "space.safetensors"
    save_space(space, path)
    read = load_space(path)
    if opened:
        read.decode(torch.zeros(1, space.latent_size))
    again = pickle.loads(pickle.dumps(read)) if how == "pickle" else copy.deepcopy(read)
    path.unlink()
    z, w = torch.tensor(rows(space.latent_size)), torch.tensor(rows(space.layout.size))
    assert torch.equal(again.decode(z), space.decode(z))
    assert torch.equal(again.encode(w).mean, space.encode(w).mean)
    assert again.fingerprint == space.fingerprint and repr(again) == repr(space)
    del vars(again)["fingerprint"]
    assert again.fingerprint == space.fingerprint  # computed again from what has travelled
    assert torch.equal(again.directions["smile"], space.directions["smile"])


def test_an_identity_travels_to_other_processes():
    again = pickle.loads(pickle.dumps(PEOPLE))
    assert torch.equal(again.z, PEOPLE.z) and torch.equal(again.residual, PEOPLE.residual)
    assert again.provenance == PEOPLE.provenance and repr(again) == repr(PEOPLE)


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
def test_a_space_opens_on_a_device(space, tmp_path, device):
    save_space(space, tmp_path / "s")
    moved = load_space(tmp_path / "s", device=device)
    z, w = rows(space.latent_size), rows(space.layout.size)
    decoded, encoded = moved.decode(z), moved.encode(w).mean
    assert moved.device == decoded.device == encoded.device == torch.zeros(1, device=device).device
    torch.testing.assert_close(decoded.cpu(), space.decode(z))
    torch.testing.assert_close(encoded.cpu(), space.encode(w).mean)
    assert moved.fingerprint == space.fingerprint
    save_space(moved, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "s").read_bytes()


@pytest.mark.parametrize("device", ["gpu", torch.float16, 1.5])
def test_what_is_no_device_is_refused(space, device):
    with pytest.raises(ConfigError, match="Expected a device such as 'cpu' or 'cuda:0'"):
        space.to(device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_found_wherever_they_are(dtype, odd):
    t = torch.randn(2, 37, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert is_finite(t) and is_finite(t[:0]) and is_finite(t.T)
    for i in range(t.numel()):
        one = t.clone()
        one.view(-1)[i] = odd
        assert not is_finite(one) and not is_finite(one.T)


def test_other_types_of_numbers_are_looked_at_as_well():
    assert is_finite(torch.tensor([1, 2])) and is_finite(torch.tensor([True]))
    assert is_finite(torch.ones(3).to(torch.float8_e4m3fn))
    assert not is_finite(torch.tensor([1.0, float("nan")]).to(torch.float8_e5m2))
    assert not is_finite(torch.tensor([complex(1, float("inf"))]))
