"""Attributes of a collection from a table of its files."""

import pytest
import torch

from w2wpp import ConfigError, DataError, edit, load_space, save_space
from w2wpp.files.tables import LabelTable, read_labels
from w2wpp.lora.collection import members_of
from w2wpp.lora.delta import Factors
from w2wpp.mixtures import members
from w2wpp.training.collection_directions import collection_directions
from w2wpp.training.fit_delta import CollectionSettings, fit_delta

OUT, IN, COUNT = 12, 10, 24
NAMES = [f"file {i}" for i in range(COUNT)]


def update(g, rank=2):
    return torch.randn(OUT, rank, generator=g), torch.randn(rank, IN, generator=g)


@pytest.fixture(scope="module")
def known():
    """(a space, two planted updates [out, in], who has how much of them [N, 2])."""
    g = torch.Generator().manual_seed(0)
    planted = [update(g, 1), update(g, 1)]
    has = torch.stack([torch.arange(COUNT) % 2, (torch.arange(COUNT) // 2) % 2], 1).float()
    has[:4] = torch.tensor([[0.0, 0], [1, 1], [0, 0], [1, 1]])  # the two go together somewhat
    loras = {}
    for name, amounts in zip(NAMES, has):
        own, parts = update(g, 2), [(b * a, d) for a, (b, d) in zip(amounts, planted)]
        up = torch.cat([0.6 * own[0], *(3 * b for b, _ in parts)], 1)
        down = torch.cat([own[1], *(d for _, d in parts)])
        loras[name] = {"blocks.0.to_q": Factors(down, up)}
    settings = CollectionSettings(rank=12, keep_names=True)
    space, _ = fit_delta(members_of(loras), settings)
    return space, [3 * b @ d for b, d in planted], has


def table(values, names=("hat", "smile"), keys=tuple(NAMES)):
    return LabelTable("table.csv", keys, tuple(names), values)


def moved(space, direction):
    """The change of the update [out, in] by a step from the mean."""
    w = space.decode(torch.stack([torch.zeros_like(direction), direction]))
    before, after = (
        space.layout.scale * b @ a for v in w for a, b in [space.layout.unpack(v)["blocks.0.to_q"]]
    )
    return after - before


def cosine(a, b):
    return float((a * b).sum() / a.norm() / b.norm())


@pytest.mark.parametrize("method", ["means", "logistic"])
def test_a_step_adds_what_was_planted_and_nothing_of_the_other(known, method):
    space, planted, has = known
    found = collection_directions(space, table(has), method=method)
    assert found.names == ("hat", "smile") and bool((found.r2 > 0.5).all())
    for a in range(2):
        step = moved(space, found.vectors[a])
        assert cosine(step, planted[a]) > 0.8
        assert abs(cosine(step, planted[1 - a])) < 0.25


def test_naive_means_are_the_difference_of_the_means(known):
    space, _, has = known
    z = members(space).z
    found = collection_directions(space, table(has), debias=False, only=["hat"])
    difference = z[has[:, 0] == 1].mean(0) - z[has[:, 0] == 0].mean(0)
    assert cosine(found.vectors[0], difference) == pytest.approx(1.0, abs=1e-5)


def test_labels_of_noise_are_not_read(known):
    space, _, _ = known
    noise = (torch.rand(COUNT, 1, generator=torch.Generator().manual_seed(3)) > 0.5).float()
    for method in ("means", "logistic"):
        assert float(collection_directions(space, table(noise, ["luck"]), method=method).r2) < 0.2


def test_numbers_and_files_without_a_line(known):
    space, planted, has = known
    amounts = has[:, :1] * 5 + 20
    some = table(amounts[4:], ["size"], tuple(NAMES[4:]))
    found = collection_directions(space, some)
    assert cosine(moved(space, found.vectors[0]), planted[0]) > 0.7
    by_number = table(amounts[4:], ["size"], tuple(str(i) for i in range(4, COUNT)))
    assert torch.equal(collection_directions(space, by_number).vectors, found.vectors)


def test_what_is_refused(known, make_space):
    space, _, has = known
    for wrong, error, said in (
        ({"method": "magic"}, ConfigError, "means or logistic"),
        ({"only": ["beard"]}, ConfigError, "no labels for 'beard'"),
        ({"against": ["beard"]}, ConfigError, "no labels for 'beard'"),
    ):
        with pytest.raises(error, match=said):
            collection_directions(space, table(has), **wrong)
    with pytest.raises(DataError, match=r"lines for 0 of the 24 LoRAs.*file 0, file 1"):
        collection_directions(space, table(has, keys=tuple("x" + n for n in NAMES)))
    with pytest.raises(DataError, match="same 'hat'"):
        collection_directions(space, table(has * 0))
    with pytest.raises(DataError, match="can't be told apart"):
        collection_directions(space, table(has[:, [0, 0]]))
    numbers = torch.arange(COUNT).float()[:, None]
    with pytest.raises(DataError, match="24 values"):
        collection_directions(space, table(numbers, ["age"]), method="logistic")
    with pytest.raises(ConfigError, match="does not hold the LoRAs"):
        collection_directions(make_space("pca"), table(has))


def test_on_the_command_line(known, run, tmp_path):
    space, planted, has = known
    save_space(space, tmp_path / "mine.safetensors")
    lines = [
        "file,hat,smile",
        *(f"{n},{int(a)},{int(b)}" for n, (a, b) in zip(NAMES, has.tolist())),
    ]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    arguments = ("directions", "mine.safetensors", "table.csv", "-o", "edits.safetensors")
    code, told, _ = run(*arguments, "--method", "logistic")
    assert code == 0 and told["directions"]["method"] == "logistic, de-biased"
    again = load_space("edits.safetensors")
    assert set(again.directions) == {"hat", "smile"} and again.fingerprint == space.fingerprint
    expected = collection_directions(space, read_labels("table.csv"), method="logistic")
    torch.testing.assert_close(again.directions["hat"], expected.vectors[0])
    person = members(again)[0]
    edited = edit(person, again, {"hat": 2.0})
    assert cosine(moved_between(again, person, edited), planted[0]) > 0.8


def moved_between(space, before, after):
    updates = []
    for who in (before, after):
        a, b = space.layout.unpack(who.vectors(space)[0])["blocks.0.to_q"]
        updates.append(space.layout.scale * b @ a)
    return updates[1] - updates[0]
