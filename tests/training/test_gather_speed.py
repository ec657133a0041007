"""Gathering many files that look alike: as fast as they can be read, and equal to reading each on its own."""

import dataclasses

import numpy as np
import pytest
import torch

from w2wpp import kohya_tensors, load_lora, save_lora
from w2wpp.files.container import write_container
from w2wpp.training import gather
from w2wpp.training.dataset import load_dataset
from w2wpp.training.gather import Losses, gather_loras, row_reader


@pytest.fixture
def loras(layout, tmp_path):
    """40 folders of one trainer, as peft writes them."""
    folder = tmp_path / "loras"
    w = torch.randn(40, layout.size, generator=torch.Generator().manual_seed(2))
    for i, row in enumerate(w):
        path = folder / f"{i:02}.safetensors"
        save_lora(layout.unpack(row), path, format="peft", alpha=3.0)
    return folder


@pytest.fixture(autouse=True)
def fresh_plans(monkeypatch):
    monkeypatch.setattr(gather, "_PLANS", {})


def collect(layout, folder, output, **options):
    losses = Losses()
    written = gather_loras(
        [folder], output, layout, losses=losses, assume_family=True, heldout=0.0, **options
    )
    return written, losses


def test_a_plan_gives_what_the_reader_gives(layout, loras):
    paths = gather.find_loras([loras])
    read = row_reader(paths, layout, "keep", assume_family=True)
    rows = [read(path) for path in paths]
    assert [type(p).__name__ for p in gather._PLANS.values()] == ["Plan"]
    for path, row in zip(paths, rows):
        assert np.array_equal(
            row.w, load_lora(path).vector(layout).numpy()
        )  # B takes up 3 / 4 of alpha
        assert (row.kept, row.missing, row.ignored) == (pytest.approx(1.0), 0.0, 0)


def test_alphas_in_the_file_are_looked_at(layout, tmp_path):
    lora = layout.unpack(torch.randn(layout.size, generator=torch.Generator().manual_seed(3)))
    paths = []
    for i, alpha in enumerate((4.0, 4.0, 4.0, 2.0, 4.0)):
        paths.append(tmp_path / f"{i}.safetensors")
        write_container(paths[-1], kohya_tensors(lora, alpha), metadata={"ss_session_id": str(i)})
    read = row_reader(paths, layout, "keep", assume_family=True)
    w = [torch.from_numpy(read(path).w) for path in paths]
    assert len(gather._PLANS) == 1 and isinstance(*gather._PLANS.values(), gather.alike.Plan)
    for path, row in zip(paths, w):
        assert torch.equal(row, load_lora(path).vector(layout))
    assert not torch.equal(w[3], w[2]) and torch.equal(w[4], w[2])


def test_what_differs_goes_to_the_reader(layout, loras):
    """One file without a module, one with a matrix of zeros, one whose metadata state another alpha."""
    paths = gather.find_loras([loras])
    lora = load_lora(paths[5]).lora
    names = list(lora)
    save_lora({n: lora[n] for n in names[1:]}, paths[5].parent, format="peft", alpha=3.0)
    a, b = lora[names[0]]
    save_lora({**lora, names[0]: (a, 0 * b)}, paths[6].parent, format="peft", alpha=3.0)
    save_lora(lora, paths[7].parent, format="peft", alpha=30.0)
    read = row_reader(paths, layout, "keep", assume_family=True)
    for path in paths[:5]:
        read(path)
    with pytest.raises(
        ValueError
    ):  # as without plans: this vector has no place for a missing module
        read(paths[5])
    for path in paths[6:8]:
        slow, _ = read._read(path)
        assert np.array_equal(read(path).w, slow.w) and read(path).kept == slow.kept


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_taken_up_gives_the_same_bytes(layout, loras, tmp_path, monkeypatch, workers):
    _, whole = collect(layout, loras, tmp_path / "whole")
    real, calls = gather.in_order, []

    def dying(function, things, count):
        for i, row in enumerate(real(function, things, count)):
            if not calls and i == 23:
                calls.append(i)
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(gather, "in_order", dying)
    with pytest.raises(KeyboardInterrupt):
        collect(layout, loras, tmp_path / "d", workers=workers)
    lines = []
    _, losses = collect(layout, loras, tmp_path / "d", workers=workers, callback=lines.append)
    assert (tmp_path / "d").read_bytes() == (tmp_path / "whole").read_bytes()
    assert dataclasses.asdict(losses) == dataclasses.asdict(whole)
    assert "taken up at 23 of 40" in lines[0] and "files/s" in lines[-1] and "left" in lines[-1]
    assert not list(tmp_path.glob("d.partial*"))


def test_half_precision(layout, loras, tmp_path):
    full, _ = collect(layout, loras, tmp_path / "full")
    half, _ = collect(layout, loras, tmp_path / "half", precision="half")
    assert torch.equal(load_dataset(tmp_path / "half").vectors(), full.vectors().half().float())
    assert len(half) == 40
