"""The user's model as an inversion sees it: denoising with LoRAs as an argument.

Everything goes the host's own way: its sampler's helpers prepare the prompt, its model calls its network, its sampling
says what noisy pictures and predictions are (``model.noise_schedule``). Only what the sampling does around the network
is left to that schedule, so that no rounding comes between the network and the loss.

For gradients the network is a private one; without them it is the host's own, with hooks for as long as the block
lasts.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...w2wpp import Layout
from ...w2wpp.lora.hooks import Site, hooked
from .model import check_fit, check_inputs, has_frames, reorder, sites_of
from .plan import Plan, count_parameters
from .private import attention, in_training, private_network, recompute, with_network
from .prompts import Prompt, check_prompt, joined, side_by_side


class _Bare:
    """A sampling of the host's that adds nothing to a network: noisy pictures go in and predictions out as they are."""

    def __init__(self, sampling: Any) -> None:
        self._sampling = sampling

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampling, name)

    def calculate_input(self, sigma: Tensor, noisy: Tensor) -> Tensor:
        """As the schedule made them."""
        return noisy

    def calculate_denoised(self, sigma: Tensor, output: Tensor, noisy: Tensor) -> Tensor:
        """As the schedule takes it."""
        return output


class Denoiser:
    """``denoise(noisy [N, C, H, W], timestep [N], vectors [B, P])`` -> prediction [N, C, H, W].

    Timesteps are those of the model's schedule. Rows are ordered by LoRA, N a multiple of B.
    """

    def __init__(
        self,
        base: Any,
        layout: Layout,
        sites: dict[str, Site],
        prompt: Prompt,
        plan: Plan,
        functions: dict[str, Callable[[Tensor], Tensor]],
        new_prompt: Callable[..., Prompt],
    ) -> None:
        self.plan = plan
        self._base, self._layout, self._sites, self._prompt = base, layout, sites, prompt
        self._new_prompt = new_prompt  # of a conditioning, for this model
        self._functions = functions  # of modules whose rows the host keeps in another order
        self._sigmas = base.model_sampling.sigmas.detach().clone().to(plan.device)  # [T]
        self._frames = has_frames(base)
        self._lora: dict[str, tuple[Tensor, Tensor]] = {}
        self._options: dict[str, Any] = {"cond_or_uncond": [0]}
        if plan.gradients:
            self._options["optimized_attention_override"] = attention

    def __call__(self, noisy: Tensor, timestep: Tensor, vectors: Tensor) -> Tensor:
        return self._predict(noisy, timestep, vectors, self._prompt.batch(len(noisy)))

    def prompt(self, conditioning: list) -> Prompt:
        """A prompt for single rows. Raises ConfigError for one that is not for the whole picture."""
        check_prompt(conditioning)
        return self._new_prompt(conditioning, kept_on="cpu")

    def under(self, prompts: Sequence[Prompt]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The denoiser for batches of which row i has the prompt i."""
        return functools.partial(self._each_under, prompts)

    def _each_under(
        self, prompts: Sequence[Prompt], noisy: Tensor, timestep: Tensor, vectors: Tensor
    ) -> Tensor:
        device, parts = self.plan.device, side_by_side(prompts)
        if len(parts) == 1:
            return self._predict(noisy, timestep, vectors, joined(prompts, device))
        each = vectors.repeat_interleave(len(noisy) // len(vectors), 0)  # rows in any order
        found = [
            self._predict(noisy[p], timestep[p], each[p], joined([prompts[i] for i in p], device))
            for p in parts
        ]
        order = torch.tensor([row for part in parts for row in part], device=noisy.device)
        return torch.cat(found)[order.argsort()]

    def _predict(
        self, noisy: Tensor, timestep: Tensor, vectors: Tensor, words: dict[str, Any]
    ) -> Tensor:
        place = {"device": self.plan.device, "dtype": self.plan.dtype}
        self._lora = self._layout.unpack(vectors.to(**place))
        reorder(self._lora, self._functions)
        sigma = self._sigmas[timestep.to(self._sigmas.device)]
        noisy = noisy.to(**place)
        predicted = self._base.apply_model(
            noisy.unsqueeze(2) if self._frames else noisy,
            sigma,
            transformer_options={**self._options, "sigmas": sigma},
            **words,
        )
        return predicted.squeeze(2) if self._frames else predicted

    @contextlib.contextmanager
    def hooked(self) -> Iterator[Denoiser]:
        """Within the block the model's layers add the LoRAs of the last call."""
        try:
            with hooked(self._sites, lambda name: self._lora[name], self._layout.scale):
                yield self
        finally:
            self._lora = {}
            # Whoever still holds the denoiser holds no weights.
            del self._base, self._sites, self._prompt, self._new_prompt

    def as_called(self, run: Callable) -> Callable:
        """``run`` with the LoRAs of this call, also if a later call comes before it is run again."""
        lora = self._lora

        def with_these(*args: Any, **kwargs: Any) -> Any:
            before, self._lora = self._lora, lora
            try:
                return run(*args, **kwargs)
            finally:
                self._lora = before

        return with_these


@contextlib.contextmanager
def denoiser(model: Any, layout: Layout, conditioning: list, plan: Plan) -> Iterator[Denoiser]:
    """The network of ``model`` with its patches, under a prompt. Nothing stays behind when the block is left.

    Raises LayoutMismatch for a model that the layout does not fit or that wants more than noisy pictures, and
    ConfigError for a prompt that is not one for the whole picture.
    """
    targets = check_fit(model, layout)
    check_inputs(model)
    check_prompt(conditioning)
    sampling = model.get_model_object("model_sampling")
    switch = in_training() if plan.gradients else contextlib.nullcontext()
    try:
        if plan.gradients:
            wanted = count_parameters(model) * plan.dtype.itemsize + plan.activations
            comfy.model_management.free_memory(wanted, plan.device)
            network = private_network(model, plan)
        else:
            comfy.model_management.load_models_gpu([model], memory_required=plan.activations)
            network = model.model.diffusion_model
        base = with_network(model, network, _Bare(sampling))
        sites, functions = sites_of(network, targets)
        latents = torch.zeros(1, *plan.latents, device=plan.device)
        latents = latents.unsqueeze(2) if has_frames(base) else latents
        new_prompt = functools.partial(Prompt, base, latents=latents)
        prompt = new_prompt(conditioning)
        prompt.require_no_picture(model, plan.latents[0])
        denoise = Denoiser(base, layout, sites, prompt, plan, functions, new_prompt)
        if plan.checkpointing:
            recompute(network, denoise.as_called)
        with switch, denoise.hooked():
            yield denoise
    finally:
        network = base = denoise = sites = prompt = new_prompt = None
        gc.collect()  # checkpointed blocks refer to themselves
        comfy.model_management.soft_empty_cache()
