"""Many LoRAs in one pass give what each gives when it is merged into the weights alone."""

import copy

import pytest
import torch

from w2wpp.avatars.world.adapters import avatar_layout
from w2wpp.avatars.world.base import AvatarBase
from w2wpp.lora.hooks import loras_applied


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
