"""Inner products, sums and cuts of updates, against the updates themselves."""

import pytest
import torch

from w2wpp.errors import DataError
from w2wpp.lora import delta
from w2wpp.lora.delta import Factors, combine, cut, cut_sum, gram, inner, square_norm, stack

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


@pytest.fixture(params=["double", "single", "tiles", "multiplied out", "row by row"])
def precision(request, monkeypatch):
    if request.param != "double":
        monkeypatch.setattr(delta, "EXACT_RANK", 0)
    if request.param == "tiles":
        monkeypatch.setattr(delta, "LEAST", 3)
        monkeypatch.setattr(delta, "MOST", 4)
    multiplied = request.param in ("multiplied out", "row by row")
    monkeypatch.setattr(delta, "_shorter_multiplied_out", lambda stack: multiplied)
    if request.param == "row by row":
        monkeypatch.setattr(delta, "WHOLE", 1)
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


def test_the_way_of_fewer_operations_is_taken(monkeypatch):
    g, ways = generator(1), []
    for name in ("_inner_of_factors", "_inner_multiplied_out"):
        real = getattr(delta, name)
        monkeypatch.setattr(delta, name, lambda *a, n=name, f=real: (ways.append(n), f(*a))[1])
    # 2 * 9 * 12 * (1.5 R + N^2) against R^2 * 21, and the same for sides of 90 and 120
    for count, rank, size, way in (
        (2, 1, 1, "_inner_of_factors"),
        (2, 9, 1, "_inner_multiplied_out"),
        (2, 9, 10, "_inner_of_factors"),
        (12, 9, 1, "_inner_multiplied_out"),
        (60, 1, 1, "_inner_of_factors"),
    ):
        one = [
            Factors(
                torch.randn(rank, 9 * size, generator=g), torch.randn(12 * size, rank, generator=g)
            )
            for _ in range(count)
        ]
        found = inner(stack(one))
        assert ways.pop() == way and not ways
        built = torch.stack([f.dense().flatten() for f in one])
        torch.testing.assert_close(found, built @ built.T, atol=1e-4 * float(found.max()), rtol=0)


def test_scales_far_from_one_neither_overflow_nor_vanish(precision):
    g = generator(3)
    one = [
        Factors(f.down, f.up, f.scale * factor)
        for f, factor in zip(
            (random_update(g, (3,))["a.to_q"] for _ in range(3)), (1e25, 1, -1e-25)
        )
    ]
    built = torch.stack([f.dense().flatten() for f in one])
    found, expected = inner(stack(one)), built @ built.T
    length = expected.diagonal().sqrt()
    sizes = length[:, None] * length
    torch.testing.assert_close(found / sizes, expected / sizes, atol=1e-5, rtol=0)


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


@pytest.mark.parametrize("dependent", ["neither", "A", "B", "both"])
def test_a_cut_of_dependent_factors_is_the_svd_of_their_product(dependent):
    g = generator(6)
    f = Factors(torch.randn(8, 30, generator=g), torch.randn(20, 8, generator=g), 0.3)
    if dependent in ("A", "both"):
        f.down[5:] = f.down[:3] + f.down[1:4]
    if dependent in ("B", "both"):
        f.up[:, 6:] = f.up[:, :2] * 2
    u, s, vt = torch.linalg.svd(f.dense())
    for rank in (3, 5, 8):
        short, kept = cut(f, rank)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        torch.testing.assert_close(short.dense(), best, atol=2e-6 * float(s[0]), rtol=0)
        assert kept == pytest.approx(float(s[:rank].square().sum()), rel=1e-6)
        assert torch.isfinite(short.down).all() and torch.isfinite(short.up).all()


def test_a_member_that_a_mixture_hardly_holds_is_no_dependent_one(monkeypatch):
    """Weights of one to a hundred million: still by roots, which are many times faster than QR, and as exact."""
    g = torch.Generator().manual_seed(8)
    weights = torch.tensor([1.0, -0.5, 1e-4, 1e-8]).repeat_interleave(4)
    down, up = torch.randn(16, 40, generator=g), torch.randn(48, 16, generator=g) * weights
    f = Factors(down, up, -0.7)
    monkeypatch.setattr(torch.linalg, "qr", None)
    kept, energy = cut(f, 12)
    u, s, vt = torch.linalg.svd(f.dense())
    best = (u[:, :12] * s[:12]) @ vt[:12]
    torch.testing.assert_close(kept.dense(), best, atol=1e-5, rtol=0)
    assert energy == pytest.approx(float(s[:12].square().sum()), rel=1e-9)


@pytest.mark.parametrize("direct", [384, 0])
@pytest.mark.parametrize("weights", [[0.7, -1.3, 0.4], [0.0, 2.0, -0.5], [0.0, 0.0, 1e-8]])
def test_a_sum_is_cut_as_its_factors_side_by_side_are(weights, direct, monkeypatch):
    monkeypatch.setattr(delta, "DIRECT", direct)
    g = generator(9)
    members = [
        Factors(torch.randn(r, 40, generator=g), torch.randn(30, r, generator=g), s)
        for r, s in ((4, 0.5), (3, -2.0), (5, 1.0))
    ]
    together, weights = stack(members), torch.tensor(weights)
    truth = sum(w * f.dense() for w, f in zip(weights.tolist(), members))
    u, s, vt = torch.linalg.svd(truth)
    best = (u[:, :4] * s[:4]) @ vt[:4]
    found = {
        "by itself": cut_sum(together, weights, 4),
        "with Gram matrices": cut_sum(together, weights, 4, together.column_grams()),
    }
    for short, kept in found.values():
        torch.testing.assert_close(short.dense(), best, atol=2e-6 * float(s[0]), rtol=0)
        assert kept == pytest.approx(float(s[:4].square().sum()), rel=1e-6)


@pytest.mark.parametrize(
    "weights", [[1.0, torch.inf], [torch.nan, 1.0], [3e37, 1.0]], ids=["infinite", "nan", "huge"]
)
def test_sums_out_of_range_are_refused(weights):
    g = generator(10)
    members = [Factors(torch.randn(2, 9, generator=g), 1e3 * torch.randn(7, 2, generator=g))] * 2
    with pytest.raises(DataError, match="out of range"):
        cut_sum(stack(members), torch.tensor(weights), 2)


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
