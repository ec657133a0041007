"""The data set of the miniature world: a LoRA for each of a thousand people.

People are fine-tuned in groups; every finished group is a file, so that a run resumes where it stopped and several
single-threaded processes can share the work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from ...errors import ConfigError
from ...files.container import open_container, write_container
from ...lora.layout import Layout
from ...training.compute import Compute
from ...training.dataset import VectorDataset, load_dataset, write_dataset
from ...training.people import Start, initial_vector, measure_start, train_people
from ...training.ranks import Ranks, current_ranks
from ..world.adapters import TARGETS, avatar_layout
from ..world.base import load_base
from ..world.renderer import TRAITS, sample_identities
from .dreambooth import DreamBooth, people_loss

FORMAT = "w2wpp.avatar_loras"


@dataclass(frozen=True)
class LoraSet:
    """Who is fine-tuned, and how."""

    people: int = 1000
    heldout: float = 0.2  # share of the people that no space may learn from; the last ones
    seed: int = 4
    pilot: int = 32  # further people, whose mean LoRA is where all others start
    group: int = 16  # people trained together
    targets: tuple[str, ...] = TARGETS
    rank: int = 1
    alpha: float = 1.0
    training: DreamBooth = field(default_factory=DreamBooth)

    def identities(self) -> Tensor:
        """[people, 20]"""
        return sample_identities(self.people, generator=torch.Generator().manual_seed(self.seed))

    def pilots(self) -> Tensor:
        """[pilot, 20], none of them among ``identities``."""
        return sample_identities(
            self.pilot, generator=torch.Generator().manual_seed(self.seed + 1_000_003)
        )

    def heldout_flags(self) -> Tensor:
        """[people] bool"""
        return torch.arange(self.people) >= self.people - round(self.heldout * self.people)


def build_loras(
    base_path: Path,
    config: LoraSet,
    folder: Path,
    *,
    workers: int = 1,
    compute: Compute | None = None,
    callback: Callable[[str], None] = lambda line: None,
) -> VectorDataset:
    """Fine-tune everyone and write ``folder/dataset.safetensors``. ``folder`` keeps what is finished.

    Under `torchrun` the ranks share the people, each with workers of its own, and the folder.
    """
    ranks, compute = current_ranks(), compute or Compute()
    folder.mkdir(parents=True, exist_ok=True)
    layout = avatar_layout(
        load_base(base_path), targets=config.targets, rank=config.rank, alpha=config.alpha
    )
    start = _start(base_path, layout, config, folder, workers, compute, ranks, callback)
    identity, people = config.identities(), folder / "people"
    files = _train_groups(
        base_path, layout, config, identity, start, people, workers, compute, ranks, callback
    )
    if not ranks.is_writer:
        ranks.wait()
        return load_dataset(folder / "dataset.safetensors")
    written = write_dataset(
        folder / "dataset.safetensors",
        (open_container(file, FORMAT).read("vectors") for file in files),
        layout,
        torch.arange(config.people),
        heldout=config.heldout_flags(),
        labels=identity,
        label_names=TRAITS,
        provenance={"world": asdict(config)},
    )
    ranks.wait()
    return written


def _start(
    base_path: Path,
    layout: Layout,
    config: LoraSet,
    folder: Path,
    workers: int,
    compute: Compute,
    ranks: Ranks,
    callback: Callable[[str], None],
) -> Start:
    """The shared start: the mean LoRA of the pilot people, who themselves start from zero."""
    path = folder / "start.safetensors"
    exists = path.exists()
    ranks.wait()  # so that all have looked before one writes
    if not exists:
        base, pilots = load_base(base_path).to(compute.device), config.pilots()
        callback("loras: measuring the pilot's preconditioner")
        few = pilots[: config.group]
        loss = people_loss(base, layout, few, config.training)
        with compute.products():
            from_zero = measure_start(loss, initial_vector(layout), len(few))
        pilot = folder / "pilot"
        files = _train_groups(
            base_path, layout, config, pilots, from_zero, pilot, workers, compute, ranks, callback
        )
    if not exists and ranks.is_writer:
        mean = torch.cat([open_container(file, FORMAT).read("vectors") for file in files]).mean(0)
        with compute.products():
            start = measure_start(loss, mean, len(few))
        tensors = {"vector": start.vector, "preconditioner": start.preconditioner}
        write_container(
            path, tensors, format=FORMAT, config={"norm": start.norm, "made_by": _made_by(config)}
        )
    ranks.wait()
    file = open_container(path, FORMAT)
    _require_same_run(path, file.config, config)
    return Start(file.read("vector"), file.read("preconditioner"), float(file.config["norm"]))


def _train_groups(
    base_path: Path,
    layout: Layout,
    config: LoraSet,
    identity: Tensor,
    start: Start,
    folder: Path,
    workers: int,
    compute: Compute,
    ranks: Ranks,
    callback: Callable[[str], None],
) -> list[Path]:
    """Train every group that has no file yet; groups are dealt to ranks, and to their workers, in turn."""
    groups = torch.arange(len(identity)).split(config.group)
    files = [folder / f"{int(rows[0]):05d}.safetensors" for rows in groups]
    for file in files:
        if file.exists():
            _require_same_run(file, open_container(file, FORMAT).config, config)
    mine = list(zip(files, groups))[ranks.rank :: ranks.size]
    missing = [(file, rows) for file, rows in mine if not file.exists()]
    callback(f"loras: {len(mine) - len(missing)} of {len(mine)} groups in {folder.name} are done")
    shares = [missing[i::workers] for i in range(workers)]
    args = (base_path, layout, config, identity, start, compute)
    if workers == 1:
        _work(0, shares, *args)
    elif missing:
        multiprocessing.spawn(_work, (shares, *args), nprocs=workers)  # type: ignore[no-untyped-call]
    ranks.wait()
    return files


def _work(
    worker: int,
    shares: list[list[tuple[Path, Tensor]]],
    base_path: Path,
    layout: Layout,
    config: LoraSet,
    identity: Tensor,
    start: Start,
    compute: Compute,
) -> None:
    if len(shares) > 1:
        torch.set_num_threads(1)  # threads that wait for each other's processes are slower than one
    base = load_base(base_path).to(compute.device)
    for file, rows in shares[worker]:
        loss = people_loss(base, layout, identity[rows], config.training, rows)
        with compute.products():
            vectors = train_people(loss, len(rows), start, config.training)
        write_container(
            file, {"vectors": vectors}, format=FORMAT, config={"made_by": _made_by(config)}
        )


def _made_by(config: LoraSet) -> dict[str, object]:
    """The settings on which a group's vectors depend, as JSON gives them back."""
    settings = asdict(config)
    return {**settings, "targets": list(config.targets)}


def _require_same_run(path: Path, stored: dict[str, object], config: LoraSet) -> None:
    if stored.get("made_by") != _made_by(config):
        raise ConfigError(
            f"{path} is from a run with other settings. Remove its folder, or match the settings."
        )
