"""A start network without labels: learned from paintings of a space's own samples alone.

Of a latent only part shows in a picture: a linear fit of pictures to latents, taken in stds of what it leaves
unexplained, has as its singular directions what shows, from most to least (canonical correlations, Hotelling 1936). So
the network learns to read these coordinates and no others, each as heavy as it shows; then its own features take the
place of the pixels, the directions are found again, and it goes on (alternating conditional expectations, Breiman &
Friedman 1985). Paintings kept apart tell how strongly it answers, and answers are lengthened to match.

With a pretrained vision model its features take the place of learned ones, and only linear maps are fitted
(`fit_sight`).

The same paintings, moved about, teach a locator, and where they change with the latents is where heads are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, DataError
from ..placement import Frame, place_box
from ..rates import warm_cosine
from ..sight import Vision
from ..start_network import StartNetwork, build_start
from .augment import Augmentation
from .compute import Compute
from .fit_locator import LocatorTraining, fit_locator
from .fit_sight import SightTraining, fit_sight
from .fit_start import LabelMap
from .fit_verdict import fit_verdict
from .painted import EVEN, PaintedPeople, Readable, readable

Told = Callable[[int, int, str], None]  # done, of, line
FEWEST = 64  # people to learn anything from


@dataclass(frozen=True)
class PaintingsTraining:
    """Settings of learning from paintings."""

    seed: int = 31
    apart: float = 0.2  # share of the people whose paintings are kept apart
    most: int = 32  # coordinates that are read at most
    least_share: float = 0.08  # of a coordinate's variance that pictures must tell
    rounds: tuple[float, ...] = (0.4, 0.6)  # shares of the steps, each with coordinates of its own
    steps: int = 2_400
    batch: int = 64
    learning_rate: float = 2e-3  # peak of each round; linear warm-up, cosine to zero
    agreement: float = 0.1  # weight of two paintings of one person being read alike
    damping: float = 0.05  # of lengthened answers, in mean eigenvalues
    size: int = 64
    width: int = 32
    features: int = 128
    augmentation: Augmentation = field(default_factory=Augmentation)
    locator: LocatorTraining | None = field(default_factory=LocatorTraining)
    sight: SightTraining = field(default_factory=SightTraining)  # where a vision model is given

    def __post_init__(self) -> None:
        if not 0 < self.apart < 0.9 or self.steps < 1 or self.batch < 2 or self.most < 1:
            raise ConfigError(
                "Learning from paintings keeps some of them apart, in steps of batches of at least two. Got "
                f"{self.apart=}, {self.steps=}, {self.batch=}, {self.most=}."
            )


def fit_paintings(
    painted: PaintedPeople,
    config: PaintingsTraining,
    *,
    vision: Vision | None = None,
    compute: Compute | None = None,
    callback: Told = lambda done, of, line: None,
) -> tuple[StartNetwork, Frame, dict[str, Any]]:
    """A start network that reads, locates and judges; how its pictures were framed; and a report.

    With a vision model people are read by what that sees; the network then wants the same one wherever it is used
    (`StartNetwork.seeing`). What the report says of answers was measured on people kept apart. Raises DataError for
    too few people.
    """
    compute = compute or Compute()
    learned_from, apart = _divided(painted, config)
    z, bank = apart.z, apart.bank
    head, frame = measure_head(learned_from)
    if vision is None:
        network, found = _Reading(learned_from, config, head, compute, callback).train()
        features = None
    else:
        sighted = fit_sight(
            learned_from,
            vision,
            config.sight,
            frame=frame,
            head=head,
            augmentation=config.augmentation,
            most=config.most,
            least_share=config.least_share,
            features=config.features,
            seed=config.seed,
            callback=callback,
        )
        network, found, features = sighted.network, sighted.found, sighted.features
    locator = None
    if config.locator is not None:
        locator = fit_locator(
            learned_from.anyone, config.locator, head=head, compute=compute, callback=callback
        )
    answer, slope = _answer(network.seeing(vision), found, z, bank, config)
    if features is None:
        features = _seen(network, learned_from, config)
    start = _assembled(network, answer, locator, features, config)
    seeing = start.seeing(vision)
    start.verdict = fit_verdict(
        seeing,
        z,
        bank,
        found.directions,
        config.augmentation,
        head=head,
        most=600 if vision is None else config.sight.judged,
    )
    report = {
        "people": len(learned_from),
        "paintings": painted.bank.shape[0] * painted.bank.shape[1],
        "kept_apart": len(apart),
        "coordinates": len(found.share),
        "told_by_pictures": [round(float(s), 3) for s in found.share],
        "slope": round(slope, 3),
        **_judged(seeing, found, z, bank),
        "frame": frame.to_json(),
        "vision": None if vision is None else vision.name,
        "training": asdict(config),
    }
    return start.requires_grad_(False).eval(), frame, report


def fit_placing(
    start: StartNetwork,
    painted: PaintedPeople,
    config: PaintingsTraining,
    *,
    compute: Compute | None = None,
    callback: Told = lambda done, of, line: None,
) -> tuple[StartNetwork, Frame, dict[str, Any]]:
    """A start network that answers as one does that came otherwise, and finds faces as paintings taught it.

    As `fit_paintings`, but for what answers: that stays as it is, to the bit. It learns no verdict, for what a network
    was not taught to bear it can't tell either.
    """
    learned_from, apart = _divided(painted, config)
    head, frame = measure_head(learned_from)
    locator = fit_locator(
        learned_from.anyone,
        config.locator or LocatorTraining(),
        head=head,
        compute=compute or Compute(),
        callback=callback,
    )
    placing = build_start({**start.config, "locator": locator.sizes})
    parts = {n: t for n, t in start.state_dict().items() if not n.startswith("locator.")}
    parts |= {f"locator.{name}": t for name, t in locator.state_dict().items()}
    placing.load_state_dict(parts)
    report = {
        "people": len(learned_from),
        "paintings": painted.bank.shape[0] * painted.bank.shape[1],
        "kept_apart": len(apart),
        "frame": frame.to_json(),
        "training": asdict(config),
    }
    return placing.requires_grad_(False).eval(), frame, report


def _divided(
    painted: PaintedPeople, config: PaintingsTraining
) -> tuple[PaintedPeople, PaintedPeople]:
    """Those that are learned from, and those kept apart. Raises DataError for too few."""
    least = fewest_people(painted.z.shape[1], config)
    if len(painted) < least:
        raise DataError(
            f"A start network for {painted.z.shape[1]} latents learns from {least} painted people at least, thousands "
            f"if possible: fewer can't tell which latents show. Got {len(painted)}."
        )
    order = torch.randperm(len(painted), generator=torch.Generator().manual_seed(config.seed))
    apart = max(FEWEST // 4, round(config.apart * len(painted)))
    return painted[order[apart:]], painted[order[:apart]]


def fewest_people(latent_size: int, config: PaintingsTraining) -> int:
    """How many people must be painted: linear fits from latents need half as many again as there are latents."""
    return max(FEWEST, math.ceil(1.5 * latent_size / (1 - config.apart)))


def measure_head(painted: PaintedPeople, *, size: int = 32) -> tuple[Tensor, Frame]:
    """Where people are in paintings: a map [S, S] in [0, 1], and its box as a frame.

    A pixel belongs to the person if latents tell what it is: scenes change with the noise, people with the latent.
    """
    n, m = painted.bank.shape[:2]
    seen = _small(painted.bank, size).flatten(3).mean(2)  # [n, m, size^2], brightness
    told = torch.zeros(size**2)
    for scene in range(m):
        x = seen[:, scene] - seen[:, scene].mean(0)
        fit = LabelMap.fit(painted.z, x, penalty=EVEN)
        left = (x - fit(painted.z)).square().sum(0) / max(1, n - painted.z.shape[1] - 1)
        told += (x.square().mean(0) - left).clamp_min(0) / x.square().mean(0).clamp_min(1e-6) / m
    plane = F.avg_pool2d(
        F.pad(told.reshape(1, 1, size, size), (1, 1, 1, 1), mode="replicate"), 3, 1
    )
    strong = float(plane.flatten().quantile(0.95))
    level = 0.35 * strong
    inside = plane[0, 0] > level
    if strong < 0.02 or not bool(inside.any()):  # nothing shows: heads are taken to be anywhere
        return torch.ones(painted.bank.shape[-1], painted.bank.shape[-1]), Frame()
    rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
    box = torch.tensor([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]]).float()
    right, down, half_width, half_height = place_box(box, (size, size))[0].tolist()
    soft = (plane / level - 0.4).clamp(0, 1)
    soft = F.interpolate(soft, painted.bank.shape[-2:], mode="bilinear")[0, 0]
    return soft, Frame(round(right, 4), round(down, 4), round(half_width, 4), round(half_height, 4))


def _small(bank: Tensor, size: int) -> Tensor:
    """[n, m, 3, s, s] of a bank, scaled down to at most `size`."""
    n, m = bank.shape[:2]
    side = min(size, bank.shape[-1])
    parts = [
        F.interpolate(p.float() / 127, (side, side), mode="area")
        for p in bank.flatten(0, 1).split(256)
    ]
    small = torch.cat(parts)
    if side != size:
        small = F.interpolate(small, (size, size), mode="bilinear")
    return small.unflatten(0, (n, m))


class _Reading:
    """Rounds of finding what shows and learning to read it."""

    def __init__(
        self,
        painted: PaintedPeople,
        config: PaintingsTraining,
        head: Tensor,
        compute: Compute,
        callback: Told,
    ) -> None:
        self.painted, self.config, self.head = painted, config, head
        self.compute, self.callback = compute, callback
        self.generator = torch.Generator().manual_seed(config.seed + 1)
        self.done = 0

    def train(self) -> tuple[StartNetwork, Readable]:
        config, painted = self.config, self.painted
        m = painted.bank.shape[1]
        z = painted.z.repeat_interleave(m, 0)
        pixels = _small(painted.bank, 16).flatten(0, 1).flatten(1)
        found = self._found(pixels, z)
        network = self._network(len(found.share))
        shares = [r / sum(config.rounds) for r in config.rounds]
        for number, share in enumerate(shares):
            if number:
                found = self._found(self._features(network), z)
                network = self._reheaded(network, found, z)
            self._round(network, found, max(1, round(share * config.steps)))
        return network.requires_grad_(False).eval().cpu(), found

    def _found(self, seen: Tensor, z: Tensor) -> Readable:
        return readable(seen, z, most=self.config.most, least_share=self.config.least_share)

    def _network(self, answers: int) -> StartNetwork:
        config = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = StartNetwork(
                answers, size=config.size, width=config.width, features=config.features
            )
        return network.to(self.compute.device)

    def _round(self, network: StartNetwork, found: Readable, steps: int) -> None:
        config, (n, m) = self.config, self.painted.bank.shape[:2]
        optimiser = torch.optim.AdamW(
            network.parameters(), lr=config.learning_rate, weight_decay=0.05
        )
        weight = self.compute.put(found.share / found.share.mean())
        for step in range(steps):
            rate = warm_cosine(step, steps, warmup=min(100, 1 + steps // 10))
            optimiser.param_groups[0]["lr"] = config.learning_rate * rate
            people = torch.randint(n, (config.batch // 2,), generator=self.generator)
            scenes = torch.rand(len(people), m, generator=self.generator).argsort(1)[:, :2]
            first, second = scenes[:, 0], scenes[:, -1]
            seen = torch.cat(
                [self.painted.pictures(people, first), self.painted.pictures(people, second)]
            )
            seen = config.augmentation(seen, self.generator, head=self.head)
            wanted = self.compute.put(found(self.painted.z[people]).repeat(2, 1))
            with self.compute.products():
                read = network(self.compute.put(seen)).float()
            loss = (weight * (read - wanted).square()).mean()
            apart = read[: len(people)] - read[len(people) :]
            loss = loss + config.agreement * (weight * apart.square()).mean()
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            self.done += 1
            line = f"reader step {self.done}, loss {loss.item():.4f}"
            self.callback(self.done, config.steps, line)

    @torch.no_grad()
    def _features(self, network: StartNetwork) -> Tensor:
        """Of every painting, in the order of people [n * m, F]."""
        parts = self.painted.bank.flatten(0, 1).split(256)
        place = self.compute.put
        return torch.cat([network.describe(place(p.float() / 127)).cpu() for p in parts])

    def _reheaded(self, network: StartNetwork, found: Readable, z: Tensor) -> StartNetwork:
        """The same eye with a new answer, fitted to what is to be read from now on."""
        other = self._network(len(found.share))
        eye = {
            k: t for k, t in network.state_dict().items() if not k.startswith(("head", "spread"))
        }
        other.load_state_dict(eye, strict=False)
        fit = LabelMap.fit(self._features(network), found(z), penalty=EVEN)
        with torch.no_grad():
            other.head.weight.copy_(fit.weights.T)
            other.head.bias.copy_(fit.bias)
        return other


@torch.no_grad()
def _read(network: StartNetwork, bank: Tensor) -> Tensor:
    """[n, m, A] of a bank [n, m, 3, S, S]."""
    parts = [network(p.float() / 127) for p in bank.flatten(0, 1).split(256)]
    return torch.cat(parts).unflatten(0, bank.shape[:2])


def _answer(
    network: StartNetwork, found: Readable, z: Tensor, bank: Tensor, config: PaintingsTraining
) -> tuple[LabelMap, float]:
    """From what is read [r] to latents, such that their paintings are expected to be read the same."""
    read = _read(network, bank)
    truth = found(z)[:, None].expand(-1, bank.shape[1], -1).flatten(0, 1)
    shown = LabelMap.fit(truth, read.flatten(0, 1), penalty=EVEN)  # [r, r]
    gram = shown.weights.T @ shown.weights
    gram = gram + config.damping * gram.diagonal().mean() * torch.eye(len(gram))
    step = torch.linalg.solve(gram, shown.weights.T) @ found.directions.T  # [r, d]
    slope = float(shown.weights.diagonal().mean())
    return LabelMap(step, -shown.bias @ step), slope


def _assembled(
    network: StartNetwork,
    answer: LabelMap,
    locator: Any,
    features: Tensor,
    config: PaintingsTraining,
) -> StartNetwork:
    """One network that answers in latents, locates, and knows what pictures of people are like."""
    start = build_start(
        {
            **network.config,
            "latent_size": answer.weights.shape[1],
            "rank": len(answer.weights),
            "measured": True,
            "hides": config.augmentation.hidden > 0,
            **({} if locator is None else {"locator": locator.sizes}),
        }
    )
    own = ("head", "spread", "scale")
    parts = {n: t for n, t in network.state_dict().items() if not n.startswith(own)}
    parts["head.weight"] = answer.weights.T @ network.head.weight
    parts["head.bias"] = answer(network.head.bias)
    parts["spread"], parts["scale"] = answer.weights, torch.ones(())
    if locator is not None:
        parts |= {f"locator.{name}": t for name, t in locator.state_dict().items()}
    parts["centre"], parts["whiten"] = _measured(features)
    start.load_state_dict(parts)
    return start.requires_grad_(False).eval()


@torch.no_grad()
def _seen(network: StartNetwork, painted: PaintedPeople, config: PaintingsTraining) -> Tensor:
    """Features [k, F] of paintings, each as it is and once augmented."""
    generator = torch.Generator().manual_seed(config.seed + 2)
    seen = []
    for part in painted.bank.flatten(0, 1)[:4096].split(256):
        pictures = part.float() / 127
        seen += [network.describe(p) for p in (pictures, config.augmentation(pictures, generator))]
    return torch.cat(seen)


def _measured(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and whitening of features [k, F]."""
    features = features.double()
    middle = features.mean(0)
    features = features - middle
    values, vectors = torch.linalg.eigh(features.T @ features / len(features))
    # Directions that hardly vary would turn rounding into strangeness.
    whiten = vectors @ ((values + 0.01 * values.mean()).rsqrt()[:, None] * vectors.T)
    return middle.float(), whiten.float()


@torch.no_grad()
def _judged(start: StartNetwork, found: Readable, z: Tensor, bank: Tensor) -> dict[str, Any]:
    """How well people are answered in the coordinates that show: from one painting, and from all of theirs."""
    answers = _read(start, bank) @ found.directions  # [n, m, r]
    truth = found(z) * found.share
    one = F.cosine_similarity(answers[:, 0] * found.share, truth, dim=1)
    every = F.cosine_similarity(answers.mean(1) * found.share, truth, dim=1)
    return {
        "cosine_of_one": round(float(one.mean()), 4),
        "cosine_of_all": round(float(every.mean()), 4),
    }
