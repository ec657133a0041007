"""What an inversion makes of reduced models of every family, beside the host's own sampler; run by the host's Python.

denoising.py HOST REPO prints for each family and spelling, as JSON: how far predictions with a LoRA as an argument lie
from those of the host's sampler with the LoRA patched in, and gradients from finite differences. Also how far a batch
whose rows have prompts and LoRAs of their own lies from its rows one by one.
"""

# ruff: noqa: E402 - the host is found by its path first

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from pathlib import Path
from typing import Any

HOST, REPO = map(Path, sys.argv[1:3])
sys.path.insert(0, str(REPO / "benchmarks"))

import in_host

in_host.enter(HOST)

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

denoiser = in_host.part("nodes.host.denoiser").denoiser
model = in_host.part("nodes.host.model")
patched_each = in_host.part("nodes.host.patches").patched_each
plan_run = in_host.part("nodes.host.plan").plan_run
Objective = in_host.part("w2wpp.inversion").Objective
lora = in_host.part("w2wpp.lora.delta")
split = in_host.part("w2wpp.lora.families").split
members_of = in_host.part("w2wpp.lora.collection").members_of
fitting = in_host.part("w2wpp.training.fit_delta")
kohya_tensors = in_host.part("w2wpp.lora.write").kohya_tensors

spec = importlib.util.spec_from_file_location("probe", REPO / "tests/host/probe/__init__.py")
probe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(probe)
spec = importlib.util.spec_from_file_location("weights", REPO / "tests/host/weights.py")
weights = importlib.util.module_from_spec(spec)
spec.loader.exec_module(weights)

STEP = 0.02  # of the finite differences


def space_of(family: str, spelled: str) -> Any:
    """A space of four random LoRAs of ranks 1 to 4, in the model's own names or in diffusers' parts of them."""
    loras = {}
    for rank, made in zip(weights.RANKS, weights.random_loras(family)):
        update = {}
        for name, (down, up) in made.items():
            parts = {name: lora.Factors(down, up / rank)}
            update |= split(name, parts[name]) if spelled == "parts" and down.ndim == 2 else parts
        loras[str(rank)] = update
    return fitting.fit_delta(members_of(loras), fitting.CollectionSettings(rank=16))[0]


def of_the_sampler(patched: Any, prompt: list, noise: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """The pictures that the host's sampler sees in noisy ones."""
    comfy.model_management.load_models_gpu([patched])
    patched.pre_run()
    try:
        noisy = patched.model.model_sampling.noise_scaling(sigma, noise, x0)
        conds = {"positive": comfy.sampler_helpers.convert_cond(prompt)}
        conds = comfy.samplers.process_conds(
            patched.model, noise, conds, torch.device("cpu"), x0, None, 0
        )
        positive = conds["positive"]
        return comfy.samplers.calc_cond_batch(
            patched.model, [positive], noisy, sigma, patched.model_options
        )[0]
    finally:
        patched.cleanup()


def compared(family: str, spelled: str) -> dict[str, Any]:
    bare, prompt, _ = probe.ReducedModel.execute(family).args
    space = space_of(family, spelled)
    g = torch.Generator().manual_seed(0)
    shape = (3, bare.model.latent_format.latent_channels, 8, 12)
    noise, picture = torch.randn(shape, generator=g), torch.randn(1, *shape[1:], generator=g)
    z = torch.randn(1, space.latent_size, generator=g)
    vector = space.decode(z)
    schedule = model.noise_schedule(bare)
    times = torch.tensor([len(schedule) // 10, len(schedule) // 2, len(schedule) - 1])
    tensors = kohya_tensors(space.layout.unpack(vector[0]), alpha=space.layout.alpha)
    (patched,) = patched_each(bare, space.layout, [tensors], 1.0)
    frames = model.has_frames(bare.model)
    around = (lambda t: t.unsqueeze(2)) if frames else (lambda t: t)
    sigma = patched.model.model_sampling.sigmas[times].clone()
    expected = of_the_sampler(
        patched, prompt, around(noise), around(picture.expand(shape)).clone(), sigma
    ).reshape(shape)
    noisy, _ = schedule.add_noise(picture.expand(shape), noise, times)
    found: dict[str, Any] = {"modules": len(space.layout.modules), "off": 0.0, "gradients": []}
    for gradients, checkpointing in ((False, None), (True, False), (True, True)):
        plan = plan_run(bare, shape, gradients=gradients, checkpointing=checkpointing)
        with denoiser(bare, space.layout, prompt, plan) as denoise:
            output = denoise(noisy, times, vector)
            mine = torch.stack(
                [schedule.clean(x, o, int(t)) for x, o, t in zip(noisy, output, times)]
            )
            off = (mine - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
            found["off"] = max(found["off"], float(off.max()))
            if gradients:
                objective = Objective(space, picture, denoise, schedule, draws=3, seed=1)
                draw = objective.draw(0)
                found["gradients"].append(
                    objective.value_and_gradient(z, None, draw)[1][0].tolist()
                )
    if spelled == "whole":
        found["rows_off"] = rows_off(bare, space, prompt, noisy, times)
    found["differences"] = [
        float(objective_of(bare, space, prompt, picture, schedule, z, STEP * unit))
        for unit in torch.eye(space.latent_size)
    ]
    return found


def rows_off(bare: Any, space: Any, prompt: list, noisy: Tensor, times: Tensor) -> float:
    """Six rows of two people, under three prompts of which one is of another length, beside each row alone."""
    ((tokens, options),) = prompt
    g = torch.Generator().manual_seed(2)
    longer = torch.randn(1, tokens.shape[1] * 5, tokens.shape[2], generator=g)
    prompts = [prompt, [[tokens.flip(1), options]], [[longer, options]]]
    vectors = space.decode(torch.randn(2, space.latent_size, generator=g))
    noisy, times = noisy.repeat(2, 1, 1, 1), times.repeat(2)
    order = [2, 0, 1, 1, 2, 0]
    plan = plan_run(bare, tuple(noisy.shape), gradients=False)
    with denoiser(bare, space.layout, prompt, plan) as denoise:
        under = denoise.under([denoise.prompt(prompts[i]) for i in order])
        together = under(noisy, times, vectors)
    off = []
    for row, i in enumerate(order):
        part = slice(row, row + 1)
        with denoiser(bare, space.layout, prompts[i], plan) as denoise:
            alone = denoise(noisy[part], times[part], vectors[row // 3][None])
        off.append(float((together[part] - alone).norm() / alone.norm()))
    return max(off)


def objective_of(
    bare: Any, space: Any, prompt: list, picture: Tensor, schedule: Any, z: Tensor, step: Tensor
) -> Tensor:
    """The central difference of the loss along a step, on the host's own weights."""
    plan = plan_run(bare, (3, *picture.shape[1:]), gradients=False)
    with denoiser(bare, space.layout, prompt, plan) as denoise:
        objective = Objective(space, picture, denoise, schedule, draws=3, seed=1)
        after, before = (
            objective.loss(z + sign * step, None, objective.draw(0)) for sign in (1, -1)
        )
    return (after - before) / (2 * step.norm())


logging.disable(logging.WARNING)
with torch.inference_mode(False), torch.no_grad():
    print(
        json.dumps(
            {
                f"{family}, {spelled}": compared(family, spelled)
                for family in weights.INVERTED
                for spelled in ("whole", "parts")
            }
        )
    )
