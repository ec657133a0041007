"""The networks: what they promise with any weights, and that files bring them back."""

from dataclasses import replace

import pytest
import torch

import w2wpp.avatars.edition2.train_base as training_base
import w2wpp.avatars.edition2.train_reader as reading
import w2wpp.avatars.edition2.train_vae as module
from w2wpp.avatars.edition2.base import (
    SLOTS,
    VOCABULARY,
    AvatarBase,
    load_base,
    save_base,
    word_indices,
)
from w2wpp.avatars.edition2.dreambooth import DreamBooth, Photographs, people_loss
from w2wpp.avatars.edition2.painter import Painter
from w2wpp.avatars.edition2.reader import BACKBONES, AvatarReader, load_reader, save_reader
from w2wpp.avatars.edition2.scene import WORDS, face_map, sample_identities, sample_scenes
from w2wpp.avatars.edition2.train_reader import ReaderTraining
from w2wpp.avatars.edition2.train_vae import VaeTraining, measure_vae, train_vae
from w2wpp.avatars.edition2.vae import AvatarVae, load_vae, save_vae
from w2wpp.avatars.world.adapters import avatar_layout
from w2wpp.errors import ConfigError
from w2wpp.training.people import initial_vector, measure_start, train_people


@pytest.fixture(scope="module")
def base() -> AvatarBase:
    torch.manual_seed(0)
    return AvatarBase().requires_grad_(False).eval()


@pytest.fixture(scope="module")
def vae() -> AvatarVae:
    torch.manual_seed(1)
    return AvatarVae(wide=16, deep=16).requires_grad_(False).eval()


def pictures(count: int, size: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(2)) * 2 - 1


def test_the_autoencoder_takes_any_multiple_of_eight(vae):
    for size in (32, 64):
        latents = vae.encode(pictures(2, size))
        assert latents.shape == (2, 4, size // 8, size // 8)
        assert vae.decode(latents).shape == (2, 3, size, size)


def test_files_bring_networks_back(base, vae, tmp_path):
    save_vae(vae, tmp_path / "vae.safetensors")
    again = load_vae(tmp_path / "vae.safetensors")
    assert torch.allclose(again.encode(pictures(1)), vae.encode(pictures(1)), atol=2e-2)
    save_base(base, tmp_path / "base.safetensors")
    loaded = load_base(tmp_path / "base.safetensors")
    words = torch.zeros(1, 4, dtype=torch.long)
    noisy, time = torch.randn(1, 4, 16, 16), torch.tensor([500])
    one, two = (b(noisy, time, b.prompt(words)) for b in (base, loaded))
    assert torch.allclose(one, two, atol=2e-2)
    reader = AvatarReader("conv", width=16).eval()
    save_reader(reader, tmp_path / "reader.safetensors")
    assert torch.allclose(
        load_reader(tmp_path / "reader.safetensors")(pictures(2)), reader(pictures(2)), atol=2e-2
    )


def test_a_training_that_was_stopped_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    config = VaeTraining(pictures=4, steps=7, batch=2, warm_up=2)
    straight = train_vae(config)
    path = tmp_path / "vae.ckpt"

    def stop(line):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "REPORT_EVERY", 4)  # after the checkpoint of step 3
    with pytest.raises(KeyboardInterrupt):
        train_vae(config, checkpoint=path, every=3, callback=stop)
    resumed = train_vae(config, checkpoint=path, every=3)
    for one, two in zip(straight.state_dict().values(), resumed.state_dict().values()):
        assert torch.equal(one, two)
    figures = measure_vae(straight, pictures=2)
    assert 5 < figures["psnr"] < 40 and figures["latent_std"] == pytest.approx(1, abs=0.5)


def test_a_base_goes_on_from_another(base, tmp_path):
    # A step of almost nothing: what comes out is where it began.
    save_base(base, tmp_path / "base.safetensors")
    still = (training_base.Round(steps=1, batch=2, learning_rate=1e-12, time_power=1.0),)
    config = training_base.BaseTraining(seed=5, pictures=4, rounds=still)
    latents = torch.randn(4, 4, 16, 16)
    went_on = replace(config, start=str(tmp_path / "base.safetensors"))
    for settings, same in ((went_on, True), (config, False)):
        found = training_base.train_base(settings, latents)
        pairs = zip(found.unet.parameters(), base.unet.parameters())
        assert all(torch.allclose(a, b, atol=1e-3) for a, b in pairs) == same


def test_guides_ask_the_middle_for_the_picture_and_the_place():
    torch.manual_seed(3)
    base = AvatarBase()
    guides = training_base.Guides(base)
    placement = sample_scenes(2, generator=torch.Generator().manual_seed(0)).placement()
    latents = torch.randn(2, 4, 16, 16)
    base(latents, torch.tensor([10, 900]), base.unconditional(2))
    asked = guides(latents, placement)
    asked.backward()
    assert float(base.unet.conv_in.weight.grad.abs().max()) > 0
    assert base.unet.conv_out.weight.grad is None  # the middle does not know of it
    torch.nn.init.zeros_(guides.head.weight)
    torch.nn.init.zeros_(guides.head.bias)
    nothing = 0.5 * latents.square().mean() + face_map(placement, 8).square().mean()
    torch.testing.assert_close(guides(latents, placement), nothing)


def test_a_base_that_was_interrupted_is_the_same(tmp_path):
    rounds = (training_base.Round(steps=3, batch=2, learning_rate=1e-3, time_power=1.0),)
    config = training_base.BaseTraining(seed=5, pictures=4, rounds=rounds)
    latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    straight = training_base.train_base(config, latents)
    path = tmp_path / "base.ckpt"
    save = training_base.save_run

    def stopped(*args, **kwargs):
        save(*args, **kwargs)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_base, "SAVED_EVERY", 2)
        patch.setattr(training_base, "save_run", stopped)
        with pytest.raises(KeyboardInterrupt):
            training_base.train_base(config, latents, checkpoint=path)
    resumed = training_base.train_base(config, latents, checkpoint=path)
    unguided = training_base.train_base(replace(config, guided=0.0), latents)
    for one, two in zip(straight.parameters(), resumed.parameters()):
        assert torch.equal(one, two)
    pairs = zip(straight.unet.mid_block.parameters(), unguided.unet.mid_block.parameters())
    assert not any(torch.equal(one, two) for one, two in pairs)


def test_words_in_the_order_of_the_slots():
    assert SLOTS == ("person", *WORDS) and len(VOCABULARY) == len(SLOTS)
    assert word_indices(smile="smiling").tolist() == [-1, 2, -1, -1]
    assert word_indices(background="white", framing="wide").tolist() == [0, -1, -1, 1]
    with pytest.raises(ConfigError, match="grinning"):
        word_indices(smile="grinning")
    with pytest.raises(ConfigError, match="slot 'hat'"):
        word_indices(hat="red")


@pytest.mark.parametrize("make", BACKBONES)
def test_a_reader_answers_every_question(make):
    answers = AvatarReader(make, width=16).read(pictures(3, 128))
    assert (
        answers.traits.shape == (3, 20)
        and answers.placement.shape == (3, 4)
        and answers.present.shape == (3,)
    )
    assert torch.allclose(answers.identity.norm(dim=1), torch.ones(3))
    assert {slot: answer.shape[1] for slot, answer in answers.words.items()} == {
        s: len(w) for s, w in WORDS.items()
    }
    asked = torch.stack([answers.words[slot].argmax(1) for slot in WORDS], dim=1)
    assert bool(answers.obeyed(asked).all()) and not bool(answers.obeyed(asked + 1).any())


def test_readers_of_another_make_are_refused():
    with pytest.raises(ConfigError, match="crystal ball"):
        AvatarReader("crystal ball")


def test_a_reader_learns():
    """One picture over and over: its loss falls from that of not knowing anything."""
    config = ReaderTraining(
        pictures=1, empty=1, steps=8, batch=4, moved=0, nobody=0, blur=0, gain=0
    )
    losses = []
    monitored = AvatarReader("conv", width=16)
    album = reading._album(config, torch.Generator().manual_seed(0))
    optimiser = torch.optim.Adam(monitored.parameters(), lr=3e-3)
    for _ in range(12):
        loss = reading._loss(monitored, album, config, torch.Generator().manual_seed(0))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_all_people_are_photographed_under_one_protocol(vae):
    people = sample_identities(2, generator=torch.Generator().manual_seed(3))
    album = Photographs(people, DreamBooth(photographs=3, pictures=3), vae)
    latents, words, weights, noise, timestep = album.batch(1)
    assert latents.shape == (6, 4, 16, 16) and words.shape == (6, 4)
    for shared in (words, weights, noise, timestep):
        assert torch.equal(shared[:3], shared[3:])
    assert not torch.allclose(latents[:3], latents[3:])


def test_own_conditions_do_not_depend_on_the_group(vae):
    people = sample_identities(2, generator=torch.Generator().manual_seed(3))
    config = DreamBooth(photographs=3, pictures=3, conditions="own")
    together, alone = (
        Photographs(people, config, vae),
        Photographs(people[1:], config, vae, torch.tensor([1])),
    )
    noise = together.batch(1)[3]
    assert not torch.equal(noise[:3], noise[3:])
    for one, two in zip(alone.batch(1), together.batch(1)):
        assert torch.equal(one, two[3:])


def test_people_are_trained_and_painted(base, vae):
    people = sample_identities(2, generator=torch.Generator().manual_seed(3))
    layout, config = avatar_layout(base), DreamBooth(photographs=2, pictures=2, steps=2)
    loss = people_loss(base, vae, layout, people, config)
    start = measure_start(loss, initial_vector(layout), 2, batches=1)
    vectors = train_people(loss, 2, start, config)
    assert vectors.shape == (2, layout.size) and not torch.allclose(vectors[0], vectors[1])
    moved = (vectors[1] - start.vector).norm()
    only = people_loss(base, vae, layout, people[1:], config, torch.tensor([1]))
    alone = train_people(only, 1, start, config)
    # Products in bf16 depend a little on the batch.
    assert moved > 0 and (vectors[1] - alone[0]).norm() < 0.05 * moved
    painter = Painter(base, vae, steps=2, chunk=2)
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(4))
    words = torch.zeros(4, 4, dtype=torch.long)
    together = painter.paint(words, noise, vectors, layout)
    alone = painter.paint(words[2:], noise[2:], vectors[1:], layout)
    assert together.shape == (4, 3, 128, 128)
    assert torch.allclose(together[2:], alone, atol=2e-2)
