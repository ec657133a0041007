"""A space of the LoRAs that somebody has: files in, a delta basis and a report out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..codecs import build_codec
from ..commands import command
from ..delta_basis import DeltaBasis, Grams, compute_grams, delta_components
from ..errors import ConfigError, DataError, W2WError
from ..files.writing import is_leftover
from ..lora.collection import Collection, collect
from ..lora.families import UNKNOWN, join_key, of_text_encoders, split_sizes
from ..lora.layout import Layout, Module
from ..lora.members import Member, Source, open_member
from ..space import Space
from .coefficients import Coefficients
from .collection_report import (
    CollectionReport,
    copies,
    cosines,
    held_out_shares,
    mean_shares,
    nearest_pairs,
    outliers,
)
from .compute import Compute

USUAL_RANK = 32  # of the LoRAs that come out, if the members' ranks allow it
MOST_FILES = 2000  # beyond that, a pass over all pairs is no matter of seconds
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CollectionSettings:
    """How a collection becomes a space."""

    rank: int | None = (
        None  # of the LoRAs that come out; None: the members' largest, and 32 at least
    )
    components: int | None = None  # K; None: all that there are
    cut_to: int | None = None  # keep only so many ranks of each member, for a smaller file
    name: str = "my LoRAs"
    licence: str = ""
    trigger_prompt: str = ""
    keep_names: bool = False  # write the files' names into the space file


def lora_files(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files named, and those in the folders named, with their subfolders, sorted.

    Raises DataError for a folder without any.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*.safetensors") if p.is_file())
            inside = [p for p in inside if not any(map(is_leftover, p.relative_to(path).parts))]
            if not inside:
                raise DataError(f"{path} holds no .safetensors file.")
            found += inside
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def open_members(
    paths: Sequence[Path], names: Sequence[str] | None = None, *, text_encoders: bool = False
) -> tuple[list[Member], list[tuple[str, str]]]:
    """Every file that is a LoRA (of text encoders, where these are meant), and (name, reason) of the others.

    Without names of their own they are called as their files, with the folder where that repeats.
    """
    names = names or _distinct([p.stem for p in paths], paths)
    members, refused = [], []
    for path, name in zip(paths, names):
        try:
            members.append(open_member(path, name, text_encoders=text_encoders))
        except (W2WError, OSError) as e:
            refused.append((name, str(e)))
    return members, refused


def fitting(members: Sequence[Member]) -> tuple[list[Member], list[tuple[str, str]]]:
    """The members of the family that most are of, with modules of the sizes that most have; and why not the others."""
    if not members:
        return [], []
    refused = []
    family = Counter(m.family for m in members).most_common(1)[0][0]
    known = [m for m in members if m.family == family]
    theirs = _module_keys(known)
    kept = []
    for member in members:
        # Too few modules to tell a model by, but modules that the others have as well.
        unsure = UNKNOWN in (member.family, family)
        shared = unsure and bool(_module_keys([member]) & theirs)
        if member.family == family or shared:
            kept.append(member)
        else:
            refused.append(
                (member.name, f"it is for {member.family}, most others are for {family}")
            )
    votes: dict[str, Counter[tuple[int, int]]] = {}
    for member in kept:
        for name, source in member.modules.items():
            votes.setdefault(name, Counter())[(source.shape.size_in, source.shape.size_out)] += 1
    usual = {name: counter.most_common(1)[0][0] for name, counter in votes.items()}
    fit = []
    for member in kept:
        odd = [
            n for n, s in member.modules.items() if usual[n] != (s.shape.size_in, s.shape.size_out)
        ]
        if odd:
            got = member.modules[odd[0]].shape
            refused.append(
                (
                    member.name,
                    f"{len(odd)} of its modules have other sizes than in the others, e.g. {odd[0]} maps "
                    f"{got.size_in} to {got.size_out} and not {usual[odd[0]][0]} to {usual[odd[0]][1]}",
                )
            )
        else:
            fit.append(member)
    return fit, refused


def _products(members: Sequence[Member]) -> tuple[list[Member], list[tuple[str, str]]]:
    """Those whose updates are products of thin matrices, and why not the others."""
    kept, refused = [], []
    for member in members:
        if member.dense is None:
            kept.append(member)
            continue
        module, kind = member.dense
        reason = (
            f"{module} is a {kind} that is a whole matrix, no product of a few ranks. Cut the LoRAs to a "
            "rank (64, for one) when making a space of them; what that loses is told"
        )
        refused.append((member.name, reason))
    return kept, refused


def _module_keys(members: Sequence[Member]) -> set[tuple[str, int, int]]:
    """Modules with their sizes, however they are spelled and fused."""
    return {
        (join_key(name), source.shape.size_in, stop - start)
        for member in members
        for name, (source, (start, stop)) in _parts(member)
    }


def _parts(member: Member) -> Iterator[tuple[str, tuple[Source, tuple[int, int]]]]:
    for name, source in member.modules.items():
        for part, rows in split_sizes(name, source.shape.size_in, source.shape.size_out).items():
            yield part, (source, rows)


def collection_layout(collection: Collection, rank: int) -> Layout:
    """The layout of the LoRAs that come out: alpha is the rank, so that an update is B A."""
    modules = tuple(Module(n, s.size_in, s.size_out) for n, s in collection.shapes.items())
    return Layout("collection", collection.family, modules, rank, float(rank))


def fit_delta(
    members: Sequence[Member],
    settings: CollectionSettings | None = None,
    *,
    weights: Mapping[str, float] | None = None,
    refused: Sequence[tuple[str, str]] = (),
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
    weigh: Callable[[Collection], Tensor] | None = None,
) -> tuple[Space, CollectionReport]:
    """A linear space of the members' updates, and how it turned out.

    `weights`: how much each member counts in the mean and the components, {name: weight}, one by
    default. Members that do not fit are left out and reported. `device`: where inner products are
    taken; the space is on the CPU. `weigh`: how much each module counts, [M] for those of the collection
    that fits (`module_weights`); all alike by default.
    """
    settings = settings or CollectionSettings()
    members, whole = ([*members], []) if settings.cut_to else _products(members)
    members, unfit = fitting(members)
    refused = [*refused, *whole, *unfit]
    _require_enough(members, refused)
    collection = collect(members, settings.cut_to)
    layout = collection_layout(collection, _rank(collection, settings))
    modules = None if weigh is None else weigh(collection)
    grams = _grams(layout, collection, progress, device, modules)
    empty = [i for i in range(len(members)) if not grams.total[i, i] > 0]
    if empty:
        refused += [(members[i].name, "its update is zero: there is nothing in it") for i in empty]
        keep = [i for i in range(len(members)) if i not in empty]
        members = [members[i] for i in keep]
        _require_enough(members, refused)
        collection = collect(members, settings.cut_to)
        layout = collection_layout(collection, layout.rank)
        modules = None if weigh is None else weigh(collection)
        grams = _grams(layout, collection, progress, device, modules)
    left_out = {name for name, _ in refused}
    p = member_weights(members, {n: w for n, w in (weights or {}).items() if n not in left_out})
    mixing, values = delta_components(grams.total, p, settings.components)
    basis = DeltaBasis(
        layout,
        collection,
        grams=lambda: grams,
        weights=p,
        mixing=mixing,
        singular_values=values,
        module_weights=modules,
    )
    report = _report(collection, grams, basis, refused)
    return _space(basis, collection, report, settings), report


def collection_coefficients(space: Space) -> Coefficients:
    """Whitened coefficients [N, K] of a collection's own LoRAs: what a VAE on it is trained with.

    Every LoRA counts as a person of their own.

    Raises ConfigError for a space that is no collection.
    """
    basis = space.basis
    if not isinstance(basis, DeltaBasis):
        raise ConfigError(
            f"The space '{space.name}' does not hold what it was made of. Train on the basis of its data set, from "
            f"'{command('fit-basis')}'."
        )
    c, gram, p = basis.member_coefficients(), basis.grams.total, basis.weights
    along = gram @ p
    whole = gram.diagonal() - 2 * along + p @ along  # squared distance from the mean
    inside = (c.double() * basis.singular_values.double()).square().sum(1)
    rows = torch.arange(basis.count)
    nobody = torch.zeros(basis.count, dtype=torch.bool)
    outside = (whole - inside).clamp_min(0).float()
    made_from = {"made_from": f"{basis.count} LoRA files"}
    return Coefficients(space.layout, c, outside, rows, nobody, made_from)


@dataclass(frozen=True, eq=False)
class Comparison:
    """How much LoRAs are alike."""

    family: str
    names: tuple[str, ...]
    gram: Tensor  # [N, N]
    refused: tuple[tuple[str, str], ...]

    @property
    def cosines(self) -> Tensor:
        """[N, N], whatever the ranks and gauges."""
        return cosines(self.gram)

    @property
    def norms(self) -> Tensor:
        """|dW| [N]."""
        return self.gram.diagonal().clamp_min(0).sqrt()

    @property
    def pairs(self) -> tuple[tuple[str, str, float], ...]:
        """Those most alike: (one, other, cosine)."""
        return nearest_pairs(self.names, self.cosines)

    @property
    def copies(self) -> tuple[tuple[str, str, float], ...]:
        """Those that are another one, scaled: (copy, original, factor)."""
        return copies(self.names, self.cosines, self.norms)

    @property
    def outliers(self) -> tuple[tuple[str, str], ...]:
        """Those unlike the rest: (name, reason)."""
        return outliers(self.names, self.cosines, self.norms)

    def __str__(self) -> str:
        lines = [f"{len(self.names)} LoRAs for {self.family}"]
        lines += [f"alike: {a} and {b}, cosine {c:.2f}" for a, b, c in self.pairs]
        lines += [f"copies: {a} is {b}, at {c:.3g} times its strength" for a, b, c in self.copies]
        lines += [f"outlier: {name}, {reason}" for name, reason in self.outliers]
        lines += [f"did not fit: {name}: {reason}" for name, reason in self.refused]
        return "\n".join(lines)


def compare_members(
    members: Sequence[Member],
    *,
    refused: Sequence[tuple[str, str]] = (),
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
) -> Comparison:
    """Inner products of those that fit together, taken on the device."""
    members, whole = _products(members)
    members, unfit = fitting(members)
    refused = [*refused, *whole, *unfit]
    _require_enough(members, refused)
    collection = collect(members)
    grams = _grams(collection_layout(collection, 1), collection, progress, device)
    names = tuple(m.name for m in members)
    return Comparison(collection.family, names, grams.total, tuple(refused))


def _grams(
    layout: Layout,
    collection: Collection,
    progress: Progress | None,
    device: torch.device | str,
    module_weights: Tensor | None = None,
) -> Grams:
    compute = Compute.pick(device, "fp32")
    with compute.products():
        return compute_grams(
            layout, collection, progress, device=compute.device, module_weights=module_weights
        )


def member_weights(members: Sequence[Member], weights: Mapping[str, float] | None) -> Tensor:
    """p [N], with the sum one.

    Raises ConfigError for a name that is not there and weights that are negative or of one member only.
    """
    given = dict(weights or {})
    unknown = sorted(given.keys() - {m.name for m in members})
    if unknown:
        raise ConfigError(
            f"There is no LoRA {unknown[0]!r} to give a weight to; there are "
            f"{', '.join(m.name for m in members[:20])}."
        )
    p = torch.tensor([float(given.get(m.name, 1.0)) for m in members], dtype=torch.float64)
    if not bool(torch.isfinite(p).all()) or bool((p < 0).any()) or int((p > 0).sum()) < 2:
        raise ConfigError(
            f"Weights are finite and not negative, and at least two of them are positive. Got {p.tolist()}."
        )
    return p / p.sum()


def _require_enough(members: Sequence[Member], refused: Sequence[tuple[str, str]]) -> None:
    if len(members) < 2:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in refused[:10])
        raise DataError(
            f"A space takes at least two LoRAs; {len(members)} of those given fit.{reasons}"
        )
    if len(members) > MOST_FILES:
        raise DataError(
            f"A space takes at most {MOST_FILES} LoRAs; {len(members)} were given. For LoRAs of one trainer "
            f"with one seed use '{command('dataset')}' and '{command('fit-basis')}'."
        )


def _rank(collection: Collection, settings: CollectionSettings) -> int:
    if settings.rank is not None:
        if not 1 <= settings.rank <= 1024:
            raise ConfigError(f"The rank of a LoRA lies between 1 and 1024. Got {settings.rank}.")
        return settings.rank
    largest = int(collection.ranks.max())
    return max(largest, min(USUAL_RANK, int(collection.ranks.sum(1).max())))


def _report(
    collection: Collection,
    grams: Grams,
    basis: DeltaBasis,
    refused: Sequence[tuple[str, str]],
) -> CollectionReport:
    gram, p = grams.total, basis.weights
    names = [m.name for m in collection.members]
    norms, likeness = gram.diagonal().sqrt(), cosines(gram)
    # By the definition of the singular values, their squares are the variance along each component.
    n = 1.0 / float(p.square().sum())
    variance = basis.singular_values.double().square() * (n - 1) / n
    spread = float(p @ gram.diagonal() - p @ gram @ p)
    return CollectionReport(
        family=collection.family,
        names=tuple(names),
        modules=len(collection.names),
        ranks=tuple(sorted(set(collection.ranks.flatten().tolist()) - {0})),
        components=basis.n_components,
        explained=tuple((variance.cumsum(0) / spread).clamp(max=1.0).tolist()),
        held_out=tuple(held_out_shares(gram, p, basis.n_components).tolist()),
        mean_only=tuple(mean_shares(gram, p).tolist()),
        norms=tuple(norms.tolist()),
        pairs=nearest_pairs(names, likeness),
        copies=copies(names, likeness, norms),
        outliers=outliers(names, likeness, norms),
        refused=tuple(refused),
        apart=sum(m.apart > 0 for m in collection.members),
        text_encoders=of_text_encoders(collection.names),
        weighed=not bool((basis.module_weights == 1).all()),
        unread=sum(len(m.unread) for m in collection.members),
        rounding=_rounding(collection) if collection.cut_to is not None else 0.0,
    )


def _rounding(collection: Collection) -> float:
    missed, total = collection.lost()
    return (missed / total) ** 0.5 if total > 0 else 0.0


def _space(
    basis: DeltaBasis,
    collection: Collection,
    report: CollectionReport,
    settings: CollectionSettings,
) -> Space:
    k = basis.n_components
    codec = build_codec({"name": "pca", "coefficient_size": k, "latent_size": k})
    provenance: dict[str, Any] = {
        "name": settings.name,
        "version": "1",
        "licence": settings.licence,
        "trigger_prompt": settings.trigger_prompt,
        "base_model": collection.family,
        "made_from": f"{basis.count} LoRA files",
        "training_report": report.for_file(),
    }
    if settings.keep_names:
        provenance["members"] = list(report.names)
    return Space(basis.layout, basis, codec, torch.zeros(k), torch.ones(k), provenance)


def _distinct(stems: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """Stems, with the folder before those that occur twice and a number behind what is still the same."""
    counts = Counter(stems)
    names = [s if counts[s] == 1 else f"{p.parent.name}/{s}" for s, p in zip(stems, paths)]
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found
