"""The example files: a matte that is the person, and LoRAs that read back as what they were."""

import dataclasses

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
from PIL import Image

from w2wpp import load_lora
from w2wpp.avatars.edition2 import examples
from w2wpp.avatars.edition2.scene import TRAITS, sample_identities
from w2wpp.errors import DataError


@pytest.fixture
def people(dataset):
    labels = sample_identities(len(dataset), generator=torch.Generator().manual_seed(0))
    heldout = torch.arange(len(dataset)) >= len(dataset) - 40
    identity = torch.arange(len(dataset))
    return dataclasses.replace(
        dataset, identity=identity, labels=labels, label_names=TRAITS, heldout=heldout
    )


def test_the_portraits_opacity_is_where_the_person_is(people, tmp_path):
    examples.write_portrait(people, tmp_path / "portrait.png")
    opacity = np.asarray(Image.open(tmp_path / "portrait.png"))[..., 3]
    assert opacity.shape == (128, 128)
    assert opacity[60:70, 60:70].min() == 255  # the face
    assert opacity[:20, :10].max() == 0 and opacity[:20, -10:].max() == 0  # the wall
    assert 0.2 < (opacity > 127).mean() < 0.8


def test_a_data_set_without_the_portraits_person_is_refused(people, tmp_path):
    few = dataclasses.replace(people, heldout=torch.arange(len(people)) < 5)
    with pytest.raises(DataError, match="There are 5"):
        examples.write_portrait(few, tmp_path / "portrait.png")
    assert not (tmp_path / "portrait.png").exists()


def test_the_example_loras_are_the_first_held_out_people(people, tmp_path):
    written = examples.write_loras(people, tmp_path / "loras")
    assert len(written) == examples.LORAS
    first = load_lora(written[0]).vector(people.layout)
    expected = people.vectors(people.heldout_rows[:1])[0]
    torch.testing.assert_close(first, expected, rtol=2e-3, atol=1e-4)
