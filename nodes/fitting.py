"""From LoRAs of many people to a space that draws new ones."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io, ui

from .. import w2wpp
from ..w2wpp.imports.w2w import LICENCE, TRIGGER_PROMPT
from ..w2wpp.imports.w2w_space import hold_out, w2w_basis, w2w_coefficients
from ..w2wpp.space import SpaceBasis
from ..w2wpp.spacefile import space_bytes
from ..w2wpp.training.basis_job import FittedBasis, SpanError
from ..w2wpp.training.coefficients import Coefficients
from ..w2wpp.training.dataset import VectorDataset, holdout_by_identity
from ..w2wpp.training.fit_basis import fit_coefficients
from ..w2wpp.training.fit_flow import with_flow
from ..w2wpp.training.gather import public
from ..w2wpp.training.run import Progress
from .bars import draw_bars
from .curve import draw_curve
from .host import folders, learnable, tensors
from .host.blocking import nothing_because
from .host.progress import steps_shown, tell
from .host.unfinished import Unfinished
from .inputs import name_of_result, seed_of_training
from .likeness import draw_map
from .types import (
    DatasetSocket,
    IdentitySocket,
    People,
    SpaceSocket,
    advanced,
    schema,
)

TITLE = "W2W++ Fit Space"
CONNECTED = "connected"
LINEAR, VAE = "linear (w2w)", "VAE (w2w++)"
NORMAL, FLOW = "normal", "as people are spread"
METRICS = {"what they do": "update", "each number alike": "parameter", "raw numbers": "raw"}
MOST_COMPONENTS = 1000  # unless somebody asks for more
USUAL_LATENT = 64
FEW = 20  # people, below which nobody is held out unless somebody asks for it
ON_THE_MAP = 200  # people


class FitSpace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="W2WPP_FitSpace",
            display_name=TITLE,
            description="Learns a space of people from their LoRAs: every point of it is a person, most of them nobody "
            "was trained on. For LoRAs of one training, as W2W++ Train People makes them, or official files.",
            search_aliases=[
                "train space",
                "train vae",
                "pca of loras",
                "learn identities",
                "weights2weights",
            ],
            inputs=[
                io.Combo.Input(
                    "source",
                    options=[CONNECTED, *learnable.learnable()],
                    default=CONNECTED,
                    tooltip="What to learn from: the connected data set; one in models/w2wpp/; a folder of LoRAs in "
                    "models/loras/; or official files, whose coefficients are known.",
                ),
                io.Combo.Input(
                    "kind",
                    options=[LINEAR, VAE],
                    default=LINEAR,
                    tooltip="linear is PCA, as weights2weights has it, and all that few people support. A VAE holds "
                    "more in as many latents, from some hundreds of people on.",
                ),
                name_of_result(
                    "Name of a file in models/w2wpp/, for W2W++ Load Space. Leave empty to pass the space on "
                    "without saving it.",
                ),
                io.Int.Input(
                    "components",
                    default=0,
                    min=0,
                    max=10000,
                    tooltip="How many principal components to keep. 0 keeps all that the people support, up to 1,000.",
                ),
                io.Int.Input(
                    "latent",
                    default=0,
                    min=0,
                    max=10000,
                    tooltip="How many numbers describe a person in a VAE. 0 is 64, or the number of components if that "
                    "is smaller. A linear space has one for each component.",
                ),
                io.Int.Input(
                    "epochs",
                    default=400,
                    min=1,
                    max=100000,
                    tooltip="How often a VAE sees everybody, at most; it stops once people kept aside gain "
                    "nothing more.",
                ),
                io.Float.Input(
                    "held_out",
                    default=-1.0,
                    min=-1.0,
                    max=0.9,
                    step=0.05,
                    tooltip="Share of the people who are kept aside to measure with. -1 is a tenth, and nobody of "
                    "fewer than 20.",
                    **advanced(),
                ),
                io.Combo.Input(
                    "count_by",
                    options=list(METRICS),
                    default="what they do",
                    tooltip="How a difference between two LoRAs counts: by what it does to the model's matrices, by "
                    "each number in units of its spread (as in weights2weights), or by the raw numbers.",
                    **advanced(),
                ),
                io.Combo.Input(
                    "prior",
                    options=[NORMAL, FLOW],
                    default=NORMAL,
                    tooltip="How new people are drawn: from a normal distribution, or one fitted to how people lie, "
                    "with clusters and tails. That takes 50 people or more.",
                    **advanced(),
                ),
                io.Float.Input(
                    "beta",
                    default=w2wpp.VaeTraining.beta,
                    min=0.0,
                    max=10.0,
                    step=0.0001,
                    round=0.000001,
                    tooltip="How strongly a VAE is held to a normal distribution.",
                    **advanced(),
                ),
                seed_of_training(
                    "Seed of the first weights, of the order, and of who is held out.",
                ),
                io.String.Input(
                    "trigger_prompt",
                    default="",
                    tooltip="The words that call a person up, kept in the space. Empty takes those of the data set.",
                    **advanced(),
                ),
                io.String.Input(
                    "licence",
                    default="",
                    tooltip="What others may do with the space, kept in it. Official files bring their own.",
                    **advanced(),
                ),
                DatasetSocket.Input(
                    "dataset", optional=True, tooltip="Everybody's LoRAs, from W2W++ Train People."
                ),
            ],
            outputs=[
                SpaceSocket.Output(display_name="space", tooltip="The space."),
                IdentitySocket.Output(
                    display_name="identity",
                    tooltip="The people it was learned from, as points of it, in the order of the data set. Nothing "
                    "for official files.",
                ),
                io.Image.Output(
                    display_name="plots",
                    is_output_list=True,
                    tooltip="How much of people's LoRAs the space holds, the course of the training, and a map of the "
                    "people.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="What was learned from whom, how well it holds people it has not seen, and what to expect.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, source: str | None = None):
        if source in (None, CONNECTED):
            return True
        return folders.refusal(learnable.require_learnable, source)

    @classmethod
    def fingerprint_inputs(cls, source: str = CONNECTED, **_: Any):
        return "" if source == CONNECTED else learnable.stamp_of(source)

    @classmethod
    def execute(
        cls,
        source,
        kind,
        save_as,
        components,
        latent,
        epochs,
        held_out,
        count_by,
        prior,
        beta,
        seed,
        trigger_prompt,
        licence,
        dataset=None,
    ) -> io.NodeOutput:
        node = cls.hidden.unique_id
        target = folders.new_space_file(save_as) if save_as.strip() else None
        share = None if held_out < 0 else held_out
        work = Unfinished(save_as)
        with tensors.ordinary_tensors():
            material = _material(
                source, dataset, components, share, METRICS[count_by], seed, node, work
            )
            facts = {
                **material.facts,
                "name": target.stem if target else "my people",
                "version": "1",
                **{
                    k: v for k, v in (("trigger_prompt", trigger_prompt), ("licence", licence)) if v
                },
            }
            if kind == LINEAR:
                space = w2wpp.linear_space(material.rows, material.basis, provenance=facts)
            else:
                size = latent or min(USUAL_LATENT, material.basis.n_components)
                learning = int((~material.rows.heldout).sum())
                training = w2wpp.VaeTraining(
                    latent=size,
                    epochs=epochs,
                    beta=beta,
                    seed=seed,
                    validation=w2wpp.VaeTraining.validation if learning >= FEW else 0.0,
                )

                def fit(checkpoint: Path) -> w2wpp.Space:
                    return w2wpp.fit_vae(
                        material.rows,
                        material.basis,
                        training,
                        checkpoint=checkpoint,
                        callback=_epochs_shown(node),
                        provenance=facts,
                    )

                with torch.enable_grad():
                    space = work.run(
                        "vae", [repr(training), material.rows.values, material.rows.identity], fit
                    )
            if prior == FLOW:
                space = with_flow(space, material.rows)
            text = _report(space, material, kind)
            if work.taken_up:
                text += "\ntaken up where it was stopped"
            if target:
                w2wpp.save_space(space, target)
                space = w2wpp.load_space(target)
                text += f"\nsaved as {target.name}, {space_bytes(space) / 1e6:,.1f} MB"
            work.done()
            people = _people(space, material)
            plots = _plots(space, people)
        given = people or nothing_because("Official files hold no single people's LoRAs.")
        return io.NodeOutput(space, given, plots, text, ui=ui.PreviewText(text))


@dataclass(frozen=True)
class _Material:
    """What a space is learned from."""

    rows: Coefficients
    basis: SpaceBasis
    facts: Mapping[str, Any]  # for the space
    text: str  # what was done to get it
    official: bool = False


def _material(
    source: str,
    dataset: VectorDataset | None,
    components: int,
    share: float | None,
    metric: str,
    seed: int,
    node: str,
    work: Unfinished,
) -> _Material:
    if (source == CONNECTED) != (dataset is not None):
        raise w2wpp.ConfigError(
            f"{TITLE} learns from one thing: connect 'dataset' and set 'source' to '{CONNECTED}', or choose a source "
            "and connect nothing."
        )
    folder = None if dataset is not None else learnable.official_source(source)
    if folder is not None:
        return _from_official(folder, components, share, seed, node)
    data, text = (
        (dataset, "") if dataset is not None else learnable.open_data(source, _work(source))
    )
    data = _with_held_out(data, share, seed)
    most = min(len(data.training_rows) - 1, data.layout.size)
    if most < 1:
        raise w2wpp.DataError(
            f"A space takes at least two people to learn from; there are {len(data.training_rows)}."
        )
    count = components or min(most, MOST_COMPONENTS)
    if count > most:
        raise w2wpp.ConfigError(
            f"{len(data.training_rows)} people support at most {most} components. Got {components}; 0 takes all."
        )

    def fit(count: int) -> FittedBasis:
        options: dict[str, Any] = {"metric": metric, "callback": _lines_shown(node)}
        what = [
            count,
            metric,
            len(data),
            data.heldout,
            data.identity,
            data.vectors([0, len(data) - 1]),
        ]
        return work.run(
            "basis", what, lambda path: fit_coefficients(data, count, checkpoint=path, **options)
        )

    try:
        fitted = fit(count)
    except SpanError as e:  # people who are the same, or nearly
        if components or not e.span:
            raise
        fitted = fit(e.span)
    facts = {
        "trigger_prompt": str(data.provenance.get("trigger_prompt", "")),
        "made_from": "LoRAs of people",
        "data": public(fitted.coefficients.provenance),
    }
    return _Material(fitted.coefficients, fitted.basis, facts, text)


def _from_official(
    folder: Path, components: int, share: float | None, seed: int, node: str
) -> _Material:
    source = w2wpp.open_w2w(folder)
    source = source.first(components or source.known)
    rows, how = hold_out(w2w_coefficients(source), 0.1 if share is None else share, seed=seed)
    basis = w2w_basis(source, progress=steps_shown(node, "reading component"))
    facts = {
        "licence": LICENCE,
        "trigger_prompt": TRIGGER_PROMPT,
        "made_from": "official files",
        "data": public(rows.provenance),
    }
    text = (
        f"{how['rows']:,} rows of the official coefficients were held out; rows are all that is known of these people, "
        "and the components were made from all of them, which flatters every figure"
    )
    return _Material(rows, basis, facts, text, official=True)


def _with_held_out(data: VectorDataset, share: float | None, seed: int) -> VectorDataset:
    """Some people kept aside, unless the data set says who is."""
    if share is None and bool(data.heldout.any()):
        return data
    count = len(data.identity.unique())
    wanted = (0.1 if count >= FEW else 0.0) if share is None else share
    generator = torch.Generator().manual_seed(seed)
    return replace(data, heldout=holdout_by_identity(data.identity, wanted, generator=generator))


def _work(source: str) -> Path:
    """Where the data set of a folder of LoRAs is gathered."""
    name = source.removeprefix(learnable.LORAS).strip("./") or "loras"
    return folders.space_place(name).with_suffix("")


def _lines_shown(node: str):
    """A callback for lines of text; it raises if Cancel was pressed."""
    check = steps_shown(node, "finding components, step")
    state = {"lines": 0}

    def show(line: str) -> None:
        state["lines"] += 1
        check(state["lines"], state["lines"] + 1)
        tell(node, line)

    return show


def _epochs_shown(node: str):
    """A callback for the epochs of a VAE; it raises if Cancel was pressed."""
    shown = {
        stage: steps_shown(node, text)
        for stage, text in (
            ("search", "finding how long to train: epoch"),
            ("final", "training: epoch"),
        )
    }

    def show(p: Progress) -> None:
        shown.get(p.stage, partial(lambda *_: None))(p.epoch, p.epochs)

    return show


def _people(space: w2wpp.Space, material: _Material) -> People | None:
    if material.official:
        return None
    z = space.latent_of(space.codec.encode(material.rows.values).mean)
    how = {"made_by": "fit-space"}
    return People(w2wpp.Identity(z, space.fingerprint, None, how), space)


def _report(space: w2wpp.Space, material: _Material, kind: str) -> str:
    rows, report = material.rows, space.training_report
    learned, aside = int((~rows.heldout).sum()), int(rows.heldout.sum())
    lines = [
        f"{kind}: {space.latent_size} numbers describe a person, over {material.basis.n_components} components, "
        f"learned from {learned:,} LoRAs" + (f"; {aside:,} held out" if aside else ""),
        *_r2_lines(report),
    ]
    if "collapse" in report:
        lines.append(str(report["collapse"]))
    if "flow" in space.provenance:
        rounds = space.provenance["flow"]["rounds"]
        lines.append(
            f"people are drawn by a flow of {rounds} rounds"
            if rounds
            else "people lie as a normal distribution has them; no flow was needed"
        )
    if learned < FEW:
        lines.append(
            f"Of {learned} people a space holds mixtures of them and little else: mix and walk, and sample with a "
            "truncation of 0.7 or less."
        )
    return "\n".join([*lines, *([material.text] if material.text else [])])


def _r2_lines(report: Mapping[str, Any]) -> list[str]:
    return [
        f"share of the difference between people that is kept, {name}: {value:.1%}"
        for name, value in _shares(report).items()
    ]


def _shares(report: Mapping[str, Any]) -> dict[str, float]:
    """What of people's LoRAs is kept, by whom it is measured on and by what."""
    found = {}
    for name, value in dict(report.get("weight_r2", {})).items():
        found[f"{name} people"] = float(value)
    for name, value in dict(report.get("weight_r2_of_pca", {})).items():
        found[f"{name} people, PCA of that size"] = float(value)
    return found


def _plots(space: w2wpp.Space, people: People | None) -> list[torch.Tensor]:
    report = space.training_report
    plots = [draw_bars(_shares(report), "share of the difference between people that is kept")]
    losses = [float(row["loss"]) for row in report.get("history", ()) if "loss" in row]
    if losses:
        plots.append(draw_curve(losses, "loss of the VAE, epochs evenly spread", comparable=False))
    if people is not None and len(people) > 1:
        z = people.identity.z[:ON_THE_MAP]
        plane = torch.nn.functional.pad(z[:, :2], (0, max(0, 2 - z.shape[1])))
        names = [str(i) for i in range(len(z))]
        plots.append(draw_map(names, plane - plane.mean(0)))
    return plots
