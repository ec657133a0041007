"""Pages of the library's interface, made from its docstrings by pdoc.

    python -m pip install ".[docs]"
    python docs/api.py FOLDER

The command line and the miniature world are left out: they are used by commands.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = {"cli", "avatars", "__main__"}


def modules() -> list[str]:
    """The package, its public modules and packages, by their dotted names."""
    found = {"w2wpp"}
    for path in (ROOT / "w2wpp").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[1] not in LEFT_OUT:
            found.add(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return sorted(found)


def build(folder: Path, names: list[str]) -> None:
    """Write the pages of some modules into a folder."""
    import pdoc

    pdoc.render.configure(docformat="markdown", footer_text="W2W++")
    pdoc.pdoc(*names, output_directory=folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.path.insert(0, str(ROOT))
    build(Path(sys.argv[1]), modules())
