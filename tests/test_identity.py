import math

import pytest
import torch

from w2wpp import (
    ConfigError,
    FormatError,
    Identity,
    ShapeError,
    SpaceMismatch,
    concat,
    interpolate,
    load_identity,
    save_identity,
)
from w2wpp.files.container import write_container
from w2wpp.identity import MOST_STEPS, load_pictures

HERE, ELSEWHERE = "a" * 32, "b" * 32


def identity(*rows, residual=None, space=HERE):
    residual = None if residual is None else torch.tensor(residual)
    return Identity(torch.tensor(rows), space, residual, {"made_by": "test"})


def test_batch_like_access_keeps_where_rows_come_from():
    ids = identity([1.0, 0.0], [2.0, 0.0], [3.0, 0.0], residual=[[1.0], [2.0], [3.0]])
    assert len(ids) == 3 and len(ids[0]) == 1
    assert ids[-1].z.tolist() == [[3.0, 0.0]]
    assert ids[1:].residual.tolist() == [[2.0], [3.0]]
    assert ids[1:][1].provenance == {"made_by": "test", "rows": [2]}
    assert [one.z[0, 0].item() for one in ids] == [1.0, 2.0, 3.0]
    with pytest.raises(IndexError):
        ids[3]


def test_concat_fills_missing_residuals_with_zero():
    both = concat([identity([1.0, 0.0]), identity([2.0, 0.0], residual=[[5.0]])])
    assert both.z.tolist() == [[1.0, 0.0], [2.0, 0.0]]
    assert both.residual.tolist() == [[0.0], [5.0]]
    assert len(both.provenance["parents"]) == 2
    assert concat([identity([1.0, 0.0])]).residual is None
    with pytest.raises(ConfigError, match="empty"):
        concat([])


def test_slerp_of_perpendicular_ends_is_an_arc():
    path = interpolate(identity([1.0, 0.0]), identity([0.0, 1.0]), steps=5).z
    angles = torch.linspace(0, math.pi / 2, 5)
    assert torch.allclose(path, torch.stack([angles.cos(), angles.sin()], 1), atol=1e-6)


def test_slerp_extrapolates_along_the_circle():
    path = interpolate(identity([1.0, 0.0]), identity([0.0, 1.0]), positions=[-1.0, 2.0]).z
    assert torch.allclose(path, torch.tensor([[0.0, -1.0], [-1.0, 0.0]]), atol=1e-6)


def test_lerp_is_the_line():
    path = interpolate(
        identity([1.0, 0.0]), identity([0.0, 2.0]), positions=[0.25, 1.5], mode="lerp"
    ).z
    assert path.tolist() == [[0.75, 0.5], [-0.5, 3.0]]


@pytest.mark.parametrize("from_opposite", [1e-5, 1e-3, 0.1])
def test_slerp_follows_the_circle_as_near_to_opposite_as_latents_can_tell(from_opposite):
    """The middle of nearly opposite ends lies beside them at full length; a straight line would pass by zero."""
    b = identity([-math.cos(from_opposite), math.sin(from_opposite)])
    middle = interpolate(identity([1.0, 0.0]), b, positions=[0.5]).z
    half = (math.pi - from_opposite) / 2
    expected = torch.tensor([[math.cos(half), math.sin(half)]])
    assert torch.allclose(middle, expected, atol=1e-3)


def test_slerp_of_opposite_ends_goes_straight():
    middle = interpolate(identity([1.0, 0.0]), identity([-1.0, 5e-7]), positions=[0.5]).z
    assert torch.allclose(middle, torch.zeros(1, 2), atol=1e-6)


@pytest.mark.parametrize("mode", ["slerp", "lerp"])
def test_ends_are_exact(mode):
    g = torch.Generator().manual_seed(0)
    a, b = (Identity(torch.randn(1, 64, generator=g), HERE) for _ in range(2))
    path = interpolate(a, b, steps=7, mode=mode)
    assert torch.equal(path.z[0], a.z[0]) and torch.equal(path.z[-1], b.z[0])
    assert len(path) == 7 and path.provenance["mode"] == mode


@pytest.mark.parametrize("b", [[2.0, 0.0], [-2.0, 0.0], [0.0, 0.0]])
def test_slerp_without_a_unique_circle_goes_straight(b):
    ends = identity([1.0, 0.0]), identity(b)
    assert torch.equal(interpolate(*ends, steps=3).z, interpolate(*ends, steps=3, mode="lerp").z)


def test_residual_goes_along_the_line():
    a, b = identity([1.0, 0.0], residual=[[4.0]]), identity([0.0, 1.0])
    assert interpolate(a, b, steps=3).residual.tolist() == [[4.0], [2.0], [0.0]]


def test_bad_requests_are_refused():
    a, two = identity([1.0, 0.0]), identity([1.0, 0.0], [0.0, 1.0])
    for kwargs in ({}, {"steps": 2, "positions": [0.0]}, {"steps": 0}, {"positions": []}):
        with pytest.raises(ConfigError):
            interpolate(a, a, **kwargs)
    with pytest.raises(ConfigError, match="finite"):
        interpolate(a, a, positions=[float("nan")])
    with pytest.raises(ConfigError, match="'cubic'"):
        interpolate(a, a, steps=2, mode="cubic")
    with pytest.raises(ShapeError, match="Got 1 and 2"):
        interpolate(a, two, steps=2)
    with pytest.raises(ShapeError, match="NaN"):
        identity([float("nan")])
    with pytest.raises(ShapeError, match=r"\[B, d\]"):
        Identity(torch.zeros(3), HERE)
    with pytest.raises(ShapeError, match="residual"):
        identity([1.0], residual=[[1.0], [2.0]])


def test_identities_of_two_spaces_do_not_mix(make_space):
    a, b = identity([1.0, 0.0]), identity([1.0, 0.0], space=ELSEWHERE)
    for mix in (lambda: interpolate(a, b, steps=2), lambda: concat([a, b])):
        with pytest.raises(SpaceMismatch, match=r"aaaaaaaa.*bbbbbbbb"):
            mix()
    space, other = make_space("vae-skip"), make_space("vae-mlp")
    drawn = space.sample(1, generator=torch.Generator().manual_seed(0))
    assert drawn.vectors(space).shape == (1, space.layout.size)
    with pytest.raises(SpaceMismatch, match="can't be used with the space 'vae-mlp'"):
        drawn.vectors(other)


@pytest.mark.parametrize("residual", [None, [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]])
def test_file_round_trip(tmp_path, residual):
    ids = identity([0.1, 0.2], [0.3, 0.4], residual=residual)
    save_identity(ids, tmp_path / "id")
    read = load_identity(tmp_path / "id")
    assert torch.equal(read.z, ids.z) and read.space_fingerprint == HERE
    assert read.provenance == ids.provenance
    assert (read.residual is None) == (residual is None)
    assert residual is None or torch.equal(read.residual, ids.residual)


def test_bad_files_are_refused(tmp_path):
    good = {"space_fingerprint": HERE, "provenance": {}}
    z = torch.zeros(2, 3)
    cases = [
        ({"z": z}, {"provenance": {}}, "which space"),
        ({}, good, "'z' is missing"),
        ({"z": z[0]}, good, "expected"),
        ({"z": z.long()}, good, "int64"),
        ({"z": z, "residual": torch.zeros(1, 5)}, good, "'residual'"),
        ({"z": z / 0}, good, "NaN"),
    ]
    for tensors, config, message in cases:
        write_container(tmp_path / "id", tensors, format="w2wpp.identity", config=config)
        with pytest.raises(FormatError, match=message):
            load_identity(tmp_path / "id")
    write_container(tmp_path / "id", {"z": z}, format="w2wpp.identity", version="2", config=good)
    with pytest.raises(FormatError, match="Update w2wpp"):
        load_identity(tmp_path / "id")


@pytest.mark.parametrize("size", [(0, 3), (2, 0), (0, 0)])
def test_a_file_without_anybody_is_refused(tmp_path, size):
    good = {"space_fingerprint": HERE, "provenance": {}}
    tensors = {"z": torch.zeros(size)}
    write_container(tmp_path / "id", tensors, format="w2wpp.identity", config=good)
    with pytest.raises(FormatError, match="nobody"):
        load_identity(tmp_path / "id")


def test_one_person_of_one_number_is_somebody(tmp_path):
    save_identity(identity([0.5]), tmp_path / "id")
    assert load_identity(tmp_path / "id").z.tolist() == [[0.5]]


def test_indexing_by_lists_masks_and_what_is_neither():
    ids = identity([1.0], [2.0], [3.0])
    assert ids[[2, 0]].z.flatten().tolist() == [3.0, 1.0]
    assert ids[torch.tensor([True, False, True])].z.flatten().tolist() == [1.0, 3.0]
    assert ids[-3].z.item() == 1.0 and len(ids[[]]) == 0
    for outside in (-4, 3):
        with pytest.raises(IndexError, match=r"3 identities, numbered from 0. Got"):
            ids[outside]
    with pytest.raises(IndexError, match=r"has 3 flags. Got 2"):
        ids[[True, False]]
    for wrong in ("1", 1.0, [[0]], [0, True]):
        with pytest.raises(ShapeError, match="picked by a number"):
            ids[wrong]


def test_a_walk_may_have_one_step_and_no_more_than_many():
    a, b = identity([1.0, 0.0]), identity([0.0, 1.0])
    assert torch.equal(interpolate(a, b, steps=1).z, a.z)
    assert len(interpolate(a, b, steps=MOST_STEPS)) == MOST_STEPS
    with pytest.raises(ConfigError, match=r"at most 100,000. Got 100001"):
        interpolate(a, b, steps=MOST_STEPS + 1)


def test_residuals_of_two_sizes_do_not_mix():
    with pytest.raises(ShapeError, match=r"one size. Got \[1, 2\]"):
        concat([identity([1.0], residual=[[1.0]]), identity([1.0], residual=[[1.0, 2.0]])])


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (1, 513, 8, 3), (1, 8, 513, 3), (65, 2, 2, 3)])
def test_pictures_that_nobody_could_have_saved_are_refused(tmp_path, shape):
    config = {"space_fingerprint": HERE, "provenance": {}}
    tensors = {"z": torch.zeros(1, 2), "pictures": torch.zeros(shape, dtype=torch.uint8)}
    write_container(tmp_path / "id", tensors, format="w2wpp.identity", config=config)
    with pytest.raises(FormatError, match="pictures of the size"):
        load_pictures(tmp_path / "id")


def test_pictures_come_back_as_bytes(tmp_path):
    pictures = torch.arange(64 * 512 * 2 * 3).remainder(251).to(torch.uint8).view(64, 512, 2, 3)
    save_identity(identity([0.5]), tmp_path / "id", pictures)
    assert torch.equal(load_pictures(tmp_path / "id"), pictures)
    save_identity(identity([0.5]), tmp_path / "bare")
    assert load_pictures(tmp_path / "bare") is None
    for wrong in (pictures.float(), pictures[0], pictures[..., :2]):
        with pytest.raises(ShapeError, match="of bytes"):
            save_identity(identity([0.5]), tmp_path / "other", wrong)


def test_names_of_files_stay_out_of_what_is_saved_however_deep(tmp_path):
    inner = {"made_by": "encode", "files": ["anna.safetensors", "bob.safetensors"]}
    how = {"made_by": "concat", "parents": [inner, "unknown"], "files": ("carl.safetensors",)}
    save_identity(Identity(torch.zeros(1, 2), HERE, None, how), tmp_path / "id")
    assert load_identity(tmp_path / "id").provenance == {
        "made_by": "concat",
        "files": 1,
        "parents": [{"made_by": "encode", "files": 2}, "unknown"],
    }
