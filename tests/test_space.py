"""Every space through one contract, and its file."""

import dataclasses
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from w2wpp import (
    AffineBasis,
    ConfigError,
    DataError,
    FormatError,
    ShapeError,
    Space,
    SpaceMismatch,
    load_space,
    save_space,
)
from w2wpp.files.container import Container, open_container, write_container
from w2wpp.space import compact
from w2wpp.spacefile import find_space


def generator(seed=7):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def stored(space, tmp_path):
    path = tmp_path / "space.safetensors"
    save_space(space, path)
    return path


def rewrite(path, change):
    """Edit a file's configuration in place."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    config = json.loads(header["__metadata__"]["config"])
    change(config)
    header["__metadata__"]["config"] = json.dumps(config)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def test_shapes(space, layout):
    ids = space.sample(3, generator=generator())
    w = space.decode(ids.z)
    assert ids.z.shape == (3, space.latent_size)
    assert w.shape == (3, layout.size)
    posterior = space.encode(w)
    assert posterior.mean.shape == posterior.logvar.shape == ids.z.shape
    assert space.decode(torch.zeros(0, space.latent_size)).shape == (0, layout.size)


def test_batch_equals_one_by_one(space):
    ids = space.sample(5, generator=generator())
    alone = torch.cat([one.vectors(space) for one in ids])
    apart = (ids.vectors(space) - alone).abs().amax(1) / alone.abs().amax(1)
    assert float(apart.max()) <= 1e-6  # as the documentation of `decode` says


def test_truncation_scales(space):
    full = space.sample(2, generator=generator()).z
    assert torch.equal(space.sample(2, generator=generator(), truncation=0.5).z, full * 0.5)
    assert space.sample(2, generator=generator(), truncation=0.0).z.abs().max() == 0


def test_residual_is_added_in_coefficients(space):
    z = torch.randn(2, space.latent_size)
    residual = torch.randn(2, space.basis.n_components)
    lifted = space.lift(residual) - space.lift(torch.zeros_like(residual))
    assert torch.allclose(space.decode(z, residual), space.decode(z) + lifted, atol=1e-4)


def test_a_residual_is_what_latents_do_not_express(space):
    z = space.sample(3, generator=generator()).z
    c = space.basis.project(space.decode(z)) + torch.randn(3, space.basis.n_components)
    with torch.no_grad():
        again = space.decode(z, space.residual(c, z))
    torch.testing.assert_close(again, space.lift(c), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(space.basis.mean, space.lift(torch.zeros_like(c))[0])


def test_latents_are_standardised(make_space):
    space = make_space("pca")
    w = space.lift(torch.randn(5, space.basis.n_components))
    raw = space.codec.encode(space.basis.project(w))
    post = space.encode(w)
    assert torch.allclose(post.mean * space.prior_std + space.prior_mean, raw.mean, atol=1e-5)
    assert torch.allclose(post.std * space.prior_std, raw.std)
    assert torch.allclose(space.decode(post.mean), w, atol=1e-3)


def test_file_round_trip_to_the_bit(space, stored):
    read = load_space(stored)
    z = torch.randn(3, space.latent_size)
    w = space.decode(z)
    assert torch.equal(read.decode(z), w)
    assert torch.equal(read.encode(w).mean, space.encode(w).mean)
    assert read.layout == space.layout
    assert read.provenance == space.provenance
    assert torch.equal(read.directions["smile"], space.directions["smile"])


def test_fingerprint_survives_and_names_the_coordinates(space, stored):
    read = load_space(stored)
    assert read.fingerprint == space.fingerprint
    recomputed = dataclasses.replace(read, provenance={"name": "other"}, directions={})
    assert recomputed.fingerprint == space.fingerprint
    moved = dataclasses.replace(read, prior_mean=read.prior_mean + 1)
    assert moved.fingerprint != space.fingerprint
    assert space.to("cpu").fingerprint == space.fingerprint


def test_saving_again_gives_the_same_bytes(stored, tmp_path):
    again = tmp_path / "again.safetensors"
    save_space(load_space(stored), again)
    assert again.read_bytes() == stored.read_bytes()


def test_opening_reads_no_weights(stored, monkeypatch):
    read = []
    container = type(open_container(stored))
    original = container.read

    def spy(self, name, **kwargs):
        read.append(name)
        return original(self, name, **kwargs)

    monkeypatch.setattr(container, "read", spy)
    space = load_space(stored)
    space.sample(2, generator=generator())
    assert set(read) == {"prior.mean", "prior.std", "direction.smile"}
    space.decode(torch.zeros(1, space.latent_size))
    assert space.codec.name == "pca" or any(name.startswith("codec.") for name in read)


def test_space_opened_in_inference_mode_gives_gradients(stored):
    with torch.inference_mode():
        space = load_space(stored)
        space.decode(torch.zeros(1, space.latent_size))
    z = torch.zeros(1, space.latent_size, requires_grad=True)
    space.decode(z).sum().backward()
    assert torch.isfinite(z.grad).all()


def test_sampling_is_the_same_in_a_fresh_process(stored):
    code = (
        "import sys, hashlib, torch, w2wpp; s = w2wpp.load_space(sys.argv[1]);"
        "z = s.sample(3, generator=torch.Generator().manual_seed(7)).z;"
        "print(hashlib.sha256(z.numpy().tobytes()).hexdigest(), z[0, :2].tolist())"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code, str(stored)],
        check=True,
        capture_output=True,
        text=True,
        cwd=root,
    )
    import hashlib

    z = load_space(stored).sample(3, generator=generator()).z
    assert done.stdout.split()[0] == hashlib.sha256(z.numpy().tobytes()).hexdigest()


def test_components_travel_in_half_precision(make_space, tmp_path):
    save_space(make_space("vae-skip"), tmp_path / "s")
    entries = open_container(tmp_path / "s").entries
    assert entries["basis.components"].dtype == torch.float16
    assert entries["codec.fc_mu.weight"].dtype == torch.float32  # not representable in half


def test_compact_never_loses_a_number():
    assert compact(torch.tensor([0.5, 3.0])).dtype == torch.float16
    assert compact(torch.tensor([0.5, 0.1])).dtype == torch.float32
    assert compact(torch.tensor([1e30])).dtype == torch.float32
    assert compact(torch.tensor([1, 2])).dtype == torch.int64


def test_parts_must_meet(space, layout):
    with pytest.raises(ShapeError, match="dimensions"):
        dataclasses.replace(space, prior_mean=torch.zeros(99))
    with pytest.raises(ShapeError, match="must fit together"):
        dataclasses.replace(space, layout=dataclasses.replace(layout, rank=1))
    with pytest.raises(ValueError, match="positive"):
        dataclasses.replace(space, prior_std=torch.zeros(space.latent_size))


def test_bad_input_is_refused(space, layout):
    with pytest.raises(DataError, match="NaN"):
        space.encode(torch.full((1, layout.size), float("nan")))
    with pytest.raises(ShapeError, match="P ="):
        space.encode(torch.zeros(1, layout.size + 1))
    with pytest.raises(ShapeError, match="Got"):
        space.decode(torch.zeros(1, space.latent_size + 1))
    with pytest.raises(ShapeError, match="residual"):
        space.decode(torch.zeros(1, space.latent_size), torch.zeros(1, 1))
    with pytest.raises(ValueError, match="at least one"):
        space.sample(0, generator=generator())
    with pytest.raises(ValueError, match="Truncation"):
        space.sample(1, generator=generator(), truncation=float("nan"))


def test_wrong_layout_in_a_file(stored):
    rewrite(stored, lambda c: c["layout"]["modules"].pop())
    with pytest.raises((FormatError, ShapeError)):
        load_space(stored)


@pytest.mark.parametrize("key", ["layout", "basis", "codec", "provenance", "fingerprint"])
def test_missing_configuration(stored, key):
    rewrite(stored, lambda c: c.pop(key))
    with pytest.raises(FormatError, match=key):
        load_space(stored)


def test_claimed_sizes_must_be_backed_by_the_file(make_space, tmp_path):
    path = tmp_path / "s"
    save_space(make_space("vae-mlp"), path)
    rewrite(path, lambda c: c["codec"].update(hidden=[10**9]))
    with pytest.raises(FormatError, match="claims sizes"):
        load_space(path)


def test_unknown_codec_in_a_file(stored):
    rewrite(stored, lambda c: c["codec"].update(name="from the future"))
    with pytest.raises(FormatError, match="from the future"):
        load_space(stored)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_a_space_and_in_its_file(make_space, tmp_path, bad):
    space = make_space("pca")
    with pytest.raises(ConfigError, match="NaN or infinite numbers: prior_mean"):
        dataclasses.replace(space, prior_mean=torch.full((space.latent_size,), bad))
    with pytest.raises(ConfigError, match="a finite scale"):
        AffineBasis(4, scale=bad)
    with pytest.raises(ConfigError, match="finite, positive alpha"):
        dataclasses.replace(space.layout, alpha=bad)
    save_space(space, tmp_path / "s")
    with open_container(tmp_path / "s", "w2wpp.space") as file:
        tensors = {n: file.read(n) for n in file.entries}
        tensors["prior.mean"] = torch.full((space.latent_size,), bad)
        write_container(tmp_path / "s", tensors, format="w2wpp.space", config=file.config)
    with pytest.raises(FormatError, match="NaN"):
        load_space(tmp_path / "s")


def damaged_configurations():
    return {
        "rank Infinity": lambda c: c["layout"].update(rank=float("inf")),
        "rank 1.5": lambda c: c["layout"].update(rank=1.5),
        "alpha NaN": lambda c: c["layout"].update(alpha=float("nan")),
        "alpha of 400 digits": lambda c: c["layout"].update(alpha=10**400),
        "alpha zero": lambda c: c["layout"].update(alpha=0),
        "layout a list": lambda c: c.update(layout=[]),
        "dropout text": lambda c: c["codec"].update(dropout="x"),
        "dropout 2": lambda c: c["codec"].update(dropout=2),
        "hidden a number": lambda c: c["codec"].update(hidden=3),
        "hidden negative": lambda c: c["codec"].update(hidden=[-3]),
        "codec name a list": lambda c: c["codec"].update(name=[1]),
        "latent size of 30 digits": lambda c: c["codec"].update(latent_size=10**30),
        "basis rank text": lambda c: c["basis"].update(rank="12"),
        "basis kind none": lambda c: c["basis"].update(kind=None),
        "provenance a list": lambda c: c.update(provenance=[1]),
        "fingerprint a number": lambda c: c.update(fingerprint=7),
        "start a list": lambda c: c.update(start=[]),
        "start of impossible sizes": lambda c: c.update(
            start={"latent_size": 5, "rank": 0, "size": 2**62, "width": 2**62, "features": 8}
        ),
    }


@pytest.mark.parametrize("what", damaged_configurations())
def test_a_damaged_configuration_is_one_sentence(make_space, tmp_path, what):
    save_space(make_space("vae-skip"), tmp_path / "s.safetensors")
    rewrite(tmp_path / "s.safetensors", damaged_configurations()[what])
    with pytest.raises(FormatError, match=r"s\.safetensors") as caught:
        load_space(tmp_path / "s.safetensors")
    assert "\n" not in str(caught.value)


def test_find_space_by_fingerprint(space, stored, tmp_path):
    (tmp_path / "other.safetensors").write_bytes(b"not a space")
    assert find_space(space.fingerprint, [tmp_path]) == stored
    with pytest.raises(SpaceMismatch, match="Name the space file"):
        find_space("0" * 32, [tmp_path])


def test_what_lies_beside_the_coordinates_changes_without_reading_them(stored, monkeypatch):
    space, read = load_space(stored), Container.read
    names = []

    def spy(self, name, **kwargs):
        names.append(name)
        return read(self, name, **kwargs)

    monkeypatch.setattr(Container, "read", spy)
    other = space.with_(provenance={"name": "other"}, directions={})
    assert other.fingerprint == space.fingerprint and other.name == "other" and not names
    with pytest.raises(ConfigError, match="Got prior_mean"):
        space.with_(prior_mean=space.prior_mean + 1)


def test_spaces_are_immutable(space):
    with pytest.raises(dataclasses.FrozenInstanceError):
        space.layout = None
    assert isinstance(space, Space)
