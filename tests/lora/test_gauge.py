"""The gauge of a LoRA is solved for: the same person comes out, whatever the file's own gauge is, at the true size."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from w2wpp import SD15, Space, build_codec, encode_lora, kohya_tensors, transformer_layout
from w2wpp.basis import Basis
from w2wpp.lora.gauge import factor, towards

SIZES = (6, 200, 1000)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def orthonormal(k, p, g):
    """Rows of a cosine transform with random signs, in a random order: [k, p]."""
    place = torch.arange(p, dtype=torch.float64) + 0.5
    rows = [((2 / p) ** 0.5 * torch.cos(math.pi * place * n / p)).half() for n in range(1, k + 1)]
    signs = torch.randint(0, 2, (p,), generator=g) * 2 - 1
    return (torch.stack(rows) * signs)[:, torch.randperm(p, generator=g)]


def make_space(layout, k, mean):
    g = generator(k)
    std = 0.01 * (0.5 + torch.rand(layout.size, generator=g))
    centre = mean * torch.randn(layout.size, generator=g)
    scale = 30 / torch.arange(1, k + 1).float().sqrt()
    basis = Basis(centre, std, orthonormal(k, layout.size, g), scale)
    codec = build_codec({"name": "pca", "coefficient_size": k, "latent_size": k})
    return Space(layout, basis, codec, torch.zeros(k), torch.ones(k))


@pytest.fixture(scope="module", params=SIZES)
def space(request):
    return make_space(SD15, request.param, 0.02)


def in_gauge(lora, gauges):
    return {n: (torch.linalg.inv(c) @ a, b @ c) for (n, (a, b)), c in zip(lora.items(), gauges)}


def padded(lora, rank, g):
    """The same updates with more columns than they need: G of any shape that has a right inverse."""
    wide = {}
    for name, (a, b) in lora.items():
        turn = torch.linalg.qr(torch.randn(rank, rank, generator=g)).Q
        # As long as A itself: a file in single precision can't hold both otherwise.
        more = a.norm() / a.shape[1] ** 0.5 * torch.randn(rank - 1, a.shape[1], generator=g)
        wide[name] = (
            turn.T @ torch.cat([a, more]),
            torch.cat([b, torch.zeros(len(b), rank - 1)], dim=1) @ turn,
        )
    return wide


def test_signs_of_half_of_the_modules(space):
    identity = space.sample(1, generator=generator(1))
    w = space.decode(identity.z)
    lora = space.layout.unpack(w[0])
    flips = torch.ones(64, 1, 1)
    flips[torch.randperm(64, generator=generator(2))[:32]] = -1
    turned = in_gauge(lora, flips)
    away = space.encode(space.layout.pack(turned)[None]).mean
    assert (away - identity.z).abs().max() > 0.5, "the signs matter here"
    found, report = encode_lora(space, kohya_tensors(turned, SD15.alpha))
    torch.testing.assert_close(found.z, space.encode(w).mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.z, identity.z, atol=5e-4, rtol=0)  # as exact as half precision
    assert report.update_error < 1e-4 and report.gauge == "resolved"


@settings(
    max_examples=2,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**31), spread=st.floats(0, 3), rank=st.integers(1, 8))
def test_any_gauge_of_any_rank_is_the_same_person(space, seed, spread, rank):
    g = generator(seed)
    w = space.sample(1, generator=g).vectors(space)
    scales = torch.exp(spread * torch.randn(64, 1, 1, generator=g))
    signs = torch.randint(0, 2, (64, 1, 1), generator=g) * 2 - 1
    lora = in_gauge(space.layout.unpack(w[0]), scales * signs)
    if rank > 1:
        lora = padded(lora, rank, g)
    found, report = encode_lora(space, kohya_tensors(lora, SD15.alpha * rank))
    torch.testing.assert_close(found.z, space.encode(w).mean, atol=5e-4, rtol=0)
    assert report.update_error < 1e-3 and report.rank_energy_lost < 1e-6


def test_people_from_outside_of_the_span_have_one_identity_in_every_gauge(space):
    g = generator(3)
    w = space.sample(1, generator=g).vectors(space)[0]
    w = w + 0.3 * space.basis.std * torch.randn(w.shape, generator=g)
    lora = SD15.unpack(w)
    gauges = torch.exp(torch.randn(2, 64, 1, 1, generator=g))
    gauges *= torch.randint(0, 2, gauges.shape, generator=g) * 2 - 1
    one, two = (encode_lora(space, kohya_tensors(in_gauge(lora, c), 27.0))[0].z for c in gauges)
    torch.testing.assert_close(one, two, atol=5e-4, rtol=0)
    raw = space.encode(w[None]).mean
    assert (one - raw).norm() < 0.1 * raw.norm(), "nearly what its own gauge gives"


def test_a_mean_of_zero_leaves_the_sign_to_the_file():
    space = make_space(SD15, 50, 0.0)
    identity = space.sample(1, generator=generator(4))
    lora = SD15.unpack(space.decode(identity.z)[0])
    found, report = encode_lora(space, kohya_tensors(lora, 27.0))
    torch.testing.assert_close(found.z, identity.z, atol=5e-4, rtol=0)
    mirrored, _ = encode_lora(space, kohya_tensors(in_gauge(lora, -torch.ones(64, 1, 1)), 27.0))
    torch.testing.assert_close(mirrored.z, -identity.z, atol=5e-4, rtol=0)
    assert report.gauge == "kept"


@pytest.mark.parametrize("rank", [2, 4])
def test_layouts_of_higher_rank(rank):
    blocks = [(f"down_blocks.1.attentions.{i}.transformer_blocks.0", 96) for i in range(2)]
    layout = transformer_layout("small", "x", blocks, context_dim=64, rank=rank, alpha=4.0)
    space, g = make_space(layout, 40, 0.02), generator(rank)
    w = space.sample(1, generator=g).vectors(space)
    changes = torch.randn(8, rank, rank, generator=g) + 0.3 * torch.eye(rank)
    found, report = encode_lora(space, kohya_tensors(in_gauge(layout.unpack(w[0]), changes), 4.0))
    torch.testing.assert_close(found.z, space.encode(w).mean, atol=5e-3, rtol=0)
    assert report.update_error < 5e-3


def test_towards_a_vector_is_the_least_distance_in_scale_and_sign():
    layout = transformer_layout("one", "x", [("mid", 8)], context_dim=8, targets=("to_q",))
    g = generator(5)
    w, target = torch.randn(2, layout.size, generator=g)
    balanced = {n: factor(a, b, 1)[:2] for n, (a, b) in layout.unpack(w).items()}
    found = towards(balanced, layout, target)
    scales = torch.cat([s * torch.logspace(-2, 2, 4001) for s in (1, -1)])
    for name, (a, b) in balanced.items():
        a0, b0 = layout.unpack(target)[name]
        grid = (a / scales[:, None] - a0).square().sum(1) + (
            b.T * scales[:, None] - b0.T
        ).square().sum(1)
        got_a, got_b = layout.unpack(found)[name]
        assert float((got_a - a0).square().sum() + (got_b - b0).square().sum()) <= grid.min() + 1e-4
        torch.testing.assert_close((got_b @ got_a).double(), b @ a, atol=1e-5, rtol=1e-5)
