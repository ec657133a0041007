import json
import os
import struct

import pytest
import safetensors
import safetensors.torch
import torch

from w2wpp import FormatError
from w2wpp.files.container import Streamed, open_container, write_container

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "half": torch.tensor([1.5, -2.0]).half(),
    "flag": torch.tensor([True, False, True]),
    "number": torch.tensor(27.0),
    "none": torch.zeros(0, 4),
    "long": torch.tensor([[2**40, -1]]),
    "brain": torch.tensor([0.5, 2.0]).bfloat16(),
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file.safetensors"
    write_container(path, TENSORS, format="w2wpp.test", config={"b": 1, "a": [1.5]})
    return path


def header_of(path):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(path, header, body):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def test_safetensors_itself_reads_what_is_written(path):
    read = safetensors.torch.load_file(path)
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[k], t) and read[k].dtype == t.dtype for k, t in TENSORS.items())
    with safetensors.safe_open(path, "pt") as f:
        assert json.loads(f.metadata()["config"]) == {"a": [1.5], "b": 1}


def test_reads_what_safetensors_writes(tmp_path):
    safetensors.torch.save_file(TENSORS, tmp_path / "x", metadata={"k": "v"})
    file = open_container(tmp_path / "x")
    assert file.metadata == {"k": "v"}
    assert all(torch.equal(file.read(k), t) for k, t in TENSORS.items())


def test_rows_are_read_alone(path):
    file = open_container(path, "w2wpp.test")
    assert file.config == {"a": [1.5], "b": 1}
    assert torch.equal(file.read_rows("a", 1, 2), TENSORS["a"][1:])
    assert torch.equal(file.read_rows("a", 0, 99), TENSORS["a"])


def test_same_contents_same_bytes(path, tmp_path):
    again = tmp_path / "again"
    backwards = dict(reversed(TENSORS.items()))
    write_container(again, backwards, format="w2wpp.test", config={"a": [1.5], "b": 1})
    assert again.read_bytes() == path.read_bytes()


def test_streamed_tensor_equals_whole(tmp_path):
    t = torch.randn(10, 3)
    write_container(tmp_path / "whole", {"t": t})
    streamed = Streamed(torch.float32, (10, 3), iter(t.double().split(4)))
    write_container(tmp_path / "parts", {"t": streamed})
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()


def test_failed_write_leaves_the_old_file_and_no_rest(path, tmp_path):
    before = path.read_bytes()
    with pytest.raises(FormatError, match="announced with 5 rows, 2 arrived"):
        write_container(path, {"t": Streamed(torch.float32, (5,), [torch.zeros(2)])})
    with pytest.raises(ValueError):
        write_container(path, {}, format="f", config={"loss": float("nan")})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["file.safetensors"]


def test_tensors_read_in_inference_mode_can_take_part_in_gradients(path):
    with torch.inference_mode():
        t = open_container(path).read("a")
    assert not t.is_inference()


@pytest.mark.parametrize("size", [0, 5, 8, 60, -1])
def test_truncated_files(path, size):
    raw = path.read_bytes()
    path.write_bytes(raw[:size])
    with pytest.raises(FormatError, match=r"truncated|not a safetensors file"):
        open_container(path)


def test_trailing_bytes(path):
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(FormatError, match="4 bytes follow"):
        open_container(path)


def test_missing_file(tmp_path):
    with pytest.raises(FormatError, match="no such file"):
        open_container(tmp_path / "nothing")


def test_future_version_is_refused_by_name(path):
    header, body = header_of(path)
    header["__metadata__"]["format_version"] = "2"
    with pytest.raises(FormatError, match=r"version 2; this release reads 1\. Update"):
        open_container(with_header(path, header, body), "w2wpp.test")


def test_another_format_is_refused_by_name(path, tmp_path):
    with pytest.raises(FormatError, match=r"is a 'w2wpp\.test' file, expected 'w2wpp\.space'"):
        open_container(path, "w2wpp.space")
    safetensors.torch.save_file(TENSORS, tmp_path / "plain")
    with pytest.raises(FormatError, match="without a format of ours"):
        open_container(tmp_path / "plain", "w2wpp.space")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]},  # more than the file
        {"dtype": "F32", "shape": [7], "data_offsets": [0, 24]},  # shape and bytes differ
        {"dtype": "F32", "shape": [-6], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [6.0], "data_offsets": [0, 24]},
        {"dtype": "F6_E2M3", "shape": [24], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [6], "data_offsets": [4, 28]},  # a gap
        {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]},
        {"dtype": "F32"},
        "tensor",
    ],
)
def test_headers_that_lie_are_refused_before_anything_is_allocated(path, entry):
    with pytest.raises(FormatError):
        open_container(with_header(path, {"a": entry}, b"\0" * 24))


def test_overlapping_tensors_are_refused(path):
    entry = {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}
    with pytest.raises(FormatError, match="overlap"):
        open_container(with_header(path, {"a": entry, "b": entry}, b"\0" * 24))


@pytest.mark.parametrize("text", [b"[]", b"{", b"\xff\xfe", b'{"__metadata__": {"a": 1}}'])
def test_headers_that_do_not_read(path, text):
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(FormatError):
        open_container(path)


def test_absurd_header_length(path):
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(FormatError, match="claims a header"):
        open_container(path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(tmp_path, bad):
    write_container(tmp_path / "x", {"t": torch.tensor([0.0, bad])})
    with pytest.raises(FormatError, match="NaN or infinite"):
        open_container(tmp_path / "x").read("t")


def test_require_names_what_differs(path):
    file = open_container(path)
    assert file.require("a", (2, None), torch.float32).shape == (2, 3)
    with pytest.raises(FormatError, match="'gone' is missing"):
        file.require("gone", ())
    with pytest.raises(FormatError, match=r"'a' is \[2, 3\] torch\.float32, expected \[any, 4\]"):
        file.require("a", (None, 4), torch.float32)


def test_a_file_held_in_memory_reads_the_same(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5), "c": torch.zeros(0)}
    write_container(tmp_path / "f", tensors)
    held = open_container(tmp_path / "f").held()
    (tmp_path / "f").unlink()  # nothing more is read from it
    for name, t in tensors.items():
        assert torch.equal(held.read(name), t)
    assert torch.equal(held.read_rows("a", 1, 3), tensors["a"][1:])
    assert torch.equal(held.read_columns("a", [2, 0], 1, 3), tensors["a"][[2, 0], 1:3])


@pytest.mark.parametrize("beside", [{}, {"n": torch.arange(3)}], ids=["floats", "mixed"])
def test_held_or_not_numbers_are_checked(tmp_path, beside):
    write_container(tmp_path / "f", {"a": torch.tensor([1.0, float("nan")]), **beside})
    held = open_container(tmp_path / "f").held()
    with pytest.raises(FormatError, match="'a' holds NaN"):
        held.read("a")
    assert held.read("a", finite=False).isnan().any()
