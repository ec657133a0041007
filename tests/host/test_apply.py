"""Apply, against the weights and pictures of the running server."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import w2wpp

from .graphs import AvatarGraph, Link
from .server import REPO, Host, PromptFailed

# Where the host keeps the blocks that hold the avatar model's attention, by their diffusers names.
AVATAR_BLOCKS = {
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.attentions.0": "middle_block.1",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
}


def dump(graph: AvatarGraph, model: Link, file: str) -> str:
    return graph.add("Probe_Weights", model=model, file=file, endings="weight bias")


def host_key(module: str, blocks: dict[str, str]) -> str:
    """The host's name of a module's weight: only the block is called something else."""
    prefix = next(p for p in blocks if module.startswith(p + "."))
    return f"{blocks[prefix]}{module[len(prefix) :]}.weight"


@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_patched_weight_is_w_plus_scaled_ba(host: Host, strength: float) -> None:
    graph = AvatarGraph()
    applied = graph.apply(graph.sample(11), strength)
    dump(graph, graph.model, f"bare{strength}.safetensors")
    dump(graph, [applied, 0], f"patched{strength}.safetensors")
    host.run(graph.nodes)
    bare = load_file(host.output / f"bare{strength}.safetensors")
    patched = load_file(host.output / f"patched{strength}.safetensors")

    space = w2wpp.load_space(REPO / "models" / "avatars.safetensors")
    identity = space.sample(1, generator=torch.Generator().manual_seed(11))
    layout = space.layout
    expected = dict(bare)
    for module, (a, b) in layout.unpack(identity.vectors(space)[0]).items():
        expected[host_key(module, AVATAR_BLOCKS)] = bare[host_key(module, AVATAR_BLOCKS)] + (
            strength * layout.alpha / layout.rank * b @ a
        )
    changed = {name for name in bare if not torch.equal(bare[name], patched[name])}
    assert changed == {host_key(m.name, AVATAR_BLOCKS) for m in layout.modules}
    for name, weight in expected.items():
        torch.testing.assert_close(patched[name], weight, rtol=1e-5, atol=1e-6)


def test_the_given_model_is_not_changed(host: Host) -> None:
    graph = AvatarGraph()
    dump(graph, graph.model, "before.safetensors")
    host.run(graph.nodes)
    applied = graph.apply(graph.sample(12))
    graph.paint([applied, 0])
    host.run(graph.nodes)
    dump(graph, graph.model, "after.safetensors")
    host.run(graph.nodes)
    before, after = (load_file(host.output / f"{name}.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_strength_zero_paints_the_bare_models_picture(host: Host) -> None:
    graph = AvatarGraph()
    bare = graph.paint(graph.model)
    zero = graph.paint([graph.apply(graph.sample(13), 0.0), 0])
    full = graph.paint([graph.apply(graph.sample(13), 1.0), 0])
    result = host.run(graph.nodes)
    (bare_picture,), (zero_picture,), (full_picture,) = map(result.pictures, (bare, zero, full))
    assert np.array_equal(bare_picture, zero_picture)
    assert not np.array_equal(bare_picture, full_picture)


def test_one_seed_gives_the_same_bits_and_another_seed_another_face(host: Host) -> None:
    def picture(seed: int) -> np.ndarray:
        graph = AvatarGraph()
        graph.paint([graph.apply(graph.sample(seed)), 0])
        host.forget()
        return host.run(graph.nodes).pictures()[0]

    first, again, other = picture(1), picture(1), picture(2)
    assert np.array_equal(first, again)
    assert (
        np.abs(first.astype(int) - other).mean() > 5
    )  # of 255: the noise is the same, the face is not


def test_a_batch_is_painted_one_by_one_as_each_would_be_alone(host: Host) -> None:
    together = AvatarGraph()
    together.paint([together.apply(together.sample(5, count=3)), 0])
    pictures = host.run(together.nodes).pictures()
    alone = AvatarGraph()
    alone.paint([alone.apply(alone.sample(5, count=1)), 0])
    assert len(pictures) == 3
    assert np.array_equal(pictures[0], host.run(alone.nodes).pictures()[0])
    assert not np.array_equal(pictures[0], pictures[1])


def test_ends_of_a_walk_are_the_two_people(host: Host) -> None:
    graph = AvatarGraph()
    a, b = graph.sample(21), graph.sample(22)
    walk = graph.add(
        "W2WPP_Interpolate", identity_a=a, identity_b=b, steps=3, position=1.0, mode="slerp"
    )
    painted = [graph.paint([graph.apply(who), 0]) for who in (a, b, [walk, 0])]
    result = host.run(graph.nodes)
    (start,), (end,), strip = map(result.pictures, painted)
    assert len(strip) == 3
    assert np.array_equal(strip[0], start) and np.array_equal(strip[2], end)
    assert not np.array_equal(strip[1], start) and not np.array_equal(strip[1], end)


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_the_hosts_own_lora_nodes_paint_the_same_picture(host: Host, strength: float) -> None:
    graph = AvatarGraph()
    applied = graph.apply(graph.sample(31), strength)
    by_apply = graph.paint([applied, 0])
    loaded = graph.add(
        "LoraModelLoader",
        model=graph.model,
        lora=[applied, 1],
        strength_model=strength,
        bypass=False,
    )
    by_lora_model = graph.paint([loaded, 0])
    graph.add("SaveLoRA", lora=[applied, 1], prefix=f"loras/face{strength}")
    result = host.run(graph.nodes)
    saved = max((host.output / "loras").glob(f"face{strength}*.safetensors"))

    stock = AvatarGraph()
    load = stock.add(
        "LoraLoaderModelOnly", model=stock.model, lora_name=saved.name, strength_model=strength
    )
    by_saved_file = stock.paint([load, 0])
    (expected,), (got,) = result.pictures(by_apply), result.pictures(by_lora_model)
    assert np.array_equal(expected, got)
    assert np.array_equal(expected, host.run(stock.nodes).pictures(by_saved_file)[0])


def test_a_file_exported_by_the_library_paints_the_same_picture(host: Host) -> None:
    space = w2wpp.load_space(REPO / "models" / "avatars.safetensors")
    identity = space.sample(1, generator=torch.Generator().manual_seed(32))
    lora = space.layout.unpack(identity.vectors(space)[0])
    folder = host.base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    w2wpp.save_lora(lora, folder / "exported.safetensors", format="kohya", alpha=space.layout.alpha)

    graph = AvatarGraph()
    by_apply = graph.paint([graph.apply(graph.sample(32)), 0])
    load = graph.add(
        "LoraLoaderModelOnly",
        model=graph.model,
        lora_name="exported.safetensors",
        strength_model=1.0,
    )
    by_file = graph.paint([load, 0])
    result = host.run(graph.nodes)
    (expected,), (got,) = result.pictures(by_apply), result.pictures(by_file)
    assert (
        np.abs(expected.astype(int) - got).max() <= 1
    )  # two versions of torch may decode with other last bits


def test_a_wrong_model_is_named_and_nothing_is_painted(host: Host) -> None:
    graph = AvatarGraph()
    model = graph.add("Probe_RandomModel", family="SD15")
    graph.model = [model, 0]
    dump(graph, [graph.apply(graph.sample(1)), 0], "never.safetensors")
    with pytest.raises(PromptFailed) as failure:
        host.run(graph.nodes)
    message = str(failure.value)
    assert "SD15" in message and "'avatar'" in message and "missing" in message
    assert not (host.output / "never.safetensors").exists()
