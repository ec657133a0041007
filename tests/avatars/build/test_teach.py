"""Start networks of the miniature world that learn from paintings alone."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers", reason="the miniature world needs diffusers")

from w2wpp import load_space, save_space
from w2wpp.avatars.build.teach import Teaching, paint_people, teach
from w2wpp.avatars.places import MODELS
from w2wpp.avatars.world.studio import open_studio
from w2wpp.errors import ConfigError
from w2wpp.inversion.framing import Framing
from w2wpp.spacefile import save_start
from w2wpp.start_network import StartNetwork
from w2wpp.training.dataset import load_dataset
from w2wpp.training.fit_basis import fit_coefficients
from w2wpp.training.fit_locator import LocatorTraining
from w2wpp.training.fit_paintings import PaintingsTraining
from w2wpp.training.fit_vae import linear_space

CONFIG = Teaching(
    people=80,
    training=PaintingsTraining(
        size=32, width=8, steps=12, batch=16, locator=LocatorTraining(size=32, width=8, steps=8)
    ),
)


@pytest.fixture(scope="module")
def studio():
    studio = open_studio(MODELS / "avatar-base.safetensors", MODELS / "avatar-embedder.safetensors")
    return replace(studio, steps=2, guidance=1.0)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A linear space of few latents in a file."""
    folder = tmp_path_factory.mktemp("space")
    heldout = load_dataset(MODELS / "avatars-heldout.safetensors")
    everybody = replace(heldout, heldout=torch.zeros(len(heldout), dtype=torch.bool))
    fitted = fit_coefficients(everybody, 8, metric="update")
    save_space(linear_space(fitted.coefficients, fitted.basis), folder / "small.safetensors")
    return folder / "small.safetensors"


@pytest.fixture(scope="module")
def kept(small, studio, tmp_path_factory):
    """A folder with paintings of its people."""
    folder = tmp_path_factory.mktemp("paintings")
    paint_people(small, studio, folder, CONFIG)
    return folder


def test_a_space_is_taught_from_its_own_paintings(small, studio, kept):
    lines = []
    start, frame, report = teach(small, studio, kept, CONFIG, callback=lines.append)
    space = load_space(small)
    assert start.locates and start.verdict is not None and start.latent_size == 8
    assert report["people"] + report["kept_apart"] == 80 and report["paintings"] == 80 * 2
    assert 0 < frame.half_width <= 1 and "2 of 2 groups" in "".join(lines)
    picture = torch.rand(1, 3, 48, 64) * 2 - 1
    framed = Framing(frame, start)(picture, 32)
    assert start(framed.pictures).shape == (1, space.latent_size)


def test_paintings_are_kept_and_those_of_another_run_refused(small, studio, kept, tmp_path):
    folder = shutil.copytree(kept, tmp_path / "kept")
    first = paint_people(small, studio, folder, CONFIG)
    assert first.z.shape == (80, 8) and first.bank.shape == (80, 2, 3, 32, 32)
    assert (first.bank[:, 0] != first.bank[:, 1]).any()  # scenes of their own
    (folder / "0001.safetensors").unlink()
    before = (folder / "0000.safetensors").stat().st_mtime_ns
    again = paint_people(small, studio, folder, CONFIG, workers=2)
    assert torch.equal(again.bank, first.bank)
    assert (folder / "0000.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="another run"):
        paint_people(small, replace(studio, steps=3), folder, CONFIG)


def test_models_that_are_not_on_the_cpu_paint_in_this_process(small, studio, tmp_path, monkeypatch):
    monkeypatch.setattr("w2wpp.avatars.build.teach.ProcessPoolExecutor", None)
    elsewhere = replace(studio, base=copy.deepcopy(studio.base).to("meta"))
    with pytest.raises(RuntimeError, match="meta tensor"):  # which hold no pictures
        paint_people(small, elsewhere, tmp_path, CONFIG, workers=2)


def test_a_network_that_answers_learns_to_find_faces(small, studio, kept, tmp_path):
    with pytest.raises(ConfigError, match="no start network"):
        teach(small, studio, kept, CONFIG, keep_answers=True)
    torch.manual_seed(0)
    answering = tmp_path / "answering.safetensors"
    save_start(small, answering, StartNetwork(8))
    before = load_space(answering).start
    start, frame, report = teach(answering, studio, kept, CONFIG, keep_answers=True)
    pictures = torch.rand(3, 3, 32, 32) * 2 - 1
    assert torch.equal(start(pictures), before(pictures))  # to the bit
    assert start.locates and not before.locates and start.verdict is None
    assert start.locate(pictures).placement.shape == (3, 4)
    assert report["paintings"] == 80 * 2 and frame.half_height > 0
    save_start(answering, answering, start, frame=frame)
    again = load_space(answering)
    assert torch.equal(again.start(pictures), before(pictures)) and again.frame == frame
