"""How a file scales its updates, where no .alpha beside a module says it.

PEFT keeps the scale in adapter_config.json, diffusers in the metadata entry lora_adapter_metadata
(the same configuration, by component), this project's older exports in the entry lora_alpha.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import FormatError
from ..files.text import parse_json, read_json
from .kinds import Scale
from .source import ADAPTERS, Source

FOLDED = "w2wpp.folded_scale"  # metadata: what B was multiplied by, so that reading can undo it
DIFFUSERS = "lora_adapter_metadata"
CHANGES_THE_BASE = (
    "pissa",
    "olora",
    "corda",
    "loftq",
)  # ways to start that alter the base's weights


@dataclass(frozen=True)
class Stated:
    """The scale of every module, and where that is written; empty if nowhere."""

    alpha: float | None = None
    rank: int | None = None
    root: bool = False
    alphas: Mapping[str, float] = field(default_factory=dict)  # alpha_pattern
    ranks: Mapping[str, int] = field(default_factory=dict)  # rank_pattern
    where: str = ""

    def of(self, module: str) -> Scale:
        """What is stated for a module, patterns first."""
        alpha = _matched(self.alphas, module)
        rank = _matched(self.ranks, module)
        return Scale(
            self.alpha if alpha is None else alpha,
            self.root,
            self.rank if rank is None else int(rank),
        )


def stated_by(source: Source, component: str = "unet") -> Stated:
    """What the file's metadata or the configuration beside it say of a model's component."""
    if DIFFUSERS in source.metadata:
        return _of_diffusers(source, component)
    alpha = stated_number(source, "lora_alpha")
    if alpha is not None:
        return Stated(alpha, where="metadata")
    path = _config_beside(source)
    return _of_config(_table(path, read_json(path)), str(path)) if path else Stated()


def _config_beside(source: Source) -> Path | None:
    """PEFT's configuration of an adapter; a file of another name has one if no adapter claims it."""
    path = source.path
    config = path.parent / "adapter_config.json"
    if not path.is_file() or not config.is_file():
        return None
    if not any(key.startswith("base_model.model.") for key in source.entries):
        return None
    others = [n for n in ADAPTERS if n.startswith("adapter_model") and (path.parent / n).is_file()]
    return config if path.name in others or not others else None


def stated_number(source: Source, key: str) -> float | None:
    """A number in the metadata; raises if it is none."""
    try:
        number = float(source.metadata[key]) if key in source.metadata else None
    except ValueError:
        number = math.nan
    if number is not None and not (math.isfinite(number) and number != 0):
        raise FormatError(
            f"{source.path}: its metadata says {key} = {source.metadata[key]!r}, which is not a number."
        )
    return number


def _of_diffusers(source: Source, component: str) -> Stated:
    where = f"{source.path}: {DIFFUSERS}"
    config = _table(where, parse_json(source.metadata[DIFFUSERS], where))
    # By component, as an adapter of PEFT, or of a model by itself.
    for prefix in (f"{component}.", "base_model.model.", ""):
        ours = {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
        if "r" in ours or "lora_alpha" in ours:
            break
    else:
        ours = {}
    return _of_config(ours, where) if ours else Stated()


def _of_config(config: Mapping[str, Any], where: str) -> Stated:
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_THE_BASE):
        raise FormatError(
            f"{where} says init_lora_weights = {start!r}: such an adapter belongs to a base model "
            "whose weights were changed for it. Save it converted to a plain LoRA (PEFT: "
            "path_initial_model_for_weight_conversion)."
        )
    if config.get("fan_in_fan_out"):
        raise FormatError(f"{where} says fan_in_fan_out, which no layer of a UNet is.")
    alpha = config.get("lora_alpha", config.get("alpha"))
    if alpha is None and "r" not in config:
        raise FormatError(f"{where} does not state lora_alpha as a number.")
    return Stated(
        None if alpha is None else _number(where, "lora_alpha", alpha),
        None if config.get("r") is None else int(_number(where, "r", config["r"])),
        bool(config.get("use_rslora", False)),
        _pattern(where, "alpha_pattern", config),
        {k: int(v) for k, v in _pattern(where, "rank_pattern", config).items()},
        where,
    )


def _number(where: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise FormatError(f"{where} does not state {name} as a number. Got {value!r}.")
    return float(value)


def _pattern(where: str, name: str, config: Mapping[str, Any]) -> dict[str, float]:
    table = config.get(name) or {}
    if not isinstance(table, Mapping):
        raise FormatError(f"{where}: {name} is no table.")
    return {str(key): _number(where, name, value) for key, value in table.items()}


def _matched(patterns: Mapping[str, float], module: str) -> float | None:
    """The value whose key is the module's name or an end of it, or as PEFT reads it, a pattern of that."""
    for key, value in patterns.items():
        plain = key.removeprefix("^").split(".lora_")[0]
        if module == plain or (module.endswith("." + plain) and not key.startswith("^")):
            return value
    for key, value in patterns.items():
        if re.fullmatch(r"[\w.]*", key) is None and _found(key, module):
            return value
    return None


def _found(pattern: str, module: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        return False


def _table(where: object, config: Any) -> dict[str, Any]:
    if not isinstance(config, dict):
        raise FormatError(f"{where} does not state lora_alpha: it is no table.")
    return config
