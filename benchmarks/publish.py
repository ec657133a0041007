"""How every benchmark ends: its table on standard output, and beside a JSON file if one is asked for."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch


def publish(result: dict[str, Any] | list[dict[str, Any]], table: str, output: Path | None) -> None:
    cores = f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads"
    hardware = f"{cores}, torch {torch.__version__}"
    print(table)
    if output:
        if isinstance(result, list):  # of rows
            whole: Any = [{**row, "hardware": hardware} for row in result]
        else:
            whole = {**result, "hardware": hardware}
        text = json.dumps(whole, indent=1) + "\n"
        output.write_text(text, encoding="utf-8")
        output.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
