"""The command line as a user meets it: verbs, JSON, exit codes. Runs in this process."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from w2wpp import Space, edit, load_identity, load_lora, load_space, save_lora, save_space
from w2wpp.cli import build_parser, main
from w2wpp.commands import command
from w2wpp.lora.gauge import span_distance
from w2wpp.training.dataset import load_dataset, write_dataset

ROOT = Path(__file__).parents[2]


@pytest.fixture
def loras(dataset, tmp_path):
    """One folder per person, two files each, of the first 20 rows."""
    for i, w in enumerate(dataset.vectors()[:20]):
        path = tmp_path / "loras" / f"person{i // 2}" / f"{i:02d}.safetensors"
        save_lora(dataset.layout.unpack(w), path, alpha=dataset.layout.alpha)
    (tmp_path / "layout.json").write_text(json.dumps(dataset.layout.to_json()))
    return tmp_path / "loras"


@pytest.fixture
def space_file(make_space, tmp_path):
    space = make_space("vae-skip", licence="Apache-2.0", trigger_prompt="person", version="3")
    save_space(space, tmp_path / "space.safetensors")
    return tmp_path / "space.safetensors"


def test_every_verb_of_the_library_is_there():
    verbs = build_parser()._subparsers._group_actions[0].choices
    names = "info sample interpolate encode export dataset fit-basis train directions edit"
    names += " import-w2w import-identity import-vae"
    assert set(names.split()) <= set(verbs)


def test_from_lora_files_to_a_trained_space(run, loras, dataset):
    code, result, _ = run(
        *("dataset", loras, "--layout", "layout.json", "--identity", "folder"),
        *("--heldout", 0.2, "-o", "data.safetensors"),
    )
    assert code == 0
    assert (result["rows"], result["persons"], result["heldout_rows"]) == (20, 10, 4)
    assert torch.equal(load_dataset("data.safetensors").vectors(), dataset.vectors()[:20])

    code, result, _ = run(
        "fit-basis", "data.safetensors", "--components", 8, "-o", "basis.safetensors"
    )
    assert code == 0 and result["weight_r2"]["training"] > 0.8

    train = ("train", "basis.safetensors", "--name", "toy", "--licence", "Apache-2.0")
    options = ("--latent", 3, "--epochs", 4, "--kl", "sigmoid", "--hidden", 8, "--validation", 0.3)
    code, result, _ = run(*train, *options, "--seed", 5, "-o", "space.safetensors")
    settings = result["training"]["settings"]
    assert code == 0 and settings["kl"] == "sigmoid" and settings["seed"] == 5
    space = load_space("space.safetensors")
    assert (space.name, space.licence, space.latent_size) == ("toy", "Apache-2.0", 3)

    code, result, _ = run(*train, "--codec", "pca", "--latent", 4, "-o", "pca.safetensors")
    assert code == 0 and load_space("pca.safetensors").latent_size == 4

    original = ("--latent", 3, "--hidden", 8, 4, "--epochs", 2)
    fingerprints = set()
    for name in ("original", "seed"):  # its older name
        how = ("--codec", name, "--kl", name)
        code, result, _ = run(
            "train", "data.safetensors", *how, *original, "-o", "original.safetensors"
        )
        assert code == 0
        fingerprints.add(result["fingerprint"])
    assert len(fingerprints) == 1
    code, _, err = run("train", "data.safetensors", "-o", "x.safetensors")
    assert code == 1 and f"run '{command('fit-basis')}' on it first" in err


def test_seeded_means_the_same_bytes(run, loras, make_space):
    """Whatever else drew random numbers before."""
    save_space(make_space("vae-skip"), "space.safetensors")
    options = ("--latent", 3, "--epochs", 3, "--hidden", 8, "--validation", 0, "--input-noise", 0.1)
    calls = {
        "data": ("dataset", loras, "--layout", "layout.json", "--seed", 3),
        "basis": ("fit-basis", "data", "--components", 6),
        "trained": ("train", "basis", "--dropout", 0.2, "--seed", 3, *options),
        "people": ("sample", "space.safetensors", "--seed", 3, "-n", 2),
    }
    for name, call in calls.items():
        written = []
        for state in (1, 2):
            torch.manual_seed(state)
            np.random.seed(state)
            random.seed(state)
            code, _, err = run(*call, "-o", name)
            assert code == 0, err
            written.append(Path(name).read_bytes())
        assert written[0] == written[1], name


def test_sample_is_the_librarys_own(run, space_file):
    sample = ("sample", space_file, "--seed", 7, "-n", 3, "--truncation", 0.5)
    code, result, _ = run(*sample, "-o", "a.safetensors")
    assert code == 0 and result["count"] == 3
    run(*sample, "-o", "b.safetensors")
    with open("a.safetensors", "rb") as a, open("b.safetensors", "rb") as b:
        assert a.read() == b.read()
    expected = load_space(space_file).sample(
        3, generator=torch.Generator().manual_seed(7), truncation=0.5
    )
    assert torch.equal(load_identity("a.safetensors").z, expected.z)


def test_interpolate_and_export(run, space_file):
    for seed in (1, 2):
        run("sample", space_file, "--seed", seed, "-o", f"{seed}.safetensors")
    code, result, _ = run(
        "interpolate", "1.safetensors", "2.safetensors", "--steps", 3, "-o", "path.safetensors"
    )
    assert code == 0 and result["count"] == 3
    code, result, _ = run("export", "path.safetensors", "-o", "out/face.safetensors")
    assert code == 0
    assert [p.replace("\\", "/") for p in result["loras"]] == [
        f"out/face-{i}.safetensors" for i in (1, 2, 3)
    ]
    space = load_space(space_file)
    file = load_lora("out/face-2.safetensors")
    expected = load_identity("path.safetensors").vectors(space)[1]
    assert torch.allclose(file.vector(space.layout), expected, atol=1e-6)
    assert file.metadata["w2wpp.space_fingerprint"] == space.fingerprint
    assert file.metadata["w2wpp.trigger_prompt"] == "person"
    assert json.loads(file.metadata["w2wpp.provenance"])["rows"] == [1]


def test_edit_is_the_librarys_own(run, space_file):
    run("sample", space_file, "--seed", 1, "-o", "a.safetensors")
    code, result, _ = run("edit", "a.safetensors", "smile=-1.5", "-o", "b.safetensors")
    assert code == 0 and result["strengths"] == {"smile": -1.5}
    before, after = load_identity("a.safetensors"), load_identity("b.safetensors")
    expected = edit(before, load_space(space_file), {"smile": -1.5})
    assert torch.equal(after.z, expected.z)
    assert run("edit", "a.safetensors", "smile", "-o", "x")[0] == 1
    code, _, err = run("edit", "a.safetensors", "hat=1", "-o", "x")
    assert code == 1 and "it has smile" in err


@pytest.mark.parametrize("residual", [False, True])
def test_encode_reports_what_is_reconstructed(run, loras, make_space, residual):
    space = make_space("pca")
    save_space(space, "space.safetensors")
    files = sorted(loras.rglob("*.safetensors"))[2:4]
    flags = ["--residual"] if residual else []
    code, result, _ = run("encode", "space.safetensors", *files, *flags, "-o", "id.safetensors")
    assert code == 0 and result["count"] == 2
    assert all(0.5 < v < 1 for v in result["weight_r2"].values())
    reports = list(result["loras"].values())
    assert all(r["gauge"] == "kept" and 0 < r["update_error"] < 0.7 for r in reports)
    identity = load_identity("id.safetensors")
    assert (identity.residual is not None) == residual
    w = torch.stack([load_lora(f).vector(space.layout) for f in files])
    # Up to what the noise of people from outside of the span moves their gauge by.
    expected = space.basis.project(w)
    off = (space.basis.project(identity.vectors(space)) - expected).norm(dim=1)
    assert bool((off < 0.1 * expected.norm(dim=1)).all())


def test_info_on_every_kind_of_file(run, space_file, loras):
    run("sample", space_file, "--seed", 1, "-o", "id.safetensors")
    layout = ("--layout", space_file)
    run("dataset", loras, *layout, "-o", "data.safetensors")
    space = load_space(space_file)
    _, about, _ = run("info", space_file)
    assert about["format"] == "w2wpp.space" and about["fingerprint"] == space.fingerprint
    assert about["codec"] == "vae-skip" and about["directions"] == ["smile"]
    _, about, _ = run("info", "id.safetensors")
    assert about["count"] == 1 and about["provenance"]["seed"] == 1
    _, about, _ = run("info", "data.safetensors")
    assert about["format"] == "w2wpp.dataset" and "vectors" in about["tensors"]
    _, about, _ = run("info", next(loras.rglob("*.safetensors")))
    assert about["format"] == "lora" and about["ranks"] == [2] and about["alphas"] == [4.0]


def test_labels_are_matched_by_name(run, loras):
    names = [p.stem for p in sorted(loras.rglob("*.safetensors"))]
    rows = [f"{n},{i},{-i}" for i, n in enumerate(names)]
    table = "\n".join(["name,age,smile", *reversed(rows)])
    with open("labels.csv", "w") as f:
        f.write(table)
    arguments = ("dataset", loras, "--layout", "layout.json", "--labels", "labels.csv", "-o", "d")
    code, result, _ = run(*arguments)
    assert code == 0 and result["labels"] == ["age", "smile"]
    labels = load_dataset("d").labels
    assert labels[:, 0].tolist() == list(range(20)) and torch.equal(labels[:, 1], -labels[:, 0])
    with open("labels.csv", "w") as f:
        f.write("\n".join(table.splitlines()[:-1]))
    code, _, err = run(*arguments)
    assert code == 1 and "has no line for 00.safetensors" in err


def test_files_of_any_gauge_become_one_data_set(run, loras, dataset, make_space):
    """Scrambled files at twice the rank: turned into one gauge, with the same updates."""
    layout, g = dataset.layout, torch.Generator().manual_seed(0)
    space = make_space("pca")
    save_space(space, "space.safetensors")
    for path in loras.rglob("*.safetensors"):
        lora = {}
        for name, (a, b) in load_lora(path).lora.items():
            change = torch.randn(len(a), len(a), generator=g) + 0.5 * torch.eye(len(a))
            a, b = torch.linalg.inv(change) @ a, b @ change
            lora[name] = (torch.cat([a, a]), torch.cat([b, b], dim=1))
        save_lora(lora, path, alpha=layout.alpha)
    arguments = ("dataset", loras, "--layout", "space.safetensors", "-o", "data")
    code, _, err = run(*arguments)
    assert code == 1 and "Layout 'tiny' expects" in err and err.count("\n") == 1
    original, far = dataset.vectors()[:20], []
    for gauge in ("first", "space.safetensors"):
        code, result, _ = run(*arguments, "--gauge", gauge)
        found = load_dataset("data").vectors()
        assert code == 0 and result["rows"] == 20
        far.append(sum(span_distance(w, space.basis) for w in found))
        for name, (a, b) in layout.unpack(found).items():
            down, up = layout.unpack(original)[name]
            torch.testing.assert_close(b @ a, up @ down, atol=1e-6, rtol=1e-3)
    assert far[1] < far[0], "nearer to the space in its gauge than in that of the first file"
    code, _, err = run("dataset", loras, "--layout", "layout.json", "--gauge", "no", "-o", "x")
    assert code == 1 and "There is no file no" in err and "written" not in err


def test_users_errors_are_one_line_and_exit_code_1(run, space_file, make_space):
    run("sample", space_file, "--seed", 1, "-o", "id.safetensors")
    save_space(make_space("vae-mlp"), "other.safetensors")
    with open("short.safetensors", "wb") as f:
        f.write(space_file.read_bytes()[:-10])
    cases = [
        (("info", "nothing"), "no such file"),
        (("info", "short.safetensors"), "truncated"),
        (("sample", "id.safetensors", "--seed", 1, "-o", "x"), "expected 'w2wpp.space'"),
        (("sample", space_file, "--seed", -1, "-o", "x"), "between 0 and"),
        (("sample", space_file, "--seed", 1, "-n", 0, "-o", "x"), "whole numbers from 1"),
        (("export", "id.safetensors", "--space", "other.safetensors", "-o", "x"), "can't be used"),
        (("encode", space_file, "id.safetensors", "-o", "x"), "holds no LoRA"),
        (("dataset", ".", "--layout", "missing", "-o", "x"), "no such file"),
        (("train", space_file, "-o", "x"), "Train on the basis of its data set"),
    ]
    for arguments, message in cases:
        code, result, err = run(*arguments)
        assert code == 1 and result is None
        assert err.startswith("w2wpp: ") and err.count("\n") == 1 and message in err


def test_the_pages_say_of_every_verb_which_node_does_it():
    page = (ROOT / "docs" / "nodes.md").read_text(encoding="utf-8")
    table = page.partition("| command | node |")[2].partition("\n\n")[0]
    said = {
        verb
        for line in table.splitlines()
        for verb in re.findall(r"`([a-z0-9-]+)`", line.split("|")[1] if "|" in line else "")
    }
    assert said == set(build_parser()._subparsers._group_actions[0].choices)


def test_wrong_usage_is_exit_code_2(run):
    for arguments in ((), ("paint",), ("sample", "space")):
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        assert stop.value.code == 2


def test_plain_output_is_for_people(space_file, capsys):
    assert main(["info", str(space_file)]) == 0
    out = capsys.readouterr().out
    assert "trigger_prompt: person\n" in out and "layout: tiny: 8 modules" in out
    assert isinstance(load_space(space_file), Space)


def test_a_reader_that_leaves_early_is_no_error(space_file):
    command = [sys.executable, "-m", "w2wpp", "info", str(space_file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (0, b"")


def test_train_learns_how_people_are_spread(run, layout):
    """Two kinds of people in one direction: the flow bends there, and the space still decodes what it encodes."""
    g = torch.Generator().manual_seed(3)
    kind = torch.where(torch.rand(200, 1, generator=g) < 0.4, 1.0, -1.0)
    traits = torch.cat(
        [kind + 0.05 * torch.randn(200, 1, generator=g), torch.randn(200, 3, generator=g)], dim=1
    )
    w = 0.02 * traits @ torch.randn(4, layout.size, generator=g)
    write_dataset(
        "data.safetensors", w, layout, torch.arange(200), heldout=torch.arange(200) >= 180
    )
    assert (
        run("fit-basis", "data.safetensors", "--components", 4, "-o", "basis.safetensors")[0] == 0
    )
    train = ("train", "basis.safetensors", "--codec", "pca", "-o", "flow.safetensors")
    code, result, _ = run(*train, "--prior", "flow")
    assert code == 0 and result["flow"]["rounds"] >= 1
    space = load_space("flow.safetensors")
    assert space.flow is not None
    z = space.encode(w).mean
    assert torch.allclose(space.decode(z), w, atol=1e-4)
