"""An output that has nothing to give."""

from typing import Any

from comfy_execution.graph_utils import ExecutionBlocker


def nothing_because(reason: str) -> Any:
    """In place of an output: what is connected to it does not run, and says why."""
    return ExecutionBlocker(reason)
