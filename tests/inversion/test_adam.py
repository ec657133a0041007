"""Adam against its equations and against torch's."""

import math

import pytest
import torch

from w2wpp import Adam

STEPS = 12


def path(settings, gradient, start, steps=STEPS):
    """Where a run stands after every step [steps, B, D]."""
    run, points = settings.begin(start, steps=steps, seed=0), []
    for _ in range(steps):
        x = run.ask()
        run.tell(torch.zeros(len(x)), gradient(x))
        points.append(run.result().clone())
    return torch.stack(points)


def slope(x):
    return 2 * (x - torch.tensor([1.0, -2.0, 0.5])) * torch.tensor([1.0, 10.0, 0.1])


def test_is_torchs_adam_under_a_cosine_schedule():
    start = torch.tensor([[0.3, 0.1, -0.4], [2.0, 1.0, 0.0]])
    x = start.clone().requires_grad_(True)
    adam = torch.optim.Adam([x], lr=0.2, betas=(0.9, 0.99), eps=1e-8)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS)
    expected = []
    for _ in range(STEPS):
        x.grad = slope(x.detach())
        adam.step()
        schedule.step()
        expected.append(x.detach().clone())
    found = path(Adam(lr=0.2), slope, start)
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=2e-6)


@pytest.mark.parametrize("anneal", [True, False])
def test_the_rate_falls_to_zero_along_half_a_cosine_or_stays(anneal):
    """Under a constant gradient every step of Adam is as long as its rate."""
    points = path(Adam(lr=0.1, anneal=anneal), torch.ones_like, torch.zeros(1, 3))
    lengths = -torch.diff(points[:, 0, 0], prepend=torch.zeros(1))
    rates = [
        0.1 * (0.5 * (1 + math.cos(math.pi * i / STEPS)) if anneal else 1.0) for i in range(STEPS)
    ]
    torch.testing.assert_close(lengths, torch.tensor(rates), rtol=0, atol=1e-6)


def test_anneals_unless_told_otherwise():
    assert Adam().anneal and Adam().lr == 0.1 and Adam().betas == (0.9, 0.99)
