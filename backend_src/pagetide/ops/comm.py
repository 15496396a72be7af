"""How the ranks of one model put together what each of them has computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class Comm(Protocol):
    """The ranks of one model, each of which calls the same methods in the same order."""

    @property
    def rank(self) -> int:
        """Of this process, from 0."""

    @property
    def size(self) -> int:
        """How many there are."""

    def all_reduce(self, x: torch.Tensor) -> None:
        """x becomes the sum over all ranks, on each of them."""

    def gather(self, columns: torch.Tensor) -> torch.Tensor:
        """The columns of all ranks side by side on rank 0; anything elsewhere. [s, own] -> [s, all].

        Ranks may have different numbers of columns, always the same ones.
        """

    def broadcast(self, x: torch.Tensor) -> None:
        """x becomes rank 0's, on each of them."""

    def smallest(self, value: int) -> int:
        """The smallest of all ranks' values."""

    def total(self, value: int) -> int:
        """The sum of all ranks' values."""


@dataclass(frozen=True)
class Alone:
    """The only rank."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, x: torch.Tensor) -> None:
        pass

    def gather(self, columns: torch.Tensor) -> torch.Tensor:
        return columns

    def broadcast(self, x: torch.Tensor) -> None:
        pass

    def smallest(self, value: int) -> int:
        return value

    def total(self, value: int) -> int:
        return value


ALONE = Alone()
