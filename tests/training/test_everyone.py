"""LoRAs of many people in one gauge, on a model small enough to know the answer: a linear map that learns to paint each
person's own picture."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from w2wpp import Layout, Module, NoiseSchedule
from w2wpp.errors import ConfigError, W2WError
from w2wpp.training import everyone
from w2wpp.training.album import Album, PeopleTraining, people_loss
from w2wpp.training.everyone import UNFINISHED, Everyone, Person
from w2wpp.training.people import initial_vector

SIZE = 4  # a picture is [1, 2, 2]
LAYOUT = Layout("toy", "toy", (Module("paint", SIZE, SIZE),), rank=2, alpha=4.0)
SCHEDULE = NoiseSchedule(torch.linspace(0.999, 0.01, 40, dtype=torch.float64), "v_prediction")
CONFIG = PeopleTraining(steps=12, pictures=4)
CALLS = []


def denoise(noisy, timestep, vectors):
    """Rows ordered by vector; predicts B A x for each."""
    CALLS.append(len(noisy))
    down, up = LAYOUT.unpack(vectors)["paint"]
    x = noisy.flatten(1).view(len(vectors), -1, SIZE)
    out = LAYOUT.scale * torch.bmm(torch.bmm(x, down.mT), up.mT)
    return out.view(-1, 1, 2, 2) + 0.01 * timestep.view(-1, 1, 1, 1)


def pictures_of(name):
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    face = torch.randn(1, 1, 2, 2, generator=g)
    return face + 0.1 * torch.randn(3 + len(name) % 3, 1, 2, 2, generator=g)


def people(*names):
    return [Person(n, f"key of {n}", lambda n=n: pictures_of(n)) for n in names]


NAMES = ("anna", "ben", "chloe", "dan", "eve")


def training(folder, **settings):
    given = {"config": CONFIG, "folder": folder, "model": "toy", "together": 2, "pilots": 3}
    return Everyone(LAYOUT, denoise, SCHEDULE, **given | settings)


def test_everybody_meets_the_same_noise_and_their_own_pictures_in_turn():
    album = Album([pictures_of(n) for n in NAMES], CONFIG, 40)
    seen, noises = [], []
    for step in range(5):
        x0, noise, timestep = album.batch(step)
        assert x0.shape == (5, 4, 1, 2, 2) and noise.shape == (4, 1, 2, 2)
        # One timestep from every quarter of the schedule.
        assert sorted((timestep * 4 // 40).tolist()) == [0, 1, 2, 3]
        seen.append(x0[0])
        noises.append(noise)
    own = pictures_of("anna")
    expected = own[torch.arange(20) % len(own)]
    assert torch.equal(torch.cat(seen), expected)
    assert all((a - b).abs().max() > 0.1 for a, b in pairwise(noises))
    again = Album([pictures_of("zoe")], CONFIG, 40).batch(3)
    assert torch.equal(again[1], noises[3])


def under(words):
    """A model that adds to every row what its prompt says."""
    told = torch.tensor(words).view(-1, 1, 1, 1)
    return lambda noisy, timestep, vectors: denoise(noisy, timestep, vectors) + told


def words_of(name):
    return [0.1 * i + ord(name[0]) for i in range(len(pictures_of(name)))]


@pytest.mark.parametrize("rows", [5, 10, None])
def test_every_picture_is_met_under_its_own_prompt(rows):
    album = Album([pictures_of(n) for n in NAMES], CONFIG, 40, [words_of(n) for n in NAMES])
    for step in range(3):
        for name, own in zip(NAMES, album.prompts(step)):
            words = words_of(name)
            assert own == [words[i % len(words)] for i in range(4 * step, 4 * step + 4)]
    w = torch.randn(5, LAYOUT.size, generator=torch.Generator().manual_seed(1))
    x0, noise, timestep = album.batch(2)
    expected = 0.0
    for person in range(5):
        noisy, target = SCHEDULE.add_noise(x0[person], noise, timestep)
        told = torch.tensor(album.prompts(2)[person]).view(-1, 1, 1, 1)
        error = denoise(noisy, timestep, w[person : person + 1]) + told - target
        expected += error.square().mean()
    got = people_loss(album, denoise, SCHEDULE, rows=rows, under=under)(w, 2)
    torch.testing.assert_close(got, expected)


def test_people_with_prompts_of_their_own(tmp_path):
    def told(name, offset=0.0):
        words = [offset + 0.01 * i for i in range(len(pictures_of(name)))]
        return Person(name, f"{name} {offset}", lambda: pictures_of(name), lambda: words)

    plain = training(tmp_path / "plain").train(people(*NAMES[:3]))
    same = training(tmp_path / "zero", under=lambda words: denoise).train(
        [told(n) for n in NAMES[:3]]
    )
    assert torch.equal(same.vectors, plain.vectors)  # a model that heeds no words
    found = training(tmp_path / "told", under=under).train([told(n, 1.0) for n in NAMES[:3]])
    assert (found.vectors - plain.vectors).norm(dim=1).min() > 0.01
    again = training(tmp_path / "told", under=under).train(
        [told("anna", 1.0), told("ben", 2.0), told("chloe", 1.0)]
    )
    assert again.resumed == 2
    for some in ([told("anna"), *people("ben")], [told("anna")]):
        with pytest.raises(W2WError, match="for all people or for none"):
            training(tmp_path / "wrong", under=under if len(some) > 1 else None).train(some)


@pytest.mark.parametrize("rows", [1, 5, 10, 20, None])
def test_the_loss_and_its_gradient_do_not_depend_on_how_much_goes_through_at_once(rows):
    album = Album([pictures_of(n) for n in NAMES], CONFIG, 40)
    w = torch.randn(5, LAYOUT.size, generator=torch.Generator().manual_seed(1)).requires_grad_()
    CALLS.clear()
    value = people_loss(album, denoise, SCHEDULE, rows=rows)(w, 2)
    assert max(CALLS) <= max(5, rows or 20)
    x0, noise, timestep = album.batch(2)
    expected = torch.zeros(())
    for person in range(5):
        noisy, target = SCHEDULE.add_noise(x0[person], noise, timestep)
        error = denoise(noisy, timestep, w[person : person + 1]) - target
        expected = expected + error.square().mean()
    torch.testing.assert_close(value, expected)
    (got,), (want,) = torch.autograd.grad(value, w), torch.autograd.grad(expected, w)
    torch.testing.assert_close(got, want)


def test_each_learns_their_own_face_and_all_keep_one_gauge(tmp_path):
    config = PeopleTraining(steps=60, pictures=8)
    found = training(tmp_path, config=config).train(people(*NAMES))
    assert found.vectors.shape == (5, LAYOUT.size) and found.losses.shape == (5, 60)
    w = found.vectors
    zero = initial_vector(LAYOUT, seed=3).expand(5, -1)
    album = Album([pictures_of(n) for n in NAMES], PeopleTraining(pictures=60), 40)
    loss = people_loss(album, denoise, SCHEDULE)

    def each(weights):
        album_of = [Album([pictures_of(n)], PeopleTraining(pictures=60), 40) for n in NAMES]
        return torch.stack(
            [
                people_loss(a, denoise, SCHEDULE)(weights[i : i + 1], 0)
                for i, a in enumerate(album_of)
            ]
        )

    assert (each(w) < each(zero)).all() and (each(w) < each(w.roll(1, 0))).all()
    assert float(loss(w, 0)) == pytest.approx(float(each(w).sum()), rel=1e-4)
    # A has moved from where all share it, by less than it is long.
    down = LAYOUT.unpack(w)["paint"][0]
    start = LAYOUT.unpack(zero)["paint"][0]
    assert 0 < (down - start).norm() < 0.5 * start.norm()


class Cancelled(BaseException):
    pass


@pytest.mark.parametrize(
    "stage, step", [("measuring", 5), ("pilot", 0), ("pilot", 7), ("people", 9)]
)
def test_a_cancelled_training_goes_on_with_the_same_bits(tmp_path, stage, step):
    whole = training(tmp_path / "whole").train(people(*NAMES))

    def cancel(moment):
        if (moment.stage, moment.step) == (stage, step) and moment.names[0] in ("anna", "chloe"):
            seen.append(moment)
            if len(seen) > 1 or stage == "measuring":
                raise Cancelled

    seen = []
    with pytest.raises(Cancelled):
        training(tmp_path / "part", callback=cancel).train(people(*NAMES))
    moments = []
    again = training(tmp_path / "part", callback=moments.append).train(people(*NAMES))
    assert torch.equal(again.vectors, whole.vectors)
    assert torch.equal(again.losses, whole.losses)
    assert not (tmp_path / "part" / UNFINISHED).exists()
    if stage == "people":  # the first two were finished, the next two had nine steps
        assert again.resumed == 2
        assert [(m.names, m.step) for m in moments[:2]] == [
            (("chloe", "dan"), 9),
            (("chloe", "dan"), 10),
        ]


def test_who_is_finished_is_not_trained_again_and_who_has_new_pictures_is(tmp_path):
    first = training(tmp_path).train(people(*NAMES[:3]))
    CALLS.clear()
    again = training(tmp_path).train(people(*NAMES[:3]))
    assert not CALLS and again.resumed == 3 and torch.equal(again.vectors, first.vectors)
    changed = people(*NAMES)
    changed[1] = Person("ben", "other pictures", lambda: pictures_of("zoe"))
    more = training(tmp_path).train(changed)
    assert more.resumed == 2
    assert torch.equal(more.vectors[[0, 2]], first.vectors[[0, 2]])
    assert not torch.equal(more.vectors[1], first.vectors[1])


def test_a_folder_of_another_training_is_refused(tmp_path):
    training(tmp_path).train(people(*NAMES[:2]))
    for change in (
        {"config": PeopleTraining(steps=13, pictures=4)},
        {"model": "another"},
        {"gauge": 4},
    ):
        with pytest.raises(ConfigError, match="trained on another model or with other settings"):
            training(tmp_path, **change).train(people(*NAMES))
    # How many fit into memory is no setting.
    assert training(tmp_path, together=1, rows=2).train(people(*NAMES[:2])).resumed == 2


def test_alpha_changes_the_unit_and_not_what_is_learned(tmp_path):
    """The model's own change after the first step is alpha / rank times the step; the rate makes up for it."""
    moments = {}
    for alpha in (2.0, 8.0):
        layout = Layout("toy", "toy", LAYOUT.modules, rank=2, alpha=alpha)
        found = Everyone(
            layout,
            lambda x, t, w, layout=layout: denoise(x, t, w * (layout.scale / LAYOUT.scale) ** 0.5),
            SCHEDULE,
            PeopleTraining(steps=1, pictures=4),
            tmp_path / str(alpha),
            "toy",
            pilots=0,
        ).train(people(*NAMES[:2]))
        down, up = layout.unpack(found.vectors)["paint"]
        moments[alpha] = layout.scale * (up @ down)
    ratio = moments[8.0].norm() / moments[2.0].norm()
    assert 0.8 < float(ratio) < 1.25


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: PeopleTraining(steps=0),
        lambda: PeopleTraining(learning_rate=float("nan")),
        lambda: Album([torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 3, 2)], CONFIG, 40),
        lambda: Album([torch.zeros(0, 1, 2, 2)], CONFIG, 40),
        lambda: Album([torch.full((1, 1, 2, 2), torch.nan)], CONFIG, 40),
        lambda: Album([torch.zeros(2, 1, 2, 2)], CONFIG, 40, [["one prompt for two"]]),
    ],
)
def test_bad_settings_and_pictures(wrong):
    with pytest.raises(W2WError, match=r"Got|NaN"):
        wrong()


@pytest.mark.parametrize("names", [(), ("anna", "Anna"), ("aux",)])
def test_bad_names(tmp_path, names):
    with pytest.raises(W2WError):
        training(tmp_path).train(people(*names))
    assert not list(tmp_path.iterdir())


def test_a_damaged_leftover_is_given_up(tmp_path):
    (tmp_path / UNFINISHED).write_bytes(b"\0" * 100)
    found = training(tmp_path).train(people("anna"))
    assert len(found.vectors) == 1 and everyone.UNFINISHED not in [
        p.name for p in tmp_path.iterdir()
    ]
