"""From pictures of a person to a point in a space."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io

from .. import w2wpp
from ..w2wpp import inversion
from .curve import draw_curve
from .host import folders, tensors
from .host.denoiser import denoiser, paint
from .host.model import noise_schedule, usual_size
from .host.pictures import picture_latents
from .host.plan import plan_run
from .host.progress import Watch
from .types import IdentitySocket, People, SpaceSocket, advanced, schema

PREVIEWS = 8  # in a run, unless somebody says how often
PREVIEW_STEPS = 8  # of DDIM: enough to know the face by


class InvertFromImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="W2WPP_InvertFromImage",
            display_name="W2W++ Invert from Image",
            description="Finds the person of a picture in a space: the identity with which the model explains the "
            "picture best. From there they can be painted in other scenes, edited and mixed.",
            search_aliases=[
                "photo to identity",
                "image to lora",
                "face inversion",
                "one shot lora",
                "weights2weights",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that the space was learned on, LoRAs included if it has any. It stays as it is.",
                ),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="A prompt that describes the picture, with the space's trigger words: what the prompt says "
                    "the identity need not learn.",
                ),
                SpaceSocket.Input(
                    "space", tooltip="Where to look for the person, from W2W++ Load Space."
                ),
                io.Image.Input(
                    "image",
                    tooltip="A picture of the person, or a batch of pictures of the same person.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(inversion.FAR),
                    default="adam",
                    tooltip="adam follows the gradient and is the quickest. hybrid tries several starts before. "
                    "cma needs no gradient, and so no more memory than painting, but many more evaluations.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=10000,
                    tooltip="How many steps to take. 0 takes the method's own number.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the noise under which the picture is looked at. The result hardly depends on it.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the person is, of any size. Without one the background counts as much as "
                    "the face.",
                ),
                IdentitySocket.Input(
                    "start",
                    optional=True,
                    tooltip="Where to start from, such as an inversion that was cancelled, or someone similar. Without "
                    "it the space's own guess from the picture is taken, or else its average person.",
                ),
                io.Int.Input(
                    "batch",
                    default=0,
                    min=0,
                    max=256,
                    tooltip="How many noised copies of the pictures each step looks at. More is steadier and slower. 0 "
                    "takes the method's own number.",
                    **advanced(),
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.005,
                    tooltip="How far a step goes: for cma the width of its first population, in standard deviations of "
                    "the space. 0 takes the method's own.",
                    **advanced(),
                ),
                io.Float.Input(
                    "prior",
                    default=-1.0,
                    min=-1.0,
                    max=10.0,
                    step=0.001,
                    round=0.0001,
                    tooltip="How strongly the person is held near the people that the space knows: 0 not at all. -1 "
                    "takes the recommended strength.",
                    **advanced(),
                ),
                io.Float.Input(
                    "pivotal",
                    default=-1.0,
                    min=-1.0,
                    max=1.0,
                    step=0.05,
                    tooltip="The share of the steps that refines, at the end, what the space can't express. Nearer to "
                    "the picture, somewhat less editable; 0 is never, and -1 takes the recommended share. Needs "
                    "gradients.",
                    **advanced(),
                ),
                io.Int.Input(
                    "resolution",
                    default=0,
                    min=0,
                    max=2048,
                    step=8,
                    tooltip="The pictures are scaled to the area of a square with sides this long. 0 takes the size "
                    "that the model paints at.",
                    **advanced(),
                ),
                io.Int.Input(
                    "preview_every",
                    default=-1,
                    min=-1,
                    max=10000,
                    tooltip="After how many steps the person found so far is painted on the node, if previews are on "
                    "in the host's settings. 0 is never, and -1 is eight times in all.",
                    **advanced(),
                ),
            ],
            outputs=[
                IdentitySocket.Output(
                    display_name="identity", tooltip="The person, together with their space."
                ),
                io.Image.Output(
                    display_name="curve",
                    tooltip="The loss at every step, and the best so far; their running mean where every step has "
                    "other noise.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="What was done, on which device, how far it came and why it stopped.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        vae,
        positive,
        space,
        image,
        method: str,
        steps: int,
        seed: int,
        batch: int,
        learning_rate: float,
        prior: float,
        pivotal: float,
        resolution: int,
        preview_every: int,
        mask=None,
        start=None,
    ) -> io.NodeOutput:
        guesses = start is None and space.start is not None
        recipe = (inversion.NEAR if guesses else inversion.FAR)[method].adjusted(
            steps=steps or None,
            draws=batch or None,
            rate=learning_rate or None,
            prior=None if prior < 0 else prior,
            pivotal=None if pivotal < 0 else pivotal,
        )
        with tensors.ordinary_tensors():
            pixels = resolution or usual_size(model)
            pictures = picture_latents(model, vae, image, mask, pixels)
            begin = _guess(space, image) if guesses else start and start.identity
            task = _Task(model, positive, space, *pictures, method, recipe, seed)
            watch = _Watcher(task, Watch(model, cls.hidden.unique_id), preview_every)
            solution = task.solve(begin, watch)
        report = watch.report(solution)
        title = f"{method}, {len(solution.history)} steps"
        comparable = not recipe.objective.get("fresh")
        curve = draw_curve(solution.history, title, comparable=comparable)
        return io.NodeOutput(People(solution.identity, space), curve, report)


def _guess(space: w2wpp.Space, image: torch.Tensor) -> w2wpp.Identity:
    """One person from pictures [n, H, W, 3]: the mean of what the start network makes of each."""
    guessed = space.start_from(image[..., :3].movedim(-1, 1).float().clone() * 2 - 1)
    return w2wpp.Identity(
        guessed.z.mean(0, keepdim=True), guessed.space_fingerprint, None, guessed.provenance
    )


@dataclass(frozen=True)
class _Task:
    """Whom to find where, and how."""

    model: Any
    prompt: list
    space: w2wpp.Space
    pictures: torch.Tensor  # [n, C, h, w]
    mask: torch.Tensor | None  # [n, 1, h, w]
    method: str
    recipe: inversion.Recipe
    seed: int

    def solve(self, start: w2wpp.Identity | None, watch: "_Watcher") -> inversion.Solution:
        recipe = self.recipe
        gradients = self.method != "cma" or recipe.pivotal is not None
        shape = (recipe.objective["draws"], *self.pictures.shape[1:])
        plan = plan_run(self.model, shape, gradients=gradients)
        space = self.space if plan.device.type == "cpu" else self.space.to(plan.device)
        with denoiser(self.model, space.layout, self.prompt, plan) as denoise:
            schedule = inversion.NoiseSchedule(*noise_schedule(self.model))
            watch.begin(denoise, schedule, space)
            objective = inversion.Objective(
                space,
                self.pictures.to(plan.device),
                denoise,
                schedule,
                seed=self.seed,
                mask=self.mask,
                micro_batch=plan.rows,
                **recipe.objective,
            )
            with watch.keeping_the_best():
                return inversion.invert(
                    objective,
                    recipe.optimiser,
                    steps=recipe.steps,
                    start=start,
                    pivotal=recipe.pivotal,
                    keep=recipe.keep,
                    seed=self.seed,
                    callback=watch,
                )


def _course(history: list[float], recipe: inversion.Recipe) -> str:
    if not recipe.objective.get("fresh"):
        return f"Loss {history[0]:.5g} to {min(history):.5g}"
    third = max(1, len(history) // 3)
    first, last = (sum(part) / third for part in (history[:third], history[-third:]))
    return f"Loss {first:.5g} to {last:.5g} (first and last third of the steps, each under other noise)"


def _on_cpu(identity: w2wpp.Identity) -> w2wpp.Identity:
    residual = None if identity.residual is None else identity.residual.cpu()
    how = dict(identity.provenance)
    return w2wpp.Identity(identity.z.cpu(), identity.space_fingerprint, residual, how)


class _Watcher:
    """Shows how it goes after every step, and saves the best so far if it ends early."""

    def __init__(self, task: _Task, watch: Watch, preview_every: int) -> None:
        self._task, self._watch = task, watch
        every = preview_every if preview_every >= 0 else math.ceil(task.recipe.steps / PREVIEWS)
        self._every = every if watch.shows_previews else 0
        self._best: w2wpp.Identity | None = None
        self._started = time.monotonic()

    def begin(self, denoise: Any, schedule: inversion.NoiseSchedule, space: w2wpp.Space) -> None:
        self._denoise, self._schedule, self._space = denoise, schedule, space
        shape = (1, *self._task.pictures.shape[1:])
        generator = torch.Generator().manual_seed(self._task.seed)
        self._noise = torch.randn(shape, generator=generator).to(denoise.plan.device)
        self._watch.show(0, self._task.recipe.steps, f"{denoise.plan}")

    def __call__(self, progress: inversion.Progress) -> None:
        self._best = progress.best
        preview = None
        if self._every and (progress.step % self._every == 0 or progress.step == progress.steps):
            preview = self._face(progress.best)
        text = (
            f"{progress.stage}: step {progress.step} of {progress.steps}, loss {progress.loss:.5g}"
        )
        self._watch.show(progress.step, progress.steps, text, preview)

    def _face(self, identity: w2wpp.Identity) -> torch.Tensor:
        """Latents of the person under the prompt, always from the same noise."""
        vector = self._space.decode(identity.z, identity.residual)
        alphas, kind = self._schedule.alphas_cumprod, self._schedule.prediction
        return paint(self._denoise, self._noise, vector, alphas, kind, PREVIEW_STEPS)

    @contextlib.contextmanager
    def keeping_the_best(self) -> Iterator[None]:
        try:
            yield
        except BaseException:  # Cancel, memory, anything: the steps so far were paid for
            if self._best is not None:
                path, label = folders.new_identity_file("unfinished")
                w2wpp.save_identity(_on_cpu(self._best), path)
                self._watch.tell(
                    f"The best so far is {label}: W2W++ Load Identity opens it, for 'start'."
                )
            raise

    def report(self, solution: inversion.Solution) -> str:
        task, history = self._task, solution.history
        seconds = time.monotonic() - self._started
        count, _, height, width = task.pictures.shape
        lines = [
            f"{count} {'picture' if count == 1 else 'pictures'}, latents {width} x {height}"
            + (", masked" if task.mask is not None else ""),
            f"{task.recipe}",
            f"{_course(history, task.recipe)}; {solution.stop_reason}",
            f"{solution.evaluations} evaluations of the UNet in {seconds:.1f} s, {self._denoise.plan}",
            f"Distance from the average person {float(solution.identity.z.square().mean()) ** 0.5:.2f} "
            "(people of the space: about 1)",
        ]
        if solution.residual_norm:
            lines.append(
                f"Outside of the space: {solution.residual_norm:.2f} in whitened coefficients"
            )
        return "\n".join(lines)
