import pytest
import torch

from w2wpp import DataError, FormatError
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
        holdout_by_identity(identity, 1.0, generator=torch.Generator())


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
