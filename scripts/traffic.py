"""Requests as they come: at random, in bursts, or as they were recorded. Used by scripts/simulate.py."""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from pathlib import Path

VOCABULARY = 32_000


@dataclass(frozen=True)
class Arrival:
    """A request: when it comes (seconds), how long prompt and answer are (tokens), and which beginning its
    prompt shares with others.
    """

    at: float
    prompt_tokens: int
    answer_tokens: int
    prefix: str = ""
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.at < float("inf"):
            raise ValueError(f"it arrives at {self.at}, must be seconds from 0 on")
        if min(self.prompt_tokens, self.answer_tokens) < 1 or self.prefix_tokens < 0:
            raise ValueError("prompt and answer must have tokens, a prefix 0 or more")


@dataclass(frozen=True)
class Traffic:
    """rate: requests a second, on average. burst: in the tenth of the time when they come in bursts, so many
    times the rate. prompt, answer: tokens, from and to. prefixes: so many beginnings of prefix_tokens tokens
    are shared, the first ones more often than the last (Zipf).
    """

    rate: float
    burst: float = 1.0
    prompt: tuple[int, int] = (16, 512)
    answer: tuple[int, int] = (16, 256)
    prefixes: int = 0
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if self.rate <= 0 or not 1 <= self.burst < 10:
            raise ValueError(
                f"rate is {self.rate}, must be above 0; burst {self.burst}, must be from 1 to 9.9"
            )

    def arrivals(self, seconds: float, seed: int = 0) -> list[Arrival]:
        rng, at, found = random.Random(seed), 0.0, []
        weights = [1 / (i + 1) for i in range(self.prefixes)]
        while True:
            # As many as in a burst, of which what is too much for the time is left out.
            at += rng.expovariate(self.rate * self.burst)
            if at >= seconds:
                return found
            if rng.random() * self.rate * self.burst >= self._rate(at):
                continue
            prompt, answer = rng.randint(*self.prompt), rng.randint(*self.answer)
            prefix = str(rng.choices(range(self.prefixes), weights)[0]) if weights else ""
            found.append(Arrival(at, prompt, answer, prefix, self.prefix_tokens if prefix else 0))

    def _rate(self, at: float) -> float:
        """Of ten seconds one is a burst's."""
        calm = (10 - self.burst) / 9
        return self.rate * (self.burst if at % 10 < 1 else calm)


def read_trace(file: Path) -> list[Arrival]:
    """Raises ValueError for a row that cannot be read, by its number."""
    found = []
    with file.open(newline="") as opened:
        for number, row in enumerate(csv.DictReader(opened), 2):
            try:
                found.append(
                    Arrival(
                        float(row["arrival_s"]),
                        int(row["prompt_tokens"]),
                        int(row["answer_tokens"]),
                        row.get("prefix") or "",
                        int(row.get("prefix_tokens") or 0),
                    )
                )
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{file}, line {number}: {type(error).__name__}: {error}") from None
    return sorted(found, key=lambda arrival: arrival.at)


def prompt_ids(arrival: Arrival, number: int) -> list[int]:
    """Tokens that only prompts with the same prefix share."""

    def tokens(seed: str, count: int) -> list[int]:
        return random.Random(seed).choices(range(10, VOCABULARY), k=count)

    shared = min(arrival.prefix_tokens, arrival.prompt_tokens - 1) if arrival.prefix else 0
    own = tokens(f"own {number}", arrival.prompt_tokens - shared)
    return tokens(f"prefix {arrival.prefix}", shared) + own
