"""The kinds of updates that files hold: one algorithm a file, and this list of them."""

from .difference import Difference
from .dora import MAGNITUDES, decomposed
from .hadamard import Hadamard
from .kronecker import Kronecker
from .low_rank import LowRank
from .parts import Kind, Parts, Scale
from .refused import REFUSED

KINDS: tuple[Kind, ...] = (LowRank(), Hadamard(), Kronecker(), Difference(), *REFUSED)

__all__ = ["KINDS", "MAGNITUDES", "Kind", "Parts", "Scale", "decomposed"]
