"""From pictures of people to a LoRA for each, made so that a space can be learned from them."""

import math
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io, ui

from .. import w2wpp
from ..w2wpp.diffusion.sampler import sample
from ..w2wpp.files.captions import caption_file, caption_of
from ..w2wpp.lora.write import kohya_tensors
from ..w2wpp.training.album import PeopleTraining
from ..w2wpp.training.dataset import VectorDataset
from ..w2wpp.training.everyone import Everyone, Moment, Trained
from .curve import draw_curve
from .host import adaptable, folders, places, tensors
from .host.albums import people_in, person_of
from .host.captions import Captions, clip_fingerprint
from .host.denoiser import Denoiser, denoiser
from .host.fingerprints import fingerprint, model_fingerprint
from .host.model import noise_schedule, usual_size
from .host.people_files import people_folder, save_loras
from .host.plan import Plan, plan_run
from .host.progress import Watch
from .inputs import name_of_result, seed_of_training, side_of_pictures
from .types import DatasetSocket, LoraSocket, advanced, schema

NO_FOLDER, EXAMPLE = "none", "eight avatars (shipped)"
EXAMPLE_FOLDER = folders.PACK / "example_workflows" / "people"
TITLE = "W2W++ Train People"
PREVIEWS, FEW = 4, 1  # of each group in training, with and without previews in the host's settings
PREVIEW_STEPS = 8  # enough to know the face by
TOGETHER = 16  # most people side by side


class TrainPeople(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="W2WPP_TrainPeople",
            display_name=TITLE,
            description="Trains a LoRA for every person of a folder, all in one gauge and by one protocol, so that "
            "W2W++ Fit Space can learn a space from them. Goes on where it was stopped, and takes new people in later.",
            search_aliases=[
                "train lora",
                "dreambooth",
                "train many loras",
                "lora training",
                "folder of people",
                "weights2weights",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model to train LoRAs for. It stays as it is."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The words that call every person up, such as 'sks person'.",
                ),
                io.Combo.Input(
                    "folder",
                    options=[NO_FOLDER, EXAMPLE, *places.people_folders()],
                    default=NO_FOLDER,
                    tooltip="A folder in input/ that holds a folder of pictures for every person, named after them. "
                    "Press R to see new ones.",
                ),
                io.String.Input(
                    "path",
                    default="",
                    tooltip="Such a folder elsewhere in ComfyUI's folders, as in output/people. Takes the place of "
                    "'folder'.",
                ),
                name_of_result(
                    "Name of the training. LoRAs go into models/loras/ under this name, what the training "
                    "needs to go on into models/w2wpp/. The same name again trains only who is new.",
                    default="people",
                ),
                io.String.Input(
                    "trigger_prompt",
                    default="",
                    tooltip="The words of 'positive' as text, to be kept with LoRAs and spaces, because a prompt can't "
                    "be read back. With captions it stands before each that does not hold it.",
                ),
                io.Combo.Input(
                    "modules",
                    options=list(adaptable.CHOICES),
                    default="attention",
                    tooltip="Which layers get LoRAs. weights2weights takes 'attention, q and v'; more layers hold more "
                    "of a person, and take more people to learn a space from.",
                ),
                io.Int.Input(
                    "rank",
                    default=1,
                    min=1,
                    max=128,
                    tooltip="Rank of the LoRAs. 1 is what spaces are usually learned from.",
                ),
                io.Float.Input(
                    "alpha",
                    default=1.0,
                    min=0.01,
                    max=1024.0,
                    step=0.01,
                    tooltip="The LoRA's change is alpha / rank times B A. The learning rate makes up for it. For files "
                    "like those of weights2weights: 27 at rank 1.",
                    **advanced(),
                ),
                io.Int.Input(
                    "steps",
                    default=PeopleTraining.steps,
                    min=1,
                    max=100000,
                    tooltip="Steps of training for every person.",
                ),
                io.Int.Input(
                    "batch",
                    default=PeopleTraining.pictures,
                    min=1,
                    max=256,
                    tooltip="Pictures of each person in a step.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=PeopleTraining.learning_rate,
                    min=0.00001,
                    max=10.0,
                    step=0.001,
                    round=0.00001,
                    tooltip="How far a weight with an average gradient moves in a step; falls to zero over the "
                    "training.",
                    **advanced(),
                ),
                seed_of_training(
                    "Seed of the noise, which everybody meets in the same order, and of the weights that all "
                    "start from.",
                    default=PeopleTraining.seed,
                ),
                io.Int.Input(
                    "pilots",
                    default=8,
                    min=0,
                    max=256,
                    tooltip="So many people are trained first, from nothing; everybody then starts from their mean, "
                    "which is what makes a space of few people learnable. 0 starts from nothing.",
                    **advanced(),
                ),
                side_of_pictures(
                    "The middle of every picture is scaled to a square with sides of this many pixels. 0 uses "
                    "the size that the model was trained on.",
                    "resolution",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="For pictures with captions, a .txt file of the same name beside each: every picture is "
                    "trained under 'trigger_prompt' and its own words, so that these need not be learned as part of "
                    "the person. Pictures without a caption are trained under 'positive'.",
                ),
            ],
            outputs=[
                DatasetSocket.Output(
                    display_name="dataset", tooltip="Everybody's LoRAs, for W2W++ Fit Space."
                ),
                LoraSocket.Output(
                    display_name="loras",
                    is_output_list=True,
                    tooltip="The LoRAs one by one, for ComfyUI's own Load LoRA Model.",
                ),
                io.Image.Output(
                    display_name="curve", tooltip="The loss at every step, mean over the people."
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="Who was trained on how many pictures, how, and where the files are.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, folder: str | None = None, path: str | None = None):
        if folder is None or path is None:
            return True
        return folders.refusal(lambda _: people_in(*_chosen(folder, path)), "")

    @classmethod
    def fingerprint_inputs(cls, folder: str = NO_FOLDER, path: str = "", **_: Any):
        people = people_in(*_chosen(folder, path))
        pictures = [p for files in people.values() for p in files]
        stamps = (f"{p} {folders.file_stamp(p)}" for p in pictures)
        return " ".join([*stamps, *(folders.file_stamp(caption_file(p)) for p in pictures)])

    @classmethod
    def execute(
        cls,
        model,
        vae,
        positive,
        folder,
        path,
        save_as,
        trigger_prompt,
        modules,
        rank,
        alpha,
        steps,
        batch,
        learning_rate,
        seed,
        pilots,
        resolution,
        clip=None,
    ) -> io.NodeOutput:
        config = PeopleTraining(seed=seed, steps=steps, pictures=batch, learning_rate=learning_rate)
        place = people_folder(save_as)
        with tensors.ordinary_tensors():
            pixels = resolution or usual_size(model)
            found = people_in(*_chosen(folder, path))
            words = {name: [caption_of(file) for file in files] for name, files in found.items()}
            told = clip is not None and any(map(any, words.values()))
            layout = adaptable.layout_for(model, modules, rank, alpha)
            watch = Watch(model, cls.hidden.unique_id)
            first = next(iter(found.items()))
            example = person_of(*first, model, vae, pixels).pictures()
            together = min(TOGETHER, len(found))
            plan = plan_run(model, (together * batch, *example.shape[1:]), gradients=True)
            schedule = noise_schedule(model)
            run = [model_fingerprint(model), positive, pixels]
            run += [clip_fingerprint(clip), trigger_prompt] if told else []
            with denoiser(model, layout, positive, plan) as denoise:
                captions = Captions(clip, positive, trigger_prompt, denoise.prompt)
                prompts = captions.prompts if told else None
                people = [
                    person_of(name, files, model, vae, pixels, words[name], prompts)
                    for name, files in found.items()
                ]
                training = Everyone(
                    layout,
                    denoise,
                    schedule,
                    config,
                    place,
                    fingerprint(*run),
                    gauge=seed + 1,
                    pilots=pilots,
                    together=together,
                    rows=plan.rows,
                    device=plan.device,
                    callback=_Watcher(watch, denoise, schedule, example.shape[1:], seed),
                    under=denoise.under,
                )
                trained = training.train(people)
            facts = {"trigger_prompt": trigger_prompt, "training": training.run[:32]}
            names = list(found)
            saved = save_loras(names, trained.vectors, layout, place.name, facts)
            dataset = _dataset(place, trained, layout, names, facts)
        loras = [kohya_tensors(layout.unpack(w), layout.alpha) for w in trained.vectors]
        title = f"{len(names)} people, {steps} steps"
        curve = draw_curve(trained.losses.mean(0).tolist(), title, comparable=False)
        text = _report(trained, found, layout, plan, pixels, saved, _captioned(words, clip))
        return io.NodeOutput(dataset, loras, curve, text, ui=ui.PreviewText(text))


def _chosen(folder: str, path: str) -> tuple[Path, str]:
    """The folder of people that is meant, and what to call it."""
    if folder == EXAMPLE and not path.strip():
        return EXAMPLE_FOLDER, EXAMPLE
    text = path.strip() or (folder if folder != NO_FOLDER else "")
    if not text:
        raise w2wpp.ConfigError(
            f"{TITLE} needs pictures: put a folder into input/ that holds a folder of pictures for every person, press "
            "R, and choose it in 'folder'; or write its path into 'path'."
        )
    return places.place_of(text), text


def _dataset(
    place: Path,
    trained: Trained,
    layout: w2wpp.Layout,
    names: list[str],
    facts: dict[str, str],
) -> VectorDataset:
    """What Fit Space learns from, kept beside the training."""
    everyone = torch.arange(len(names))
    about = {**facts, "people": names}
    return w2wpp.write_dataset(
        place / "dataset.safetensors", trained.vectors, layout, everyone, provenance=about
    )


def _captioned(words: dict[str, list[str]], clip: Any) -> str:
    """Whether pictures were trained under words of their own, for the report; nothing where there are none."""
    each = [caption for captions in words.values() for caption in captions]
    count = sum(map(bool, each))
    if not count:
        return (
            "" if clip is None else "no picture has a caption, so all were trained under 'positive'"
        )
    if clip is None:
        return f"NOT USED: captions of {count} pictures. Connect 'clip' to train every picture under its own"
    rest = f", the other {len(each) - count} under 'positive'" if count < len(each) else ""
    return f"{count} of {len(each)} pictures were trained under captions of their own{rest}"


def _report(
    trained: Trained,
    found: dict[str, list[Path]],
    layout: w2wpp.Layout,
    plan: Plan,
    pixels: int,
    saved: str,
    captioned: str,
) -> str:
    counts = [len(files) for files in found.values()]
    pictures = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    course = trained.losses.mean(0).tolist()
    third = max(1, len(course) // 3)
    first, last = (sum(part) / third for part in (course[:third], course[-third:]))
    few = [name for name, files in found.items() if len(files) < 5]
    lines = [
        f"{len(found)} people with {pictures} pictures each, {pixels} x {pixels}"
        + (f"; {trained.resumed} were finished before" if trained.resumed else ""),
        *([captioned] if captioned else []),
        f"LoRAs of rank {layout.rank}, alpha {layout.alpha:g}, for {len(layout.modules)} layers: {layout.size:,} "
        "numbers",
        f"loss {first:.5g} to {last:.5g} (first and last third of the steps)",
        f"{plan}",
        saved,
    ]
    if few:
        lines.append(
            f"fewer than 5 pictures: {', '.join(few[:8])}; of so few a LoRA learns the pictures more than the person"
        )
    return "\n".join(lines)


class _Watcher:
    """Shows how it goes after every step, and now and then what the first person in training looks like."""

    def __init__(
        self,
        watch: Watch,
        denoise: Denoiser,
        schedule: w2wpp.inversion.Schedule,
        shape: tuple[int, ...],
        seed: int,
    ) -> None:
        self._watch, self._denoise, self._schedule = watch, denoise, schedule
        generator = torch.Generator().manual_seed(seed)
        self._noise = torch.randn(1, *shape, generator=generator).to(denoise.plan.device)

    def __call__(self, moment: Moment) -> None:
        names = ", ".join(moment.names[:4]) + (", ..." if len(moment.names) > 4 else "")
        if moment.weights is None:
            self._watch.show(moment.step, moment.steps, f"measuring the gradients of {names}")
            return
        stage = "pilot" if moment.stage == "pilot" else "training"
        done = moment.finished * moment.steps + moment.step * len(moment.names)
        self._watch.show(
            done,
            moment.people * moment.steps,
            f"{stage} {names} ({moment.finished} of {moment.people} people done): step {moment.step} of "
            f"{moment.steps}, loss {moment.loss:.5g}",
            self._preview(moment),
        )

    def _preview(self, moment: Moment) -> torch.Tensor | None:
        every = math.ceil(moment.steps / (PREVIEWS if self._watch.shows_previews else FEW))
        due = moment.step and (moment.step % every == 0 or moment.step == moment.steps)
        if not due or moment.weights is None:
            return None
        vector = moment.weights[:1].detach()
        return sample(
            lambda x, timestep: self._denoise(x, timestep, vector),
            self._noise,
            self._schedule,
            PREVIEW_STEPS,
        )
