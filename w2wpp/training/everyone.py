"""A LoRA for each of many people, in one gauge, a few side by side; what is finished is kept and taken up.

The folder of a training holds `start.safetensors` (where all LoRAs start, and how steps are scaled), `people/` with a
file for each who is finished, `pilot/` with those behind the start, and `unfinished.safetensors` of those in training.
People who come later start where the others did, so that their LoRAs fit in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diffusion.denoise import Denoise
from ..diffusion.schedule import Schedule
from ..errors import ConfigError, DataError, W2WError
from ..files.names import portable_name
from ..lora.layout import Layout
from .album import Album, PeopleTraining, people_loss
from .checkpoint import Saved, State, load_checkpoint, save_checkpoint
from .people import Momentum, PeopleLoss, Start, initial_vector, measure_start, train_people

START, UNFINISHED = "start.safetensors", "unfinished.safetensors"


@dataclass(frozen=True)
class Person:
    """Somebody to train a LoRA for."""

    name: str  # also that of their file
    key: str  # changes whenever their pictures do, or the words of these
    pictures: Callable[[], Tensor]  # latents [n, C, h, w], made when they are needed
    # The n prompts of these, as `Everyone.under` takes them; of all people or of none.
    prompts: Callable[[], Sequence[Any]] | None = None


@dataclass(frozen=True)
class Moment:
    """How far a training is."""

    stage: str  # "measuring", "pilot" or "people"
    names: tuple[str, ...]  # who is in training
    finished: int  # people of this stage who are done
    people: int  # all of this stage
    step: int  # that was just taken; 0 before the first
    steps: int
    loss: float  # of that step, mean over those in training
    weights: Tensor | None  # [n, P], theirs


@dataclass(frozen=True, eq=False)
class Trained:
    """Everybody's LoRAs."""

    vectors: Tensor  # [N, P]
    losses: Tensor  # [N, steps], each of the person and those beside them
    resumed: int  # people who were finished before


@dataclass(frozen=True)
class Everyone:
    """What the training of a folder of people is made of."""

    layout: Layout
    denoise: Denoise
    schedule: Schedule
    config: PeopleTraining
    folder: Path
    model: str  # tells the model and the prompt from others
    gauge: int = 3  # seed of A, which all LoRAs share
    pilots: int = 8  # people, from whose mean all others start; 0 starts from A and zeros
    together: int = 16  # most people side by side
    rows: int | None = None  # most pictures that go through the model at once
    device: torch.device | str = "cpu"
    # The model with a prompt for each row, for people with prompts of their own.
    under: Callable[[Sequence[Any]], Denoise] | None = None
    # May raise to stop; what is done by then is kept.
    callback: Callable[[Moment], None] = lambda moment: None

    def train(self, people: Sequence[Person]) -> Trained:
        """Train whoever is not finished. Raises ConfigError for a folder of another training."""
        names = [portable_name(p.name, "") for p in people]
        if not people or len(set(map(str.casefold, names))) != len(names):
            raise DataError(f"People to train have names, each its own. Got {names[:6]}.")
        told = sum(p.prompts is not None for p in people)
        if told not in (0, len(people)) or (told and self.under is None):
            raise DataError(
                f"Pictures have prompts of their own for all people or for none, and a model that takes them. Got "
                f"{told} of {len(people)} people with prompts."
            )
        start = self._start(people)
        run = _digest(self.run, start.vector, start.preconditioner)
        return self._train("people", people, start, run)

    @property
    def run(self) -> str:
        """Tells this training from others, by all that decides it but for the people."""
        # How many go side by side decides nothing; the learning rate means what it does at a scale of one.
        facts = (asdict(self.config), self.layout.to_json(), self.model, self.gauge, self.pilots)
        return _digest(repr(facts))

    @property
    def _descent(self) -> PeopleTraining:
        """The same change of the model for every alpha / rank."""
        settings = asdict(self.config)
        return PeopleTraining(
            **{**settings, "learning_rate": self.config.learning_rate / self.layout.scale}
        )

    def _start(self, people: Sequence[Person]) -> Start:
        path = self.folder / START
        if path.exists():
            return self._stored_start(path)
        pilots = people[: self.pilots or self._beside]
        first = pilots[: self._beside]
        loss = self._measuring(first)
        zero = initial_vector(self.layout, seed=self.gauge).to(self.device)
        start = measure_start(loss, zero, len(first))
        if self.pilots:
            trained = self._train("pilot", pilots, start, _digest(self.run, "pilot"))
            mean = trained.vectors.mean(0).to(self.device)
            start = measure_start(self._measuring(first), mean, len(first))
        tensors = {"vector": start.vector.cpu(), "preconditioner": start.preconditioner.cpu()}
        numbers = {"norm": start.norm, "people": [p.name for p in pilots]}
        save_checkpoint(path, self.run, tensors, numbers)
        return start

    def _stored_start(self, path: Path) -> Start:
        try:
            tensors, numbers = load_checkpoint(path, self.run)
        except ConfigError as e:
            raise ConfigError(
                f"{self.folder} holds people who were trained on another model or with other settings, so that these "
                "LoRAs would not fit to theirs. Choose another name, or the settings of then."
            ) from e
        vector, scale = (tensors[n].to(self.device) for n in ("vector", "preconditioner"))
        return Start(vector, scale, float(numbers["norm"]))

    @property
    def _beside(self) -> int:
        """How many people go through the model at once."""
        if self.rows is None:
            return self.together
        return max(1, min(self.together, self.rows // self.config.pictures))

    def _train(self, stage: str, people: Sequence[Person], start: Start, run: str) -> Trained:
        stored = {p.name: self._read(stage, p, run) for p in people}
        missing = [p for p in people if stored[p.name] is None]
        resumed, finished = len(people) - len(missing), len(people) - len(missing)
        for i in range(0, len(missing), self._beside):
            group = missing[i : i + self._beside]
            self._train_group(stage, group, finished, len(people), start, run)
            finished += len(group)
        found = [self._read(stage, p, run) or _lost(p) for p in people]
        vectors, losses = (torch.stack(part) for part in zip(*found))
        return Trained(vectors, losses, resumed)

    def _train_group(
        self, stage: str, group: Sequence[Person], finished: int, of: int, start: Start, run: str
    ) -> None:
        """Train a few people side by side, and write a file for each."""
        config, names = self._descent, tuple(p.name for p in group)
        own = _digest(run, stage, *(f"{p.name} {p.key}" for p in group))
        descent = Momentum(start.vector.expand(len(group), -1), start, config)
        saved, losses = _unfinished(self.folder / UNFINISHED, own), torch.zeros(config.steps)
        if saved.tensors:
            losses = saved.tensors["losses"]
            descent.restore(saved.tensors, saved.numbers)

        def state() -> State:
            tensors, numbers = descent.state()
            return {"losses": losses, **{n: t.cpu() for n, t in tensors.items()}}, numbers

        def tell(step: int, loss: float) -> None:
            losses[max(0, step - 1)] = loss
            now = (step, config.steps, loss, descent.weights)
            self.callback(Moment(stage, names, finished, of, *now))
            saved.keep(state)

        try:
            tell(descent.taken, float(losses[max(0, descent.taken - 1)]))
            loss = self._loss(group)
            found = train_people(loss, len(group), start, config, callback=tell, descent=descent)
        except BaseException:  # Cancel, memory, anything: the steps so far were paid for
            saved.write(state)
            raise
        for person, vector in zip(group, found.cpu()):
            tensors = {"vector": vector.detach().clone(), "losses": losses}
            save_checkpoint(self._file(stage, person), _digest(run, person.key), tensors, {})
        (self.folder / UNFINISHED).unlink(missing_ok=True)

    def _loss(self, group: Sequence[Person]) -> PeopleLoss:
        pictures = [p.pictures().to(self.device) for p in group]
        prompts = [p.prompts() for p in group if p.prompts is not None]
        album = Album(pictures, self.config, len(self.schedule), prompts or None)
        return people_loss(album, self.denoise, self.schedule, rows=self.rows, under=self.under)

    def _measuring(self, group: Sequence[Person]) -> PeopleLoss:
        """The loss of the first people, which can be stopped between its batches."""
        loss, names = self._loss(group), tuple(p.name for p in group)

        def watched(weights: Tensor, step: int) -> Tensor:
            self.callback(Moment("measuring", names, 0, len(group), step, 8, 0.0, None))
            return loss(weights, step)

        return watched

    def _file(self, stage: str, person: Person) -> Path:
        return self.folder / stage / f"{portable_name(person.name, '')}.safetensors"

    def _read(self, stage: str, person: Person, run: str) -> tuple[Tensor, Tensor] | None:
        """(vector [P], losses [steps]) of somebody who is finished, with these pictures."""
        path = self._file(stage, person)
        if not path.exists():
            return None
        try:
            tensors, _ = load_checkpoint(path, _digest(run, person.key))
        except ConfigError:
            return None
        return tensors["vector"], tensors["losses"]


def _unfinished(path: Path, run: str) -> Saved:
    """What there is of a group's training; what is left of another group is given up."""
    try:
        return Saved(path, run)
    except W2WError:
        path.unlink()
        return Saved(path, run)


def _lost(person: Person) -> tuple[Tensor, Tensor]:
    raise DataError(
        f"The finished LoRA of {person.name} was removed during the training. Run it again."
    )


def _digest(*parts: str | Tensor) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        else:
            digest.update(f"{part}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
