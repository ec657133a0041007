"""Fine-tuning: gradients of one person do not leak into another, and the protocol is the same for all."""

import torch

from w2wpp.avatars.build.dreambooth import DreamBooth, _Photographs, people_loss
from w2wpp.avatars.world.adapters import avatar_layout
from w2wpp.avatars.world.base import AvatarBase
from w2wpp.avatars.world.renderer import sample_identities
from w2wpp.training.people import initial_vector, measure_start, train_people

CONFIG = DreamBooth(steps=3, pictures=2, photographs=4)


def _world():
    torch.manual_seed(0)
    base = AvatarBase().requires_grad_(False).eval()
    # A fresh UNet's last layer is small; real bases have learned to answer.
    layout = avatar_layout(base)
    people = sample_identities(3, generator=torch.Generator().manual_seed(1))
    return base, layout, people


def test_a_person_is_trained_the_same_in_any_company():
    base, layout, people = _world()
    loss = people_loss(base, layout, people, CONFIG)
    start = measure_start(loss, initial_vector(layout), len(people), batches=1)
    together = train_people(loss, len(people), start, CONFIG)
    only = people_loss(base, layout, people[1:2], CONFIG, torch.tensor([1]))
    alone = train_people(only, 1, start, CONFIG)
    moved = (together[1] - start.vector).norm()
    assert moved > 0
    assert (
        together[1] - alone[0]
    ).norm() < 0.05 * moved  # products in bf16 depend a little on the batch


def test_common_conditions_are_common_and_own_are_not():
    people = sample_identities(2, generator=torch.Generator().manual_seed(1))
    for conditions, same in (("common", True), ("own", False)):
        stream = _Photographs(people, DreamBooth(pictures=2, photographs=4, conditions=conditions))
        _, words, noise, timestep = stream.batch(0)
        assert torch.equal(noise[:2], noise[2:]) is same
        assert torch.equal(timestep[:2], timestep[2:]) is same
        assert torch.equal(words[:2], words[2:]) is same


def test_own_conditions_do_not_depend_on_the_group():
    people = sample_identities(2, generator=torch.Generator().manual_seed(1))
    config = DreamBooth(pictures=2, photographs=4, conditions="own")
    both = _Photographs(people, config, torch.tensor([6, 7])).batch(1)
    second = _Photographs(people[1:], config, torch.tensor([7])).batch(1)
    for in_company, alone in zip(both, second):
        torch.testing.assert_close(in_company[2:], alone)


def test_the_start_passes_nothing_through():
    _, layout, _ = _world()
    for down, up in layout.unpack(initial_vector(layout)).values():
        assert up.abs().max() == 0 and down.abs().max() > 0
