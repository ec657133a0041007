"""The official weights2weights files: a folder with mean.pt, std.pt, V.pt and what belongs to them.

A saved identity is coefficients k [K] with w = (V k) * std + mean, so k = V^T ((w - mean) / std).
Some published standard deviations are negative (numerical noise). Both formulas are used with the
sign as stored: it belongs to the coordinates in which V was found and cancels on the way back, while
taking it away would mirror these parameters against V.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..basis import without_tiny
from ..errors import ConfigError, FormatError
from ..files.torchfile import Matrix, load_tensor, load_torch, open_matrix
from ..lora.layout import SD15, Layout
from ..lora.names import UNET, parse_key
from ..metrics import ColumnSums

LICENCE = "Derived from the official weights2weights files (Snap Inc.): for non-commercial, academic use only."
TRIGGER_PROMPT = "sks person"
# The words of a name and its numbers, whatever stands between them.
_ATTENTION = re.compile(
    r"(?:(down|up)_blocks?_(\d+)|(?:mid_block))_attentions?_(\d+)_transformer_blocks?_(\d+)_attn_?([12])"
    r"_(?:processor_)?to_([qkv]|out(?:_0)?)_(?:lora_)?(?:linear_layer_)?(a|b|down|up)(?:_|$)"
)
COLUMNS = 500  # of V held at a time, in half precision
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class W2WFolder:
    """What an official folder says, with V and the coefficients of the real identities left in their files."""

    folder: Path
    layout: Layout
    mean: Tensor  # [P], in the layout's order
    std: Tensor  # [P], signed
    order: Tensor | None  # [P] places of the layout's numbers in the files', None if they agree
    v: Matrix  # [P, all components]
    coefficients: Matrix | None  # [N, K'] of the real identities, not whitened
    components: int  # K

    @cached_property
    def _spread(self) -> tuple[Tensor, Tensor, str]:
        return _prior(self.coefficients, self.components, self.layout.size)

    @property
    def center(self) -> Tensor:
        """[K], mean coefficient."""
        return self._spread[0]

    @property
    def scale(self) -> Tensor:
        """[K], std of the coefficients: the singular values."""
        return self._spread[1]

    @property
    def prior(self) -> str:
        """Where these two come from."""
        return self._spread[2]

    @property
    def known(self) -> int:
        """How many components there are coefficients for; all if there are none at all."""
        every = self.v.shape[1]
        return every if self.coefficients is None else min(every, self.coefficients.shape[1])

    def first(self, components: int) -> W2WFolder:
        """The same files, opened once, with fewer components; raises ConfigError for none or more than there are."""
        every = self.v.shape[1]
        if not 1 <= components <= every:
            raise ConfigError(
                f"V.pt holds {every} components; name a number from 1 to {every}. Got {components}."
            )
        return replace(self, components=components)

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits that tell these files from others: over all of the small ones, and some of V."""
        digest = hashlib.sha256(repr((self.v.shape, self.layout.size)).encode())
        ends = [
            self.v.part(slice(i, i + 1), slice(0, self.v.shape[1]))
            for i in (0, self.v.shape[0] - 1)
        ]
        for numbers in (self.mean, self.std, self.center, self.scale, *ends):
            digest.update(numbers.float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    def chunks(
        self, start: int = 0, progress: Progress = lambda done, of: None
    ) -> Iterator[Tensor]:
        """The components [K, P] from one on, in half precision, some rows at a time.

        `progress` gets (components that were read, all of them), and may raise. Raises FormatError where they are not
        of unit length.
        """
        for first in range(start, self.components, COLUMNS):
            count = min(COLUMNS, self.components - first)
            seen = partial(_tell, progress, first, count, self.components)
            rows = self.v.columns(slice(first, first + count), seen)
            lengths = rows.float().square().sum(1) if len(rows) < 8 else _lengths(rows)
            if not bool(((lengths - 1).abs() < 0.02).all()):
                raise FormatError(
                    f"{self.v.path}: the columns from {first} on are not of unit length, so this is "
                    "no orthonormal basis. Download or copy it again."
                )
            yield rows if self.order is None else rows[:, self.order]


def open_w2w(
    folder: str | os.PathLike[str], *, components: int | None = None, layout: Layout = SD15
) -> W2WFolder:
    """Read the small files of a folder and check the large ones by their headers.

    Raises FormatError for a folder or file that is missing, damaged or of other LoRAs.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder. Name the one that holds mean.pt and V.pt.")
    mean, std = load_tensor(folder / "mean.pt", ndim=1), load_tensor(folder / "std.pt", ndim=1)
    v = open_matrix(folder / "V.pt")
    sizes = {"mean.pt": len(mean), "std.pt": len(std), "V.pt": v.shape[0]}
    wrong = [f"{name} has {n:,}" for name, n in sizes.items() if n != layout.size]
    if wrong:
        raise FormatError(
            f"{folder}: {', '.join(wrong)} numbers per LoRA, the layout '{layout.name}' has "
            f"{layout.size:,}. Use files of identity LoRAs for {layout.base_model}."
        )
    if not bool(std.any()):
        raise FormatError(
            f"{folder / 'std.pt'} is zero everywhere: no weight varies. Get it again."
        )
    order = _order(folder, layout)
    if order is not None:
        mean, std = mean[order], std[order]
    stored = folder / "proj_1000pc.pt"
    coefficients = open_matrix(stored) if stored.is_file() else None
    every = v.shape[1]
    found = W2WFolder(folder, layout, mean, without_tiny(std), order, v, coefficients, every)
    return found if components is None else found.first(components)


def provenance(source: W2WFolder, name: str) -> dict[str, Any]:
    """What a space of these files says of itself."""
    facts: dict[str, Any] = {
        "name": name,
        "version": "1",
        "licence": LICENCE,
        "trigger_prompt": TRIGGER_PROMPT,
        "base_model": "Stable Diffusion 1.5 (trained on Realistic Vision 5.1)",
        "made_by": "w2wpp import-w2w",
        "source": source.fingerprint,
        "prior": source.prior,
        "negative_stds": int((source.std < 0).sum()),
    }
    if source.coefficients is not None:
        facts["training_report"] = {
            "codec": "pca",
            "rows": {"training": source.coefficients.shape[0]},
        }
    return facts


def whitened(raw: Tensor, scale: Tensor) -> tuple[Tensor, float]:
    """Official coefficients [B, K'] -> whitened ones [B, K], and the share of |k|^2 beyond K that is dropped."""
    k = len(scale)
    total = float(raw.double().square().sum())
    dropped = float(raw[:, k:].double().square().sum()) / total if total > 0 else 0.0
    padded = torch.nn.functional.pad(raw[:, :k], (0, max(0, k - raw.shape[1])))
    return padded / scale, dropped


def moments(matrix: Matrix, columns: int) -> tuple[Tensor, Tensor]:
    """Mean and std [columns] over all rows, in double precision and one pass about the first row."""
    sums = ColumnSums(matrix.part(slice(0, 1), slice(0, columns)).double()[0])
    for _, values in matrix.rows(columns):
        sums.add(values)
    n = matrix.shape[0]
    mean, squares = sums.about_the_mean(n)
    return mean, (squares / max(1, n - 1)).sqrt()


def _tell(progress: Progress, first: int, count: int, of: int, share: float) -> None:
    progress(first + int(share * count), of)


def _lengths(rows: Tensor) -> Tensor:
    return torch.stack([row.float().square().sum() for row in rows])


def _prior(matrix: Matrix | None, k: int, p: int) -> tuple[Tensor, Tensor, str]:
    """Mean and std [K] of the coefficients of real identities, and a sentence on their origin."""
    if matrix is None:
        # Standardised parameters have variance P together.
        law = 1.0 / torch.arange(1, k + 1, dtype=torch.float64)
        scale = (p * law / law.sum()).sqrt()
        text = (
            "assumed: proj_1000pc.pt was not there, so the variance of component k falls as 1 / k and adds up to "
            "that of standardised weights; samples are less true to life than with that file"
        )
        return torch.zeros(k), scale.float(), text
    known = min(k, matrix.shape[1])
    center, scale = moments(matrix, known)
    if matrix.shape[0] < 2 or not bool((scale > 0).all()):
        raise FormatError(
            f"{matrix.path}: some component is the same for all {matrix.shape[0]} identities. Get the "
            "file again."
        )
    text = f"mean and std of the coefficients of {matrix.shape[0]} real identities"
    if known < k:
        beyond = torch.arange(known + 1, k + 1, dtype=torch.float64)
        scale = torch.cat([scale, scale[-1] * (known / beyond).sqrt()])
        center = torch.cat([center, torch.zeros(k - known, dtype=torch.float64)])
        text += f"; beyond component {known} the variance is assumed to fall as 1 / k"
    return center.float(), scale.float(), text


def _order(folder: Path, layout: Layout) -> Tensor | None:
    """Where the layout's numbers stand in the files, from weight_dimensions.pt; None: in the layout's order.

    Names are compared in whatever spelling they have. One that no spelling explains is refused:
    to_q and to_v have the same sizes, so that sizes alone would not show them swapped.
    """
    path = folder / "weight_dimensions.pt"
    if not path.is_file():
        return None
    table = load_torch(path)
    if not isinstance(table, Mapping) or not table:
        raise FormatError(f"{path} holds a {type(table).__name__}, expected a table of weights.")
    sizes = [_size(path, name, value) for name, value in table.items()]
    wanted = _expected(layout)
    names = [_half(str(name)) for name in table]
    if len(sizes) != len(wanted) or sum(sizes) != layout.size:
        raise FormatError(
            f"{path} lists {len(sizes)} weights of {sum(sizes):,} numbers, which are not the {len(wanted)} of "
            f"the layout '{layout.name}' ({layout.size:,}). Use files of identity LoRAs for "
            f"{layout.base_model}."
        )
    known = {name for name, _ in wanted}
    odd = [str(key) for key, name in zip(table, names) if name not in known]
    if odd or len(set(names)) != len(names):
        raise FormatError(
            f"{path} has names that do not say which weight each is (first: {(odd or list(table))[0]!r}), and "
            "sizes alone do not tell to_q from to_v. If the files are in the published order, remove "
            "weight_dimensions.pt: that order is assumed without it."
        )
    return _permutation(path, names, sizes, wanted)


def _expected(layout: Layout) -> list[tuple[tuple[str, bool], int]]:
    """((module, whether it is A), size) in the order of a vector."""
    halves = []
    for module, down, up in layout.slices():
        halves.append(((module.name, True), down.stop - down.start))
        halves.append(((module.name, False), up.stop - up.start))
    return halves


def _half(name: str) -> tuple[str, bool]:
    """(module, whether it is A) of a name in any spelling; ("", False) if none explains it."""
    for spelled in (name, name + ".weight"):
        where, module, part = parse_key(spelled)
        if where == UNET and part in ("down", "up"):
            return module, part == "down"
    words = "_".join(re.findall(r"[a-z]+|\d+", name.lower()))
    match = _ATTENTION.search(words)
    if not match:
        return "", False
    side, block, i, depth, attention, target, half = match.groups()
    where = f"{side}_blocks.{block}" if side in ("down", "up") else "mid_block"
    inner = f"attentions.{i}.transformer_blocks.{depth}.attn{attention}"
    end = "to_out.0" if target.startswith("out") else f"to_{target}"
    return f"{where}.{inner}.{end}", half in ("a", "down")


def _permutation(
    path: Path,
    names: list[tuple[str, bool]],
    sizes: list[int],
    wanted: list[tuple[tuple[str, bool], int]],
) -> Tensor | None:
    starts, place = {}, 0
    for name, size in zip(names, sizes):
        starts[name] = (place, size)
        place += size
    odd = [name for name, size in wanted if starts[name][1] != size]
    if odd:
        raise FormatError(f"{path}: {odd[0][0]} has another size than in the layout.")
    if names == [name for name, _ in wanted]:
        return None
    return torch.cat([torch.arange(starts[n][0], starts[n][0] + size) for n, size in wanted])


def _size(path: Path, name: Any, value: Any) -> int:
    """Numbers of an entry: (flat shape, tensor shape), or one of them alone."""
    shape = value[-1] if isinstance(value, (tuple, list)) and value else value
    if isinstance(shape, int):
        shape = value if isinstance(value, (tuple, list)) else (value,)
    try:
        size = 1
        for n in shape:
            size *= int(n)
    except TypeError as e:
        raise FormatError(f"{path}: the entry of {name} is not a shape.") from e
    return size
