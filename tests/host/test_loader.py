"""The host's loader as the truth: for every kind of file that it loads, this library sees the same updates."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .server import REPO, find_host

spec = importlib.util.spec_from_file_location("foreign", REPO / "tests" / "lora" / "foreign.py")
foreign = importlib.util.module_from_spec(spec)
sys.modules["foreign"] = foreign
spec.loader.exec_module(foreign)

CASES = foreign.cases()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder, python = find_host()
    script = Path(__file__).with_name("oracle.py")
    arguments = [python, script, folder, REPO, tmp_path_factory.mktemp("loras")]
    done = subprocess.run(
        [str(a) for a in arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path_factory.mktemp("cwd"),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_the_host_and_the_library_see_the_same_update(told: dict, name: str) -> None:
    found, case = told[name], CASES[name]
    assert found["ours"] == 64
    assert found["patched"] == (64 if case.host_loads else 0)
    assert found["error"] < 1e-4


@pytest.mark.parametrize("format, patched", [("kohya", 64), ("diffusers", 0), ("peft", 0)])
def test_what_is_written_loads_where_it_is_said_to(told: dict, format: str, patched: int) -> None:
    found = told[f"written as {format}"]
    assert (found["patched"], found["ours"]) == (patched, 64) and found["error"] < 1e-4


def test_names_of_original_checkpoints_are_read_as_the_host_reads_them(told: dict) -> None:
    """Every weight of SD 1.5, of SDXL and of the avatars' UNet, which has one layer per block."""
    assert told["misread names"] == []
