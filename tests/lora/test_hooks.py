"""Many LoRAs in one pass give what each gives when it is merged into the weights alone."""

import copy

import pytest
import torch
from torch import nn

from w2wpp.avatars.world.adapters import avatar_layout
from w2wpp.avatars.world.base import AvatarBase
from w2wpp.errors import ConfigError
from w2wpp.lora.hooks import Site, hooked, loras_applied


@pytest.fixture(scope="module")
def base() -> AvatarBase:
    torch.manual_seed(0)
    return AvatarBase().requires_grad_(False).eval()


def _inputs(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    words = torch.randint(3, (count, 3), generator=g)
    return (
        torch.randn(count, 3, 32, 32, generator=g),
        torch.randint(1000, (count,), generator=g),
        words,
    )


def _merged(base: AvatarBase, layout, vector: torch.Tensor) -> AvatarBase:
    copied = copy.deepcopy(base)
    for name, (down, up) in layout.unpack(vector).items():
        copied.unet.get_submodule(name).weight += layout.scale * up @ down
    return copied


@pytest.mark.parametrize("rank", [1, 2])
def test_batched_equals_merged(base, rank):
    layout = avatar_layout(base, rank=rank, alpha=3.0)
    vectors = 0.2 * torch.randn(3, layout.size, generator=torch.Generator().manual_seed(2))
    noisy, timestep, words = _inputs(6)
    with torch.no_grad(), loras_applied(base.unet, layout, vectors):
        together = base(noisy, timestep, base.prompt(words))
    for i, vector in enumerate(vectors):
        rows = slice(2 * i, 2 * i + 2)
        alone = _merged(base, layout, vector)
        with torch.no_grad():
            expected = alone(noisy[rows], timestep[rows], alone.prompt(words[rows]))
        torch.testing.assert_close(together[rows], expected, atol=2e-5, rtol=1e-4)


def test_nothing_stays_behind_after_an_error(base):
    layout = avatar_layout(base)
    with (
        pytest.raises(RuntimeError, match="stop"),
        loras_applied(base.unet, layout, torch.zeros(1, layout.size)),
    ):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in base.unet.modules())


def test_the_layout_names_weights_of_the_base(base):
    layout = avatar_layout(base)
    for module in layout.modules:
        weight = base.unet.get_submodule(module.name).weight
        assert weight.shape == (module.out_features, module.in_features)
    assert len(layout.modules) == 4 * 2 * 4


LAYERS = {
    "linear": (nn.Linear(6, 5), (4, 7, 6)),
    "pointwise": (nn.Conv2d(6, 5, 1), (4, 6, 4, 3)),
    "strided": (nn.Conv2d(6, 5, 3, stride=2, padding=1), (4, 6, 5, 4)),
    "dilated": (nn.Conv1d(6, 5, 3, dilation=2, padding="same"), (4, 6, 9)),
    "frames": (nn.Conv3d(6, 5, (1, 3, 3), padding=(0, 1, 1)), (4, 6, 2, 4, 4)),
}


def merged_output(layer: nn.Module, x: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
    """What copies of a layer with updates [N, out, in] put on their weights give, each for its rows."""
    found = []
    for rows, delta in zip(x.chunk(len(deltas)), deltas):
        alone = copy.deepcopy(layer).double()
        with torch.no_grad():
            alone.weight += delta.view_as(alone.weight)
        found.append(alone(rows))
    return torch.cat(found)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("gradients", [False, True])
def test_every_layer_gives_what_merging_gives(kind: str, gradients: bool) -> None:
    layer, shape = LAYERS[kind]
    layer = copy.deepcopy(layer).double().requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    down = torch.randn(2, 3, layer.weight[0].numel(), generator=g, dtype=torch.float64)
    up = torch.randn(2, 5, 3, generator=g, dtype=torch.float64)
    expected = merged_output(layer, x, 0.7 * up @ down)
    with torch.set_grad_enabled(gradients), hooked({"a": layer}, lambda _: (down, up), 0.7):
        torch.testing.assert_close(layer(x), expected)
    assert not layer._forward_hooks


@pytest.mark.parametrize("kind", ["linear", "strided"])
def test_modules_that_share_a_layer_act_on_their_rows(kind: str) -> None:
    layer, shape = LAYERS[kind]
    layer = copy.deepcopy(layer).double().requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    size_in = layer.weight[0].numel()
    rows = {"k": (3, 1), "q": (0, 2)}  # not in order, and nothing for the last row
    lora = {
        name: (
            torch.randn(2, 2, size_in, generator=g, dtype=torch.float64),
            torch.randn(2, count, 2, generator=g, dtype=torch.float64),
        )
        for name, (_, count) in rows.items()
    }
    deltas = torch.zeros(2, 5, size_in, dtype=torch.float64)
    for name, (start, count) in rows.items():
        deltas[:, start : start + count] = -1.5 * lora[name][1] @ lora[name][0]
    sites = {name: Site(layer, span) for name, span in rows.items()}
    expected = merged_output(layer, x, deltas)
    with hooked(sites, lora.__getitem__, -1.5):
        torch.testing.assert_close(layer(x), expected)
    with (
        pytest.raises(ConfigError, match="q and k are the same weights"),
        hooked({"q": Site(layer, (0, 3)), "k": Site(layer, (2, 1))}, lora.__getitem__, 1.0),
    ):
        pass


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_that_take_turns(kind: str) -> None:
    layer, shape = LAYERS[kind]
    layer = copy.deepcopy(layer).double().requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    down = torch.randn(2, 3, layer.weight[0].numel(), generator=g, dtype=torch.float64)
    up = torch.randn(2, 5, 3, generator=g, dtype=torch.float64)
    turns = [0, 2, 1, 3]  # rows by LoRA
    expected = merged_output(layer, x[turns], up @ down)
    with hooked({"a": layer}, lambda _: (down, up), 1.0, tiled=True):
        torch.testing.assert_close(layer(x)[turns], expected)
        with pytest.raises(ConfigError, match="3 rows does not consist of 2 people"):
            layer(x[:3])


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 3, groups=2), nn.LayerNorm(4)])
def test_other_layers_are_refused_by_name(layer: nn.Module) -> None:
    with (
        pytest.raises(ConfigError, match=f"blocks.3 is of the kind {type(layer).__name__}"),
        hooked({"blocks.3": layer}, lambda _: None, 1.0),
    ):
        pass
