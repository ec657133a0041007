"""`w2wpp dataset`: LoRA files of many people as rows of a data set; who each is, in which gauge, what each lost."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..encode import read_any, vector_in
from ..errors import ConfigError, DataError
from ..files.container import open_container, partial_of
from ..files.tables import read_labels
from ..files.writing import is_leftover
from ..lora.gauge import towards
from ..lora.layout import Layout
from ..lora.match import Match, match_modules
from ..lora.source import ADAPTERS, PICKLED, adapter_file
from ..space import Space
from ..spacefile import load_space
from . import alike
from .dataset import VectorDataset, holdout_by_identity, write_dataset
from .meter import Meter
from .workers import in_order

# Folders and files that training scripts put around or beside an adapter.
_INNER_FOLDER = re.compile(r"unet|lora|adapter|final|last|best|checkpoint-\d+|step[-_]?\d+", re.I)
_BESIDE = re.compile(
    r"(optimizer|scheduler|scaler|rng_state|random_states|training_args|trainer_state)", re.I
)
HASH = 16  # hex digits of what stands for a name


@dataclass
class Losses:
    """What every row lost on its way into the layout, filled while the rows are read."""

    names: list[str] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)  # share of |Delta|^2 that the rank holds
    missing: list[float] = field(
        default_factory=list
    )  # share of the layout's modules taken as no update
    ignored: list[int] = field(default_factory=list)  # modules outside of the layout

    def add(self, name: str, kept: float, missing: float, ignored: int) -> None:
        """One more row."""
        self.names.append(name)
        self.kept.append(kept)
        self.missing.append(missing)
        self.ignored.append(ignored)

    def summary(self) -> dict[str, Any]:
        """The distributions and the worst rows by name, for whoever makes the data set."""
        worst = sorted(range(len(self.kept)), key=lambda i: (self.kept[i], -self.missing[i]))[:5]
        return {
            "kept_energy": _quantiles(self.kept),
            "missing_modules": _quantiles(self.missing),
            "rows_with_modules_outside": sum(n > 0 for n in self.ignored),
            "worst": [
                {
                    "file": self.names[i],
                    "kept_energy": round(self.kept[i], 4),
                    "missing_modules": round(self.missing[i], 4),
                }
                for i in worst
                if self.kept[i] < 1 - 1e-4 or self.missing[i] > 0
            ],
        }

    def require(self, min_energy: float, max_missing: float) -> None:
        """Raise DataError where rows lost more than that."""
        poor = [i for i, kept in enumerate(self.kept) if kept < min_energy]
        gaps = [i for i, share in enumerate(self.missing) if share > max_missing]
        if poor:
            i = min(poor, key=lambda i: self.kept[i])
            raise DataError(
                f"{len(poor)} of {len(self.kept)} LoRAs keep less than {min_energy:.0%} of their energy "
                f"in the layout's rank (worst: {self.names[i]}, {self.kept[i]:.1%}; 0 is one that changes "
                "nothing). Use a layout of a higher rank, leave them out, or take them all the same with "
                "--min-energy 0."
            )
        if gaps:
            i = max(gaps, key=lambda i: self.missing[i])
            raise DataError(
                f"{len(gaps)} of {len(self.kept)} LoRAs lack more than {max_missing:.0%} of the layout's "
                f"modules (worst: {self.names[i]}, {self.missing[i]:.1%}), which would be taken as "
                "unchanged. Leave them out, or take them all the same with --max-missing 1."
            )


def gather_loras(
    folders: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    layout: Layout,
    *,
    person_is: str = "file",
    heldout: float = 0.2,
    seed: int = 0,
    labels: str | os.PathLike[str] | None = None,
    gauge: str = "keep",
    min_energy: float = 0.5,
    max_missing: float = 0.25,
    assume_family: bool = False,
    losses: Losses | None = None,
    workers: int = 1,
    precision: str = "single",
    callback: Callable[[str], object] = lambda line: None,
) -> VectorDataset:
    """Write the LoRA files in folders, sorted by path, as a data set.

    Each file is a person, or with ``person_is="folder"`` each folder; a share of the persons is held out. ``labels`` is
    a table by the file's name, its stem or its folder. ``gauge`` keeps the files' own, brings every LoRA, of any rank,
    into that of the "first", or into that of a space file. LoRAs that keep less than ``min_energy`` of their update in
    the layout's rank, or lack more than ``max_missing`` of its modules, raise DataError; ``losses`` is filled with what
    every one lost.

    A run that was killed is taken up where it stood, with the same bytes. ``workers`` processes read; ``precision`` is
    "single" or "half"; the callback is told how far it is.
    """
    for name, share in (("min_energy", min_energy), ("max_missing", max_missing)):
        if not 0 <= share <= 1:
            raise ConfigError(f"{name} is a share between 0 and 1. Got {share}.")
    paths = find_loras(folders)
    people = [person_of(path) for path in paths]
    if person_is == "folder":
        people = [path.parent if person == path else person for path, person in zip(paths, people)]
    number = {person: i for i, person in enumerate(dict.fromkeys(people))}
    identity = torch.tensor([number[person] for person in people])
    generator = torch.Generator().manual_seed(seed)
    table = read_labels(labels) if labels else None
    values = None if table is None else torch.stack([table.of(*names_of(p)) for p in paths])
    found = Losses() if losses is None else losses
    towards = gauge if gauge in ("keep", "first") else load_space(gauge)
    read = row_reader(paths, layout, towards, assume_family=assume_family)
    journal, meter = _Journal(output), Meter("files", len(paths), callback)

    def recall(count: int) -> None:
        """What the rows lost that an earlier run has written."""
        past = journal.take_up(count)
        if past is None:  # rows without what they lost are read again for that
            past = [(r.kept, r.missing, r.ignored) for r in map(read, paths[:count])]
        for path, lost in zip(paths, past):
            found.add(str(path), *lost)

    def rows(start: int) -> Iterator[Tensor]:
        recall(start)
        meter.begin(start)
        for i, row in enumerate(in_order(read, paths[start:], workers), start):
            journal.add(row)
            found.add(str(paths[i]), row.kept, row.missing, row.ignored)
            meter(i + 1)
            yield torch.from_numpy(row.w)[None]

    def kept() -> Iterator[Tensor]:  # asked for once all rows are through
        if not found.kept:  # an earlier run had written them all
            recall(len(paths))
        found.require(min_energy, max_missing)
        yield torch.tensor(found.kept)

    written = write_dataset(
        output,
        rows,
        layout,
        identity,
        heldout=holdout_by_identity(identity, heldout, generator=generator),
        labels=values,
        label_names=table.names if table is not None else (),
        kept=kept(),
        provenance={
            **origin(paths),
            "identity": person_is,
            "seed": seed,
            "gauge": gauge if gauge in ("keep", "first") else "a space's",
        },
        precision=precision,
    )
    journal.path.unlink(missing_ok=True)
    return written


def find_loras(folders: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The LoRA files in folders and below: safetensors, and PyTorch's files where no safetensors is beside.

    Raises DataError if there are none.
    """
    found = set()
    for folder in folders:
        for path in Path(folder).rglob("*"):
            suffix = path.suffix.lower()
            usable = suffix == ".safetensors" or suffix in PICKLED
            if not usable or path.name.startswith(".") or _BESIDE.match(path.name):
                continue
            if any(map(is_leftover, path.relative_to(folder).parts)):
                continue  # what a writer left behind that was killed
            if suffix != ".safetensors" and path.with_suffix(".safetensors").is_file():
                continue
            if path.name in ADAPTERS and adapter_file(path.parent) != path:
                continue  # the same adapter in two spellings
            if path.is_file():
                found.add(path)
    if not found:
        raise DataError(f"No .safetensors files in {', '.join(map(str, folders))}.")
    return sorted(found)


def person_of(path: Path) -> Path:
    """What names a LoRA's person: the file, or the folder that a training script wrote one for.

    PEFT and diffusers call every file the same, as in 17/unet/adapter_model.safetensors.
    """
    if path.name not in ADAPTERS:
        return path
    folder = path.parent
    while _INNER_FOLDER.fullmatch(folder.name) and folder.parent != folder:
        folder = folder.parent
    return folder


def names_of(path: Path) -> tuple[str, ...]:
    """By what a table may call a LoRA, most particular first."""
    person = person_of(path)
    own = (person.name,) if person != path else (path.name, path.stem)
    return tuple(dict.fromkeys((*own, path.name, path.stem, path.parent.name)))


def name_hash(name: str) -> str:
    """What stands for a name where the name itself must not."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:HASH]


def origin(paths: Sequence[Path]) -> dict[str, Any]:
    """What a data set says of its files: how many, and hashes of their names, which may be people's."""
    rows = [name_hash(_row_name(path)) for path in paths]
    return {"files": len(paths), "files_sha256": name_hash("\n".join(rows)), "rows": rows}


def _row_name(path: Path) -> str:
    person = person_of(path)
    return person.name if person != path else path.stem


def row_numbers(provenance: Mapping[str, Any], count: int) -> Mapping[str, int]:
    """{name hash: row} of a data set; by number where it says nothing of names."""
    rows = provenance.get("rows")
    if isinstance(rows, list) and len(rows) == count:
        return {str(row): i for i, row in enumerate(rows)}
    files = provenance.get("files")
    if isinstance(files, list) and len(files) == count:  # of releases up to 0.1
        return {name_hash(Path(str(name)).stem): i for i, name in enumerate(files)}
    return {name_hash(str(i)): i for i in range(count)}


def public(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What a file that is passed on may say of its data: no names, not even as hashes one by one."""
    facts = {k: v for k, v in provenance.items() if k != "rows"}
    files = facts.get("files")
    if isinstance(files, list):
        hashes = [name_hash(Path(str(name)).stem) for name in files]
        facts.update(files=len(files), files_sha256=name_hash("\n".join(hashes)))
    return facts


@dataclass(frozen=True, eq=False)
class Row:
    """A file's vector [P], and what it lost on its way."""

    w: np.ndarray
    kept: float  # share of |Delta|^2 that the layout's rank holds
    missing: float  # share of the layout's modules taken as no update
    ignored: int  # modules outside of the layout


@dataclass(frozen=True, eq=False)
class RowReader:
    """Path -> row in the gauge asked for: "keep", that of a space, or towards a reference [P]."""

    layout: Layout
    gauge: str | Space
    reference: Tensor | None = None
    assume_family: bool = False

    def __call__(self, path: Path) -> Row:
        if self.gauge != "keep" or path.suffix.lower() != ".safetensors":
            return self._read(path)[0]
        with open_container(path) as file:
            key = alike.description(file)
            key = key and f"{self._settings} {key}"
            plan = _PLANS.get(key or "", False)
            if isinstance(plan, alike.Plan):
                w = plan.apply(alike.numbers_of(file))
                if w is not None:
                    return Row(w, 1.0, 0.0, 0)
            row, plain = self._read(path)
            if plan is None and key:  # seen once before: more will come
                found = (
                    alike.find_plan(file, self.layout, torch.from_numpy(row.w)) if plain else None
                )
                _PLANS[key] = found or False
            elif key and key not in _PLANS:
                _PLANS[key] = None
            return row

    @cached_property
    def _settings(self) -> str:
        return json.dumps([self.layout.to_json(), self.assume_family])

    def _read(self, path: Path) -> tuple[Row, bool]:
        """By the reader of every kind of LoRA; and whether it took the file's numbers as they are."""
        file = read_any(path, self.layout)
        if isinstance(self.gauge, Space):
            w, match = vector_in(self.gauge, file, assume_family=self.assume_family)
        else:
            match = match_modules(file, self.layout, assume_family=self.assume_family)
            w = (
                file.vector(self.layout)
                if self.reference is None
                else _turned(match, self.reference)
            )
        kept = _kept(match, w)
        missing, ignored = len(match.missing) / len(self.layout.modules), len(match.ignored)
        plain = kept > 1 - 1e-9 and not missing and not ignored and match.own() is not None
        return Row(w.float().numpy(), kept, missing, ignored), plain


# How files of a description are read, in this process: None for one that was seen once, False for none.
_PLANS: dict[str, alike.Plan | bool | None] = {}


def row_reader(
    paths: Sequence[Path], layout: Layout, gauge: str | Space, *, assume_family: bool = False
) -> RowReader:
    """What reads files in the gauge asked for: "keep", "first" or that of a space.

    Raises ConfigError where the space has another layout.
    """
    if isinstance(gauge, Space) and gauge.layout != layout:
        raise ConfigError(
            f"The space has the layout '{gauge.layout.name}'; give it as --layout too."
        )
    reference = None
    if gauge == "first":
        reference = reference_of(paths, layout, assume_family=assume_family)
    return RowReader(layout, gauge, reference, assume_family)


class _Journal:
    """What every row lost, beside the rows that a killed write left; a line a row."""

    def __init__(self, output: str | os.PathLike[str]) -> None:
        partial = partial_of(output)
        self.path = partial.with_name(partial.name + ".rows")

    def take_up(self, count: int) -> list[tuple[float, float, int]] | None:
        """The first `count` rows, and nothing else is left of it; None where they are not all there."""
        lines = self.path.read_text("utf-8").splitlines()[:count] if self.path.exists() else []
        try:
            rows = [tuple(json.loads(line)) for line in lines]
        except ValueError:
            return None
        if len(rows) != count or any(len(row) != 3 for row in rows):
            return None
        self.path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return rows  # type: ignore[return-value]

    def add(self, row: Row) -> None:
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps([row.kept, row.missing, row.ignored]) + "\n")


def reference_of(paths: Sequence[Path], layout: Layout, *, assume_family: bool = False) -> Tensor:
    """A vector [P] to turn LoRAs towards: of every module, the first file's that has it."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for path in paths:
        match = match_modules(read_any(path, layout), layout, assume_family=assume_family)
        own = match.own()
        lora = match.balanced()[0] if own is None else layout.unpack(own)
        for name, delta in match.deltas.items():
            if name not in found and delta.square() > 0:
                found[name] = lora[name]
        if len(found) == len(layout.modules):
            break
    zero = layout.unpack(torch.zeros(layout.size, dtype=torch.float64))
    pairs = {n: found.get(n, zero[n]) for n in zero}
    return layout.pack({n: (a.double(), b.double()) for n, (a, b) in pairs.items()}).float()


def _turned(match: Match, reference: Tensor) -> Tensor:
    balanced, _ = match.balanced()
    return towards(balanced, match.layout, reference)


def _kept(match: Match, w: Tensor) -> float:
    """The share of |Delta|^2 in the layout's modules that a vector [P] holds; 0 of an empty LoRA."""
    if match.square() == 0:
        return 0.0
    return max(0.0, 1.0 - match.error(w) ** 2)


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    t = torch.tensor(sorted(values), dtype=torch.float64)
    places = {"least": 0.0, "tenth": 0.1, "median": 0.5, "most": 1.0}
    return {name: round(float(torch.quantile(t, q)), 4) for name, q in places.items()}
