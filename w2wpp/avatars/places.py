"""Where the miniature world is kept: what ships, what it is made in, and what was measured.

All three are in the project's folder, whatever the working directory; an installed package has no such folder and works
in the current one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..bundle import shipped_folder

ROOT = Path(__file__).resolve().parents[2]
MODELS = shipped_folder("models")
_HOME = ROOT if (ROOT / "pyproject.toml").exists() else Path()
RESULTS = _HOME / "benchmarks" / "results"
WORK = _HOME / "world"


@dataclass(frozen=True)
class World:
    """The folders of one miniature world; files in them are named models/..., work/... and results/..."""

    models: Path = MODELS
    work: Path = WORK
    results: Path = RESULTS

    def at(self, name: str) -> Path:
        """The path of a file by such a name."""
        folder, _, rest = name.partition("/")
        found: Path = getattr(self, folder)
        return found / rest
