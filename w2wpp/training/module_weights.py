"""How much each module of a collection's LoRAs changes what the model does: the functional metric, module by module.

Frobenius norms count a change of any weight alike. Let dW be a LoRA's update of one module, J the Jacobian of the
model's output with respect to that module's weight, and v standard normal: E (v^T J dW)^2 = |J dW|^2. A weight of the
module is the ratio of that to |dW|^2, averaged over the collection's own LoRAs, so that

    <dW_i, dW_j> = sum over modules of weight * tr(dW_i^T dW_j)

costs files no more than a number a module. v^T J dW is what the output changes by when B grows by itself,
sum over tokens of g . B (A x), so the gradient of B against B: one forward and one backward pass a row.

Letters: n rows, N LoRAs, M modules, P numbers of a LoRA.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..diffusion.denoise import Denoise
from ..diffusion.schedule import Schedule
from ..errors import ConfigError, DataError
from ..lora.collection import Collection
from ..lora.delta import Factors, square_norm
from ..lora.layout import Layout
from .sketch import DAMPING, probes, rows_at

ROWS = 128  # a module's weight is then known to about one part in eight


def module_weights(
    denoise: Denoise,
    schedule: Schedule,
    pictures: Tensor,
    collection: Collection,
    layout: Layout,
    *,
    rows: int = ROWS,
    batch: int = 1,
    damping: float = DAMPING,
    generator: torch.Generator,
    callback: Callable[[int, int], None] = lambda done, rows: None,
) -> Tensor:
    """Weights [M] of the collection's modules, in the mean one over the LoRAs' |dW|^2.

    pictures [M', C, H, W] as the model sees them, each shown with another noise and timestep. `layout`: what `denoise`
    takes; its rank is the collection's largest, so that each LoRA is itself. `damping` is the share of a weight that is
    the same for all modules. What is random comes from the CPU ``generator``.

    Raises ConfigError for no rows or pictures and shares beyond 0 and 1, DataError where nothing changes the output.
    """
    if rows < 1 or pictures.ndim != 4 or not 0 <= damping <= 1:
        raise ConfigError(
            "Weighing modules needs rows, pictures [n, C, H, W] and a damping from 0 to 1. Got "
            f"{rows=}, {list(pictures.shape)} and {damping=}."
        )
    energy = torch.zeros(len(layout.modules), dtype=torch.float64)
    length = energy.clone()
    for part in probes(schedule, pictures, collection.count, rows, batch, generator):
        members = [_member(collection, layout, int(i)) for i in part.points]
        vectors = torch.stack([vector for vector, _ in members])
        gradients = rows_at(denoise, part, vectors.to(pictures.device)).cpu()
        for m, (_, _, up) in enumerate(layout.slices()):
            # Its B against B's gradient: how the output moves when the module's update grows.
            along = (gradients[:, up].double() * vectors[:, up].double()).sum(1)
            energy[m] += float(along.square().sum())
        length += torch.stack([squares for _, squares in members]).sum(0)
        callback(int(part.rows[-1]) + 1, rows)
    mean = float(energy.sum()) / float(length.sum()) if float(length.sum()) > 0 else 0.0
    if not mean > 0:
        raise DataError(
            "The model's output does not change with these LoRAs, so their modules can't be weighed by it."
        )
    seen = torch.where(length > 0, energy / length.clamp_min(1e-300), mean) / mean
    return (1 - damping) * seen + damping


def _member(collection: Collection, layout: Layout, i: int) -> tuple[Tensor, Tensor]:
    """One LoRA as a vector [P] of the layout, and |dW|^2 [M] of its modules."""
    lora, squares = {}, []
    for module in layout.modules:
        f = collection.read(i, module.name)
        down = torch.zeros(layout.rank, module.in_features)
        up = torch.zeros(module.out_features, layout.rank)
        if f is not None:
            down[: f.rank], up[:, : f.rank] = f.down.float(), f.up.float() * f.scale
        lora[module.name] = (down, up)
        squares.append(0.0 if f is None else square_norm(Factors(down, up)))
    return layout.pack(lora), torch.tensor(squares, dtype=torch.float64)
