"""`w2wpp fit-start`: from a table of pictures to a space that starts inversions."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from w2wpp import load_space
from w2wpp.cli import main
from w2wpp.identity import save_identity
from w2wpp.lora.layout import Layout, Module
from w2wpp.spacefile import save_space
from w2wpp.training.dataset import load_dataset, write_dataset
from w2wpp.training.fit_basis import fit_basis
from w2wpp.training.fit_vae import linear_space

PEOPLE = 40


@pytest.fixture
def world(tmp_path):
    """People whose weights follow two numbers, which are also the tint of their pictures."""
    generator = torch.Generator().manual_seed(0)
    traits = (
        torch.rand(2 * PEOPLE, 2, generator=generator) * 1.6 - 0.8
    )  # the second half has no LoRA
    layout = Layout("toy", "toy", (Module("a", 3, 2),), rank=1, alpha=1.0)
    w = traits[:PEOPLE] @ torch.randn(2, layout.size, generator=generator)
    files = [f"p{i}.safetensors" for i in range(PEOPLE)]
    dataset = write_dataset(
        tmp_path / "data.safetensors",
        w,
        layout,
        torch.arange(PEOPLE),
        heldout=torch.arange(PEOPLE) >= PEOPLE - 8,
        provenance={"files": files},
    )
    save_space(linear_space(dataset, fit_basis(dataset, 2)), tmp_path / "space.safetensors")
    for i, (red, green) in enumerate(traits.tolist()):
        save_tint(tmp_path / f"{i}.png", red, green)
    return tmp_path, traits


def save_tint(path, red, green):
    colour = torch.tensor([red, green, 0.0]).add(1).mul(127.5).round().byte().numpy()
    Image.fromarray(np.tile(colour, (12, 20, 1))).save(path)


def write_table(folder, traits, labels):
    lines = ["picture,person" + (",red,green" if labels else "")]
    for i, (red, green) in enumerate(traits.tolist()):
        person = f"p{i}" if i < PEOPLE else ""
        if labels:
            lines.append(f"{i}.png,{person},{red},{green}")
        elif person:
            lines.append(f"{i}.png,{person}")
    (folder / "table.csv").write_text("\n".join(lines), encoding="utf-8")


def fit(folder, *options):
    arguments = ["fit-start", folder / "space.safetensors", folder / "table.csv", "--data"]
    arguments += [folder / "data.safetensors", "--steps", "150", "--size", "8", "--width", "8"]
    return main([str(a) for a in arguments] + ["--json", *options])


@pytest.mark.parametrize("labels", [True, False])
def test_people_that_were_held_out_are_recognised(world, capsys, labels):
    folder, traits = world
    write_table(folder, traits, labels)
    assert fit(folder, "-o", str(folder / "out.safetensors")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["heldout_pictures"] == 8
    assert report["pictures"] == (2 * PEOPLE if labels else PEOPLE)
    assert report["heldout_latent_r2"] > 0.7
    before, space = load_space(folder / "space.safetensors"), load_space(folder / "out.safetensors")
    assert before.start is None and space.fingerprint == before.fingerprint
    # The figure is of people that no step has seen: it is what anybody gets who reads the pictures again.
    dataset = load_dataset(folder / "data.safetensors")
    with torch.no_grad():
        truth = space.encode(dataset.vectors(dataset.heldout_rows)).mean
    tints = torch.cat([traits[PEOPLE - 8 : PEOPLE], torch.zeros(8, 1)], 1)
    pictures = (
        tints.add(1).mul(127.5).round().div(127.5).sub(1)[:, :, None, None].expand(-1, -1, 8, 8)
    )
    answers = space.start_from(pictures).z
    r2 = 1 - (truth - answers).square().sum() / (truth - truth.mean(0)).square().sum()
    assert r2 == pytest.approx(report["heldout_latent_r2"], abs=0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty file"),
        ("file,who\n0.png,p0", "needs a header that starts with 'picture,person'"),
        ("picture,person\nnone.png,p0", "no picture 'none.png'"),
        ("picture,person\n0.png,p99", "no LoRA 'p99'"),
        ("picture,person\n0.png,", "needs labels"),
        ("picture,person,a\n0.png,p0,x", "not all finite numbers"),
        ("picture,person,a\n0.png,p0,nan", "Got 'nan'"),
        ("picture,person,a\n0.png,p0", "2 fields, the header has 3"),
        ("picture,person\n0.png,p39", "0 of the people"),
        ("picture,person,a\n0.png,p0,1\n1.png,p1,1", "same for everybody"),
        ("picture,person\n0.png,p0\ntable.csv,p1", "not a picture"),
    ],
)
def test_a_bad_table_is_one_sentence_and_the_space_stays(world, capsys, text, message):
    folder, _ = world
    (folder / "table.csv").write_text(text, encoding="utf-8")
    before = (folder / "space.safetensors").read_bytes()
    assert fit(folder) == 1
    assert message in capsys.readouterr().err
    assert (folder / "space.safetensors").read_bytes() == before


def test_paintings_correct_the_answers(world, capsys):
    """Pictures painted with latents show half of what the weights promise; answers then go twice as far."""
    folder, traits = world
    write_table(folder, traits, labels=True)
    space, dataset = (
        load_space(folder / "space.safetensors"),
        load_dataset(folder / "data.safetensors"),
    )
    drawn = space.sample(60, generator=torch.Generator().manual_seed(3))
    save_identity(drawn, folder / "drawn.safetensors")
    with torch.no_grad():
        z = space.encode(dataset.vectors()).mean
    seen = drawn.z @ torch.linalg.lstsq(z, traits[:PEOPLE]).solution * 0.5
    lines = ["picture,identity,index"]
    for i, (red, green) in enumerate(seen.clamp(-1, 1).tolist()):
        save_tint(folder / f"painted-{i}.png", red, green)
        lines.append(f"painted-{i}.png,drawn.safetensors,{i}")
    (folder / "painted.csv").write_text("\n".join(lines), encoding="utf-8")
    assert fit(folder, "-o", str(folder / "plain.safetensors")) == 0
    painted = ("--painted", str(folder / "painted.csv"))
    assert fit(folder, "-o", str(folder / "out.safetensors"), *painted) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["paintings"] == 60
    pictures = (
        torch.rand(20, 3, 1, 1).mul(1.2).sub(0.6).expand(-1, -1, 8, 8)
        * torch.tensor([1, 1, 0])[:, None, None]
    )
    plain = load_space(folder / "plain.safetensors").start_from(pictures).z
    corrected = load_space(folder / "out.safetensors").start_from(pictures).z
    assert 1.5 < corrected.norm() / plain.norm() < 2.5

    (folder / "painted.csv").write_text(
        lines[0] + "\npainted-0.png,drawn.safetensors,60", encoding="utf-8"
    )
    assert fit(folder, *painted) == 1
    assert "holds 60 identities" in capsys.readouterr().err


def test_paintings_alone_are_enough(world, capsys):
    folder, traits = world
    space, data = (
        load_space(folder / "space.safetensors"),
        load_dataset(folder / "data.safetensors"),
    )
    drawn = space.sample(120, generator=torch.Generator().manual_seed(4))
    save_identity(drawn, folder / "drawn.safetensors")
    with torch.no_grad():
        z = space.encode(data.vectors()).mean
    seen = (drawn.z @ torch.linalg.lstsq(z, traits[:PEOPLE]).solution).clamp(-1, 1)
    lines = ["picture,identity,index"]
    for i, (red, green) in enumerate(seen.tolist()):
        for scene in range(1 + (i > 0)):  # of the first there is one only
            save_tint(folder / f"own-{i}-{scene}.png", red, green)
            lines.append(f"own-{i}-{scene}.png,drawn.safetensors,{i}")
    (folder / "painted.csv").write_text("\n".join(lines), encoding="utf-8")
    common = ["fit-start", str(folder / "space.safetensors"), "--steps", "80", "--size", "8"]
    common += ["--width", "8", "--json", "-o", str(folder / "alone.safetensors")]
    assert main([*common, "--painted", str(folder / "painted.csv")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["people"] + report["kept_apart"] == report["paintings"] == 120
    learned = load_space(folder / "alone.safetensors")
    assert learned.fingerprint == space.fingerprint and learned.frame is not None
    assert learned.start.locates and learned.start.verdict
    pictures = torch.cat([seen, torch.zeros(120, 1)], 1)[:, :, None, None].expand(-1, -1, 8, 8)
    answers = learned.start_from(pictures).z
    assert float(torch.nn.functional.cosine_similarity(answers, drawn.z).mean()) > 0.8

    assert main(common) == 1
    assert "--painted" in capsys.readouterr().err
    assert main([*common[:2], str(folder / "painted.csv"), *common[2:]]) == 1
    assert "--data" in capsys.readouterr().err
