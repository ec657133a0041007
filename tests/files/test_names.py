"""One rule for names, which holds on Windows too."""

from pathlib import PureWindowsPath

import pytest

from w2wpp import ConfigError
from w2wpp.files.names import LONGEST, portable_name
from w2wpp.files.writing import replacing


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("face", "face"),
        ("  face\n", "face"),
        ("", "identity"),
        (" / ", "identity"),
        ("friends/", "friends/identity"),
        ("friends\\anna", "friends/anna"),
        ("./a//b", "a/b"),
        ("Grüße/小明 №7 🙂", "Grüße/小明 №7 🙂"),
        ("%year%-%month%", "%year%-%month%"),
        (".hidden", ".hidden"),
        ("nullify", "nullify"),
        ("com", "com"),
        ("a" * LONGEST, "a" * LONGEST),
    ],
)
def test_names_that_hold_everywhere(tmp_path, given, expected):
    name = portable_name(given, "identity")
    assert name == expected
    with replacing(tmp_path / f"{name}_00001_.safetensors") as file:
        file.write(b"x")
    # A number behind the name, as the host gives it, must not make it a device's.
    assert not PureWindowsPath(f"{name}_00001_.safetensors").is_reserved()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x" * 300, "takes 300 bytes"),
        ("小" * 100, "takes 300 bytes"),
        ("/".join(["folder"] * 40), "279 characters"),
        ("a\0b", "holds '\\\\x00'"),
        ("a\nb", "holds '\\\\n'"),
        ("what?", r"holds '\?'"),
        ("*", r"holds '\*'"),
        ("a|b", r"holds '\|'"),
        ('a"b', "holds '\"'"),
        ("<a>", "holds '<'"),
        ("12:30", "holds ':'"),
        ("aux", "device on Windows"),
        ("AUX.safetensors", "device on Windows"),
        ("nul.txt", "device on Windows"),
        ("a/com1/b", "device on Windows"),
        ("LPT\u00b3", "device on Windows"),
        ("conin$", "device on Windows"),
        ("nul .x", "device on Windows"),
        ("\ud800", "half a character"),
        ("dot.", "ends with a dot"),
        ("a /b", "ends with a dot or a space"),
        ("a/../b", "ends with a dot"),
        (".import-a1b2c3d4", "temporary"),
    ],
)
def test_names_that_do_not(name, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        portable_name(name, "identity")
    str(caught.value).encode("utf-8")  # a message that can be shown
