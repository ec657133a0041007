"""From pictures of a person to a point of a space: objective, optimisers, and the driver that joins them."""

from ..diffusion.schedule import NoiseSchedule
from .adam import Adam
from .cma import Cma
from .driver import Progress, Solution, StopInversion, invert
from .multistart import Hybrid
from .objective import Denoise, Draw, Objective
from .optimiser import Optimiser, Run
from .pivotal import Pivotal
from .recipes import FAR, NEAR, Recipe
from .starts import best_of

__all__ = [
    "FAR",
    "NEAR",
    "Recipe",
    "Adam",
    "Cma",
    "Denoise",
    "Draw",
    "Hybrid",
    "NoiseSchedule",
    "Objective",
    "Optimiser",
    "Pivotal",
    "Progress",
    "Run",
    "Solution",
    "StopInversion",
    "best_of",
    "invert",
]
