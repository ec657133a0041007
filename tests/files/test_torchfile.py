"""PyTorch files are opened without running them and read without holding them."""

import pickle
import zipfile

import pytest
import torch

from w2wpp import FormatError
from w2wpp.files.torchfile import load_tensor, load_torch, open_matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("kind", ["rows", "columns", "part"])
def test_parts_of_a_matrix_are_those_of_the_tensor(tmp_path, monkeypatch, dtype, kind):
    monkeypatch.setattr("w2wpp.files.torchfile.MAPPED_BYTES", 300)
    t = torch.randn(40, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    stored = {"rows": t, "columns": t.T.contiguous().T, "part": torch.cat([t, t], 1)[3:, 2:9]}[kind]
    torch.save(stored, tmp_path / "m.pt")
    matrix = open_matrix(tmp_path / "m.pt")
    assert matrix.shape == tuple(stored.shape)
    assert torch.equal(matrix.columns(slice(1, 6)), stored[:, 1:6].T.half())
    rows = torch.cat([values for _, values in matrix.rows(4)])
    assert torch.equal(rows, stored[:, :4])


def test_an_infinite_number_is_found_where_it_is_read(tmp_path):
    t = torch.ones(30, 6)
    t[17, 5] = float("nan")
    torch.save(t, tmp_path / "m.pt")
    matrix = open_matrix(tmp_path / "m.pt")
    assert torch.equal(matrix.columns(slice(0, 5)), torch.ones(5, 30).half())
    with pytest.raises(FormatError, match="NaN or infinite"):
        matrix.columns(slice(3, 6))


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_objects_are_refused_and_not_run(tmp_path, capsys):
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pt", "plain.pt"):
        with pytest.raises(FormatError):
            load_torch(tmp_path / name)
    assert "code ran" not in capsys.readouterr().out
    with pytest.raises(FormatError, match="pickled Python objects"):
        load_torch(tmp_path / "evil.pt")


@pytest.mark.parametrize("size", [0, 1, 100, -1, -200])
def test_truncated_files_are_named(tmp_path, size):
    torch.save(torch.randn(50, 5), tmp_path / "whole.pt")
    data = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[:size])
    with pytest.raises(FormatError, match="truncated or no PyTorch file"):
        open_matrix(tmp_path / "cut.pt")


def test_wrong_contents_say_what_was_expected(tmp_path):
    cases = {
        "dict": ({"a": torch.ones(2)}, "holds a dict, expected one tensor of 1 dim"),
        "matrix": (torch.ones(2, 2), r"\[2, 2\] torch.float32, expected floating-point"),
        "whole": (torch.ones(3).long(), "torch.int64"),
        "nan": (torch.tensor([1.0, float("inf")]), "NaN or infinite"),
    }
    for name, (value, message) in cases.items():
        torch.save(value, tmp_path / f"{name}.pt")
        with pytest.raises(FormatError, match=message):
            load_tensor(tmp_path / f"{name}.pt", ndim=1)


def test_files_of_the_old_kind_and_compressed_ones(tmp_path):
    old = tmp_path / "old.pt"
    torch.save(torch.arange(3.0), old, _use_new_zipfile_serialization=False)
    assert load_tensor(old, ndim=1).tolist() == [0, 1, 2]
    torch.save(torch.ones(4, 4), tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as source, zipfile.ZipFile(tmp_path / "z.pt", "w") as z:
        for item in source.infolist():
            z.writestr(item.filename, source.read(item), zipfile.ZIP_DEFLATED)
    with pytest.raises(FormatError):
        open_matrix(tmp_path / "z.pt")


def odd_tensors():
    return {
        "a sparse or nested tensor": torch.eye(3).to_sparse(),
        "a sparse or nested tensor ": torch.eye(3).to_sparse_csr(),
        "a sparse or nested tensor  ": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "a tensor without numbers": torch.ones(3, device="meta"),
        "of which the file holds only a part": torch.ones(1).expand(10**6, 10**6),
        "of which the file holds only a part ": torch.ones(1).expand(10**12),
        "a quantised tensor": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", odd_tensors())
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a table of lists"])
def test_tensors_that_are_no_plain_numbers(tmp_path, what, inside):
    odd = odd_tensors()[what]
    torch.save({"more": [{"weight": odd}]} if inside else odd, tmp_path / "odd.pt")
    with pytest.raises(
        FormatError, match=rf"odd\.pt holds .*({what.strip()})|pickled Python objects"
    ):
        load_torch(tmp_path / "odd.pt")
    with pytest.raises(FormatError):
        load_tensor(tmp_path / "odd.pt", ndim=1)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_types_that_are_no_numbers_of_a_space(tmp_path, dtype):
    torch.save(torch.ones(3, 3).to(dtype), tmp_path / "odd.pt")
    with pytest.raises(FormatError, match="expected floating-point"):
        open_matrix(tmp_path / "odd.pt")


def test_a_parameter_is_a_tensor(tmp_path):
    torch.save(torch.nn.Parameter(torch.ones(3)), tmp_path / "p.pt")
    assert not load_tensor(tmp_path / "p.pt", ndim=1).requires_grad
    torch.save(torch.nn.Parameter(torch.ones(3, 2)), tmp_path / "m.pt")
    assert torch.equal(
        open_matrix(tmp_path / "m.pt").part(slice(0, 3), slice(0, 2)), torch.ones(3, 2)
    )


def test_an_archive_that_unpacks_to_more_than_itself(tmp_path):
    """A megabyte of zeros in a kilobyte, as a trap would have it at larger sizes."""
    torch.save(torch.zeros(1000, 250), tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as source, zipfile.ZipFile(tmp_path / "z.pt", "w") as z:
        for item in source.infolist():
            z.writestr(item.filename, source.read(item), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "z.pt").stat().st_size < 10_000
    with pytest.raises(FormatError, match="compressed archive"):
        load_torch(tmp_path / "z.pt")


def test_a_matrix_whose_file_was_replaced(tmp_path):
    torch.save(torch.ones(5, 4), tmp_path / "m.pt")
    matrix = open_matrix(tmp_path / "m.pt")
    torch.save(torch.zeros(5, 4), tmp_path / "other.pt")
    (tmp_path / "other.pt").replace(tmp_path / "m.pt")
    with pytest.raises(FormatError, match="was replaced"):
        matrix.columns(slice(0, 2))
