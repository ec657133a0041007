"""Metrics on weights against the updates that they stand for."""

import pytest
import torch

from w2wpp import ConfigError, ShapeError
from w2wpp.weight_metric import METRICS, SketchMetric, UpdateMetric, named_metric


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def at_mean(layout):
    """Mean and stds, every parameter another."""
    return draw(layout.size), 0.1 + torch.rand(
        layout.size, generator=torch.Generator().manual_seed(1)
    )


def metrics(layout):
    sketch = SketchMetric(draw(layout.size).abs(), draw(7, layout.size, seed=3))
    return [*(named_metric(name, layout) for name in METRICS), sketch]


def updates(layout, w):
    """B A of every module, side by side: [N, sum of out * in]."""
    return torch.cat([(b @ a).flatten(1) for a, b in layout.unpack(w.double()).values()], 1)


def test_update_metric_is_the_derivative_of_the_update(layout, at_mean):
    mean, std = (t.double() for t in at_mean)
    bound = UpdateMetric(layout).at(mean, std)
    x = draw(5, layout.size, seed=2).double()
    _, along = torch.func.jvp(lambda w: updates(layout, w), (mean.repeat(5, 1),), (x * std,))
    expected = bound.factor**2 * along.square().sum(1)
    assert torch.allclose(bound.energy(x.float()), expected, rtol=1e-5)


def test_near_the_mean_it_is_the_exact_kernel_of_updates(layout, at_mean):
    mean, std = (t.double() for t in at_mean)
    bound = UpdateMetric(layout).at(mean, std)
    x = draw(6, layout.size, seed=4)
    linear = (x @ bound.gram(x).T).double()
    for size, tolerance in ((1e-2, 2e-1), (1e-4, 2e-3)):  # the error falls with the distance
        d = updates(layout, mean + size * std * x.double()) - updates(layout, mean[None])
        exact = bound.factor**2 * d @ d.T / size**2
        assert (linear - exact).abs().max() < tolerance * linear.diagonal().max()


def test_a_change_of_gauge_is_no_difference(layout, at_mean):
    mean, std = at_mean
    lora = layout.unpack(mean)
    turned = {}
    for i, (name, (a, b)) in enumerate(lora.items()):
        x = draw(layout.rank, layout.rank, seed=i)
        turned[name] = (-x @ a, b @ x)
    d = layout.pack(turned) / std
    bound = UpdateMetric(layout).at(mean, std)
    assert bound.energy(d[None])[0] < 1e-6 * bound.energy(draw(1, layout.size))[0]


def test_features_of_typical_differences_have_variance_one(layout, at_mean):
    bound = UpdateMetric(layout).at(*at_mean)
    mean_energy = bound.energy(draw(4000, layout.size, seed=5)).mean()
    assert mean_energy == pytest.approx(layout.size, rel=0.1)  # B0 and A0 couple little


@pytest.mark.parametrize("i", range(4), ids=[*METRICS, "sketch"])
def test_the_maps_belong_together(layout, at_mean, i):
    metric = metrics(layout)[i]
    bound = metric.at(*at_mean)
    x, y = draw(3, layout.size, seed=6), draw(3, layout.size, seed=7)
    features = [torch.cat([bound.local(t), bound.extra(t)], 1) for t in (x, y)]
    inner = (features[0] * features[1]).sum(1)
    assert torch.allclose((x * bound.gram(y)).sum(1), inner, rtol=1e-3, atol=1e-3)
    assert torch.allclose(bound.energy(x), features[0].square().sum(1).double(), rtol=1e-5)


@pytest.mark.parametrize("i", range(4), ids=[*METRICS, "sketch"])
def test_blocks_of_columns_add_up(layout, at_mean, i):
    metric, (mean, std) = metrics(layout)[i], at_mean
    bound, x = metric.at(mean, std), draw(3, layout.size, seed=8)
    edges = metric.edges(layout.size)
    local, extra = [], 0
    for start, stop in zip([0, *edges[1:-1][::3]], [*edges[1:-1][::3], layout.size]):
        part = metric.part(mean[start:stop], std[start:stop], start)
        local.append(bound.factor * part.local(x[:, start:stop], start))
        extra = extra + part.extra(x[:, start:stop], start)
        assert torch.allclose(bound.local(x[:, start:stop], start), local[-1], atol=1e-5)
    assert torch.allclose(torch.cat(local, 1), bound.local(x), atol=1e-5)
    assert torch.allclose(extra, bound.extra(x), atol=1e-4)


def test_what_has_no_update_metric_is_refused(layout):
    with pytest.raises(ConfigError, match=r"no update.*--metric parameter"):
        UpdateMetric(layout).at(torch.zeros(layout.size), torch.ones(layout.size))
    with pytest.raises(ShapeError, match=rf"\[{layout.size}\]"):
        UpdateMetric(layout).at(torch.zeros(3), torch.ones(3))
    with pytest.raises(ConfigError, match="parameter, raw, update"):
        named_metric("functional", layout)
    with pytest.raises(ShapeError, match="rows"):
        SketchMetric(torch.ones(4), torch.ones(2, 5))
