"""Numbers that no verb can mean, and outputs that are no file, are refused before any work is done."""

import json
import os

import pytest

from w2wpp import save_lora, save_space

SAMPLE = ("sample", "space.safetensors", "--seed", 1, "-o", "x.safetensors")


@pytest.fixture
def files(run, make_space, dataset, tmp_path):
    save_space(make_space("pca"), "space.safetensors")
    (tmp_path / "layout.json").write_text(json.dumps(dataset.layout.to_json()))
    for i, w in enumerate(dataset.vectors()[:6]):
        lora = dataset.layout.unpack(w)
        save_lora(lora, tmp_path / "loras" / f"{i}.safetensors", alpha=dataset.layout.alpha)
    run("sample", "space.safetensors", "--seed", 1, "-o", "a.safetensors")
    run("dataset", "loras", "--layout", "layout.json", "--heldout", 0, "-o", "data.safetensors")
    run("fit-basis", "data.safetensors", "--components", 3, "-o", "basis.safetensors")
    return set(os.listdir())


DATASET = ("dataset", "loras", "--layout", "layout.json", "-o", "x.safetensors")
TRAIN = ("train", "basis.safetensors", "-o", "x.safetensors")
WALK = ("interpolate", "a.safetensors", "a.safetensors", "-o", "x.safetensors")
FIT = ("fit-basis", "data.safetensors", "-o", "x.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*SAMPLE, "-n", 10**12), "-n takes whole numbers from 1 to 2147483647"),
        ((*SAMPLE, "-n", 2 * 10**9), "at most"),
        ((*SAMPLE, "-n", 0), "-n takes whole numbers"),
        ((*SAMPLE, "-n", -1), "-n takes whole numbers"),
        ((*SAMPLE, "--seed", 2**70), "A seed lies between"),
        ((*SAMPLE, "--seed", -1), "A seed lies between"),
        ((*SAMPLE, "--truncation", "nan"), "--truncation takes a finite number"),
        ((*SAMPLE, "--truncation", "inf"), "--truncation takes a finite number"),
        ((*SAMPLE, "--truncation", -1), "positive"),
        ((*SAMPLE, "--truncation", 1e39), "NaN or infinite"),
        ((*WALK, "--steps", 10**9), "takes at most"),
        ((*WALK, "--steps", 0), "--steps takes whole numbers"),
        ((*DATASET, "--heldout", "nan"), "--heldout takes a finite number"),
        ((*DATASET, "--heldout", 1.5), r"lies in [0, 1)"),
        ((*DATASET, "--heldout", -0.1), r"lies in [0, 1)"),
        ((*DATASET, "--seed", 2**70), "A seed lies between"),
        ((*FIT, "--components", 0), "--components takes whole numbers"),
        ((*FIT, "--components", 10**15), "--components takes whole numbers"),
        ((*TRAIN, "--hidden", -3), "--hidden takes whole numbers"),
        ((*TRAIN, "--hidden", 10**9, "--codec", "vae-mlp"), "sizes of a codec"),
        ((*TRAIN, "--latent", 10**9, "--codec", "vae-mlp"), "sizes of a codec"),
        ((*TRAIN, "--seed", 2**70), "A seed lies between"),
        ((*TRAIN, "--lr", "nan"), "--lr takes a finite number"),
        ((*TRAIN, "--lr", "inf"), "--lr takes a finite number"),
        ((*TRAIN, "--epochs", 0), "too small"),
        ((*TRAIN, "--dropout", 1), "dropout"),
        (("edit", "a.safetensors", "smile=nan", "-o", "x.safetensors"), "must be finite"),
        (("edit", "a.safetensors", "smile=1e39", "-o", "x.safetensors"), "NaN or infinite"),
        (("export", "a.safetensors", "--strength", "nan", "-o", "x.safetensors"), "finite number"),
        ((*SAMPLE[:-1], "."), "names a folder"),
        ((*SAMPLE[:-1], "loras"), "is a folder and is not replaced"),
        ((*SAMPLE[:-1], "loras/"), "names a folder"),
        ((*SAMPLE[:-1], ""), "expected the name of a file"),
        ((*SAMPLE[:-1], "layout.json/x"), "layout.json/x"),
        ((*SAMPLE[:-1], "a" * 300), "name too long"),
        ((*TRAIN[:-1], "."), "names a folder"),
    ],
)
def test_one_sentence_and_nothing_written(run, files, arguments, message):
    code, result, said = run(*arguments)
    assert code == 1 and result is None
    assert message.lower() in said.lower() and said.count("\n") == 1, said
    assert set(os.listdir()) == files


def test_the_seeds_at_both_ends_draw(run, files):
    drawn = []
    for seed in (0, 2**64 - 1):
        code, _, _ = run(*SAMPLE[:3], seed, "-o", "x.safetensors")
        assert code == 0
        with open("x.safetensors", "rb") as f:
            drawn.append(f.read())
    assert drawn[0] != drawn[1]


def test_too_little_memory_is_one_sentence(run, files, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        )

    monkeypatch.setattr("w2wpp.space.standard_normal", fail)
    code, _, said = run(*SAMPLE)
    assert code == 1 and "more memory than there is" in said and said.count("\n") == 1
