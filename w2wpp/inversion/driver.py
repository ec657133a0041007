"""`invert`: an optimiser meets an objective. What is best so far, when to stop and how to go on live here, once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, FormatError, ShapeError
from ..files.container import open_container, write_container
from ..identity import Identity, require_same_space
from .objective import Draw, Objective
from .optimiser import Optimiser, Run
from .pivotal import Pivotal

FORMAT = "w2wpp.inversion"


class StopInversion(Exception):
    """Raised in a callback: end here and keep the best so far."""


@dataclass(frozen=True, eq=False)
class Progress:
    """What a callback is told after every step."""

    step: int  # made so far, over both stages
    steps: int
    loss: float  # of this step, mean over people
    best: Identity
    evaluations: int
    stage: str


@dataclass(frozen=True, eq=False)
class Solution:
    identity: Identity
    history: list[float]  # loss of every step, mean over people
    evaluations: (
        int  # pictures of each person through the UNet, those that only compared points included
    )
    stop_reason: str
    loss: list[float]  # of the identity, by person
    residual_norm: (
        float  # mean length of the residual in whitened coefficients; 0 without a pivotal stage
    )


Callback = Callable[[Progress], Any]


def invert(
    objective: Objective,
    optimiser: Optimiser,
    *,
    steps: int,
    start: Identity | None = None,
    pivotal: Pivotal | None = None,
    within: Tensor | None = None,
    patience: int | None = None,
    compare: int = 0,
    keep: str = "best",
    seed: int = 0,
    callback: Callback | None = None,
    checkpoint: Path | None = None,
) -> Solution:
    """The identity whose LoRA denoises the pictures best.

    Points are compared by `compare` draws kept aside for that, where fresh draws make the steps' own losses
    incomparable (8 if not given), and by the steps' own losses otherwise. `keep="last"` returns where the run ends
    instead of the best point met. `within` [r, d] keeps the latent on start + x @ within: one picture says much of its
    background, light and pose, and directions that tell people apart keep an inversion from fitting those.
    `patience` is the number of steps without an improvement after which a stage ends. An
    exception of the callback or the denoiser passes through; a checkpoint written before it lets the same call go on
    from there.
    """
    if within is not None and (within.ndim != 2 or within.shape[1] != objective.space.latent_size):
        raise ShapeError(
            f"`within` holds directions [r, {objective.space.latent_size}]. Got {list(within.shape)}."
        )
    if steps < 1 or (patience is not None and patience < 1) or keep not in ("best", "last"):
        raise ConfigError(
            f"An inversion takes at least one step, positive patience, and keeps 'best' or 'last'. Got "
            f"{steps=}, {patience=}, {keep=}."
        )
    return _Inversion(
        objective,
        optimiser,
        steps,
        start,
        pivotal,
        within,
        patience,
        compare,
        keep,
        seed,
        callback,
        checkpoint,
    ).solve()


class _Inversion:
    best_point: Tensor | None  # [B, D]
    best_loss: Tensor  # [B]
    stale: int  # steps without an improvement
    dirty: bool  # whether the run has moved since it was last compared

    def __init__(
        self,
        objective: Objective,
        optimiser: Optimiser,
        steps: int,
        start: Identity | None,
        pivotal: Pivotal | None,
        within: Tensor | None,
        patience: int | None,
        compare: int,
        keep: str,
        seed: int,
        callback: Callback | None,
        checkpoint: Path | None,
    ) -> None:
        self.objective, self.optimiser, self.steps = objective, optimiser, steps
        self.pivotal, self.patience, self.keep, self.seed = pivotal, patience, keep, seed
        self.callback, self.checkpoint = callback, checkpoint
        self.total = steps + (pivotal.steps if pivotal else 0)
        self.aside: Draw | None = None
        # There is nothing to compare if the last is kept.
        if compare or (objective.fresh and keep == "best"):
            self.aside = objective.evaluation(compare or 8)
        self.z, self.residual = self._start(start)
        self.origin = start
        self.within = None if within is None else within.to(self.z)
        self.history: list[float] = []
        self.done = self.steps_of_first = 0
        self.before = objective.rows_evaluated
        self.stop_reason = ""
        self._forget()

    def solve(self) -> Solution:
        stage, state = self._resume()
        if stage == 0:
            x = self.z if self.within is None else self.z.new_zeros(len(self.z), len(self.within))
            run = self.optimiser.begin(x, steps=self.steps, seed=self.seed)
            self._stage(0, run, self.steps, state)
            self.z, state = self._place(0, self._settled(x, run))[0], {}
        if self.pivotal and not self.stop_reason.startswith("stopped"):
            if self.residual is None:
                self.residual = torch.zeros(
                    len(self.z), self.objective.space.basis.n_components, device=self.z.device
                )
            if stage == 0:
                self._forget()
            run = self.pivotal.optimiser().begin(
                self.residual, steps=self.pivotal.steps, seed=self.seed
            )
            self._stage(1, run, self.pivotal.steps, state)
            self.residual = self._settled(self.residual, run)
        if self.checkpoint is not None:
            self.checkpoint.unlink(missing_ok=True)
        return self._solution()

    def _stage(self, stage: int, run: Run, steps: int, state: dict[str, Tensor]) -> None:
        """Ask, evaluate and tell until the steps are used up, nothing improves, or the callback says stop."""
        if state:
            run.restore(state)
        made = self.done - (self.steps_of_first if stage else 0)
        while made < steps:
            losses = self._advance(stage, run)
            made, self.done = made + 1, self.done + 1
            self.history.append(float(losses.mean()))
            self._save(stage, run)
            if not self._report(stage, run):
                self.stop_reason = f"stopped by the caller after {self.done} steps"
                return
            if self.patience is not None and self.stale >= self.patience:
                self.stop_reason = f"no improvement in {self.stale} steps, after {self.done} steps"
                break
        else:
            self.stop_reason = f"all {self.done} steps made"
        if self.keep == "best" and self.aside is None and self.dirty:
            self._compare(stage, run.result(), self.objective.draw(0))
        if stage == 0:
            self.steps_of_first = self.done

    def _advance(self, stage: int, run: Run) -> Tensor:
        """One step; returns the losses of its best candidates [B]."""
        asked = run.ask()
        draw, people = self.objective.draw(self.done), self.objective.people
        wanted = run.gradients
        z, residual = self._place(stage, asked)
        if wanted:
            losses, gradients = self.objective.value_and_gradient(
                z, residual, draw, of_residual=bool(stage)
            )
            if stage:
                assert residual is not None and self.pivotal is not None
                losses = losses + 0.5 * self.pivotal.decay * residual.square().sum(1)
                gradients = gradients + self.pivotal.decay * residual
            elif self.within is not None:
                gradients = gradients @ self.within.T
        else:
            with torch.no_grad():
                losses, gradients = self.objective.loss(z, residual, draw), None
        if not bool(torch.isfinite(losses).all()):
            raise DataError(
                f"The loss is not a number after {self.done} steps: the run diverged or the model "
                "overflows. Use a smaller rate, or the model in another precision."
            )
        grouped = losses.unflatten(0, (people, -1))
        if self.aside is None:
            which = grouped.argmin(1)
            candidates = asked.unflatten(0, (people, -1))
            self._offer(candidates[torch.arange(people), which], grouped.amin(1))
        run.tell(losses, gradients)
        if self.aside is not None:
            self._compare(stage, run.result(), self.aside)
        self.dirty = True
        return grouped.amin(1)

    def _compare(self, stage: int, point: Tensor, draw: Draw) -> None:
        """Where the run stands, under fixed draws: counted as evaluations like any other."""
        z, residual = self._place(stage, point)
        with torch.no_grad():
            losses = self.objective.loss(z, residual, draw)
        if stage:
            assert residual is not None and self.pivotal is not None
            losses = losses + 0.5 * self.pivotal.decay * residual.square().sum(1)
        self._offer(point, losses)
        self.dirty = False

    def _offer(self, points: Tensor, losses: Tensor) -> None:
        better = losses < self.best_loss
        self.stale = 0 if bool(better.any()) else self.stale + 1
        self.best_loss = torch.where(better, losses, self.best_loss)
        if self.best_point is None:
            self.best_point = points.detach().clone()
        self.best_point = torch.where(better[:, None], points, self.best_point).detach()

    def _forget(self) -> None:
        """Nothing is best yet."""
        self.best_point = None
        self.best_loss = torch.full((self.objective.people,), float("inf"), device=self.z.device)
        self.stale, self.dirty = 0, False

    def _settled(self, before: Tensor, run: Run) -> Tensor:
        if self.keep == "last":
            return run.result().detach()
        return before if self.best_point is None else self.best_point

    def _place(self, stage: int, asked: Tensor) -> tuple[Tensor, Tensor | None]:
        """Candidates [R, D] are latents in the first stage, residuals in the second."""
        repeat = len(asked) // self.objective.people
        if stage:
            return self.z.repeat_interleave(repeat, 0), asked
        if self.within is not None:
            asked = self.z.repeat_interleave(repeat, 0) + asked @ self.within
        if self.residual is None:
            return asked, None
        return asked, self.residual.repeat_interleave(repeat, 0)

    def _report(self, stage: int, run: Run) -> bool:
        if self.callback is None:
            return True
        progress = Progress(
            self.done,
            self.total,
            self.history[-1],
            self._best_identity(stage, run),
            self._evaluations(),
            run.stage,
        )
        try:
            return self.callback(progress) is not False
        except StopInversion:
            return False

    def _best_identity(self, stage: int, run: Run) -> Identity:
        best = None if self.keep == "last" else self.best_point
        point = run.result() if best is None else best
        z, residual = self._place(stage, point)
        return Identity(z, self.objective.space.fingerprint, residual, {"made_by": "invert"})

    def _evaluations(self) -> int:
        return (self.objective.rows_evaluated - self.before) // self.objective.people

    def _solution(self) -> Solution:
        norm = 0.0 if self.residual is None else float(self.residual.norm(dim=1).mean())
        report = {
            "steps": self.done,
            "evaluations": self._evaluations(),
            "stop_reason": self.stop_reason,
            "optimiser": repr(self.optimiser),
            "pivotal": repr(self.pivotal) if self.pivotal else "",
            "residual_norm": norm,
        }
        how: dict[str, Any] = {"made_by": "invert", "seed": self.seed, "inversion": report}
        if self.origin is not None:
            how["start"] = dict(self.origin.provenance)
        identity = Identity(
            self.z.cpu(),
            self.objective.space.fingerprint,
            None if self.residual is None else self.residual.cpu(),
            how,
        )
        return Solution(
            identity,
            self.history,
            self._evaluations(),
            self.stop_reason,
            self.best_loss.tolist(),
            norm,
        )

    def _start(self, start: Identity | None) -> tuple[Tensor, Tensor | None]:
        space, people = self.objective.space, self.objective.people
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

    def _save(self, stage: int, run: Run) -> None:
        if self.checkpoint is None:
            return
        tensors = {f"run.{n}": t for n, t in run.state().items()}
        tensors |= {"z": self.z, "best_loss": self.best_loss}
        if self.best_point is not None:
            tensors["best_point"] = self.best_point
        if self.residual is not None:
            tensors["residual"] = self.residual
        tensors = {n: t.detach().cpu() for n, t in tensors.items()}
        counters = {
            "stage": stage,
            "done": self.done,
            "stale": self.stale,
            "first": self.steps_of_first,
        }
        config = {
            **counters,
            "evaluations": self.objective.rows_evaluated - self.before,
            "history": self.history,
            "of": self._settings(),
        }
        write_container(self.checkpoint, tensors, format=FORMAT, config=config)

    def _resume(self) -> tuple[int, dict[str, Tensor]]:
        """The stage to go on with and its optimiser's state."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return 0, {}
        file = open_container(self.checkpoint, FORMAT)
        if file.config["of"] != self._settings():
            raise FormatError(
                f"{self.checkpoint} is from an inversion with other settings. Remove it, or match them."
            )
        self.done, self.stale = int(file.config["done"]), int(file.config["stale"])
        self.steps_of_first = int(file.config["first"])
        self.before = self.objective.rows_evaluated - int(file.config["evaluations"])
        self.history = [float(x) for x in file.config["history"]]
        self.z = file.read("z").to(self.z)
        self.best_loss, self.dirty = file.read("best_loss").to(self.z), True
        self.best_point = file.read("best_point").to(self.z) if "best_point" in file else None
        self.residual = file.read("residual").to(self.z) if "residual" in file else None
        state = {n.removeprefix("run."): file.read(n) for n in file.entries if n.startswith("run.")}
        return int(file.config["stage"]), state

    def _settings(self) -> dict[str, Any]:
        o = self.objective
        return {
            "optimiser": repr(self.optimiser),
            "pivotal": repr(self.pivotal),
            "steps": self.steps,
            "seed": [self.seed, o.seed],
            "draws": o.draws,
            "space": o.space.fingerprint,
        }
