"""What the callers of one name may take: a share of the room, and a weight in the queue."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

LEAST_WEIGHT, MOST_WEIGHT = 0.01, 100.0
_EXPECTED = {
    "budget": "a number > 0 and <= 1",
    "weight": f"a number from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}",
}


@dataclass(frozen=True)
class Limits:
    """Raises ValueError for a value that is not one.

    Attributes:
        budget: the share of ``--memory-budget`` and ``--max-requests`` that they may hold at a time.
        weight: how much of the device they get, compared with others, while others want it, too.
    """

    budget: float = 1.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            _refuse("budget", f"{self.budget:g}")
        if not LEAST_WEIGHT <= self.weight <= MOST_WEIGHT:
            _refuse("weight", f"{self.weight:g}")

    @classmethod
    def parsed(cls, words: Iterable[str]) -> Limits:
        """From words such as ``budget=0.5`` and ``weight=2``, each at most once.

        Raises:
            ValueError: a word is not one of these.
        """
        values: dict[str, float] = {}
        for word in words:
            key, _, text = word.partition("=")
            if key not in _EXPECTED or key in values:
                raise ValueError("expected budget=SHARE and weight=NUMBER after the token, each at most once")
            try:
                values[key] = float(text)
            except ValueError:
                _refuse(key, repr(text[:20]))
        return cls(**values)


UNLIMITED = Limits()


def _refuse(key: str, got: str) -> NoReturn:
    raise ValueError(f"{key}: got {got}; expected {_EXPECTED[key]}")
