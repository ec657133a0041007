"""A comparison as JSON, tables and plots: goals at the top level, with 95 % intervals over people, rows beneath.

Keys that end in ``_independent`` are of the reader that only scores. Differences are paired by person.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files.writing import write_text
from ...metrics import Estimate, estimate, ratio_estimate
from ...plots import plot_sizes
from ...populations import ratio_of_distances
from ...training.dataset import VectorDataset
from ..build.spaces import DEFAULT, SIZES, W2W, Candidate, candidates
from ..records import cell, save_result
from .comparison import Amounts, Compared, Scores, crowd_shots
from .population import crowd_row, energy_of, readings, reference_row, unit

SUFFIXES = ("", "_independent")
CLAIMED = (16, 32, 64, 128)  # d at which the default is compared with w2w
FEW = 32  # d up to which a codec that is not linear is held against the best linear one
Result = dict[str, Any]


def report(
    main: Compared,
    dataset: VectorDataset,
    *,
    harder: Compared | None = None,
    amounts: Amounts | None = None,
) -> Result:
    """The goals and the rows behind them; goals that were not measured are left out."""
    amounts = amounts or Amounts()
    result: Result = {}
    for suffix in SUFFIXES:
        if f"id_score{suffix}" in main.rebuilt["own"]:
            goals = _goals(main, harder, suffix)
            result |= {f"{name}{suffix}": value for name, value in goals.items()}
    crowds = _crowds(main, dataset, amounts) if "own" in main.drawn else {}
    if crowds:
        result |= _crowd_goals(crowds)
    result["rows"] = _rows(main)
    if harder is not None:
        result["harder_rows"] = _rows(harder)
    result |= {
        "crowds": crowds.get("rows", {}),
        "curve": _curve(main),
        "people": len(main.rebuilt["own"]["id_score"]),
        "default": DEFAULT.name,
        "core_minutes": round(main.minutes + (0.0 if harder is None else harder.minutes), 1),
    }
    return result


def _goals(main: Compared, harder: Compared | None, suffix: str) -> Result:
    key = f"id_score{suffix}"
    scores = main.rebuilt

    def values(candidate: Candidate) -> Tensor | None:
        found = scores.get(candidate.name)
        return None if found is None else torch.tensor(found[key])

    plain = replace(DEFAULT, flow=False)
    goals: Result = {}
    small = values(replace(plain, latent=32))
    if small is not None:
        share = ratio_estimate(small, torch.tensor(scores["own"][key]), paired=True)
        goals |= {"share_d32": share.mean, "share_d32_interval": [share.low, share.high]}
    goals |= _best_share(main, key, "share_best")
    if harder is not None:
        goals |= _best_share(harder, key, "harder_share_best")
    against_w2w, against_linear, linear_names = {}, {}, {}
    sizes = sorted({c.latent for c in candidates() if c.family == plain.family})
    for size in sizes:
        ours, theirs = values(replace(plain, latent=size)), values(replace(W2W, latent=size))
        if ours is None or theirs is None:
            continue
        if size in CLAIMED:
            against_w2w[str(size)] = _triple(estimate(ours - theirs))
        linear = {c.name: values(c) for c in candidates() if c.codec == "pca" and c.latent == size}
        name, best = max(
            ((n, v) for n, v in linear.items() if v is not None),
            key=lambda item: float(item[1].mean()),
        )
        if size <= FEW:
            against_linear[str(size)] = _triple(estimate(ours - best))
            linear_names[str(size)] = name
    goals["default_minus_w2w"] = against_w2w
    goals["nonlinear_minus_linear"] = against_linear
    goals["best_linear"] = linear_names
    return goals


def _best_share(compared: Compared, key: str, name: str) -> Result:
    own = torch.tensor(compared.rebuilt["own"][key])
    others = {
        n: torch.tensor(s[key]) for n, s in compared.rebuilt.items() if n not in ("own", "mean")
    }
    if not others:
        return {}
    best = max(others, key=lambda n: float(others[n].mean()))
    share = ratio_estimate(others[best], own, paired=True)
    return {name: share.mean, f"{name}_interval": [share.low, share.high], f"{name}_space": best}


def _rows(compared: Compared) -> dict[str, Result]:
    """Each space's figures over people, and the references that need no space."""
    own, named = compared.rebuilt["own"], {c.name: c for c in candidates()}
    rows: dict[str, Result] = {}
    for name, scores in compared.rebuilt.items():
        row: Result = {}
        if name in named:
            row |= {"family": named[name].family, "latent": named[name].latent}
        for measured, values in scores.items():
            if measured != "seconds" and not measured.startswith("stranger"):
                row[measured] = estimate(torch.tensor(values)).to_json()
        for suffix in SUFFIXES:
            key = f"id_score{suffix}"
            if key in scores and name != "own":
                mine, full = torch.tensor(scores[key]), torch.tensor(own[key])
                row[f"share{suffix}"] = ratio_estimate(mine, full, paired=True).to_json()
                w2w = f"{W2W.family}-{row.get('latent')}"
                if w2w in compared.rebuilt and w2w != name:
                    base = torch.tensor(compared.rebuilt[w2w][key])
                    row[f"minus_w2w{suffix}"] = estimate(mine - base).to_json()
        rows[name] = row
    rows["another's"] = {
        f"id_score{s}": estimate(torch.tensor(own[f"stranger{s}"])).to_json()
        for s in SUFFIXES
        if f"stranger{s}" in own
    }
    return rows


def _crowds(main: Compared, dataset: VectorDataset, amounts: Amounts) -> dict[str, Any]:
    """Shots and rows of every crowd beside the real one's."""
    assert dataset.labels is not None
    names = dataset.label_names
    known, strangers = (
        unit(dataset.labels[r]) for r in (dataset.training_rows, dataset.heldout_rows)
    )
    shots = {
        name: crowd_shots(scores, amounts.crowd_pictures, len(names))
        for name, scores in main.drawn.items()
    }
    real = shots["own"]
    rows = {
        name: reference_row(real, known, strangers, names)
        if name == "own"
        else crowd_row(some, real, known, strangers, names)
        for name, some in shots.items()
    }
    return {"shots": shots, "rows": rows}


def _crowd_goals(crowds: Mapping[str, Any]) -> Result:
    """The default's consistency as a share of real people's, and its energy distance over w2w's under N(0, I), both of
    the largest size that was drawn from."""
    rows, shots = crowds["rows"], crowds["shots"]
    drawn = [size for size in SIZES if replace(DEFAULT, latent=size).name in shots]
    if not drawn:
        return {}
    default, w2w = (replace(c, latent=drawn[-1]).name for c in (DEFAULT, W2W))
    goals: Result = {"crowd": default}
    for suffix in readings(shots[default]):
        share = rows[default][f"consistency_share{suffix}"]
        goals[f"consistency_share{suffix}"] = share["mean"]
        goals[f"consistency_share_interval{suffix}"] = [share["low"], share["high"]]
        if w2w in shots:
            ours, theirs, real = (readings(shots[name])[suffix] for name in (default, w2w, "own"))
            # Distances are estimated without bias: what is above the floor is the distance itself.
            ratio = ratio_of_distances(energy_of(ours, real), energy_of(theirs, real))
            goals[f"energy_ratio{suffix}"] = ratio.mean
            goals[f"energy_ratio_interval{suffix}"] = [_finite(ratio.low), _finite(ratio.high)]
    return goals


def _curve(main: Compared) -> dict[str, dict[str, Result]]:
    """{family: {training people: figures}}."""
    own = main.rebuilt["own"]

    def figures(scores: Scores) -> Result:
        found: Result = {}
        for suffix in SUFFIXES:
            key = f"id_score{suffix}"
            if key in scores:
                share = ratio_estimate(
                    torch.tensor(scores[key]), torch.tensor(own[key]), paired=True
                )
                found |= {
                    key: estimate(torch.tensor(scores[key])).to_json(),
                    f"share{suffix}": share.to_json(),
                }
        return found

    return {
        family: {str(people): figures(scores) for people, scores in sizes.items()}
        for family, sizes in main.curve.items()
    }


def write(result: Result, path: Path) -> list[Path]:
    """JSON, a table of what is rebuilt, tables of crowds and of the learning curve, and plots of both."""
    save_result(path, result, table(result["rows"]))
    folder, written = path.with_suffix(""), [path, path.with_suffix(".md")]
    for name, text in {
        "harder": table(result.get("harder_rows", {})),
        "crowds": crowd_table(result["crowds"]),
        "curve": curve_table(result["curve"]),
    }.items():
        if text:
            file = path.with_name(f"{path.stem}-{name}.md")
            write_text(file, text + "\n")
            written.append(file)
    plots = {"sizes": by_size(result["rows"]), "people": by_people(result["curve"])}
    if "harder_rows" in result:
        plots["sizes-harder"] = by_size(result["harder_rows"])
    for name, lines in plots.items():
        if lines:
            file = folder / f"{name}.png"
            label = "LoRAs to learn from" if name == "people" else "latents"
            plot_sizes(lines, file, label, "ID score, share of own LoRA's")
            written.append(file)
    return written


COLUMNS = {
    "latent": "d", "weight_r2": "weight R2", "outputs_lost": "outputs lost", "id_score": "ID score",
    "id_score_independent": "ID, independent", "share": "share of own", "share_independent": "share, independent",
    "minus_w2w": "less w2w", "minus_w2w_independent": "less w2w, independent",
}  # fmt: skip
CROWD_COLUMNS = {
    "consistency": "consistency", "consistency_independent": "consistency, independent", "diversity": "diversity",
    "energy": "energy", "energy_independent": "energy, independent", "coverage": "coverage", "density": "density",
    "nearest_training": "nearest", "nearest_above_strangers": "nearest, above strangers",
}  # fmt: skip


def table(rows: Mapping[str, Result]) -> str:
    """Spaces by what they rebuild; +- is half of a 95 % interval over people."""
    return _table(rows, COLUMNS)


def crowd_table(rows: Mapping[str, Result]) -> str:
    """Crowds of sampled people; the row of real ones has the floor of each figure. Undecided: half-drawn traits."""
    wide = {
        name: {
            **row,
            **{f"undecided {t}": v["undecided"] for t, v in row.get("traits", {}).items()},
        }
        for name, row in rows.items()
    }
    traits = {k: k for row in wide.values() for k in row if k.startswith("undecided ")}
    return _table(wide, {**CROWD_COLUMNS, **traits})


def curve_table(curve: Mapping[str, Mapping[str, Result]]) -> str:
    """Shares of own LoRA's ID score by how many LoRAs a space was made from."""
    counts = sorted({int(n) for sizes in curve.values() for n in sizes})
    rows = {
        family: {str(n): sizes[str(n)]["share"] for n in counts if str(n) in sizes}
        for family, sizes in curve.items()
    }
    return _table(rows, {str(n): f"{n} LoRAs" for n in counts})


def _table(rows: Mapping[str, Result], columns: Mapping[str, str]) -> str:
    shown = {k: title for k, title in columns.items() if any(k in row for row in rows.values())}
    if not shown:
        return ""
    lines = ["| | " + " | ".join(shown.values()) + " |", "|---" * (len(shown) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(cell(row.get(key)) for key in shown) + " |")
    return "\n".join(lines)


Line = list[tuple[float, float, float, float]]  # (x, mean, low, high)


def by_size(rows: Mapping[str, Result]) -> dict[str, Line]:
    """{family: shares over d}."""
    lines: dict[str, Line] = {}
    for row in rows.values():
        if "family" in row:
            share = row["share"]
            point = (row["latent"], share["mean"], share["low"], share["high"])
            lines.setdefault(row["family"], []).append(point)
    return {family: sorted(points) for family, points in lines.items()}


def by_people(curve: Mapping[str, Mapping[str, Result]]) -> dict[str, Line]:
    """{family: shares over training people}."""
    return {
        family: [
            (int(n), f["share"]["mean"], f["share"]["low"], f["share"]["high"])
            for n, f in sorted(sizes.items(), key=lambda item: int(item[0]))
        ]
        for family, sizes in curve.items()
        if sizes
    }


def _triple(value: Estimate) -> list[float]:
    return [value.mean, value.low, value.high]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
