"""Kinds that are known by name and not taken: nothing of them is read as something else."""

from __future__ import annotations

from dataclasses import dataclass

from ..products import Delta
from .parts import Parts


@dataclass(frozen=True)
class Refused:
    """A kind by name, with the reason why it is not taken."""

    name: str
    parts: frozenset[str]
    why: str

    def shape(self, parts: Parts) -> tuple[int, ...]:
        return ()  # not told by headers

    def product_rank(self, parts: Parts) -> None:
        return None

    def delta(self, parts: Parts) -> Delta:
        raise parts.error(
            f"is {self.name}, {self.why}. Merge it into its base model and extract a LoRA of the "
            "difference (ComfyUI: Load LoRA, ModelSubtract, Extract and Save Lora)."
        )


OF_THE_BASE = "which multiplies the base model's weights instead of adding to them"
REFUSED = (
    Refused(
        "OFT",
        frozenset({"oft_blocks", "oft_diag", "oft_r", "oft_R", "rescale"}),
        OF_THE_BASE,
    ),
    Refused("BOFT", frozenset({"boft_R", "boft_s", "boft_P"}), OF_THE_BASE),
    Refused("GLoRA", frozenset({"a1", "a2", "b1", "b2"}), OF_THE_BASE),
    Refused("(IA)^3", frozenset({"ia3_l", "on_input"}), OF_THE_BASE),
    Refused(
        "a weight to be set",
        frozenset({"set_weight", "weight"}),
        "which replaces the base model's instead of adding to it",
    ),
    Refused(
        "an update with parts that are not known",
        frozenset({"scalar", "reshape_weight"}),
        "which would be read wrongly without them",
    ),
)
