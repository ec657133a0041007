"""Progress of work on many things: how many a second, and how long the rest takes."""

from __future__ import annotations

import time
from collections.abc import Callable

EVERY = 5.0  # seconds between two lines


class Meter:
    """Says every few seconds how far it is: `Meter("files", 1000, print)`, then `meter(done)`."""

    def __init__(self, what: str, total: int, say: Callable[[str], object]) -> None:
        self.what, self.total, self.say = what, total, say
        self.begin(0)

    def begin(self, done: int) -> None:
        """Count from here on; so much was there already."""
        self.first, self.started = done, time.monotonic()
        self.spoken = self.started
        if done:
            self.say(f"taken up at {done:,} of {self.total:,} {self.what}")

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self.spoken < EVERY and done < self.total:
            return
        self.spoken = now
        rate = (done - self.first) / max(now - self.started, 1e-9)
        rest = (self.total - done) / rate if rate else 0.0
        self.say(
            f"{done:,} of {self.total:,} {self.what}, {rate:.0f} {self.what}/s, {duration(rest)} left"
        )


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
