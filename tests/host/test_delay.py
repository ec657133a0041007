"""Apply with a start: the LoRA acts below a noise level, as if the sampling had gone over to the patched model."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from safetensors.torch import load_file

from .graphs import SAMPLER, AvatarGraph, Link
from .server import Host
from .test_apply import dump

STEPS = 12
SPLIT = {**SAMPLER, "sampler_name": "euler", "steps": STEPS}
del SPLIT["denoise"]


def apply(graph: AvatarGraph, identity: Link, start: float | None, strength: float = 1.0) -> Link:
    late = {} if start is None else {"start_percent": start}
    node = graph.add(
        "W2WPP_ApplyDecodedLora", model=graph.model, identity=identity, strength=strength, **late
    )
    return [node, 0]


def stage(graph: AvatarGraph, model: Link, latent: Link, first: int, last: int) -> Link:
    """Steps ``first`` to ``last`` of a sampling, from noise on or from a latent that still holds noise."""
    node = graph.add(
        "KSamplerAdvanced", model=model, positive=[graph.loader, 1], negative=[graph.loader, 2],
        latent_image=latent, noise_seed=4, start_at_step=first, end_at_step=last,
        add_noise="disable" if first else "enable",
        return_with_leftover_noise="enable" if last < STEPS else "disable", **SPLIT,
    )  # fmt: skip
    return [node, 0]


def keep(graph: AvatarGraph, latent: Link, name: str) -> None:
    graph.add("SaveLatent", samples=latent, filename_prefix=name)


def latents(host: Host, name: str) -> np.ndarray:
    """The newest saved latent of that name."""
    newest = max(host.output.glob(f"{name}_*.latent"))
    return load_file(newest)["latent_tensor"].numpy()


def test_a_start_of_zero_is_the_apply_without_one(host: Host) -> None:
    graph = AvatarGraph()
    who = graph.sample(51)
    for start, name in ((None, "plain"), (0.0, "zero")):
        model = apply(graph, who, start)
        dump(graph, model, f"{name}.safetensors")
        keep(graph, stage(graph, model, [graph.loader, 4], 0, STEPS), name)
    host.run(graph.nodes)
    plain, zero = (load_file(host.output / f"{n}.safetensors") for n in ("plain", "zero"))
    assert all(bool((plain[key] == zero[key]).all()) for key in plain)
    assert np.array_equal(latents(host, "plain"), latents(host, "zero"))


def test_a_start_of_one_is_the_bare_model_and_the_weights_are_never_touched(host: Host) -> None:
    graph = AvatarGraph()
    who = graph.sample(52)
    bare, never = graph.paint(graph.model), graph.paint(apply(graph, who, 1.0))
    late, full = graph.paint(apply(graph, who, 0.4)), graph.paint(apply(graph, who, None))
    dump(graph, graph.model, "untouched.safetensors")
    dump(graph, apply(graph, who, 0.4), "delayed.safetensors")
    result = host.run(graph.nodes)
    pictures = [result.pictures(node)[0] for node in (bare, never, late, full)]
    assert np.array_equal(pictures[0], pictures[1])
    assert not any(np.array_equal(a, b) for a, b in pairwise(pictures[1:]))
    before, after = (load_file(host.output / f"{n}.safetensors") for n in ("untouched", "delayed"))
    assert all(bool((before[key] == after[key]).all()) for key in before)


@pytest.mark.parametrize("switch", [3, 8])
def test_early_steps_are_the_bare_models_and_late_ones_the_patched_models(
    host: Host, switch: int
) -> None:
    graph = AvatarGraph()
    who = graph.sample(53)
    full, empty = apply(graph, who, None, 0.8), [graph.loader, 4]
    start = (switch - 0.5) / (STEPS - 1)  # "normal" spreads the steps evenly, the last at 1
    late = apply(graph, who, start, 0.8)
    keep(graph, stage(graph, late, empty, 0, STEPS), f"late{switch}")
    keep(graph, stage(graph, late, empty, 0, switch), f"late-half{switch}")
    half = stage(graph, graph.model, empty, 0, switch)
    keep(graph, half, f"bare-half{switch}")
    keep(graph, stage(graph, full, half, switch, STEPS), f"both{switch}")
    keep(graph, stage(graph, graph.model, half, switch, STEPS), f"bare{switch}")
    host.run(graph.nodes)
    assert np.array_equal(latents(host, f"late-half{switch}"), latents(host, f"bare-half{switch}"))
    assert np.array_equal(latents(host, f"late{switch}"), latents(host, f"both{switch}"))
    assert not np.array_equal(latents(host, f"late{switch}"), latents(host, f"bare{switch}"))


def test_the_host_does_not_mix_up_copies_with_and_without_a_start(host: Host) -> None:
    def picture(start: float | None, *, forget: bool) -> np.ndarray:
        graph = AvatarGraph()
        graph.paint(graph.model if start is None else apply(graph, graph.sample(54), start), seed=9)
        if forget:
            host.forget()
        return host.run(graph.nodes).pictures()[0]

    alone = {start: picture(start, forget=True) for start in (None, 0.3, 0.6)}
    for start in (None, 0.6, 0.3, None, 0.3, 0.6):
        graph = AvatarGraph(pictures=2)  # another prompt in between, on the same weights
        graph.paint(graph.model)
        host.run(graph.nodes)
        assert np.array_equal(picture(start, forget=False), alone[start])


def test_the_lora_for_other_nodes_has_no_start(host: Host) -> None:
    graph = AvatarGraph()
    who = graph.sample(55)
    for start, prefix in ((0.0, "loras/now"), (0.7, "loras/later")):
        graph.add("SaveLoRA", lora=[apply(graph, who, start)[0], 1], prefix=prefix)
    host.run(graph.nodes)
    now, later = (
        load_file(max((host.output / "loras").glob(f"{name}*.safetensors")))
        for name in ("now", "later")
    )
    assert now.keys() == later.keys() and all(bool((now[k] == later[k]).all()) for k in now)
