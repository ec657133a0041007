import dataclasses

import pytest
import torch

from w2wpp import SD15, ConfigError, FormatError, Layout, LayoutMismatch, Module, ShapeError


def test_sd15_is_the_layout_of_the_published_weights():
    first, last = SD15.modules[0], SD15.modules[-1]
    assert SD15.size == 99_648
    assert len(SD15.modules) == 64
    assert (first.name, first.in_features) == (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        320,
    )
    assert (last.name, last.in_features, last.out_features) == (
        "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_v",
        768,
        320,
    )
    assert SD15.scale == 27.0
    # 16 blocks: 7 C + 768 numbers each, C = 320 x5, 640 x5, 1280 x6
    assert sum(7 * c + 768 for c in [320] * 5 + [640] * 5 + [1280] * 6) == SD15.size
    assert [m.name for m in SD15.modules] == sorted(m.name for m in SD15.modules)


def test_sd15_vector_starts_with_down_and_ends_with_up():
    w = torch.arange(SD15.size, dtype=torch.float32)
    lora = SD15.unpack(w)
    a, _ = lora[SD15.modules[0].name]
    _, b = lora[SD15.modules[-1].name]
    assert a.shape == (1, 320) and a[0, 0] == 0 and a[0, -1] == 319
    assert b.shape == (320, 1) and b[-1, 0] == SD15.size - 1


@pytest.mark.parametrize("shape", [(), (1,), (5,)])
def test_pack_and_unpack_are_inverse(layout, shape):
    w = torch.randn(*shape, layout.size)
    lora = layout.unpack(w)
    assert torch.equal(layout.pack(lora), w)
    for m in layout.modules:
        a, b = lora[m.name]
        assert a.shape == (*shape, layout.rank, m.in_features)
        assert b.shape == (*shape, m.out_features, layout.rank)


def test_unpack_gives_views(layout):
    w = torch.zeros(2, layout.size)
    a, _ = layout.unpack(w)[layout.modules[0].name]
    a += 1
    assert w[:, : layout.rank * layout.modules[0].in_features].eq(1).all()


def test_gradients_flow_through_unpack(layout):
    w = torch.zeros(layout.size, requires_grad=True)
    sum(t.sum() for pair in layout.unpack(w).values() for t in pair).backward()
    assert w.grad.eq(1).all()


def test_json_round_trip(layout):
    assert Layout.from_json(layout.to_json()) == layout
    assert Layout.from_json(SD15.to_json()) == SD15


@pytest.mark.parametrize(
    "change",
    [
        {"modules": []},
        {"modules": [["a", 0, 1]]},
        {"modules": [["a", 1, 1], ["a", 1, 1]]},
        {"modules": [["a", 1]]},
        {"rank": 0},
        {"alpha": "much"},
    ],
)
def test_impossible_layouts_are_refused(layout, change):
    with pytest.raises(FormatError):
        Layout.from_json({**layout.to_json(), **change})


def test_wrong_modules_are_counted_and_named(layout):
    lora = layout.unpack(torch.zeros(layout.size))
    name = layout.modules[0].name
    lora["elsewhere"] = lora.pop(name)
    with pytest.raises(LayoutMismatch, match=f"lacks 1 of them and has 1 others .*{name}"):
        layout.pack(lora)


def test_wrong_rank_is_named(layout):
    other = dataclasses.replace(layout, rank=1)
    with pytest.raises(LayoutMismatch, match="Got A"):
        layout.pack(other.unpack(torch.zeros(other.size)))


@pytest.mark.parametrize("shape", [(3,), (2, 2, 3)])
def test_wrong_vectors_are_refused(layout, shape):
    with pytest.raises(ShapeError, match="P = "):
        layout.unpack(torch.zeros(shape))


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("inf"), float("nan")])
def test_an_alpha_that_scales_nothing_is_refused(alpha):
    with pytest.raises(ConfigError, match="alpha"):
        Layout("x", "toy", (Module("a", 3, 2),), rank=1, alpha=alpha)
