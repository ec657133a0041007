"""Attributes beside a space, and those that come from marks."""

from __future__ import annotations

import pytest
import torch

from w2wpp import edit
from w2wpp.attributes import (
    Attributes,
    attribute_name,
    extended,
    load_attributes,
    save_attributes,
)
from w2wpp.errors import ConfigError, DataError, FormatError, SpaceMismatch
from w2wpp.files.container import write_container
from w2wpp.training.directions import fit_directions
from w2wpp.training.marks import direction_from_marks


def normal(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_attributes_come_back_from_their_file_and_extend_the_space(make_space, tmp_path):
    space = make_space("pca")
    found = Attributes(space.fingerprint).with_one("friendly", torch.ones(12), {"marked": [3, 4]})
    save_attributes(found, tmp_path / "a.safetensors", space.name)
    read = load_attributes(tmp_path / "a.safetensors")
    assert read.made == {"friendly": {"marked": [3, 4]}}
    more = extended(space, read)
    assert set(more.directions) == {"smile", "friendly"} and more.fingerprint == space.fingerprint
    who = space.sample(1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(edit(who, more, {"friendly": 2.0}).z, who.z + 2.0)


def test_a_space_keeps_an_attribute_of_its_own(make_space):
    space = make_space("pca")
    other = Attributes(space.fingerprint).with_one("smile", torch.zeros(12), {})
    assert torch.equal(extended(space, other).directions["smile"], space.directions["smile"])


def test_attributes_of_other_spaces_and_sizes_are_refused(make_space, tmp_path):
    with pytest.raises(SpaceMismatch):
        extended(make_space("pca"), Attributes("another"))
    path = tmp_path / "a.safetensors"
    tensors = {"direction.a": torch.zeros(3), "direction.b": torch.zeros(4)}
    write_container(
        path,
        tensors,
        format="w2wpp.attributes",
        config={"space_fingerprint": "f", "attributes": {}},
    )
    with pytest.raises(FormatError, match="of one size"):
        load_attributes(path)
    write_container(path, {}, format="w2wpp.attributes", config={})
    with pytest.raises(FormatError, match="which space"):
        load_attributes(path)


@pytest.mark.parametrize("text", ["", "   ", "a" * 65, "a\x00b", "\u202eabc"])
def test_some_texts_are_no_names(text):
    with pytest.raises(ConfigError, match="name of an attribute"):
        attribute_name(text)


def test_a_name_loses_the_spaces_around_it():
    assert attribute_name("  round   face\n") == "round face"


def test_marks_find_the_attribute_the_better_the_more_there_are():
    truth = torch.nn.functional.normalize(normal(1, 16, 1))[0]
    z = normal(400, 16, 2)
    has = z @ truth > 0.5
    closeness = []
    for n in (8, 50, 400):
        marked = direction_from_marks(z[:n][has[:n]], z[:n][~has[:n]], {})
        closeness.append(float(torch.cosine_similarity(marked.direction, truth, dim=0)))
    assert closeness == sorted(closeness) and closeness[-1] > 0.95
    assert marked.right is not None and marked.right[0] / marked.right[1] > 0.9
    assert float(marked.direction.norm()) == pytest.approx(1.0, abs=1e-5)  # one deviation


def test_a_new_attribute_leaves_those_there_are_alone():
    z, labels = normal(500, 16, 3), normal(500, 2, 4) + normal(500, 16, 3)[:, :2]
    fitted = fit_directions(z, labels, ("age", "smile"))
    known = fitted.as_mapping()
    truth = normal(1, 16, 5)[0]
    has = z @ truth + 2 * z[:, 0] > 0
    marked = direction_from_marks(z[has], z[~has], known)
    steps = torch.stack(list(known.values()), 1).double()
    readings = torch.linalg.pinv(steps).T  # what reads age and smile
    assert float((marked.direction.double() @ readings).abs().max()) < 1e-5
    assert marked.own < 0.95 and "age" in marked.close and "taken out" in str(marked)


def test_marks_that_say_nothing_are_refused_in_words():
    z = normal(6, 8, 0)
    with pytest.raises(DataError, match="Got 0 and 6"):
        direction_from_marks(z[:0], z, {})
    with pytest.raises(DataError, match="same people"):
        direction_from_marks(z, z, {})
    step = z[:3].mean(0) - z[3:].mean(0)
    with pytest.raises(DataError, match="already has attributes for"):
        direction_from_marks(z[:3], z[3:], {"this": step / step.square().sum()})


def test_marks_without_a_pattern_are_said_to_have_none():
    z = normal(40, 64, 7)
    marked = direction_from_marks(z[:20], z[20:], {})
    assert marked.right is not None and marked.right[0] < 0.75 * marked.right[1]
