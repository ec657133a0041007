"""The package as pip installs it: built into a wheel, unpacked elsewhere, run without this checkout."""

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import w2wpp

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "w2wpp",
    "models",
    "example_workflows",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, because building writes beside the sources."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy)
    code = f"from setuptools.build_meta import build_wheel as b; print(b({str(out)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(site, code, cwd):
    """(exit status, output, errors) of a fresh interpreter that finds the installed package only."""
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def test_every_module_and_what_ships_is_inside(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "w2wpp").rglob("*.py")}
    models = {f"w2wpp/models/{p.name}" for p in (ROOT / "models").glob("*.safetensors")}
    assert modules | models <= names
    assert {"w2wpp/py.typed", "w2wpp/example_workflows/avatar_portrait.png"} <= names
    assert not [n for n in names if n.startswith(("tests/", "nodes/", "benchmarks/"))]


def test_the_installed_package_works_from_any_folder(site, tmp_path):
    code = (
        "import w2wpp, torch\n"
        "space = w2wpp.load_space(w2wpp.shipped())\n"
        "people = space.sample(2, generator=torch.Generator().manual_seed(1))\n"
        "print(w2wpp.__file__, people.vectors(space).shape[1] == space.layout.size)\n"
        "from w2wpp.spacefile import find_space\n"
        "assert find_space(space.fingerprint) == w2wpp.shipped()\n"
        "from w2wpp.cli import main\n"
        "main(['--version'])"
    )
    status, out, err = run(site, code, tmp_path)
    assert status == 0, err
    first, version = out.splitlines()
    assert first == f"{site / 'w2wpp' / '__init__.py'} True"
    assert version == f"w2wpp {w2wpp.__version__}"


NO_TORCH = "import sys; sys.modules['torch'] = None\n"  # as if it were not installed


def test_without_torch_one_sentence_says_what_to_do(site, tmp_path):
    main = NO_TORCH + "from w2wpp.cli import main; sys.exit(main({}))"
    status, out, err = run(site, main.format(["info", "x.safetensors"]), tmp_path)
    assert (status, out) == (1, "")
    assert (
        err == f"w2wpp: This needs torch, which is not installed: {sys.executable} -m pip install "
        "'w2wpp[standalone]'\n"
    )
    assert run(site, main.format(["--version"]), tmp_path)[:2] == (
        0,
        f"w2wpp {w2wpp.__version__}\n",
    )
    code = NO_TORCH + "import w2wpp\nprint(w2wpp.__version__)\nw2wpp.load_space"
    status, out, err = run(site, code, tmp_path)
    assert status == 1 and out == f"{w2wpp.__version__}\n"
    assert err.splitlines()[-1] == (
        "ImportError: w2wpp.load_space: This needs torch, which is not installed: "
        f"{sys.executable} -m pip install 'w2wpp[standalone]'"
    )


def test_the_metadata_says_what_the_page_on_the_library_says(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("METADATA")]
        facts = email.message_from_bytes(archive.read(name))
    assert facts["Version"] == w2wpp.__version__
    page = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    extras = set(re.findall(r"\[([a-z]+)\]\"?'?", page)) & {
        "standalone",
        "avatars",
        "test",
        "docs",
    }
    assert "standalone" in extras and extras <= set(facts.get_all("Provides-Extra"))
    # Without an extra, only what ComfyUI does not bring: a pack must not replace the host's own.
    own = [r for r in facts.get_all("Requires-Dist") if "extra ==" not in r]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert own == [line for line in lines if line and not line.startswith("#")]


def test_what_does_not_ship_is_named(tmp_path):
    with pytest.raises(
        w2wpp.ConfigError, match=r"No file 'faces.safetensors' ships.*avatars.safetensors"
    ):
        w2wpp.shipped("faces.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no file .*faces.*avatars.safetensors"):
        w2wpp.load_space(tmp_path / "faces.safetensors")


def test_everything_that_is_promised_is_there():
    assert [n for n in w2wpp.__all__ if not hasattr(w2wpp, n)] == []
    assert sorted(set(w2wpp.__all__)) == sorted(w2wpp.__all__)
