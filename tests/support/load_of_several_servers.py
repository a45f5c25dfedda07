"""What ``test_replacement.py`` lets call all the time, in processes of its own: gRPC finds its variable when a client
opens. It ends when its standard input does, and prints what came of the calls."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lovasz.client import TLS, Joint, LossClient, LossError, LovaszSoftmax

RUNS, WORLD = 2, 3
LAG_SECONDS = 0.05
"""The most by which a rank comes later than the first."""
PAUSE_SECONDS = 0.05
"""Between two calls that are not joint."""
LARGE_EVERY = 5
"""Each of so many is larger than goes in one message."""


def inputs(number: int) -> tuple[Any, Any]:
    side = 384 if number == 0 else 16
    values = np.random.RandomState(number)
    return values.randn(1, 4, side, side).astype(np.float32), values.randint(0, 4, (1, side, side)).astype(np.uint8)


INPUTS = [inputs(number) for number in range(LARGE_EVERY)]


class Load:
    """Joint steps, and calls alone, until it is stopped."""

    def __init__(self, target: str, load_balancing: str | None, ca: Path | None) -> None:
        self._target, self._load_balancing = target, load_balancing
        self._tls = None if ca is None else TLS(ca=ca)
        self._stop = threading.Event()
        self.steps = self.calls = 0
        self.errors: list[str] = []

    def run(self) -> None:
        """Returns when the standard input ends."""
        with ThreadPoolExecutor(RUNS + 1) as threads:
            ends = [threads.submit(self._train, f"{self._load_balancing} {run}") for run in range(RUNS)]
            ends.append(threads.submit(self._call))
            sys.stdin.read()
            self._stop.set()
            for end in ends:
                end.result()

    def _train(self, run: str) -> None:
        """Each rank has a client of its own, as if it were a process of its own."""
        clients = [self._client() for _ in range(WORLD)]
        with ThreadPoolExecutor(WORLD) as threads:
            for step in itertools.count():
                if self._stop.is_set():
                    break
                joints = [Joint(run, rank, WORLD, step) for rank in range(WORLD)]
                losses = set(threads.map(self._loss, clients, joints))
                if len(losses) != 1:
                    self.errors.append(f"{run}, step {step}: the ranks got {losses}")
                self.steps += 1
        for client in clients:
            client.close()

    def _call(self) -> None:
        with self._client() as client:
            while not self._stop.wait(PAUSE_SECONDS):
                self._loss(client, None)
                self.calls += 1

    def _client(self) -> LossClient:
        return LossClient(self._target, load_balancing=self._load_balancing, tls=self._tls)

    def _loss(self, client: LossClient, joint: Joint | None) -> float | None:
        number = self.calls if joint is None or joint.step is None else joint.step
        if joint is not None:
            time.sleep(random.uniform(0, LAG_SECONDS))
        try:
            return client.compute(*INPUTS[number % LARGE_EVERY], LovaszSoftmax(), joint=joint).loss
        except LossError as error:
            self.errors.append(f"{joint or number}: {error!r}")
            return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--load-balancing")
    parser.add_argument("--ca", type=Path)
    given = parser.parse_args()
    load = Load(given.target, given.load_balancing, given.ca)
    load.run()
    print(json.dumps({"steps": load.steps, "calls": load.calls, "errors": load.errors}), flush=True)
