"""Anything that can lie under a name, given to every argument that is a file: one sentence, exit code 1, at once."""

import io
import json
import os
import pickle

import pytest
import torch

from w2wpp import save_lora, save_space
from w2wpp.cli import build_parser

CSV = "name,smile\n" + "".join(f"{i},{i % 2}\n" for i in range(6))

# Every verb of the library with whole inputs; each of these files is replaced by every odd one in turn.
VERBS = {
    "info": ("space",),
    "sample": ("space", "--seed", "1", "-o", "out"),
    "interpolate": ("id", "id", "--steps", "2", "-o", "out"),
    "edit": ("id", "smile=1", "--space", "space", "-o", "out"),
    "encode": ("space", "lora", "-o", "out"),
    "export": ("id", "--space", "space", "-o", "out"),
    "dataset": ("loras", "--layout", "json", "--labels", "csv", "--heldout", "0", "-o", "out"),
    "fit-basis": ("data", "--components", "2", "-o", "out"),
    "train": ("basis", "--epochs", "1", "--latent", "2", "--checkpoint", "checkpoint", "-o", "out"),
    "directions": ("space", "data", "-o", "out"),
    "import-identity": ("pt", "--space", "space", "-o", "out"),
    "import-vae": ("pt", "--layout", "json", "-o", "out"),
    "import-w2w": ("w2w", "--labels", "csv", "--layout", "json", "-o", "out"),
    "likeness": ("pictures", "--embeddings", "csv", "-o", "out"),
    "fit-start": ("space", "csv", "--data", "data", "-o", "out"),
}
SOME = ("page", "deep", "torch", "folder", "pipe", "NUL in its name")
MAKERS = {"out", "checkpoint"}  # what is written and need not be there


@pytest.fixture(scope="module")
def whole(tmp_path_factory, make_space, dataset, basis, coefficients):
    from w2wpp.training.coefficients import save_coefficients
    from w2wpp.training.dataset import write_dataset

    folder = tmp_path_factory.mktemp("whole")
    space, layout = make_space("pca"), dataset.layout
    save_space(space, folder / "space.safetensors")
    (folder / "layout.json").write_text(json.dumps(layout.to_json()))
    (folder / "table.csv").write_text(CSV)
    for i, w in enumerate(dataset.vectors()[:6]):
        save_lora(layout.unpack(w), folder / "loras" / f"{i}.safetensors", alpha=layout.alpha)
    write_dataset(folder / "data.safetensors", dataset.vectors(), layout, dataset.identity)
    save_coefficients(folder / "basis.safetensors", coefficients, basis)
    for name in ("a", "b"):
        (folder / f"{name}.png").write_bytes(b"")  # the table asks only whether they are there
    lines = [f"{n}.png,{n},{kind}\n" for n in ("a", "b") for kind in ("photograph", "painting")]
    (folder / "pictures.csv").write_text("picture,person,kind\n" + "".join(lines))
    torch.save(torch.ones(1, 3), folder / "k.pt")
    (folder / "w2w").mkdir()
    from w2wpp import save_identity

    save_identity(space.sample(1, generator=torch.Generator()), folder / "id.safetensors")
    return {
        "space": folder / "space.safetensors",
        "id": folder / "id.safetensors",
        "lora": folder / "loras" / "0.safetensors",
        "loras": folder / "loras",
        "json": folder / "layout.json",
        "csv": folder / "table.csv",
        "pictures": folder / "pictures.csv",
        "data": folder / "data.safetensors",
        "basis": folder / "basis.safetensors",
        "pt": folder / "k.pt",
        "w2w": folder / "w2w",
    }


def lay_odd(folder):
    """{name: path} of what no reader expects."""
    torch_file = io.BytesIO()
    torch.save({"a": [1, "x", None]}, torch_file)
    contents = {
        "empty": b"",
        "zeros": b"\0" * 5000,
        "page": b"<html><body>Please log in</body></html>",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
        "pickle": pickle.dumps({"a": 1}),
        "torch": torch_file.getvalue(),
        "csv": b'"a\n' * 50,
        "latin": "Gr\u00fc\u00dfe,1\n".encode("latin-1") * 9,
        "nul": b"a,b\n\0,1\n",
        "json": b'{"rank": 1e999, "modules": [[]], "alpha": "x"}',
        "deep": b"[" * 100_000,
        "digits": b"9" * 10_000,
        "noise": bytes(range(256)) * 20,
    }
    for name, content in contents.items():
        (folder / f"odd-{name}").write_bytes(content)
    found = {name: folder / f"odd-{name}" for name in contents}
    (folder / "odd-folder").mkdir()
    found |= {"folder": folder / "odd-folder", "nothing": folder / "odd-nothing"}
    if os.name != "nt":
        os.mkfifo(folder / "odd-pipe")
        (folder / "odd-circle").symlink_to(folder / "odd-circle")
        found |= {
            "pipe": folder / "odd-pipe",
            "circle": folder / "odd-circle",
            "device": "/dev/zero",
        }
    return found | {"NUL in its name": "a\0b", "long name": "x" * 5000, "no name": ""}


@pytest.mark.parametrize("verb", VERBS)
def test_every_argument_that_is_a_file(run, whole, tmp_path, verb):
    arguments = VERBS[verb]
    odd = lay_odd(tmp_path)
    files = {name: str(whole[name]) for name in arguments if name in whole}
    files |= {name: str(tmp_path / f"{name}.safetensors") for name in arguments if name in MAKERS}
    for spot in sorted(files.keys() - {"out"}):
        for what, path in odd.items():
            if verb not in ("info", "dataset", "import-vae") and what not in SOME:
                continue  # they read with the same functions
            if (spot, what) in (("checkpoint", "nothing"), ("w2w", "folder")):
                continue
            given = {**files, spot: str(path)}
            code, result, said = run(verb, *(given.get(a, a) for a in arguments))
            assert code == 1 and result is None, f"{spot} = {what}: {code} {result}"
            assert said.count("w2wpp: ") == 1 and "Traceback" not in said, (
                f"{spot} = {what}: {said}"
            )
            assert len(said) < 2000, f"{spot} = {what}: {said}"
    assert not list(tmp_path.glob("*.part")), "litter"


def test_no_verb_of_files_is_missing():
    known = set(build_parser()._subparsers._group_actions[0].choices)
    assert set(VERBS) <= known
