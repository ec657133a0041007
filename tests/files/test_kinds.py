"""What stands in the place of a file is called by its name."""

import gzip
import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from w2wpp import FormatError
from w2wpp.files.container import open_container, write_container
from w2wpp.files.kinds import SEEN, kind_of_bytes
from w2wpp.files.pictures import open_picture
from w2wpp.files.text import read_csv
from w2wpp.files.torchfile import load_torch

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def torch_bytes(**options):
    file = io.BytesIO()
    torch.save({"a": torch.ones(3)}, file, **options)
    return file.getvalue()


def zip_bytes():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return file.getvalue()


def png_bytes():
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def numpy_bytes():
    file = io.BytesIO()
    np.save(file, np.zeros(4))
    return file.getvalue()


KINDS = {
    "a web page": b"<!DOCTYPE html>\n<html><head><title>Sign in</title>",
    "a web page ": b"\xef\xbb\xbf\n  <html lang='en'>",
    "a Git LFS pointer": LFS,
    "a git-annex pointer": b"/annex/objects/SHA256E-s1--ab.safetensors\n",
    "a pickle": pickle.dumps({"a": 1}, 4),
    "a pickle ": pickle.dumps({"a": 1}, 2),
    "a PyTorch file": torch_bytes(),
    "a zip archive": zip_bytes(),
    "a gzip archive": gzip.compress(b"hello" * 99),
    "a picture": png_bytes(),
    "a NumPy array": numpy_bytes(),
    "a GGUF file": b"GGUF\x03\0\0\0" + b"\1" * 50,
    "JSON text": json.dumps({"error": "Repository not found"}).encode(),
    "an XML document": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "only zeros": b"\0" * 4096,
    "empty": b"",
    "a text file": "Grüße, this is a note".encode(),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_space_or_lora_that_is_something_else(tmp_path, name):
    (tmp_path / "face.safetensors").write_bytes(KINDS[name])
    with pytest.raises(
        FormatError, match=f"face.safetensors is not a safetensors file but {name.strip()}"
    ):
        open_container(tmp_path / "face.safetensors")


@pytest.mark.parametrize("name", ["a web page", "a Git LFS pointer", "only zeros", "JSON text"])
def test_a_torch_file_a_table_and_a_picture_that_are_something_else(tmp_path, name):
    (tmp_path / "V.pt").write_bytes(KINDS[name])
    with pytest.raises(FormatError, match=f"is not a PyTorch file but {name}"):
        load_torch(tmp_path / "V.pt")
    with pytest.raises(FormatError, match=f"not a picture that Pillow can read but {name}"):
        open_picture(tmp_path / "V.pt")
    if name == "only zeros":
        with pytest.raises(FormatError, match=f"is not a CSV table in UTF-8 but {name}"):
            read_csv(tmp_path / "V.pt")


def test_every_length_of_a_header_is_a_safetensors_file(tmp_path):
    """Among them those whose first bytes are a pickle's or a line feed's."""
    for n in (0, 40, *range(500, 1500, 40)):
        write_container(tmp_path / "f", {"a": torch.ones(1)}, metadata={"note": "x" * n})
        assert len(open_container(tmp_path / "f").metadata["note"]) == n
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "g", {"k": "v" * 600})
    assert open_container(tmp_path / "g").read("a").tolist() == [1]


def test_noise_is_no_kind_and_text_cut_in_a_character_is_text():
    assert kind_of_bytes(bytes(range(128, 256)) * 4) == ""
    assert kind_of_bytes(("ü" * SEEN).encode()[: SEEN - 1]) == "a text file"
