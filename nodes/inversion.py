"""From pictures of a person to a point in a space."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io

from .. import w2wpp
from ..w2wpp import inversion
from ..w2wpp.errors import DataError
from ..w2wpp.inversion.framing import Framed
from ..w2wpp.inversion.reread import PAINT_STEPS
from ..w2wpp.inversion.verdict import Verdict, judge, repainted
from ..w2wpp.start_network import StartNetwork
from .curve import draw_curve
from .host import folders, framing, tensors
from .host.denoiser import denoiser
from .host.framing import crop_image, frame_pictures, framed_image, framed_preview
from .host.model import check_fit, noise_schedule, usual_size
from .host.pictures import painted_pictures, picture_latents
from .host.plan import Plan, plan_run
from .host.progress import Watch
from .host.prompts import check_prompt
from .host.vision import with_sight
from .inputs import side_of_pictures
from .types import IdentitySocket, People, SpaceSocket, advanced, schema, seed_of_people

PREVIEWS, FEW = (
    8,
    2,
)  # in a run, unless somebody says how often; with and without ComfyUI's own previews
Paint = Callable[[w2wpp.Identity], torch.Tensor]
UNKNOWN = -1.0  # the confidence where nobody can tell


class InvertFromImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="W2WPP_InvertFromImage",
            display_name="W2W++ Invert from Image",
            description="Finds the person of a picture in a space: the identity with which the model explains the "
            "picture best. From there they can be painted in other scenes, edited and mixed.",
            search_aliases=[
                "face",
                "character from picture",
                "consistent character",
                "ip adapter alternative",
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
                    options=list(inversion.METHODS),
                    default="adam",
                    tooltip="adam follows the gradient and is the fastest. multistart first tries several "
                    "starting points, then follows the gradient from the best. cma needs no gradients, and "
                    "so no more memory than painting, but runs the model many more times.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=10000,
                    tooltip="How many steps to take. 0 uses the method's default.",
                ),
                seed_of_people(
                    "Seed of the noise that is added to the picture. The result hardly depends on it."
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
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="The vision model that the space's start network was taught with, if it was taught with "
                    "one.",
                ),
                io.Int.Input(
                    "batch",
                    default=0,
                    min=0,
                    max=256,
                    tooltip="How many noised copies of the pictures each step compares. More is steadier and "
                    "slower. 0 uses the method's default.",
                    **advanced(),
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.005,
                    tooltip="The size of a step; for cma, the standard deviation of its first population. 1 is "
                    "one standard deviation of the space. 0 uses the method's default.",
                    **advanced(),
                ),
                io.Float.Input(
                    "prior",
                    default=-1.0,
                    min=-1.0,
                    max=10.0,
                    step=0.001,
                    round=0.0001,
                    tooltip="How strongly the person is kept close to the people that the space knows: 0 is not "
                    "at all, -1 uses the recommended strength.",
                    **advanced(),
                ),
                io.Float.Input(
                    "pivotal",
                    default=-1.0,
                    min=-1.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Extra steps at the end, as a share of the steps, that refine what the space can't "
                    "express: closer to the picture, somewhat less editable. 0 is none, -1 uses the recommended "
                    "share. Needs gradients.",
                    **advanced(),
                ),
                side_of_pictures(
                    "The pictures are scaled to the area of a square with sides of this many pixels. 0 "
                    "uses the size that the model was trained on.",
                    "resolution",
                ),
                io.Int.Input(
                    "preview_every",
                    default=-1,
                    min=-1,
                    max=10000,
                    tooltip="The person found so far is painted on the node every so many steps. 0 is never, -1 is "
                    "eight times in all, or twice where previews are off in ComfyUI's settings.",
                    **advanced(),
                ),
                io.Combo.Input(
                    "framing",
                    options=list(framing.FRAMINGS),
                    default="auto",
                    optional=True,
                    tooltip="auto brings the person into the frame in which the space's people were photographed: "
                    "from the mask, or else where a face is found. off takes the middle of the picture as it is.",
                    **advanced(),
                ),
                io.Boolean.Input(
                    "strict",
                    default=False,
                    optional=True,
                    tooltip="Whether to stop with an error if the person found should not be trusted. What was found "
                    "is kept all the same.",
                    **advanced(),
                ),
                io.Boolean.Input(
                    "repaint",
                    default=True,
                    optional=True,
                    tooltip="Whether the person found is painted once more under the prompt, to see whether they look "
                    "like the one in the picture: part of the confidence, where the space has a start network. Costs "
                    f"{PAINT_STEPS} evaluations of the UNet and one decoding.",
                    **advanced(),
                ),
            ],
            outputs=[
                IdentitySocket.Output(
                    display_name="identity", tooltip="The person, together with their space."
                ),
                io.Image.Output(
                    display_name="curve",
                    tooltip="The loss at every step and the best so far, or a running mean where every step uses "
                    "different noise.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="What was done, on which device, how far the loss fell and why it stopped.",
                ),
                io.Image.Output(
                    display_name="crop",
                    tooltip="What of each picture was used, as the space's people were photographed; what does not "
                    "count is grey.",
                ),
                io.Float.Output(
                    display_name="confidence",
                    tooltip="From 0 to 1 how far the person found can be trusted; -1 if the space was not taught to "
                    "tell. The report says why in a sentence.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, method: str | None = None):
        """Graphs of older releases name a method that has another name today."""
        known = (*inversion.METHODS, *inversion.OLDER_NAMES)
        if method is None or method in known:
            return True
        return f"The methods are {', '.join(inversion.METHODS)}. Got '{method}'."

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
        clip_vision=None,
        framing: str = "auto",
        strict: bool = False,
        repaint: bool = True,
    ) -> io.NodeOutput:
        check_fit(model, space.layout)
        check_prompt(positive)
        with tensors.ordinary_tensors():
            given, (space, remarks) = space, with_sight(space, clip_vision)
            pixels = resolution or usual_size(model)
            framed = frame_pictures(space, image, mask, pixels, how=framing)
            pictures, weights = picture_latents(model, vae, *framed_image(framed), pixels)
            session = inversion.session(
                space,
                pictures,
                method,
                faces=framed.pictures,
                start=start and start.identity,
                mask=weights,
                seed=seed,
                steps=steps or None,
                draws=batch or None,
                rate=learning_rate or None,
                prior=None if prior < 0 else prior,
                pivotal=None if pivotal < 0 else pivotal,
            )
            watch = Watch(model, cls.hidden.unique_id)
            watch.draw(framed_preview(image, framed))
            if repaint and space.start is None:
                remarks += ("Not painted again: the space has no start network to compare with.",)
            repaint = repaint and space.start is not None
            solution, found, report = _solve(
                session, model, positive, watch, preview_every, repaint
            )
            likeness = None
            if found.painted is not None:
                likeness, said = _likeness(space.start, framed, model, vae, found.painted)
                report += f"\n{said}"
            verdict = judge(space.start, framed, gain=found.gain, repaint=likeness)
        title = f"{inversion.OLDER_NAMES.get(method, method)}, {len(solution.history)} steps"
        curve = draw_curve(solution.history, title, comparable=not session.recipe.fresh)
        report = "\n".join([f"{verdict}", *remarks, *framed.remarks, report])
        if strict:
            _require(verdict, solution.identity)
        watch.tell(f"{verdict}")
        sure = UNKNOWN if verdict.confidence is None else verdict.confidence
        return io.NodeOutput(
            People(solution.identity, given), curve, report, crop_image(framed), sure
        )


@dataclass(frozen=True)
class _Found:
    """What the model says of a solution."""

    gain: float  # on the average person
    painted: torch.Tensor | None  # latents [1, C, H, W] of the person found, as the model sees them


def _solve(
    session: inversion.Session,
    model: Any,
    prompt: list,
    watch: Watch,
    preview_every: int,
    repaint: bool,
) -> tuple[inversion.Solution, _Found, str]:
    """Run a session with the user's model; what was found, what the model says of it, and the report."""
    started, recipe = time.monotonic(), session.recipe
    shape = (recipe.draws, *session.pictures.shape[1:])
    plan = plan_run(model, shape, gradients=recipe.gradients)
    session, schedule = session.to(plan.device), noise_schedule(model)
    with denoiser(model, session.space.layout, prompt, plan) as denoise:
        watch.show(0, recipe.steps, f"{plan}")

        def paint(someone: w2wpp.Identity) -> torch.Tensor:
            """Latents [1, C, H, W] as the model sees them."""
            return session.painted(denoise, schedule, someone.z, someone.residual)

        watcher = _Watcher(session, watch, paint, preview_every)
        with watcher.keeping_the_best():
            solution = session.solve(denoise, schedule, micro_batch=plan.rows, callback=watcher)
        (gain,) = session.gain(denoise, schedule, solution.identity, micro_batch=plan.rows)
        painted = paint(solution.identity) if repaint else None
    report = _report(session, solution, plan, time.monotonic() - started)
    report += f"\nThe loss is {1 - gain:.4g} times that of the average person"
    return solution, _Found(gain, painted), report


def _likeness(
    start: StartNetwork, framed: Framed, model: Any, vae: Any, latents: torch.Tensor
) -> tuple[float | None, str]:
    """How alike the person found is painted to the one in the pictures, and a line for the report."""
    painted = painted_pictures(model, vae, latents)
    if painted is None:
        return None, "Not painted again: this VAE does not decode to pictures"
    likeness = repainted(start, framed, painted)
    return likeness, f"Painted again, features agree by a cosine of {likeness:.2f}"


def _require(verdict: Verdict, found: w2wpp.Identity) -> None:
    """Strict mode: an error for what should not be trusted, which says where it was kept."""
    try:
        verdict.require()
    except DataError as e:
        label = folders.save_new_identity(_on_cpu(found), "doubtful")
        raise DataError(f"{e} What was found is {label}.") from e


def _report(
    session: inversion.Session, solution: inversion.Solution, plan: Plan, seconds: float
) -> str:
    count, _, height, width = session.pictures.shape
    lines = [
        f"{count} {'picture' if count == 1 else 'pictures'}, latents {width} x {height}"
        + (", masked" if session.mask is not None else ""),
        f"{session.recipe}",
        f"{_course(solution.history, session.recipe)}; {solution.stop_reason}",
        f"{solution.evaluations} evaluations of the UNet in {seconds:.1f} s, {plan}",
        f"Distance from the average person {float(solution.identity.z.square().mean()) ** 0.5:.2f} "
        "(people of the space: about 1)",
    ]
    if solution.residual_norm:
        lines.append(f"Outside of the space: {solution.residual_norm:.2f} in whitened coefficients")
    return "\n".join(lines)


def _course(history: list[float], recipe: inversion.Recipe) -> str:
    if not recipe.fresh:
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

    def __init__(
        self, session: inversion.Session, watch: Watch, paint: Paint, preview_every: int
    ) -> None:
        self._watch, self._paint = watch, paint
        steps = session.recipe.steps
        usual = PREVIEWS if watch.shows_previews else FEW
        self._every = preview_every if preview_every >= 0 else math.ceil(steps / usual)
        self._best: w2wpp.Identity | None = None

    def __call__(self, progress: inversion.Progress) -> None:
        self._best = progress.best
        preview = None
        if self._every and (progress.step % self._every == 0 or progress.step == progress.steps):
            preview = self._paint(progress.best)
        text = (
            f"{progress.stage}: step {progress.step} of {progress.steps}, loss {progress.loss:.5g}"
        )
        self._watch.show(progress.step, progress.steps, text, preview)

    @contextlib.contextmanager
    def keeping_the_best(self) -> Iterator[None]:
        try:
            yield
        except BaseException:  # Cancel, memory, anything: the steps so far were paid for
            if self._best is not None:
                self._watch.tell(self._save(self._best))
            raise

    def _save(self, best: w2wpp.Identity) -> str:
        """What became of it; never an error, which would hide the one that ended the run."""
        try:
            label = folders.save_new_identity(_on_cpu(best), "unfinished")
        except w2wpp.W2WError as e:
            return f"The best so far could not be kept: {e}"
        return f"The best so far is {label}: W2W++ Load Identity opens it, for 'start'."
