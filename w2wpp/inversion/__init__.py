"""From pictures of a person to a point of a space: a session joins objective, optimiser and driver."""

from ..diffusion.denoise import Denoise
from ..diffusion.schedule import LinearSchedule, NoiseSchedule, Schedule
from .adam import Adam
from .cma import Cma
from .driver import invert
from .multistart import Multistart
from .objective import Draw, Objective
from .optimiser import Optimiser, Run
from .pivotal import Pivotal
from .recipes import FROM_AVERAGE, FROM_GUESS, METHODS, OLDER_NAMES, Recipe, recipe_for
from .session import Session, session, start_from
from .solution import Callback, Progress, Solution, StopInversion

__all__ = [
    "FROM_AVERAGE",
    "FROM_GUESS",
    "METHODS",
    "OLDER_NAMES",
    "Adam",
    "Callback",
    "Cma",
    "Denoise",
    "Draw",
    "LinearSchedule",
    "Multistart",
    "NoiseSchedule",
    "Objective",
    "Optimiser",
    "Pivotal",
    "Progress",
    "Recipe",
    "Run",
    "Schedule",
    "Session",
    "Solution",
    "StopInversion",
    "invert",
    "recipe_for",
    "session",
    "start_from",
]
