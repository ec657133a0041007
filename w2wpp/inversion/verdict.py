"""Whether an inversion can be trusted: a calibrated confidence, and one sentence that says why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..commands import command
from ..errors import ConfigError, DataError
from ..evidence import NAMES, agreement_of, evidence, table
from ..start_network import StartNetwork
from .framing import CERTAIN, Framed

VERSION = 1
LIMIT = 4.0  # stds beyond which evidence says no more; as in training.fit_verdict
GOOD = "This picture shows a face that the space can express."
SOMEBODY_ELSE = "Painted again, the person found does not look like the one in the picture."


@dataclass(frozen=True)
class Calibration:
    """How evidence becomes a confidence: a logistic regression on it and on its squares, in stds.

    It is fitted to paintings that the network did not learn from (`training.fit_verdict`).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights: tuple[float, ...]  # of 1, of evidence and of its squares
    usual: Mapping[str, tuple[float, float]]  # where evidence lies for pictures as they should be
    flag_below: float  # a confidence that one such picture in twenty falls short of
    # Mean and std of the agreement (artanh of the cosine) of answers to two paintings of one person, and of two people.
    same: tuple[float, float] | None = None
    other: tuple[float, float] | None = None

    @classmethod
    def of(cls, start: StartNetwork | None) -> Calibration | None:
        """A network's own; none if it has none. Raises ConfigError for one of a later release."""
        facts = None if start is None else start.verdict
        if facts is None:
            return None
        if facts.get("version") != VERSION or tuple(facts.get("evidence", ())) != NAMES:
            raise ConfigError(
                f"This release knows verdicts of version {VERSION}; the start network of this space has version "
                f"{facts.get('version')!r}. Update, or teach it again."
            )
        try:
            count = len(NAMES)
            numbers = {
                key: tuple(float(n) for n in facts[key]) for key in ("mean", "std", "weights")
            }
            usual = {
                name: (float(low), float(high)) for name, (low, high) in facts["usual"].items()
            }
            pairs = {
                key: (float(facts["repaint"][key][0]), float(facts["repaint"][key][1]))
                for key in ("same", "other")
                if "repaint" in facts  # files of earlier releases know nothing of it
            }
            found = cls(
                **numbers,
                usual=usual,
                flag_below=float(facts["flag_below"]),
                same=pairs.get("same"),
                other=pairs.get("other"),
            )
            lengths = [len(found.mean), len(found.std), len(found.weights)]
            every = [n for part in (*numbers.values(), *pairs.values()) for n in part]
            if any(std <= 0 for _, std in pairs.values()):
                raise ValueError(f"stds of {pairs}")
            if lengths != [count, count, 2 * count + 1] or not all(map(math.isfinite, every)):
                raise ValueError(f"{lengths} numbers")
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise ConfigError(f"The verdict of this start network is damaged: {e}.") from e
        return found

    def __call__(self, found: Mapping[str, Tensor]) -> Tensor:
        """Evidence [n] by name -> confidence [n] in [0, 1]."""
        mean, std, weights = (torch.tensor(part) for part in (self.mean, self.std, self.weights))
        x = ((table(found) - mean) / std).clamp(-LIMIT, LIMIT)
        columns = torch.cat([torch.ones(len(x), 1), x, x.square()], dim=1)
        return (columns @ weights).sigmoid()

    def doubt(self, repaint: float) -> float:
        """What a cosine of answers to the pictures and to a painting of the person found takes from the log odds.

        It is how much likelier two people agree like this than one person in two paintings, and never speaks for an
        answer: whoever is painted is read as themselves, also where the picture shows nobody.
        """
        if self.same is None or self.other is None or self.same[0] <= self.other[0]:
            return 0.0
        x = agreement_of(torch.tensor(repaint)).clamp(self.other[0], self.same[0])
        one, two = (_log_normal(float(x), *pair) for pair in (self.same, self.other))
        return min(LIMIT, max(0.0, two - one))


@dataclass(frozen=True)
class Verdict:
    """What is thought of an inversion."""

    confidence: float | None  # in [0, 1]: how close to the truth; none where nobody calibrated it
    sentence: str
    flagged: bool
    evidence: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.confidence is None:
            return self.sentence
        return f"Confidence {self.confidence:.2f}. {self.sentence}"

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        told = {name: round(value, 4) for name, value in self.evidence.items()}
        sure = None if self.confidence is None else round(self.confidence, 4)
        return {
            "confidence": sure, "sentence": self.sentence, "flagged": self.flagged, "evidence": told
        }  # fmt: skip

    def require(self) -> None:
        """Strict mode: raises DataError for an inversion that should not be trusted."""
        if self.flagged or self.confidence is None:
            raise DataError(f"Refused, because strict was asked for. {self}")


def confidences(start: StartNetwork, pictures: Tensor, mask: Tensor | None = None) -> Tensor | None:
    """How far each picture [n, 3, S, S] in the frame can be trusted [n]; none without a calibration."""
    calibration = Calibration.of(start)
    return None if calibration is None else calibration(evidence(start, pictures, mask))


def repainted(start: StartNetwork, framed: Framed, painted: Tensor) -> float:
    """The cosine of the answers to framed pictures of one person and to paintings [k, 3, h, w] of whom was found.

    Paintings are made with the prompt that describes the pictures, so that both show the same scene; what a mask hides
    is hidden in both.
    """
    pictures = framed.pictures
    if painted.shape[-2:] != pictures.shape[-2:]:
        size = tuple(pictures.shape[-2:])
        painted = F.interpolate(painted, size, mode="bilinear", antialias=True)
    if framed.weighted and start.hides:
        pictures, painted = pictures * framed.weights, painted * framed.weights.amax(0)
    with torch.no_grad():
        place = next(start.parameters())
        shown, again = (start(p.to(place)).mean(0) for p in (pictures, painted))
    return float(F.cosine_similarity(shown, again, dim=0))


def judge(
    start: StartNetwork | None,
    framed: Framed,
    *,
    gain: float | None = None,
    repaint: float | None = None,
) -> Verdict:
    """What to think of an answer to framed pictures of one person.

    gain: the share of the average person's loss that the person found is spared, if somebody measured it. repaint: what
    `repainted` says of a painting of the person found. Several pictures are as good as they are on average.
    """
    calibration = Calibration.of(start)
    told = {
        name: value for name, value in (("gain", gain), ("repaint", repaint)) if value is not None
    }
    nobody = bool((framed.certainty < CERTAIN).all())
    if calibration is None or start is None:
        if nobody:
            return Verdict(0.0, "No face was found.", True, told)
        if gain is not None and gain <= 0:
            return Verdict(0.0, _explains_nothing(gain), True, told)
        return Verdict(None, _unknown(), False, told)
    mask = framed.weights if framed.weighted else None
    found = evidence(start, framed.pictures, mask)
    sure = float(calibration(found).mean())
    told |= {name: float(values.mean()) for name, values in found.items()}
    if nobody:
        return Verdict(min(sure, float(framed.certainty.max())), "No face was found.", True, told)
    if gain is not None and gain <= 0:
        return Verdict(min(sure, 0.5 * calibration.flag_below), _explains_nothing(gain), True, told)
    alone = sure  # by the picture alone
    if repaint is not None:
        sure = _odds_less(sure, calibration.doubt(repaint))
    if sure >= calibration.flag_below:
        return Verdict(sure, GOOD, False, told)
    other = alone >= calibration.flag_below
    return Verdict(sure, SOMEBODY_ELSE if other else _why(calibration, told), True, told)


def _odds_less(sure: float, doubt: float) -> float:
    """A confidence whose log odds are lower by a doubt."""
    odds = torch.tensor(sure, dtype=torch.float64).clamp(1e-9, 1 - 1e-9).logit() - doubt
    return min(sure, float(odds.sigmoid()))


def _log_normal(x: float, mean: float, std: float) -> float:
    """Density of a normal distribution, log, up to a constant."""
    return -0.5 * ((x - mean) / std) ** 2 - math.log(std)


def _explains_nothing(gain: float) -> str:
    return (
        "The model explains the picture no better with the person found than with the average one (the loss is "
        f"{1 - gain:.4g} times as large): it shows nobody whom the space can express, or the prompt does not fit it."
    )


# What it means if evidence lies outside of what is usual: on which side, and in words. The first that holds is said.
_REASONS = (
    ("certain", "low", "Hardly a face can be seen."),
    ("displaced", "high", "The face is not where the space's pictures have it: leave framing on, or mask it."),
    ("halves", "low", "Half of the face is hidden, or the two halves are of two people."),
    ("strangeness", "high", "The picture is unlike those that the space knows: too dark, too blurred, or no face."),
    ("mirrored", "low", "Mirrored, it looks like somebody else: something is before the face, or light is one-sided."),
    ("moved", "low", "Moved by a few pixels, the picture looks like somebody else: too small, or more than one face."),
    ("length", "high", "The face is further from the average than the space's people are."),
    ("length", "low", "The face is hardly told from the average person."),
)  # fmt: skip


def _why(calibration: Calibration, told: Mapping[str, float]) -> str:
    for name, side, sentence in _REASONS:
        low, high = calibration.usual.get(name, (-math.inf, math.inf))
        if (side == "low" and told[name] < low) or (side == "high" and told[name] > high):
            return sentence
    return "Nothing alone is odd, but together it is unlike pictures that could be answered well."


def _unknown() -> str:
    return (
        "How far this answer can be trusted is not known: the space has no start network that was taught to judge. "
        f"W2W++ Train Start Network makes one, or the command '{command('fit-start')}'."
    )
