"""What a diffusion model is to this library: a function."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

# denoise(noisy [N, C, H, W], timestep [N] of a schedule, vectors [R, P]) -> what the schedule says that the model
# predicts, [N, C, H, W]; rows ordered by vector
Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
