"""--device and --precision of the avatar world: what is asked for, and that nothing is left behind on the CPU."""

import inspect
from pathlib import Path

import pytest
import torch

from w2wpp import load_space
from w2wpp.avatars import making
from w2wpp.avatars.world.base import AvatarBase
from w2wpp.avatars.world.embedder import AvatarEmbedder
from w2wpp.avatars.world.studio import open_studio
from w2wpp.cli import main
from w2wpp.cli.avatars import COMPUTED
from w2wpp.lora import hooks
from w2wpp.training.compute import Compute

MODELS = Path(__file__).resolve().parents[2] / "models"
BASE, EMBEDDER = MODELS / "avatar-base.safetensors", MODELS / "avatar-embedder.safetensors"
VERBS = (
    *(["avatars", stage] for stage in COMPUTED),
    ["demo"],
    ["evaluate", "space"],
    ["evaluate", "--inversion"],
    ["evaluate", "--wild"],
    ["invert", "space", "picture", "-o", "person"],
)


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
@pytest.mark.parametrize("device", ["abacus", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_in_one_sentence(verb, device, capsys):
    assert main([*verb, "--device", device]) == 1
    said = capsys.readouterr().err.strip()
    assert "--device" in said and "\n" not in said


def test_every_stage_that_takes_a_device_hands_it_on():
    for stage in COMPUTED:
        assert "compute" in inspect.signature(getattr(making, f"make_{stage}")).parameters


def test_the_cpu_asked_for_by_name_gives_the_same_bits():
    space = load_space(MODELS / "avatars.safetensors")
    vectors = space.sample(1, generator=torch.Generator().manual_seed(3)).vectors(space)
    found = []
    for options in ({}, {"device": Compute.pick("cpu").device}):
        studio = open_studio(BASE, EMBEDDER, pictures=1, steps=2, **options)
        words, noise = studio.scenes(1)
        pictures = studio.paint(words, noise, vectors, space.layout)
        found.append((pictures, studio.read(pictures, words, 1).traits))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_what_comes_from_the_cpu_meets_the_base_where_it_computes(monkeypatch):
    """On a device without numbers: what arrives there is looked at, and that the answer would come back."""
    space = load_space(MODELS / "avatars.safetensors")
    base = AvatarBase().requires_grad_(False).to("meta")
    arrived = []

    def watch(module, args, kwargs):
        arrived.extend([*args, *kwargs.values()])

    def hooked(modules, factors, scale):
        arrived.extend(t for name in modules for t in factors(name))
        return real(modules, factors, scale)

    real = hooks.hooked
    monkeypatch.setattr(hooks, "hooked", hooked)
    base.unet.register_forward_pre_hook(watch, with_kwargs=True)
    prompt = base.prompt(torch.zeros(2, 3, dtype=torch.long))
    prompt = base.described(prompt, torch.zeros(2, 20), torch.ones(2, 20))
    noisy, vectors = torch.zeros(2, 3, 32, 32), torch.zeros(2, space.layout.size)
    with hooks.loras_applied(base.unet, space.layout, vectors):
        output = base(noisy.to("meta"), torch.tensor([10, 900]), prompt)
        with pytest.raises(NotImplementedError, match="meta tensor"):
            base(noisy, torch.tensor([10, 900]), prompt)
    assert output.shape == noisy.shape and output.device.type == "meta"
    assert len(arrived) == 2 * len(space.layout.modules) + 2 * 3
    assert {t.device.type for t in arrived} == {"meta"}
    embedder = AvatarEmbedder().requires_grad_(False).to("meta")
    embedder.stem.register_forward_pre_hook(lambda module, args: arrived.extend(args))
    with pytest.raises(NotImplementedError, match="meta tensor"):
        embedder.read(noisy)
    assert arrived[-1].device.type == "meta"


def test_pictures_are_noised_where_they_are():
    base, g = AvatarBase(), torch.Generator().manual_seed(0)
    pictures, noise = torch.randn(2, 2, 3, 8, 8, generator=g)
    timestep = torch.tensor([3, 700])
    noisy, v = base.add_noise(pictures, noise, timestep)
    abar = base.alphas_cumprod[timestep].view(2, 1, 1, 1)
    torch.testing.assert_close(noisy, abar.sqrt() * pictures + (1 - abar).sqrt() * noise)
    torch.testing.assert_close(v, abar.sqrt() * noise - (1 - abar).sqrt() * pictures)
