"""Tables of labels and of pictures, read once for all verbs."""

import pytest
import torch

from w2wpp.errors import DataError, FormatError
from w2wpp.files.tables import picture_lines, read_labels


def table(tmp_path, text):
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_labels_go_by_the_first_column(tmp_path):
    found = read_labels(table(tmp_path, "who,age,smile\nann,1.5,-2\n\nbob,3,4e-1\n"))
    assert found.names == ("age", "smile") and found.keys == ("ann", "bob")
    torch.testing.assert_close(found.values, torch.tensor([[1.5, -2.0], [3.0, 0.4]]))
    assert torch.equal(found.of("carl", "bob"), found.values[1])
    with pytest.raises(DataError, match="no line for carl"):
        found.of("carl", "dora")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "header line"),
        ("who,age\n", "header line"),
        ("who\nann\n", "header line"),
        ("who,age\nann,1,2\n", "line 2: ann has 2 labels, the header 1"),
        ("who,age\nann,old\n", "line 2: the labels of ann"),
        ("who,age\nann,1\nbob,nan\n", "line 3: the labels of bob"),
    ],
)
def test_a_bad_table_says_where(tmp_path, text, message):
    with pytest.raises(FormatError, match=message):
        read_labels(table(tmp_path, text))


def test_lines_of_pictures(tmp_path):
    (tmp_path / "a.png").touch()
    path = table(tmp_path, "picture,person,age\na.png,ann,3\n")
    ((where, picture, fields),) = picture_lines(path, ("picture", "person"))
    assert where.endswith("table.csv, line 2") and picture == tmp_path / "a.png"
    assert fields == ["ann", "3"]
    with pytest.raises(FormatError, match="starts with 'picture,who'"):
        list(picture_lines(path, ("picture", "who")))
    with pytest.raises(DataError, match=r"no picture 'b.png'"):
        list(picture_lines(table(tmp_path, "picture\nb.png\n"), ("picture",)))
