"""`invert`: an optimiser meets an objective. What is best so far, when to stop and how to go on live here, once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from ..errors import ConfigError, DataError, FormatError, ShapeError, reading
from ..identity import Identity, require_same_space
from .checkpoint import Checkpoint, digest
from .objective import Draw, Objective
from .optimiser import Optimiser, Run
from .pivotal import Pivotal
from .solution import Callback, Progress, Solution, StopInversion

COMPARISONS = (
    8  # draws kept aside, where every step has other noise and its own losses do not compare
)


def invert(
    objective: Objective,
    optimiser: Optimiser,
    *,
    steps: int,
    start: Identity | None = None,
    pivotal: Pivotal | None = None,
    keep: str = "best",
    along: Tensor | None = None,
    seed: int = 0,
    callback: Callback | None = None,
    checkpoint: Path | None = None,
) -> Solution:
    """The identity whose LoRA denoises the pictures best.

    With orthonormal directions `along` [r, d] latents move in their span alone, and optimisers search r numbers.

    Points are compared by draws kept aside for that, where fresh draws make the steps' own losses incomparable, and by
    the steps' own losses otherwise. `keep="last"` returns where the run ends instead of the best point met. An
    exception of the callback or the denoiser passes through; a checkpoint written before it lets the same call go on
    from there to the same bits, and another call is refused.
    """
    if steps < 1 or keep not in ("best", "last"):
        raise ConfigError(
            f"An inversion takes at least one step and keeps 'best' or 'last'. Got {steps=}, {keep=}."
        )
    z, residual = _begin(objective, start)
    if along is not None:
        along = _directions(along, z)
    file = None
    if checkpoint is not None:
        settings = {
            "objective": objective.digest(),
            "optimiser": repr(optimiser),
            "pivotal": repr(pivotal),
            **{"steps": steps, "keep": keep, "seed": seed},
        }
        tensors = {"z": z, "residual": residual, **({} if along is None else {"along": along})}
        file = Checkpoint(checkpoint, digest(settings, tensors))
    run = _Inversion(objective, z, residual, keep, callback, file, along)
    run.total = steps + (pivotal.steps if pivotal else 0)
    run.solve(optimiser, steps, pivotal, seed)
    how: dict[str, Any] = {"made_by": "invert", "seed": seed}
    how["inversion"] = {
        "steps": run.done,
        "evaluations": run.evaluations,
        "stop_reason": run.stop_reason,
        "optimiser": repr(optimiser),
        "pivotal": repr(pivotal) if pivotal else "",
        "residual_norm": run.residual_norm,
    }
    if start is not None:
        how["start"] = dict(start.provenance)
    return run.solution(how)


def _begin(objective: Objective, start: Identity | None) -> tuple[Tensor, Tensor | None]:
    """Latents [B, d] and residuals [B, K] to start from; without a start the average person."""
    space, people = objective.space, objective.people
    device = space.prior_mean.device
    if start is None:
        return torch.zeros(people, space.latent_size, device=device), None
    require_same_space(start.space_fingerprint, space.fingerprint, space.name)
    if len(start) not in (1, people):
        raise ShapeError(
            f"A start for {people} people is one identity or {people}. Got {len(start)}."
        )
    z = start.z.to(device).expand(people, -1).clone()
    residual = start.residual
    return z, None if residual is None else residual.to(device).expand(people, -1).clone()


def _directions(along: Tensor, z: Tensor) -> Tensor:
    """[r, d] where the latents are; raises for what is not orthonormal."""
    along = along.detach().to(z)
    if along.ndim != 2 or along.shape[1] != z.shape[1] or not len(along):
        raise ShapeError(
            f"Directions to move along are [r, {z.shape[1]}] for these latents. Got {list(along.shape)}."
        )
    off = along @ along.T - torch.eye(len(along)).to(along)
    if not float(off.abs().max()) < 1e-3:
        raise ConfigError(
            "Directions to move along are orthonormal. Take them from an SVD or a QR."
        )
    return along


@dataclass(frozen=True, eq=False)
class _Stage:
    """What moves: latents in the first stage, and residuals around them in the second."""

    number: int
    z: Tensor  # [B, d]
    residual: Tensor | None  # [B, K]
    decay: float = 0.0  # weight of |residual|^2 / 2 while residuals move
    along: Tensor | None = None  # [r, d] what latents move along; D is r then

    @property
    def start(self) -> Tensor:
        """[B, D]"""
        if self.number == 0:
            return self.z if self.along is None else self.z.new_zeros(len(self.z), len(self.along))
        assert self.residual is not None
        return self.residual

    def place(self, points: Tensor) -> tuple[Tensor, Tensor | None]:
        """Candidates [R, D], ordered by person, with what does not move beside them."""
        times = len(points) // len(self.z)
        if self.number:
            return repeat(self.z, "b d -> (b r) d", r=times), points
        if self.along is not None:
            points = repeat(self.z, "b d -> (b r) d", r=times) + points @ self.along
        if self.residual is None:
            return points, None
        return points, repeat(self.residual, "b k -> (b r) k", r=times)

    def slope(self, gradient: Tensor) -> Tensor:
        """Gradients of what moves, whole [R, d or K] -> of the points [R, D]."""
        return gradient if self.along is None else gradient @ self.along.T

    def penalty(self, points: Tensor) -> Tensor:
        """[R]"""
        return 0.5 * self.decay * points.square().sum(1)


class _Inversion:
    """The state of a run: everything here but the objective is in a checkpoint."""

    total: int  # steps of both stages

    def __init__(
        self,
        objective: Objective,
        z: Tensor,
        residual: Tensor | None,
        keep: str,
        callback: Callback | None,
        checkpoint: Checkpoint | None,
        along: Tensor | None = None,
    ) -> None:
        self.objective, self.keep = objective, keep
        self.callback, self.checkpoint = callback, checkpoint
        self.z, self.residual, self.along = z, residual, along
        # There is nothing to compare if the last is kept.
        fresh = objective.fresh and keep == "best"
        self.aside = objective.evaluation(COMPARISONS) if fresh else None
        self.history: list[float] = []
        self.done = self.done_before = 0  # steps made, and those of the stages before this one
        self.before = objective.rows_evaluated
        self.stop_reason = ""
        self.loss, self.best = self._nothing()

    def solve(self, optimiser: Optimiser, steps: int, pivotal: Pivotal | None, seed: int) -> None:
        number, state = self._resume()
        if number == 0:
            stage = _Stage(0, self.z, self.residual, along=self.along)
            run = optimiser.begin(stage.start, steps=steps, seed=seed)
            self.z, _ = stage.place(self._run(stage, run, steps, state))
        if pivotal and not self.stop_reason.startswith("stopped"):
            if self.residual is None:
                components = self.objective.space.basis.n_components
                self.residual = self.z.new_zeros(len(self.z), components)
            if number == 0:
                self.done_before, state = self.done, {}
                self.loss, self.best = self._nothing()
            stage = _Stage(1, self.z, self.residual, pivotal.decay)
            run = pivotal.optimiser().begin(self.residual, steps=pivotal.steps, seed=seed)
            self.residual = self._run(stage, run, pivotal.steps, state)
        if self.checkpoint is not None:
            self.checkpoint.remove()

    def solution(self, provenance: dict[str, Any]) -> Solution:
        residual = None if self.residual is None else self.residual.cpu()
        found = Identity(self.z.cpu(), self.objective.space.fingerprint, residual, provenance)
        return Solution(
            found,
            self.history,
            self.evaluations,
            self.stop_reason,
            self.loss.tolist(),
            self.residual_norm,
        )

    @property
    def evaluations(self) -> int:
        return (self.objective.rows_evaluated - self.before) // self.objective.people

    @property
    def residual_norm(self) -> float:
        return 0.0 if self.residual is None else float(self.residual.norm(dim=1).mean())

    def _run(self, stage: _Stage, run: Run, steps: int, state: dict[str, Tensor]) -> Tensor:
        """Ask, evaluate and tell until the steps are used up or the callback says stop; what is kept [B, D]."""
        if state:
            run.restore(state)
        while self.done - self.done_before < steps:
            self.history.append(float(self._advance(stage, run).mean()))
            self.done += 1
            self._save(stage, run)
            if not self._report(stage, run):
                self.stop_reason = f"stopped by the caller after {self.done} steps"
                break
        else:
            self.stop_reason = f"all {self.done} steps made"
            if self.keep == "best" and self.aside is None:
                self._compare(stage, run.result(), self.objective.draw(0))
        return self._kept(run).detach()

    def _advance(self, stage: _Stage, run: Run) -> Tensor:
        """One step; returns the losses of its best candidates [B]."""
        asked, draw = run.ask(), self.objective.draw(self.done)
        losses, gradients = self._evaluated(stage, asked, draw, gradients=run.gradients)
        if not bool(torch.isfinite(losses).all()):
            raise DataError(
                f"The loss became NaN or infinite after {self.done} steps: the run diverged or the model "
                "overflowed. Use a lower learning rate, or load the model in a higher precision."
            )
        by_person = rearrange(losses, "(b r) -> b r", b=self.objective.people)
        least = by_person.amin(1)
        if self.keep == "last":
            self.loss = least
        elif self.aside is None:
            candidates = rearrange(asked, "(b r) d -> b r d", b=self.objective.people)
            self._offer(candidates[torch.arange(len(least)), by_person.argmin(1)], least)
        run.tell(losses, gradients)
        if self.aside is not None:
            self._compare(stage, run.result(), self.aside)
        return least

    def _evaluated(
        self, stage: _Stage, points: Tensor, draw: Draw, *, gradients: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Losses [R] of candidates, and their gradients [R, D] if wanted."""
        z, residual = stage.place(points)
        if not gradients:
            with torch.no_grad():
                return self.objective.loss(z, residual, draw) + stage.penalty(points), None
        losses, slope = self.objective.value_and_gradient(
            z, residual, draw, of_residual=bool(stage.number)
        )
        return losses + stage.penalty(points), stage.slope(slope) + stage.decay * points

    def _compare(self, stage: _Stage, point: Tensor, draw: Draw) -> None:
        """Where the run stands, under fixed draws: counted as evaluations like any other."""
        self._offer(point, self._evaluated(stage, point, draw, gradients=False)[0])

    def _offer(self, points: Tensor, losses: Tensor) -> None:
        better = losses < self.loss
        self.loss = torch.where(better, losses, self.loss)
        best = points if self.best is None else self.best
        self.best = torch.where(better[:, None], points, best).detach()

    def _nothing(self) -> tuple[Tensor, Tensor | None]:
        """Losses [B] and points [B, D] before anything was met."""
        people = self.objective.people
        return torch.full((people,), float("inf"), device=self.z.device), None

    def _kept(self, run: Run) -> Tensor:
        return run.result() if self.best is None else self.best

    def _report(self, stage: _Stage, run: Run) -> bool:
        if self.callback is None:
            return True
        z, residual = stage.place(self._kept(run))
        best = Identity(z, self.objective.space.fingerprint, residual, {"made_by": "invert"})
        progress = Progress(
            self.done, self.total, self.history[-1], best, self.evaluations, run.stage
        )
        try:
            return self.callback(progress) is not False
        except StopInversion:
            return False

    def _save(self, stage: _Stage, run: Run) -> None:
        if self.checkpoint is None:
            return
        tensors = {"z": self.z, "residual": self.residual, "loss": self.loss, "best": self.best}
        tensors |= {f"run.{name}": t for name, t in run.state().items()}
        numbers = {
            "stage": stage.number,
            "done": self.done,
            "done_before": self.done_before,
            "rows_evaluated": self.objective.rows_evaluated - self.before,
            "history": self.history,
        }
        self.checkpoint.save({n: t for n, t in tensors.items() if t is not None}, numbers)

    def _resume(self) -> tuple[int, dict[str, Tensor]]:
        """The stage to go on with and its optimiser's state."""
        tensors, numbers = self.checkpoint.load() if self.checkpoint else ({}, {})
        if self.checkpoint is None or not numbers:
            return 0, {}
        with reading(f"{self.checkpoint.path}: this checkpoint"):
            return self._taken_up(tensors, numbers)

    def _taken_up(
        self, tensors: dict[str, Tensor], numbers: dict[str, Any]
    ) -> tuple[int, dict[str, Tensor]]:
        for name, t in (("z", self.z), ("loss", self.loss)):
            if tensors[name].shape != t.shape:
                raise FormatError(f"'{name}' is {list(tensors[name].shape)}, not {list(t.shape)}.")
        self.done, self.done_before = int(numbers["done"]), int(numbers["done_before"])
        self.before = self.objective.rows_evaluated - int(numbers["rows_evaluated"])
        self.history = [float(loss) for loss in numbers["history"]]
        stored = {name: t.to(self.z.device) for name, t in tensors.items()}
        self.z, self.loss = stored["z"], stored["loss"]
        self.residual, self.best = stored.get("residual"), stored.get("best")
        state = {n.removeprefix("run."): t for n, t in stored.items() if n.startswith("run.")}
        return int(numbers["stage"]), state
