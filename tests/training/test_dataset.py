import pytest
import torch

from w2wpp import ConfigError, DataError, FormatError
from w2wpp.errors import ResourceError
from w2wpp.training import dataset as module
from w2wpp.training.dataset import VectorDataset, holdout_by_identity, load_dataset, write_dataset


def store(dataset, path, vectors=None, **changes):
    facts = {
        "heldout": dataset.heldout,
        "labels": dataset.labels,
        "label_names": dataset.label_names,
        "provenance": {"seed": 1},
        **changes,
    }
    vectors = dataset.vectors() if vectors is None else vectors
    return write_dataset(path, vectors, dataset.layout, dataset.identity, **facts)


def test_round_trip(dataset, tmp_path):
    read = store(dataset, tmp_path / "d")
    assert len(read) == 60 and read.layout == dataset.layout
    assert torch.equal(read.vectors(), dataset.vectors())
    assert torch.equal(read.identity, dataset.identity)
    assert torch.equal(read.heldout, dataset.heldout)
    assert torch.equal(read.labels, dataset.labels)
    assert read.label_names == ("age", "smile") and read.provenance == {"seed": 1}


def test_any_rows_in_any_order(dataset, tmp_path):
    read = store(dataset, tmp_path / "d")
    for rows in ([3, 4, 5, 1, 59], [], [7], torch.tensor([2, 2])):
        assert torch.equal(read.vectors(rows), dataset.vectors(rows))
    assert torch.equal(read.vectors(read.heldout_rows), dataset.vectors()[dataset.heldout])


def test_chunks_cover_the_rows_in_bounded_pieces(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 7 * 4 * dataset.layout.size)
    read = store(dataset, tmp_path / "d")
    rows, parts = zip(*read.chunks(read.training_rows))
    assert max(len(p) for p in parts) == 7
    assert torch.equal(torch.cat(rows), dataset.training_rows)
    assert torch.equal(torch.cat(parts), dataset.vectors(dataset.training_rows))


def test_chunks_may_take_turns_in_the_same_memory(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 7 * 4 * dataset.layout.size)
    monkeypatch.setattr(module, "READ_BYTES", 3 * 4 * dataset.layout.size)
    rows = dataset.training_rows[torch.randperm(len(dataset.training_rows))]
    for source in (dataset, store(dataset, tmp_path / "d")):
        seen, places = [], set()
        for some, w in module.ahead(source.chunks(rows, buffers=2)):
            seen.append(w.clone())
            places.add(w.data_ptr())
            w.fill_(torch.nan)  # the caller's own until the next one
            assert torch.equal(some, rows[sum(map(len, seen[:-1])) :][: len(w)])
        assert torch.equal(torch.cat(seen), dataset.vectors(rows)) and len(places) == 2


def test_streamed_writing_gives_the_same_file(dataset, tmp_path):
    store(dataset, tmp_path / "a")
    store(dataset, tmp_path / "b", iter(dataset.vectors().split(11)))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_holdout_keeps_persons_together_and_is_seeded():
    identity = torch.randint(40, (300,), generator=torch.Generator().manual_seed(0))
    draw = lambda seed: holdout_by_identity(  # noqa: E731
        identity, 0.25, generator=torch.Generator().manual_seed(seed)
    )
    held = draw(0)
    assert not set(identity[held].tolist()) & set(identity[~held].tolist())
    assert len(identity[held].unique()) == 10
    assert torch.equal(held, draw(0)) and not torch.equal(held, draw(1))
    with pytest.raises(DataError, match="leaves none"):
        holdout_by_identity(identity, 0.999, generator=torch.Generator())


def test_a_person_on_both_sides_is_refused(dataset, tmp_path):
    by_row = torch.arange(60) % 2 == 0
    with pytest.raises(DataError, match="30 persons are both held out and trained on"):
        store(dataset, tmp_path / "d", heldout=by_row)
    with pytest.raises(DataError, match="by identity, not by row"):
        VectorDataset(dataset.layout, dataset.vectors(), dataset.identity, by_row)


def test_bad_data_is_refused_and_nothing_is_written(dataset, tmp_path):
    w = dataset.vectors()
    nan = w.clone()
    nan[5, 5] = float("nan")
    cases = [
        (nan, {}, "NaN"),
        (w[:, :-1], {}, "are"),
        (w[:-1], {}, "announced with 60 rows, 59 arrived"),
        (w, {"label_names": ("age",)}, "Labels must be"),
    ]
    for vectors, changes, message in cases:
        with pytest.raises((DataError, FormatError), match=message):
            store(dataset, tmp_path / "d", vectors, **changes)
    assert list(tmp_path.iterdir()) == []


def test_truncated_file(dataset, tmp_path):
    store(dataset, tmp_path / "d")
    (tmp_path / "d").write_bytes((tmp_path / "d").read_bytes()[:5000])
    with pytest.raises(FormatError, match="truncated"):
        load_dataset(tmp_path / "d")


def test_a_killed_write_is_taken_up_and_gives_the_same_bytes(dataset, tmp_path):
    w = dataset.vectors()
    asked = []

    def rows(start, die_at=None):
        asked.append(start)
        for i in range(start, len(w), 7):
            if die_at is not None and i >= die_at:
                raise KeyboardInterrupt
            yield w[i : i + 7]

    store(dataset, tmp_path / "whole")
    for die_at in (20, 40):
        with pytest.raises(KeyboardInterrupt):
            store(dataset, tmp_path / "d", lambda start, at=die_at: rows(start, at))
        assert not (tmp_path / "d").exists()
    with open(tmp_path / "d.partial", "ab") as f:
        f.write(b"half a row")
    store(dataset, tmp_path / "d", rows)
    assert asked[0] == 0 and 0 < asked[1] < asked[2] < 60
    assert (tmp_path / "d").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not (tmp_path / "d.partial").exists()


def test_what_is_left_of_another_write_is_not_taken_up(dataset, tmp_path):
    w = dataset.vectors()

    def die(start):
        yield w[:30]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store(dataset, tmp_path / "d", die)
    read = store(dataset, tmp_path / "d", lambda start: iter([w[start:]]), provenance={"seed": 2})
    assert torch.equal(read.vectors(), w) and read.provenance == {"seed": 2}


def test_half_precision_halves_the_file_and_refuses_what_it_can_not_hold(dataset, tmp_path):
    read = store(dataset, tmp_path / "d", precision="half")
    assert torch.equal(read.vectors(), dataset.vectors().half().float())
    assert torch.equal(read.vectors([3, 1]), read.vectors()[[3, 1]])
    assert torch.equal(read.columns(torch.tensor([3, 1]), 2, 9), read.vectors()[[3, 1], 2:9])
    with pytest.raises(DataError, match="65,504"):
        store(dataset, tmp_path / "e", dataset.vectors() * 1e8, precision="half")
    with pytest.raises(ConfigError, match="single or half"):
        store(dataset, tmp_path / "e", precision="fp8")


def test_a_disk_without_room_is_named_before_the_work(dataset, tmp_path, monkeypatch):
    free = module.shutil._ntuple_diskusage(100, 90, 10)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: free)
    with pytest.raises(ResourceError, match=r"GB free.*--half"):
        store(dataset, tmp_path / "d")
