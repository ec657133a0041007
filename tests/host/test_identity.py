"""The embedder looks at what the host painted: one person stays that person, and prompts are obeyed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from w2wpp.avatars.world.embedder import AvatarEmbedder, load_embedder
from w2wpp.avatars.world.renderer import BACKGROUNDS, LIGHTS, SMILES

from .graphs import AvatarGraph
from .server import REPO, Host

PEOPLE, SEEDS = (101, 102, 103, 104), (0, 1, 2, 3)


def batch(pictures: list[np.ndarray]) -> torch.Tensor:
    """Pictures [H, W, 3] uint8 -> [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.fixture(scope="module")
def embedder() -> AvatarEmbedder:
    return load_embedder(REPO / "models" / "avatar-embedder.safetensors")


def test_one_person_over_four_seeds_resembles_herself_more_than_others(
    host: Host, embedder: AvatarEmbedder
) -> None:
    graph = AvatarGraph(smile="smiling")
    saved = []
    for person in PEOPLE:
        applied = graph.apply(graph.sample(person))
        saved += [graph.paint([applied, 0], seed=seed) for seed in SEEDS]
    result = host.run(graph.nodes)
    vectors = embedder(batch([picture for node in saved for picture in result.pictures(node)]))
    person = torch.arange(len(PEOPLE)).repeat_interleave(len(SEEDS))
    similarity = vectors @ vectors.T
    same = (person[:, None] == person) & ~torch.eye(len(person), dtype=torch.bool)
    other = person[:, None] != person
    for p in range(len(PEOPLE)):
        rows = (person == p)[:, None]
        assert similarity[same & rows].mean() > similarity[other & rows].mean() + 0.2


@pytest.mark.parametrize(
    "words", [("red", "smiling", "left"), ("sunset", "serious", "right")], ids=" ".join
)
def test_pictures_obey_the_words_of_their_prompt(
    host: Host, embedder: AvatarEmbedder, words: tuple[str, str, str]
) -> None:
    graph = AvatarGraph(background=words[0], smile=words[1], light=words[2], pictures=8)
    graph.paint(graph.model)
    _, logits, _ = embedder.read(batch(host.run(graph.nodes).pictures()))
    for word, known, scores in zip(words, (BACKGROUNDS, SMILES, LIGHTS), logits):
        assert (scores.argmax(dim=1) == known.index(word)).float().mean() >= 0.75
