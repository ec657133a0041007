"""`w2wpp invert`: the person in the bundled picture, found from the command line."""

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="the miniature world needs diffusers")

from PIL import Image

from w2wpp import load_identity, load_space
from w2wpp.avatars.measure.portrait import read_picture
from w2wpp.avatars.places import MODELS
from w2wpp.avatars.world.studio import open_studio
from w2wpp.metrics import id_scores
from w2wpp.training.dataset import load_dataset

PORTRAIT = MODELS.parent / "example_workflows" / "avatar_portrait.png"
WHO = 31  # row of the picture's person among the held-out people that ship
SPACE = MODELS / "avatars.safetensors"


@pytest.mark.parametrize("method", ["adam", "cma", "multistart"])
def test_the_person_of_the_picture_is_found(run, method):
    code, result, err = run("invert", SPACE, PORTRAIT, "--method", method, "-o", "id.safetensors")
    assert code == 0, err
    assert 0 < result["evaluations"] <= 400
    assert result["verdict"]["evidence"]["repaint"] > 0.5
    space, studio = (
        load_space(SPACE),
        open_studio(MODELS / "avatar-base.safetensors", MODELS / "avatar-embedder.safetensors"),
    )
    shots = studio.photograph(load_identity("id.safetensors").vectors(space), space.layout)
    heldout = load_dataset(MODELS / "avatars-heldout.safetensors")
    people = heldout.labels[heldout.heldout_rows]
    likeness = torch.stack([id_scores(shots.embeddings, p[None])[0] for p in people])
    assert likeness[WHO] > 0.4
    assert (
        int((likeness > likeness[WHO]).sum()) < len(people) // 20
    )  # of 200 people, among the nearest ten


def test_a_mask_decides_what_counts(run, tmp_path):
    white = np.zeros((32, 32), np.uint8)
    white[8:24, 8:24] = 255
    Image.fromarray(white).save(tmp_path / "mask.png")
    _, whole, _ = run("invert", SPACE, PORTRAIT, "-o", "a.safetensors")
    _, part, _ = run("invert", SPACE, PORTRAIT, "--mask", "mask.png", "-o", "b.safetensors")
    assert part["loss"] != whole["loss"]
    assert not torch.equal(load_identity("a.safetensors").z, load_identity("b.safetensors").z)


def test_an_interrupted_inversion_goes_on_from_its_checkpoint(run, monkeypatch, tmp_path):
    def until_the_fourth(log):
        def callback(progress):
            if progress.step == 4:
                raise KeyboardInterrupt

        return callback

    _, whole, _ = run("invert", SPACE, PORTRAIT, "-o", "whole.safetensors")
    again = ("invert", SPACE, PORTRAIT, "--checkpoint", "run.safetensors", "-o", "id.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr("w2wpp.avatars.measure.portrait.say", until_the_fourth)
        assert run(*again)[0] == 130
    assert not (tmp_path / "id.safetensors").exists() and (tmp_path / "run.safetensors").exists()
    code, _, err = run(*again, "--seed", 1)
    assert code == 1 and "other pictures, or with other settings" in err
    code, result, err = run(*again)
    assert code == 0 and "step 4/" not in err and "step 5/" in err
    assert result["loss"] == whole["loss"] and not (tmp_path / "run.safetensors").exists()
    found, expected = (load_identity(n).z for n in ("id.safetensors", "whole.safetensors"))
    assert torch.equal(found, expected)


def test_pictures_of_any_size_are_framed_and_judged(run, tmp_path):
    portrait = Image.open(PORTRAIT)
    wide = Image.new("RGBA", (90, 60), (40, 90, 120, 0))
    wide.paste(portrait, (50, 20))
    wide.save(tmp_path / "wide.png")
    code, result, err = run("invert", SPACE, tmp_path / "wide.png", "-o", "id.safetensors")
    assert code == 0, err
    assert result["framing"]["how"] == ["found"]  # in what is opaque
    assert result["framing"]["placement"][0][0] > 0.3
    assert "What is transparent does not count." in result["framing"]["remarks"]
    assert result["verdict"]["evidence"]["gain"] > 0
    assert result["verdict"]["confidence"] is None and not result["verdict"]["flagged"]
    again = ("invert", SPACE, tmp_path / "wide.png", "--strict", "-o", "strict.safetensors")
    code, _, err = run(*again)
    assert code == 1 and "strict was asked for" in err
    assert torch.equal(load_identity("strict.safetensors").z, load_identity("id.safetensors").z)


def test_what_is_no_picture_is_refused(run, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    code, result, err = run("invert", SPACE, tmp_path / "text.png", "-o", "id.safetensors")
    assert code == 1 and result is None and "not a picture" in err and err.count("\n") == 1, err
    assert not (tmp_path / "id.safetensors").exists()
    assert read_picture(PORTRAIT).shape == (1, 3, 32, 32)
