"""Folders of official files among the models, as the nodes find and import them; no host takes part."""

import importlib
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from w2wpp.files.container import partial_of

REPO = Path(__file__).resolve().parents[2]
K = 6  # components of the fixture `official`


@pytest.fixture
def folder(official, tmp_path):
    place = tmp_path / "downloads" / "w2w"
    place.mkdir(parents=True)
    for name, value in official.items():
        torch.save(value, place / name)
    return place


@pytest.fixture
def pack(monkeypatch):
    for name, place in (("pack", REPO), ("pack.nodes", REPO / "nodes")):
        package = ModuleType(name)  # the tables of contents would import every node
        package.__path__ = [str(place)]
        monkeypatch.setitem(sys.modules, name, package)
    yield importlib.import_module("pack.nodes.host.official")
    for name in [n for n in sys.modules if n.startswith("pack.")]:
        del sys.modules[name]


class Node:
    """What a running node is told, and when it is cancelled."""

    def __init__(self, cancel_at=None):
        self.said, self.steps, self.cancel_at = [], [], cancel_at

    def progress(self, what):
        def show(done, of):
            self.steps.append((what, done, of))
            if done == self.cancel_at:
                raise KeyboardInterrupt

        return show

    def imports(self, pack, source, target, **more):
        return pack.import_folder(
            source, target, "models/w2wpp/w2w", say=self.said.append, progress=self.progress, **more
        )


def test_a_folder_is_listed_and_its_space_lies_beside_it(pack, tmp_path):
    roots = [str(tmp_path / "a"), str(tmp_path / "b")]
    for at in ("a/w2w", "b/deep/er", "b/w2w"):
        (tmp_path / at).mkdir(parents=True)
        (tmp_path / at / "V.pt.crdownload").touch()
    (tmp_path / "a" / "notes").mkdir()
    names = ["deep/er (official files)", "w2w (official files)"]
    assert list(pack.official_folders(roots)) == names
    for name in ("w2w (official files)", "w2w.safetensors"):
        assert pack.folder_of(name, roots) == tmp_path / "a" / "w2w"
        assert pack.space_of(name, roots) == tmp_path / "a" / "w2w.safetensors"
    assert pack.space_of(names[0], roots) == tmp_path / "b" / "deep" / "er.safetensors"
    assert pack.space_of("other.safetensors", roots) is None
    # The large files may go once they are imported.
    shutil.rmtree(tmp_path / "b" / "deep" / "er")
    assert pack.space_of(names[0], roots) is None
    (tmp_path / "b" / "deep" / "er.safetensors").touch()
    assert pack.space_of(names[0], roots) == tmp_path / "b" / "deep" / "er.safetensors"


def test_a_link_in_a_circle_and_files_right_in_the_folder(pack, tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "V.pt").touch()
    found = pack.official_folders([str(tmp_path)])
    assert found == {"weights2weights (official files)": tmp_path}


def test_it_costs_what_it_says_before_it_begins(pack, folder, tmp_path):
    node, target = Node(), tmp_path / "w2w.safetensors"
    assert node.imports(pack, folder, target) == "imported models/w2wpp/w2w as w2w.safetensors"
    (said,) = node.said
    assert f"{K} of {K} components take {target.stat().st_size / 1e6:.0f} MB in {tmp_path}" in said
    assert all(what.startswith(said) for what, *_ in node.steps) and node.steps[-1][1:] == (K, K)
    # A second time nothing is written.
    again, before = Node(), target.stat().st_mtime_ns
    assert "imported before" in again.imports(pack, folder, target)
    assert again.said == again.steps == [] and target.stat().st_mtime_ns == before


def test_cancel_keeps_what_was_written(pack, folder, tmp_path, monkeypatch):
    w2w = importlib.import_module("pack.w2wpp.imports.w2w")
    monkeypatch.setattr(w2w, "COLUMNS", 2)
    target = tmp_path / "w2w.safetensors"
    with pytest.raises(KeyboardInterrupt):
        Node(cancel_at=4).imports(pack, folder, target)
    assert not target.exists() and partial_of(target).exists()
    node = Node()
    node.imports(pack, folder, target)
    assert "going on where it was stopped" in node.said[0] and node.steps[0][1] > 2


def test_a_full_disk_and_a_taken_name_are_said_before_anything_is_written(
    pack,
    folder,
    tmp_path,
    monkeypatch,
):
    target = tmp_path / "w2w.safetensors"
    monkeypatch.setattr(
        pack.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000)
    )
    with pytest.raises(ValueError, match=r"where 0 MB are free\. Make room, or take fewer"):
        Node().imports(pack, folder, target)
    assert not partial_of(target).exists()
    monkeypatch.undo()
    shutil.copy(REPO / "models" / "avatars-pca.safetensors", target)
    with pytest.raises(ValueError, match="made of something else"):
        Node().imports(pack, folder, target)
