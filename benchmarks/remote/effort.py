"""How often everything is measured: in full, or just to check that it runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """Numbers of repetitions, and sizes, of the parts of the benchmark.

    Attributes:
        turns, calls: blocks of each contender, and calls in a block.
        other_turns: blocks in the regimes that are not half-trained.
        fair_bytes: size of the large request in the fairness part.
    """

    turns: int
    calls: int
    other_turns: int
    crossover_turns: int
    generator_seconds: float
    stream_calls: int
    fair_samples: int
    fair_seconds: float
    fair_bytes: int
    inference_server_turns: int


FULL = Effort(5, 5, 2, 6, 1.5, 3, 400, 20.0, 256 << 20, 2)
QUICK = Effort(1, 2, 1, 1, 0.5, 2, 40, 3.0, 64 << 20, 1)
