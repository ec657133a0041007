"""What is still to be filled in before the pack is published.

    python docs/publishing.py

Prints a line for each point and ends with status 1 while one is open. What the points mean: ``docs/publishing.md``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACEHOLDERS = {"PublisherId": "w2wpp", "Repository": "https://github.com/w2wpp/ComfyUI-w2wpp"}


def open_points(metadata: str, changelog: str) -> list[str]:
    """What the text of pyproject.toml and of the changelog leave open, a sentence each."""
    # Read line by line: the interpreter that runs ComfyUI may be too old for a TOML reader.
    values = dict(re.findall(r'^(\w[\w-]*) = "(.*)"$', metadata, re.M))
    points = []
    for name, placeholder in PLACEHOLDERS.items():
        if values.get(name, "") in ("", placeholder):
            points.append(f"{name} is a placeholder: {values.get(name, '')!r}.")
    owner = values.get("Repository", "").removeprefix("https://github.com/").removesuffix(".git")
    if not values.get("Repository", "").startswith("https://github.com/"):
        points.append(f"Repository is no address at GitHub: {values.get('Repository', '')!r}.")
    elif f"/{owner}/" not in values.get("Icon", ""):
        points.append(f"Icon lies outside of the repository {owner}: {values.get('Icon', '')!r}.")
    version = values.get("version", "")
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        points.append(f"version has to be three numbers, such as 0.1.0: {version!r}.")
    if not re.search(rf"^## {re.escape(version)}( |$)", changelog, re.M):
        points.append(f"CHANGELOG.md has no chapter '## {version}'.")
    return points


def main() -> int:
    texts = [
        (ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "CHANGELOG.md")
    ]
    points = open_points(*texts)
    print("\n".join(points) or "Everything is filled in.")
    return int(bool(points))


if __name__ == "__main__":
    sys.exit(main())
