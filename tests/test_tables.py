"""What the pages quote is what the benchmarks wrote."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", REPO / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", sorted(p.name for p in (REPO / "docs").glob("*.md")))
def test_tables_in_pages_are_up_to_date(tables, page):
    text = (REPO / "docs" / page).read_text(encoding="utf-8")
    assert page != "measurements.md" or text.count("<!-- table ") > 3
    assert tables.fill(text) == text, f"run: python benchmarks/tables.py docs/{page}"


def test_the_readme_leaves_figures_to_the_page_of_measurements():
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert "<!-- table" not in text and "docs/measurements.md" in text
    assert len(text.splitlines()) < 100  # three screens


def test_rows_of_the_training_benchmark_state_their_goals():
    rows = json.loads((REPO / "benchmarks/results/training_speed.json").read_text("utf-8"))
    compare = {"<=": lambda a, b: a <= b, ">=": lambda a, b: a >= b}
    for row in rows:
        assert isinstance(row["measured"], float | int) and row["name"]
        sign, limit = row["goal"].split() if row["goal"] else ("<=", "inf")
        compare[sign](row["measured"], float(limit))  # reads as a comparison


def test_columns_are_picked_by_their_headings(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "a.md").write_text("| | x | y |\n|---|---|---|\n| r | 1 | 2 |\n", encoding="utf-8")
    page = "<!-- table a.md: y -->\nold\n<!-- end -->\n"
    assert tables.fill(page).splitlines()[1:-1] == ["|  | y |", "| --- | --- |", "| r | 2 |"]
    with pytest.raises(SystemExit, match="No column 'z'"):
        tables.fill(page.replace(": y", ": z"))
