"""Where the miniature world is kept."""

from pathlib import Path

from ..shipped import shipped_folder

MODELS = shipped_folder("models")
RESULTS = Path("benchmarks") / "results"
