"""Copy the tables that the benchmarks wrote into the pages that quote them.

    python benchmarks/tables.py docs/measurements.md docs/train.md

In the page, ``<!-- table FILE -->`` or ``<!-- table FILE: COLUMN, COLUMN -->`` opens a copy of a table of
``benchmarks/results/``, whole or some columns of it, and ``<!-- end -->`` closes it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
QUOTE = re.compile(
    r"(<!-- table (?P<file>[\w.-]+)(?:: (?P<columns>[^>]+?))? -->\n).*?(<!-- end -->)", re.S
)


def fill(page: str) -> str:
    """The page with every quoted table as it is in its file now."""
    return QUOTE.sub(
        lambda m: m[1] + _columns((RESULTS / m["file"]).read_text("utf-8"), m["columns"]) + m[4],
        page,
    )


def _columns(table: str, wanted: str | None) -> str:
    """The first column of a Markdown table, and those whose headings are wanted (all by default)."""
    if wanted is None:
        return table
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    names = [name.strip() for name in wanted.split(",")]
    unknown = [name for name in names if name not in rows[0]]
    if unknown:
        raise SystemExit(f"No column {unknown[0]!r}; there are {', '.join(rows[0][1:])}.")
    kept = [0, *(rows[0].index(name) for name in names)]
    return "".join("| " + " | ".join(row[i] for i in kept) + " |\n" for row in rows)


def main() -> None:
    for name in sys.argv[1:]:
        page = Path(name)
        page.write_text(fill(page.read_text("utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
