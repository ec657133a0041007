"""Where the miniature world is kept."""

from pathlib import Path

MODELS = Path(__file__).resolve().parents[2] / "models"
RESULTS = Path("benchmarks") / "results"
