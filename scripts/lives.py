"""What became of a request: shared by what measures engines under load, and what simulates them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Life:
    """When a request arrived, and when its first and last token came: seconds of one clock, 0: not yet.

    num_tokens: of the answer so far.
    """

    arrived: float
    first: float = 0.0
    last: float = 0.0
    num_tokens: int = 0
    is_done: bool = False
    is_refused: bool = False

    @property
    def ttft(self) -> float:
        return self.first - self.arrived

    @property
    def tpot(self) -> float:
        return (self.last - self.first) / max(1, self.num_tokens - 1)

    def take(self, num_tokens: int, now: float) -> None:
        """So many tokens have come."""
        self.first = self.first or now
        self.last, self.num_tokens = now, self.num_tokens + num_tokens

    def is_good(self, ttft_s: float, tpot_s: float) -> bool:
        """Whether it was answered within both limits."""
        return self.is_done and not self.is_refused and self.ttft <= ttft_s and self.tpot <= tpot_s
