"""Official files that are on their way: each is named with what there is of it; an import goes on where it ended."""

from __future__ import annotations

import re

import pytest
import torch

from w2wpp import W2WError, load_space, open_w2w, write_w2w_space
from w2wpp.files.container import partial_of
from w2wpp.imports import w2w
from w2wpp.imports.downloads import downloads, is_w2w_folder, require_whole
from w2wpp.imports.w2w_space import space_size

from .conftest import K


def state(folder):
    return {d.name: d for d in downloads(folder)}


def test_a_whole_folder(folder):
    found = state(folder)
    assert all(d.is_whole and not d.blocks for d in found.values())
    assert str(found["V.pt"]) == f"V.pt: whole ({found['V.pt'].size / 1e6:,.2f} MB)"
    require_whole(folder, "w2w")
    assert is_w2w_folder(path.name for path in folder.iterdir())


def test_what_is_missing_cut_off_or_on_its_way_is_named_with_sizes(folder):
    whole = (folder / "V.pt").read_bytes()
    (folder / "V.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "mean.pt").rename(folder / "mean.pt.crdownload")
    (folder / "std.pt").write_bytes(b"<!DOCTYPE html><html>Please log in</html>")
    (folder / "proj_1000pc.pt").unlink()
    with pytest.raises(W2WError, match="in models/w2wpp/w2w are not complete") as refusal:
        require_whole(folder, "models/w2wpp/w2w")
    lines = {line.split(":")[0].strip(): line for line in str(refusal.value).splitlines()[1:-1]}
    assert re.search(r"V.pt: 1\.\d+ MB of about 3,986 MB, cut off$", lines["V.pt"])
    assert re.search(r"0.40 MB of about .*mean\.pt\.crdownload\)$", lines["mean.pt"])
    assert "a web page" in lines["std.pt"]
    assert "missing (about 260 MB); not needed" in lines["proj_1000pc.pt"]
    assert "whole" in lines["weight_dimensions.pt"]
    assert "huggingface.co/snap-research/weights2weights" in str(refusal.value)


def test_a_list_beside_the_file_says_that_pieces_are_missing(folder):
    (folder / "V.pt.aria2").write_bytes(b"\0\1")
    (folder / "mean.pt.part").write_bytes(b"")  # an older attempt; the file itself is whole
    found = state(folder)
    assert "broken off (V.pt.aria2)" in str(found["V.pt"]) and found["V.pt"].blocks
    assert found["V.pt"].size == (folder / "V.pt").stat().st_size
    assert found["mean.pt"].is_whole


def test_what_is_optional_blocks_only_where_it_is_damaged(folder):
    for name in ("proj_1000pc.pt", "weight_dimensions.pt"):
        (folder / name).unlink()
    require_whole(folder, "w2w")
    (folder / "proj_1000pc.pt").write_bytes(b"")
    with pytest.raises(W2WError, match=r"proj_1000pc\.pt: 0\.00 MB of about 260 MB, empty"):
        require_whole(folder, "w2w")


@pytest.mark.parametrize(
    "names, expected",
    [
        (["V.pt"], True),
        (["V.pt.part"], True),
        (["mean.pt", "std.pt.crdownload"], True),
        (["mean.pt"], False),
        (["w2wmodel.pt", "vae.pt", "V.pt.txt"], False),
    ],
)
def test_a_folder_is_known_by_its_names(names, expected):
    assert is_w2w_folder(names) is expected


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_an_import_that_was_cancelled_goes_on_where_it_ended(
    folder, official, tmp_path, monkeypatch, layout
):
    monkeypatch.setattr(w2w, "COLUMNS", 2)
    if layout == "columns":
        torch.save(official["V.pt"].T.contiguous().T, folder / "V.pt")
    source = open_w2w(folder)
    write_w2w_space(source, tmp_path / "whole", name="w2w")

    def cancel(done, of):
        if done == 4:
            raise Cancelled

    with pytest.raises(Cancelled):
        write_w2w_space(source, tmp_path / "space", name="w2w", progress=cancel)
    assert not (tmp_path / "space").exists() and partial_of(tmp_path / "space").exists()
    seen = []
    write_w2w_space(
        open_w2w(folder), tmp_path / "space", name="w2w", progress=lambda n, k: seen.append((n, k))
    )
    assert seen[0][0] > 2 and seen[-1] == (K, K)
    assert (tmp_path / "space").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not partial_of(tmp_path / "space").exists()
    size = (tmp_path / "space").stat().st_size
    assert space_size(source) < size < space_size(source) + 50_000


def test_other_files_under_the_same_name_start_anew(folder, official, tmp_path, monkeypatch):
    monkeypatch.setattr(w2w, "COLUMNS", 2)

    def cancel(done, of):
        if done == 4:
            raise Cancelled

    with pytest.raises(Cancelled):
        write_w2w_space(open_w2w(folder), tmp_path / "space", name="w2w", progress=cancel)
    torch.save(-official["V.pt"], folder / "V.pt")
    write_w2w_space(open_w2w(folder), tmp_path / "space", name="w2w")
    components = load_space(tmp_path / "space").basis.components
    torch.testing.assert_close(components.float(), -official["V.pt"].T, atol=1e-4, rtol=1e-3)
