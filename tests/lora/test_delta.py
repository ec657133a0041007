"""Inner products, sums and cuts of updates, against the updates themselves."""

import pytest
import torch

from w2wpp.lora import delta
from w2wpp.lora.delta import Factors, combine, cut, gram, inner, square_norm, stack

SIZES = {"a.to_q": (12, 9), "b.to_k": (7, 15), "c.ff": (20, 20)}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_update(g, ranks, modules=SIZES):
    found = {}
    for name, rank in zip(modules, ranks):
        if rank is None:
            continue
        out, size = modules[name]
        found[name] = Factors(
            torch.randn(rank, size, generator=g),
            torch.randn(out, rank, generator=g),
            float(torch.rand((), generator=g)) * 3 - 1,
        )
    return found


@pytest.fixture(params=["double", "single", "blocks"])
def precision(request, monkeypatch):
    if request.param != "double":
        monkeypatch.setattr(delta, "EXACT_RANK", 0)
    if request.param == "blocks":
        monkeypatch.setattr(delta, "BLOCK", 3)
    return 1e-12 if request.param == "double" else 1e-5


def dense(update):
    return torch.cat(
        [
            update[n].dense().flatten() if n in update else torch.zeros(o * i, dtype=torch.float64)
            for n, (o, i) in SIZES.items()
        ]
    )


def test_gram_is_that_of_the_built_updates_for_any_ranks_and_missing_modules(precision):
    g = generator()
    ranks = [(1, 2, 3), (4, None, 1), (8, 7, 20), (None, 1, None), (2, 2, 2)]
    updates = [random_update(g, r) for r in ranks]
    built = torch.stack([dense(u) for u in updates])
    expected = built @ built.T
    found = gram(updates)
    scale = float(expected.diagonal().max())
    torch.testing.assert_close(found, expected, atol=precision * scale, rtol=0)
    assert found.dtype == torch.float64


def test_inner_products_between_two_sets(precision):
    g = generator(1)
    first = [random_update(g, r)["a.to_q"] for r in [(1,), (3,)]]
    second = [None, *(random_update(g, r)["a.to_q"] for r in [(2,), (9,)])]
    found = inner(stack(first), stack(second))
    expected = torch.tensor(
        [
            [0.0 if f2 is None else float((f1.dense() * f2.dense()).sum()) for f2 in second]
            for f1 in first
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(found, expected, atol=precision * 500, rtol=0)


def test_any_gauge_gives_the_same_inner_products():
    g = generator(2)
    first, second = (random_update(g, (3, 2, 5)) for _ in range(2))
    turned = {}
    for name, f in second.items():
        m = torch.randn(f.rank, f.rank, generator=g, dtype=torch.float64)
        turned[name] = Factors(
            torch.linalg.inv(m) @ f.down.double(), f.up.double() @ m * 2, f.scale / 2
        )
    a, b = gram([first, second]), gram([first, turned])
    torch.testing.assert_close(a, b, atol=1e-4 * float(a.max()), rtol=0)


def test_a_combination_is_the_sum_of_the_updates():
    g = generator(3)
    updates = [random_update(g, r) for r in [(1, 2, 3), (4, None, 1), (2, 2, None)]]
    weights = torch.tensor([0.5, -2.0, 0.0])
    found = combine(updates, weights)
    built = sum(w * dense(u) for w, u in zip(weights.double(), updates))
    torch.testing.assert_close(dense(found), built, atol=1e-5, rtol=1e-5)
    assert found["c.ff"].rank == 4  # the third, with weight zero, takes no room


@pytest.mark.parametrize("direct", [384, 0])
def test_a_cut_is_the_best_of_its_rank_and_says_what_it_keeps(direct, monkeypatch):
    monkeypatch.setattr(delta, "DIRECT", direct)
    monkeypatch.setattr(delta, "OVERSAMPLING", 4)
    g = generator(4)
    f = Factors(torch.randn(30, 40, generator=g), torch.randn(35, 30, generator=g), -0.7)
    u, s, vt = torch.linalg.svd(f.dense())
    # A spectrum that falls, as that of sums of LoRAs does.
    s = s * 0.8 ** torch.arange(len(s))
    f = Factors((s.sqrt()[:30, None] * vt[:30]).float(), (u * s.sqrt())[:, :30].float(), -0.7)
    short, kept = cut(f, 6)
    best = -0.7 * (u[:, :6] * s[:6]) @ vt[:6]
    torch.testing.assert_close(short.dense(), best, atol=2e-3, rtol=0)
    assert kept == pytest.approx(0.49 * float(s[:6].square().sum()), rel=1e-4)
    assert kept == pytest.approx(square_norm(short), rel=1e-5)
    torch.testing.assert_close(short.down.norm(dim=1), short.up.norm(dim=0))


def test_a_cut_to_more_than_there_is_is_exact_and_padded():
    g = generator(5)
    f = Factors(torch.randn(2, 9, generator=g), torch.randn(5, 2, generator=g), 1.5)
    wide, kept = cut(f, 8)
    assert wide.down.shape == (8, 9) and wide.up.shape == (5, 8)
    torch.testing.assert_close(wide.dense(), f.dense(), atol=1e-5, rtol=1e-5)
    assert kept == pytest.approx(square_norm(f), rel=1e-6)
    nothing, kept = cut(Factors(torch.zeros(0, 9), torch.zeros(5, 0)), 3)
    assert kept == 0 and not nothing.dense().any()


def test_the_same_update_in_another_gauge_is_cut_to_the_same_numbers():
    g = generator(6)
    f = Factors(torch.randn(5, 9, generator=g), torch.randn(7, 5, generator=g))
    m = torch.randn(5, 5, generator=g)
    turned = Factors(torch.linalg.solve(m, f.down), f.up @ m)
    one, _ = cut(f, 3)
    other, _ = cut(turned, 3)
    torch.testing.assert_close(one.down, other.down, atol=1e-3, rtol=0)
    torch.testing.assert_close(one.up, other.up, atol=1e-3, rtol=0)
