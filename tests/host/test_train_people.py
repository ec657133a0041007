"""From folders of pictures to LoRAs and a space, in the running server. The pictures are painted there, too."""

from __future__ import annotations

import shutil
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import w2wpp
from w2wpp.training.dataset import load_dataset

from .graphs import SAMPLER, AvatarGraph, Graph
from .server import Host, PromptFailed

NAMES = ("anna", "ben", "chloe")
PICTURES = 4
TRAINING = {
    "folder": "input/people", "path": "", "save_as": "test people", "trigger_prompt": "a person",
    "modules": "attention", "rank": 1, "alpha": 1.0, "steps": 24, "batch": 2, "learning_rate": 0.02, "seed": 2,
    "pilots": 2, "resolution": 0,
}  # fmt: skip
FITTING = {
    "source": "connected", "kind": "linear (w2w)", "save_as": "", "components": 0, "latent": 0, "epochs": 5,
    "held_out": -1.0, "count_by": "what they do", "prior": "normal", "beta": 0.001, "seed": 0, "trigger_prompt": "",
    "licence": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def people(host: Host) -> Path:
    """A folder for each of three people, with pictures of them."""
    graph = AvatarGraph(background="white", pictures=PICTURES)
    many = graph.sample(3, count=len(NAMES))
    graph.paint([graph.apply(many), 0], prefix="people")
    painted = host.run(graph.nodes)
    (saved,) = [node for node, found in painted.outputs.items() if found.get("images")]
    files = [host.output / image["filename"] for image in painted.outputs[saved]["images"]]
    assert len(files) == len(NAMES) * PICTURES
    for i, name in enumerate(NAMES):
        folder = host.base / "input" / "people" / name
        folder.mkdir(parents=True)
        for file in files[i * PICTURES : (i + 1) * PICTURES]:
            shutil.copy(file, folder)
    (host.base / "input" / "people" / "nobody").mkdir()  # without pictures: no person
    return host.base / "input" / "people"


def train(graph: AvatarGraph, **settings) -> str:
    given = {"model": graph.model, "vae": [graph.loader, 3], "positive": [graph.loader, 1]}
    return graph.add("W2WPP_TrainPeople", **given | TRAINING | settings)


def fit(graph: Graph, **settings) -> str:
    return graph.add("W2WPP_FitSpace", **FITTING | settings)


def vectors(host: Host, name: str) -> torch.Tensor:
    return load_dataset(host.base / "models" / "w2wpp" / name / "dataset.safetensors").vectors()


@pytest.fixture(scope="module")
def trained(host: Host, people: Path) -> str:
    """The report of a training of these people, whose space is fitted and sampled."""
    graph = AvatarGraph()
    training = train(graph)
    curve = graph.add("SaveImage", images=[training, 2], filename_prefix="curve")
    space = fit(graph, dataset=[training, 0], save_as="of people")
    plots = graph.add("SaveImage", images=[space, 2], filename_prefix="plots")
    drawn = graph.add("W2WPP_SampleIdentity", space=[space, 0], seed=1, truncation=0.7, count=1)
    picture = graph.paint([graph.apply([drawn, 0]), 0], prefix="drawn")
    back = graph.add("W2WPP_SaveIdentity", identity=[space, 1], filename_prefix="test/learned from")
    result = host.run(graph.nodes)
    assert len(result.pictures(curve)) == 1 and len(result.pictures(plots)) == 2
    assert result.pictures(picture)[0].std() > 5
    text = result.outputs[space]["text"][0]
    assert "2 numbers describe a person, over 2 components, learned from 3 LoRAs" in text
    assert "training people: 100.0%" in text and "Of 3 people a space holds mixtures" in text
    saved = result.outputs[back]["text"][0].removeprefix("saved ").removesuffix(" [output]")
    identity = w2wpp.load_identity(host.output / "w2wpp" / saved)
    opened = w2wpp.load_space(host.base / "models" / "w2wpp" / "of people.safetensors")
    assert opened.trigger_prompt == "a person"
    # Three people lie in a plane: the space holds each of them whole.
    torch.testing.assert_close(
        identity.vectors(opened), vectors(host, "test people"), atol=2e-3, rtol=0
    )
    return result.outputs[training]["text"][0]


def test_everybody_gets_a_lora_of_one_gauge(host: Host, trained: str) -> None:
    assert "3 people with 4 pictures each" in trained
    assert "fewer than 5 pictures: anna, ben, chloe" in trained
    w = vectors(host, "test people")
    opened = load_dataset(host.base / "models" / "w2wpp" / "test people" / "dataset.safetensors")
    shipped = w2wpp.load_space(w2wpp.shipped())
    assert opened.layout.modules == shipped.layout.modules
    loras = [host.base / "models" / "loras" / "test people" / f"{n}.safetensors" for n in NAMES]
    for file, own in zip(loras, w):
        found = w2wpp.load_lora(file)
        assert torch.equal(opened.layout.pack(found.lora), own)
        assert found.metadata["w2wpp.trigger_prompt"] == "a person"
    # Everybody differs, and everybody's A is still close to the one that all started from.
    halves = [opened.layout.unpack(own) for own in w]
    for i, one in enumerate(halves):
        for other in halves[i + 1 :]:
            a, b = (torch.cat([m[0].flatten() for m in h.values()]) for h in (one, other))
            assert torch.cosine_similarity(a, b, dim=0) > 0.8  # of different seeds: 0
            up, down = (torch.cat([m[1].flatten() for m in h.values()]) for h in (one, other))
            assert torch.cosine_similarity(up, down, dim=0) < 0.98


def test_the_hosts_own_loader_takes_the_files(host: Host, trained: str) -> None:
    graph = AvatarGraph()
    loaded = graph.add(
        "LoraLoaderModelOnly",
        model=graph.model,
        lora_name="test people/anna.safetensors",
        strength_model=1.0,
    )
    with_lora, without = (
        graph.paint([loaded, 0], prefix="own"),
        graph.paint(graph.model, prefix="none"),
    )
    result = host.run(graph.nodes)
    assert (
        np.abs(result.pictures(with_lora)[0] - result.pictures(without)[0].astype(float)).mean() > 1
    )


def test_a_training_that_was_interrupted_gives_the_same(host: Host, trained: str) -> None:
    graph = AvatarGraph()
    train(graph, save_as="interrupted")
    folder = host.base / "models" / "w2wpp" / "interrupted"
    number = host.post("/prompt", {"prompt": graph.nodes})["prompt_id"]
    deadline = time.monotonic() + 600
    while not (folder / "start.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    host.post("/interrupt", {})
    assert host.wait(number)["status"]["status_str"] == "error"
    assert (folder / "unfinished.safetensors").exists() and not (folder / "people").exists()
    result = host.run(graph.nodes)
    assert "3 people" in next(iter(result.outputs.values()))["text"][0]
    assert torch.equal(vectors(host, "interrupted"), vectors(host, "test people"))
    assert not (folder / "unfinished.safetensors").exists()


def test_who_is_new_is_trained_and_nobody_else(host: Host, people: Path, trained: str) -> None:
    before = vectors(host, "test people")
    shutil.copytree(people / "anna", people / "dora")
    try:
        graph = AvatarGraph()
        node = train(graph)
        text = host.run(graph.nodes).outputs[node]["text"][0]
    finally:
        shutil.rmtree(people / "dora")
    assert "4 people" in text and "3 were finished before" in text
    after = vectors(host, "test people")
    assert torch.equal(after[:3], before)
    # Dora has Anna's pictures, the same start and the same noise; only the batch differs.
    torch.testing.assert_close(after[3], after[0], atol=1e-3, rtol=1e-2)
    # Of two who are one, a space keeps one direction fewer, and says so if it is asked for all.
    graph = Graph()
    space = fit(graph, source="loras/test people")
    assert "2 numbers describe a person" in host.run(graph.nodes).outputs[space]["text"][0]
    fit(graph := Graph(), source="loras/test people", components=3)
    with pytest.raises(PromptFailed, match="span only 2 directions"):
        host.run(graph.nodes)
    # Without Dora again, for the tests that follow.
    (host.base / "models" / "loras" / "test people" / "dora.safetensors").unlink()
    train(graph := AvatarGraph())
    host.run(graph.nodes)


def test_a_folder_of_loras_gives_the_same_space_as_their_data_set(host: Host, trained: str) -> None:
    graph = Graph()
    spaces = [
        fit(graph, source="test people/dataset.safetensors (data set)", save_as="of data"),
        fit(graph, source="loras/test people", save_as="of files"),
    ]
    outputs = host.run(graph.nodes).outputs
    assert "3 LoRAs, of one training of W2W++ Train People" in outputs[spaces[1]]["text"][0]
    of_data, of_files = (
        w2wpp.load_space(host.base / "models" / "w2wpp" / f"{n}.safetensors")
        for n in ("of data", "of files")
    )
    assert of_data.fingerprint == of_files.fingerprint


def test_a_vae_is_fitted_to_official_coefficients(host: Host, official: dict) -> None:
    folder = host.base / "models" / "w2wpp" / "downloads"
    folder.mkdir()
    try:
        for name, value in official.items():
            torch.save(value, folder / name)
        graph = Graph()
        space = fit(graph, source="downloads (official files)", kind="VAE (w2w++)", latent=3)
        info = graph.add("W2WPP_SpaceInfo", space=[space, 0])
        outputs = host.run(graph.nodes).outputs
    finally:
        shutil.rmtree(folder)
    text = outputs[space]["text"][0]
    assert (
        "3 numbers describe a person, over 6 components, learned from 45 LoRAs; 5 held out" in text
    )
    assert "heldout people, PCA of that size" in text and "latent units" in text
    assert "for non-commercial, academic use only" in outputs[info]["text"][0]


def test_a_space_whose_fit_was_interrupted_is_the_same(host: Host, trained: str) -> None:
    source = "test people/dataset.safetensors (data set)"
    how = {"source": source, "kind": "VAE (w2w++)", "epochs": 1500, "latent": 2}
    fit(graph := Graph(), save_as="stopped", **how)
    models = host.base / "models" / "w2wpp"
    number = host.post("/prompt", {"prompt": graph.nodes})["prompt_id"]
    deadline = time.monotonic() + 300
    while not list((models / "stopped").glob("vae-*.unfinished")) and time.monotonic() < deadline:
        time.sleep(0.02)
    host.post("/interrupt", {})
    messages = [kind for kind, _ in host.wait(number)["status"]["messages"]]
    assert "execution_interrupted" in messages and not (models / "stopped.safetensors").exists()
    # Other settings begin anew, and leave what was stopped alone.
    other = fit(graph := Graph(), save_as="stopped", **how | {"epochs": 30})
    assert "taken up" not in host.run(graph.nodes).outputs[other]["text"][0]
    again = fit(graph := Graph(), save_as="stopped", **how)
    assert "taken up where it was stopped" in host.run(graph.nodes).outputs[again]["text"][0]
    assert not (models / "stopped").exists()
    at_once = fit(graph := Graph(), save_as="at once", **how)
    assert "taken up" not in host.run(graph.nodes).outputs[at_once]["text"][0]
    stopped, whole = (w2wpp.load_space(models / f"{n}.safetensors") for n in ("stopped", "at once"))
    assert stopped.fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    "change, message",
    [
        ({"folder": "none"}, "needs pictures"),
        ({"path": "input/people/anna"}, "it holds 4 pictures itself"),
        ({"path": "input/people/nobody"}, "there are none"),
        ({"steps": 25}, "trained on another model or with other settings"),
        ({"save_as": " "}, "needs a name"),
        ({"save_as": "../../elsewhere"}, "leads out of it"),
    ],
)
def test_what_is_refused(host: Host, trained: str, change: dict, message: str) -> None:
    graph = AvatarGraph()
    train(graph, **change)
    with pytest.raises(PromptFailed, match=message):
        host.run(graph.nodes)


@pytest.fixture
def captions(people: Path) -> Iterator[None]:
    """Words beside every picture but one."""
    pictures = sorted(people.glob("*/*.png"))
    files = [p.with_suffix(".txt") for p in pictures[1:]]
    for i, file in enumerate(files):
        file.write_text(f"{('red', 'blue')[i % 2]} background,\n smiling", encoding="utf-8")
    yield
    for file in files:
        file.unlink()


def encoded(graph: AvatarGraph, text: str) -> list:
    return [graph.add("CLIPTextEncode", text=text, clip=[graph.loader, 5]), 0]


def test_words_of_the_avatar_model_make_the_prompts_that_its_menus_do(host: Host) -> None:
    graph = AvatarGraph(background="blue", smile="smiling", light="left")
    prompts = {
        "menus": ([graph.loader, 1], [graph.loader, 2]),
        "text": (
            encoded(graph, "A person, SMILING; blue background, light from the left, not red"),
            encoded(graph, ""),
        ),
        "other": (encoded(graph, "person, red, smiling, left"), encoded(graph, "")),
    }
    saved = {}
    for name, (positive, negative) in prompts.items():
        sampled = graph.add(
            "KSampler", model=graph.model, positive=positive, negative=negative,
            latent_image=[graph.loader, 4], seed=3, **SAMPLER,
        )  # fmt: skip
        decoded = graph.add("VAEDecode", samples=[sampled, 0], vae=[graph.loader, 3])
        saved[name] = graph.add("SaveImage", images=[decoded, 0], filename_prefix=name)
    result = host.run(graph.nodes)
    menus, text, other = (result.pictures(saved[name])[0].astype(int) for name in prompts)
    assert (menus == text).all() and np.abs(menus - other).mean() > 5


def test_captions_are_trained_under_with_a_clip_and_named_without(
    host: Host, people: Path, trained: str, captions: None
) -> None:
    graph = AvatarGraph()
    node = train(graph)
    text = host.run(graph.nodes).outputs[node]["text"][0]
    assert "NOT USED: captions of 11 pictures. Connect 'clip'" in text
    assert "3 were finished before" in text  # an older training goes on as it was
    graph = AvatarGraph()
    node = train(graph, clip=[graph.loader, 5], save_as="captioned")
    text = host.run(graph.nodes).outputs[node]["text"][0]
    assert "11 of 12 pictures were trained under captions of their own, the other 1" in text
    with_words, without = vectors(host, "captioned"), vectors(host, "test people")
    assert ((with_words - without).norm(dim=1) > 0.05 * without.norm(dim=1)).all()
    # Other words are another training of whoever has them.
    (first, *_) = sorted((people / "ben").glob("*.txt"))
    first.write_text("serious")
    text = host.run(graph.nodes).outputs[node]["text"][0]
    assert "2 were finished before" in text
    assert torch.equal(vectors(host, "captioned")[[0, 2]], with_words[[0, 2]])
    assert not torch.equal(vectors(host, "captioned")[1], with_words[1])
    first.write_bytes(b"\xff\xfe\0")
    with pytest.raises(PromptFailed, match="can't be read as a caption"):
        host.run(graph.nodes)


def test_a_clip_without_captions_changes_nothing(host: Host, trained: str) -> None:
    graph = AvatarGraph()
    node = train(graph, clip=[graph.loader, 5])
    text = host.run(graph.nodes).outputs[node]["text"][0]
    assert "3 were finished before" in text and "no picture has a caption" in text


def test_a_file_that_is_no_picture_is_named(host: Host, people: Path, trained: str) -> None:
    (people / "eve").mkdir()
    (people / "eve" / "page.png").write_text("<html>")
    try:
        train(graph := AvatarGraph(), save_as="with eve")
        with pytest.raises(
            (PromptFailed, urllib.error.HTTPError), match=r"eve/page\.png can't be read"
        ):
            host.run(graph.nodes)
    finally:
        shutil.rmtree(people / "eve")


def test_one_thing_is_learned_from(host: Host, trained: str) -> None:
    fit(graph := Graph())
    with pytest.raises(PromptFailed, match="learns from one thing"):
        host.run(graph.nodes)
