"""Start networks: stored with a space without changing it, and fitted so that they read people."""

import dataclasses

import pytest
import torch

from w2wpp import Basis, Layout, Module, Space, build_codec, load_space, save_space
from w2wpp.errors import ConfigError, DataError, FormatError, ShapeError
from w2wpp.placement import Frame
from w2wpp.spacefile import save_directions, save_start
from w2wpp.start_network import StartNetwork, build_start
from w2wpp.training.augment import Augmentation
from w2wpp.training.fit_start import LabelMap, StartTraining, start_from_reader, train_reader

D = 3


def make_space(start=None):
    torch.manual_seed(1)
    layout = Layout("toy", "toy", (Module("a", 3, 2),), rank=1, alpha=1.0)
    v = torch.linalg.qr(torch.randn(layout.size, D)).Q.T
    basis = Basis(torch.zeros(layout.size), torch.ones(layout.size), v, torch.ones(D))
    codec = build_codec({"name": "pca", "coefficient_size": D, "latent_size": D})
    return Space(layout, basis, codec, torch.zeros(D), torch.ones(D), start=start)


def make_network():
    torch.manual_seed(0)
    return StartNetwork(D, rank=2, size=8, width=8, features=8).requires_grad_(False).eval()


def test_a_space_file_keeps_its_start_and_its_fingerprint(tmp_path):
    space = make_space()
    save_space(space, tmp_path / "old.safetensors")
    old = load_space(tmp_path / "old.safetensors")
    assert old.start is None
    save_space(dataclasses.replace(old, start=make_network()), tmp_path / "new.safetensors")
    direction = {"left": torch.ones(D)}
    save_directions(tmp_path / "new.safetensors", tmp_path / "new.safetensors", direction, {})
    new = load_space(tmp_path / "new.safetensors")
    assert new.fingerprint == old.fingerprint == space.fingerprint
    vars(new).pop("fingerprint")
    assert new.fingerprint == space.fingerprint
    pictures = torch.rand(2, 3, 20, 12) * 2 - 1
    expected = make_network()(pictures)
    torch.testing.assert_close(new.start_from(pictures).z, expected, rtol=0.01, atol=0.01)
    assert new.start.spread.shape == (2, D)


def test_a_start_of_another_size_is_refused(tmp_path):
    with pytest.raises(ShapeError, match="start network"):
        make_space(StartNetwork(D + 1, size=8, width=8, features=8))
    with pytest.raises(ConfigError, match="no start network"):
        make_space().start_from(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ShapeError):
        make_network()(torch.zeros(1, 4, 8, 8))


def test_a_space_file_whose_start_does_not_match_is_refused(tmp_path):
    network = make_network()
    space = make_space(network)
    network.features += 1  # what the file will say of it
    save_space(space, tmp_path / "odd.safetensors")
    with pytest.raises(FormatError):
        load_space(tmp_path / "odd.safetensors")


def test_a_start_learns_to_read_people():
    """Brightness and tint decide the latent; a few people with latents are enough for the map."""

    def pictures(count, generator):
        labels = torch.randn(count, 2, generator=generator)
        colour = torch.stack([labels[:, 0], labels[:, 1], labels.sum(1)], 1) / 3
        return colour[:, :, None, None].expand(-1, -1, 8, 8).contiguous(), labels

    # Brightness is what augmentation takes away.
    config = StartTraining(steps=60, batch=32, size=8, width=8, features=16, augmented=0)
    reader = train_reader(pictures, 2, config)
    again = train_reader(pictures, 2, config)
    assert all(
        torch.equal(a, b) for a, b in zip(reader.state_dict().values(), again.state_dict().values())
    )
    generator = torch.Generator().manual_seed(0)
    labels = torch.randn(40, 2, generator=generator)
    true = torch.tensor([[1.0, 0.0, 2.0], [0.5, -1.0, 0.0]])
    answer = LabelMap.fit(labels, labels @ true + 0.3, penalty=1e-6)
    start = start_from_reader(reader, answer)
    seen, who = pictures(200, generator)
    z = who @ true + 0.3
    r2 = 1 - (start(seen) - z).square().sum() / (z - z.mean(0)).square().sum()
    assert r2 > 0.8
    torch.testing.assert_close(start.spread, true, atol=0.01, rtol=0)
    assert build_start(start.config).state_dict().keys() == start.state_dict().keys()


def test_a_reader_that_saw_bad_pictures_reads_bad_pictures():
    """Where a disc is and how large, in pictures as they are, too dark, and half hidden."""

    def pictures(count, generator):
        labels = torch.rand(count, 2, generator=generator) * 2 - 1
        axis = torch.linspace(-1, 1, 16)
        down, radius = labels[:, :1, None] * 0.3, labels[:, 1:, None] * 0.1 + 0.4
        inside = (axis[None, :, None] - down).square() + axis[None, None].square() < radius.square()
        return inside[:, None].float().expand(-1, 3, -1, -1) * 1.4 - 0.7, labels

    seen, labels = pictures(300, torch.Generator().manual_seed(1))
    hidden = seen.clone()
    hidden[..., 8:] = 0.0
    shown = {"as they are": seen, "dark": (seen + 1) * 0.6 - 1, "half hidden": hidden}
    wrong = {}
    for augmented in (0.0, 0.7):
        config = StartTraining(
            steps=250, batch=32, size=16, width=8, features=16, augmented=augmented,
            augmentation=Augmentation(shift=0, zoom=0, turn=0, covered=0),
        )  # fmt: skip
        reader = train_reader(pictures, 2, config)
        assert reader.hides == (augmented > 0)
        wrong[augmented] = {
            name: float((reader(some) - labels)[:, 0].square().mean() / labels[:, 0].var())
            for name, some in shown.items()
        }
    assert wrong[0.7]["as they are"] < 0.15
    for name in ("dark", "half hidden"):
        assert wrong[0.7][name] < 0.7 * wrong[0.0][name], (name, wrong)


@pytest.mark.parametrize("augmented", [-0.1, 1.5, float("nan")])
def test_a_share_of_augmented_pictures_is_a_share(augmented):
    with pytest.raises(ConfigError, match="between 0, none, and 1"):
        StartTraining(augmented=augmented)


def test_answers_are_corrected_by_what_is_painted():
    """Latents show at half strength and with an offset: the corrected answers make up for both."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randn(60, 2, generator=generator)
    true = torch.tensor([[1.0, 0.0, 2.0], [0.5, -1.0, 0.0]])
    answer = LabelMap.fit(labels, labels @ true, penalty=1e-6)
    shown = 0.5 * torch.linalg.pinv(true)  # [d, L]

    def read(z):
        return z @ shown + 0.4

    painted = torch.randn(200, 3, generator=generator)
    better = answer.calibrated(painted, read(painted), damping=1e-6)
    torch.testing.assert_close(read(better(labels)), labels, atol=0.01, rtol=0.01)
    assert (read(answer(labels)) - labels).abs().max() > 0.5
    # Where nothing shows, damping keeps answers from running away.
    hidden = read(painted) * torch.tensor([1.0, 0.0]) + 0.001 * torch.randn(
        200, 2, generator=generator
    )
    assert answer.calibrated(painted, hidden)(labels).norm() < 3 * answer(labels).norm()
    with pytest.raises(DataError, match="more paintings"):
        answer.calibrated(painted[:3], read(painted[:3]))
    with pytest.raises(DataError, match="Paintings come with"):
        answer.calibrated(painted, read(painted)[:, :1])


def test_a_start_that_locates_and_was_measured_comes_back_from_its_file(tmp_path):
    torch.manual_seed(0)
    sizes = {"size": 16, "width": 8, "features": 8}
    start = StartNetwork(
        D, **sizes, locator=sizes, measured=True, hides=True, verdict={"version": 1}
    )
    start = start.requires_grad_(False).eval()
    frame = Frame(0.1, -0.2, 0.4, 0.5)
    save_space(make_space(), tmp_path / "old.safetensors")
    save_start(tmp_path / "old.safetensors", tmp_path / "new.safetensors", start, frame=frame)
    space = load_space(tmp_path / "new.safetensors")
    assert space.frame == frame and space.fingerprint == make_space().fingerprint
    assert space.start.config == start.config
    pictures = torch.rand(5, 3, 16, 16) * 2 - 1
    for mine, theirs in zip(
        vars(start.locate(pictures)).values(), vars(space.start.locate(pictures)).values()
    ):
        torch.testing.assert_close(mine, theirs, rtol=0.01, atol=0.01)
    assert space.start.strangeness(space.start.describe(pictures)).shape == (5,)
    save_space(space, tmp_path / "again.safetensors")
    assert load_space(tmp_path / "again.safetensors").frame == frame
    with pytest.raises(ConfigError, match="not taught to say where"):
        make_network().locate(pictures)
    with pytest.raises(ConfigError, match="was not measured"):
        make_network().strangeness(torch.zeros(1, 8))


def test_a_file_of_a_later_frame_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(Frame, "VERSION", 2)
    save_space(dataclasses.replace(make_space(), frame=Frame()), tmp_path / "late.safetensors")
    monkeypatch.undo()
    with pytest.raises(FormatError, match="frames of version 1, not 2"):
        load_space(tmp_path / "late.safetensors")
