"""How much the tests notice: changes one thing in the library at a time and runs the tests that should fail.

Run from the repository's root as ``python -m tests.mutate --seed 1 --count 40 [--only inversion]``. Works on a copy.
Prints every change that no test noticed. Some mean nothing: a limit that nobody reaches, a constant that was tuned.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Sources, and the tests that hold them; the quickest first, because the first failure ends a run.
ROOMS = {
    "codecs": ["tests/codecs", "tests/test_space.py"],
    "inversion": ["tests/inversion"],
    "lora": ["tests/lora", "tests/test_encode.py"],
    "basis.py": ["tests/test_basis.py", "tests/training/test_fit_metrics.py"],
    "delta_basis.py": ["tests/test_delta_space.py"],
    "edits.py": ["tests/test_edits.py", "tests/cli/test_cli.py"],
    "flow.py": ["tests/test_flow.py"],
    "identity.py": ["tests/test_identity.py", "tests/test_mix.py"],
    "mix.py": ["tests/test_mix.py"],
    "mixtures.py": ["tests/test_delta_space.py"],
    "space.py": ["tests/test_space.py", "tests/test_flow.py", "tests/test_interface.py"],
}
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.MatMult: ast.MatMult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip


def mutants(tree: ast.AST) -> Iterator[tuple[ast.AST, str, object]]:
    """(node, field, new value) of every change that is known here, outside of annotations, messages and docstrings."""
    for node in _code(tree):
        if isinstance(node, ast.Compare):
            yield node, "ops", [COMPARISONS[type(node.ops[0])](), *node.ops[1:]]
        elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) is not ast.MatMult:
            if type(node.op) in ARITHMETIC:
                yield node, "op", ARITHMETIC[type(node.op)]()
        elif isinstance(node, ast.BoolOp):
            yield node, "op", ast.And() if isinstance(node.op, ast.Or) else ast.Or()
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            yield node, "op", ast.UAdd()
        elif isinstance(node, ast.IfExp | ast.If | ast.While):
            yield node, "test", ast.UnaryOp(ast.Not(), node.test)
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield node, "value", not node.value
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            yield node, "value", node.value * 2 if isinstance(node.value, float) else node.value + 1


def _code(node: ast.AST) -> Iterator[ast.AST]:
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.Raise | ast.JoinedStr):
                yield child
                yield from _code(child)


def changed(source: str, number: int) -> tuple[str, str]:
    """The source with one of its mutants, and the line as it became."""
    tree = ast.parse(source)
    node, field, value = list(mutants(tree))[number]
    line = node.lineno
    setattr(node, field, value)
    ast.fix_missing_locations(tree)
    statement = min(
        (s for s in ast.walk(tree) if isinstance(s, ast.stmt) and s.lineno <= line <= s.end_lineno),
        key=lambda s: s.end_lineno - s.lineno,
    )
    return ast.unparse(tree), f"line {line}: {ast.unparse(statement).splitlines()[0]}"


def noticed(copy: Path, tests: list[str]) -> bool:
    """Whether the tests fail, or do not end in time."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=600)
    except subprocess.TimeoutExpired:
        return True
    return done.returncode != 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--only", choices=ROOMS, help="a single room")
    args = parser.parse_args()
    found = []
    for room in [args.only] if args.only else ROOMS:
        at = ROOT / "w2wpp" / room
        for path in sorted(at.rglob("*.py")) if at.is_dir() else [at]:
            source = path.read_text(encoding="utf-8")
            found += [(room, path, i) for i in range(len(list(mutants(ast.parse(source)))))]
    chosen = random.Random(args.seed).sample(found, min(args.count, len(found)))
    killed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(
            ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "world", "__pycache__")
        )
        for number, (room, path, i) in enumerate(chosen, 1):
            source = path.read_text(encoding="utf-8")
            target = copy / path.relative_to(ROOT)
            text, line = changed(source, i)
            target.write_text(text, encoding="utf-8")
            fine = noticed(copy, ROOMS[room])
            target.write_text(source, encoding="utf-8")
            killed += fine
            if not fine:
                print(f"{path.relative_to(ROOT)}, {line}", flush=True)
            print(f"{number} of {len(chosen)}: {killed} noticed", file=sys.stderr)
    print(f"{killed} of {len(chosen)} noticed, of {len(found)} possible changes.")


if __name__ == "__main__":
    main()
