"""What README quotes is what the benchmarks wrote."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", REPO / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_in_readme_are_up_to_date(tables):
    page = (REPO / "README.md").read_text(encoding="utf-8")
    assert "<!-- table world.md -->" in page
    assert tables.fill(page) == page, "run: python benchmarks/tables.py README.md"


def test_columns_are_picked_by_their_headings(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "a.md").write_text("| | x | y |\n|---|---|---|\n| r | 1 | 2 |\n", encoding="utf-8")
    page = "<!-- table a.md: y -->\nold\n<!-- end -->\n"
    assert tables.fill(page).splitlines()[1:-1] == ["|  | y |", "| --- | --- |", "| r | 2 |"]
    with pytest.raises(SystemExit, match="No column 'z'"):
        tables.fill(page.replace(": y", ": z"))
