"""The host's modules in this process, on the CPU, with the pack loaded as the host loads it: from a folder, by path."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

REPO = Path(__file__).resolve().parents[1]
PACK = "w2wpp_pack"


def enter(host: Path) -> None:
    """Make ``comfy`` and the pack importable; its arguments are read on import."""
    others = [p for p in sys.path if Path(p or ".").resolve() != REPO]
    sys.path[:] = [str(host), *others, str(REPO)]  # `nodes` is the host's
    importlib.import_module("comfy.options").enable_args_parsing()
    given, sys.argv = sys.argv, [sys.argv[0], "--cpu"]
    try:
        importlib.import_module("comfy.cli_args")
    finally:
        sys.argv = given
    spec = importlib.util.spec_from_file_location(
        PACK, REPO / "__init__.py", submodule_search_locations=[str(REPO)]
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = module
    spec.loader.exec_module(module)


def part(name: str) -> ModuleType:
    """A module of the pack, such as ``nodes.host.plan``."""
    return importlib.import_module(f"{PACK}.{name}")
