"""Captions beside pictures, and the words that call a person up."""

import pytest

from w2wpp.errors import FormatError
from w2wpp.files.captions import LONGEST, caption_file, caption_of, with_trigger


@pytest.mark.parametrize(
    "trigger, caption, expected",
    [
        ("sks person", "smiling, red", "sks person, smiling, red"),
        ("sks person", "a photo of SKS Person, smiling", "a photo of SKS Person, smiling"),
        ("sks", "nobody asks", "sks, nobody asks"),  # as a word, not as letters
        ("sks", "sks2, smiling", "sks, sks2, smiling"),
        ("sks", "(sks), smiling", "(sks), smiling"),
        (" sks \n person ", "sks person", "sks person"),
        ("a+b (c)", "with a+b (c) in it", "with a+b (c) in it"),  # no pattern
        ("", "smiling", "smiling"),
        ("  ", "smiling", "smiling"),
    ],
)
def test_a_caption_follows_the_trigger_unless_it_has_it(trigger, caption, expected):
    assert with_trigger(trigger, caption) == expected


def test_the_words_of_a_picture_are_on_one_line(tmp_path):
    picture = tmp_path / "some.person" / "1.best.png"
    picture.parent.mkdir()
    assert caption_of(picture) == ""
    assert caption_file(picture).name == "1.best.txt"
    caption_file(picture).write_bytes("\ufeffa  photo\r\n of \u4eba ".encode())
    assert caption_of(picture) == "a photo of \u4eba"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\xff\xfe\x00a", "Save it as text in UTF-8"),
        (b"a" * (LONGEST + 1), "too long for a caption"),
    ],
)
def test_what_is_no_caption_is_named(tmp_path, content, message):
    (tmp_path / "1.txt").write_bytes(content)
    with pytest.raises(FormatError, match=rf"{tmp_path.name}/1\.txt .*{message}"):
        caption_of(tmp_path / "1.png")
