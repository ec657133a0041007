"""Damaged files of every kind: reading one ends in success or in a W2WError, and in nothing else.

As many mutants as `--mutants` says, spread over the kinds. Each is one of our own files, or one of
PyTorch's, with a few edits: bytes flipped, parts cut, repeated or moved, values of its JSON replaced
by what no reader expects.
"""

import contextlib
import io
import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from w2wpp import (
    W2WError,
    kohya_tensors,
    load_identity,
    load_lora,
    load_space,
    save_identity,
    save_lora,
    save_space,
)
from w2wpp.cli import main
from w2wpp.cli.layouts import find_layout
from w2wpp.encode import encode_lora
from w2wpp.files.container import open_container, peek_metadata
from w2wpp.files.tables import read_labels
from w2wpp.files.text import read_csv
from w2wpp.files.torchfile import load_tensor, load_torch, open_matrix
from w2wpp.lora.collection import members_of
from w2wpp.lora.delta import Factors
from w2wpp.lora.members import open_member
from w2wpp.training.checkpoint import load_checkpoint, save_checkpoint
from w2wpp.training.coefficients import load_coefficients, save_coefficients
from w2wpp.training.dataset import load_dataset, write_dataset
from w2wpp.training.fit_delta import CollectionSettings, fit_delta

NASTY = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 1.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "x", "1", "\ud800", "\0", "x" * 5000, [], [1], [[]], {}, {"a": 1}, [None] * 200, "w2wpp.space",
    "vae-mlp", "F64", "BOOL", "BF16", [2**62, 2**62], [0, 2**62, 2**62], [1] * 9,
]  # fmt: skip
DEEP = "[" * 3000 + "]" * 3000

# Edits. A place is a share of the file, more often near its start, where the headers are.
place = st.floats(0, 1, width=32).map(lambda x: x * x * x)
flip = st.tuples(st.just("flip"), place, st.integers(0, 255))
cut = st.tuples(st.just("cut"), place, st.integers(1, 400))
end = st.tuples(st.just("end"), place, st.just(0))
again = st.tuples(st.just("again"), place, st.integers(1, 400))
swap = st.tuples(st.just("swap"), place, place)
value = st.tuples(st.just("value"), st.integers(0, 10_000), st.integers(-3, len(NASTY) - 1))
edits = st.lists(
    st.one_of(flip, cut, end, again, swap, value, value, value), min_size=1, max_size=4
)


def edited(raw: bytes, edit) -> bytes:
    kind, where, what = edit
    if kind == "value":
        return with_value(raw, where, what)
    at = int(where * max(0, len(raw) - 1))
    if kind == "flip":
        return raw[:at] + bytes([what]) + raw[at + 1 :]
    if kind == "cut":
        return raw[:at] + raw[at + what :]
    if kind == "end":
        return raw[:at]
    if kind == "again":
        return raw[: at + what] + raw[at:]
    other = int(what * max(0, len(raw) - 1))
    a, b = sorted((at, other))
    return raw[:a] + raw[b : b + 16] + raw[a + 16 : b] + raw[a : a + 16] + raw[b + 16 :]


def with_value(raw: bytes, where: int, what: int) -> bytes:
    """Another value somewhere in the JSON of a safetensors file, or in a JSON file; bytes of others stay."""
    is_container = raw[8:9] == b"{"
    length = struct.unpack("<Q", raw[:8])[0] if is_container else len(raw)
    try:
        header = json.loads(raw[8 : 8 + length] if is_container else raw)
        inner = header.get("__metadata__", {}) if is_container else {}
        if "config" in inner:
            inner["config"] = json.loads(inner["config"])
    except (ValueError, AttributeError, TypeError, RecursionError):
        return raw
    spots = list(spots_of(header)) if isinstance(header, (dict, list)) else []
    if not spots:
        return raw
    table, key = spots[where % len(spots)]
    deep = what == -2
    if what == -1:
        del table[key]
    elif what == -3 and isinstance(table, dict):
        table[f"{key}x"] = table.pop(key)
    else:
        table[key] = "deep" if deep else NASTY[what]
    inner = header.get("__metadata__") if is_container else None
    if isinstance(inner, dict) and not isinstance(inner.get("config", ""), str):
        inner["config"] = json.dumps(inner["config"])
    text = json.dumps(header)
    text = (text.replace('"deep"', DEEP) if deep else text).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + length :] if is_container else text


def spots_of(data):
    """(table, key) of every value in tables within tables."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, inner in items:
        yield data, key
        if isinstance(inner, (dict, list)):
            yield from spots_of(inner)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory, make_space, layout, dataset, basis, coefficients):
    """{kind: (bytes of a whole file, suffix, what reads it)}"""
    folder = tmp_path_factory.mktemp("whole")
    found = {}

    def add(name, write, read, suffix=".safetensors"):
        path = folder / f"{name}{suffix}"
        write(path)
        read(path)  # the whole file reads
        found[name] = (path.read_bytes(), suffix, read)

    def read_space(path):
        space = load_space(path)
        w = space.decode(torch.zeros(2, space.latent_size))
        space.encode(w)
        str(space.training_report), space.name, space.licence

    def read_identity(path):
        identity = load_identity(path)
        [one.provenance for one in identity]

    def read_lora(path):
        load_lora(path).vector(layout)

    pca = make_space("pca")

    def encode(path):
        encode_lora(pca, path, residual=True)

    def read_member(path):
        member = open_member(path).split()
        [member.read(module) for module in member.modules]

    def read_delta(path):
        space = load_space(path)
        w = space.decode(torch.zeros(1, space.latent_size))
        space.encode(w)

    def read_dataset(path):
        data = load_dataset(path)
        data.vectors(data.training_rows)

    def read_matrix(path):
        matrix = open_matrix(path)
        list(matrix.rows(matrix.shape[1]))
        matrix.columns(slice(0, matrix.shape[1]))

    lora = layout.unpack(dataset.vectors()[0])
    person = pca.sample(3, generator=torch.Generator().manual_seed(0))
    state = {"encoder.0.0.weight": torch.randn(4, 6), "epoch": 3, "more": [torch.ones(2)]}
    table = "name,age,smile\n" + "\n".join(f"p{i},{i}.5,-1e-3" for i in range(9))
    for codec in ("pca", "vae-skip", "vae-mlp", "seed"):
        space = make_space(codec, training_report={"rows": {"training": 3}})
        add(f"space-{codec}", lambda p, s=space: save_space(s, p), read_space)
    add("identity", lambda p: save_identity(person[1:], p), read_identity)
    adapter = folder / "adapter"
    save_lora(lora, adapter, format="peft", alpha=4.0)  # a folder of weights and their settings
    weights, stated = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    beside, config = weights.read_bytes(), stated.read_bytes()

    def read_adapter(path):
        stated.write_bytes(path.read_bytes())
        read_lora(weights)

    add("peft", lambda p: p.write_bytes(beside), lambda p: load_lora(p))
    add("peft-config", lambda p: p.write_bytes(config), read_adapter, ".json")
    for kind in ("kohya", "diffusers"):
        add(kind, lambda p, k=kind: save_lora(lora, p, format=k, alpha=4.0), read_lora)
    add("pickled", lambda p: torch.save(kohya_tensors(lora, 4.0), p), read_lora, ".pt")
    add("encoded", lambda p: save_lora(lora, p, alpha=4.0), encode)
    add("member", lambda p: save_lora(lora, p, alpha=4.0), read_member)
    add("space-delta", lambda p: save_space(delta_space(), p), read_delta)
    add(
        "dataset",
        lambda p: write_dataset(
            p,
            dataset.vectors()[:8],
            layout,
            torch.arange(8),
            labels=torch.ones(8, 1),
            label_names=["a"],
        ),
        read_dataset,
    )
    add("basis", lambda p: save_coefficients(p, coefficients, basis), load_coefficients)
    add(
        "checkpoint",
        lambda p: save_checkpoint(p, "run", {"a": torch.ones(3)}, {"epoch": 1}),
        lambda p: load_checkpoint(p, "run"),
    )
    add("info", lambda p: save_space(pca, p), lambda p: run_info(p))
    add("peek", lambda p: save_space(pca, p), peek_metadata)
    add("plain", lambda p: save_lora(lora, p, alpha=4.0), lambda p: read_all(open_container(p)))
    add("tensor", lambda p: torch.save(torch.randn(9), p), lambda p: load_tensor(p, ndim=1), ".pt")
    add("matrix", lambda p: torch.save(torch.randn(6, 5), p), read_matrix, ".pt")
    add("state", lambda p: torch.save(state, p), load_torch, ".pt")
    add(
        "legacy",
        lambda p: torch.save(state, p, _use_new_zipfile_serialization=False),
        load_torch,
        ".pt",
    )
    add("labels", lambda p: p.write_text(table), read_labels, ".csv")
    add("table", lambda p: p.write_text(table), read_csv, ".csv")
    add(
        "layout",
        lambda p: p.write_text(json.dumps(layout.to_json())),
        lambda p: find_layout(str(p)),
        ".json",
    )
    return found


def delta_space():
    """A space of five collected LoRAs with two modules."""
    g = torch.Generator().manual_seed(0)
    loras = {
        f"{i}.safetensors": {
            f"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_{to}": Factors(
                torch.randn(2, 8, generator=g), torch.randn(8, 2, generator=g), 1.0
            )
            for to in "qv"
        }
        for i in range(5)
    }
    return fit_delta(members_of(loras), CollectionSettings(rank=4))[0]


def read_all(file):
    for name in file.entries:
        file.read(name)


def run_info(path):
    """The command line on a file: exit code 0 or 1, and one sentence if it is 1."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main(["info", str(path), "--json"])
    assert code in (0, 1) and (code == 0 or said.getvalue().count("\n") == 1), said.getvalue()


def test_damaged_files_end_in_success_or_in_an_error_of_ours(kinds, tmp_path, pytestconfig):
    count = {"success": 0, "refused": 0}

    @settings(
        max_examples=pytestconfig.getoption("mutants"),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(sorted(kinds)), edits)
    def read(kind, changes):
        raw, suffix, reader = kinds[kind]
        for change in changes:
            raw = edited(raw, change)
        path: Path = tmp_path / f"mutant{suffix}"
        path.unlink(missing_ok=True)
        path.write_bytes(raw)
        try:
            reader(path)
            count["success"] += 1
        except W2WError:
            count["refused"] += 1

    read()
    total = sum(count.values())
    print(f"{total} mutants: {count}")
    assert total >= pytestconfig.getoption("mutants")
    assert count["refused"] > total / 4  # or the edits would not reach anything
