"""Joint steps under everything at once: each call ends, right or with a named error, and nothing is left."""

from __future__ import annotations

import random
import threading
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_all
from dataclasses import replace

import grpc
from support.desk import (
    ABORTED,
    CANCELLED,
    CLASSES,
    FAILED_PRECONDITION,
    OK,
    RESOURCE_EXHAUSTED,
    SOFTMAX,
    UNAVAILABLE,
    Desk,
    DeskCarrier,
    Outcome,
    Rank,
    assert_right,
)

from lovasz.spec import CrossEntropy, LossLike, LovaszSoftmax, weighted_sum

NAMED = {ABORTED, FAILED_PRECONDITION, RESOURCE_EXHAUSTED, UNAVAILABLE, CANCELLED}


class Mischief:
    """Many runs whose ranks leave, come again, come twice, differ, are of other sizes, or do not come at all."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self.seen: dict[tuple[str, grpc.StatusCode], int] = {}
        self.wrong: list[str] = []
        self._losses: tuple[LossLike, ...] = (SOFTMAX, weighted_sum([(1.0, CrossEntropy()), (0.5, SOFTMAX)]))
        self.runs = [self._a_run(f"run {number}") for number in range(5)]
        largest = max(sum(rank.nbytes for rank in step) for run in self.runs for step in run)
        self.desk = Desk(
            budget=int(largest * self._random.choice((1.3, 2.5, 8))),
            max_requests=self._random.choice((6, 12, 40)),
            timeout=0.15,
        )
        self.desk.engine.slowness = self._random.choice((0.0, 0.003))
        self.desk.compute()

    def _a_run(self, name: str) -> list[list[Rank]]:
        world_size, loss = self._random.choice((1, 2, 3, 5)), self._random.choice(self._losses)
        return [
            [
                Rank(
                    rank,
                    world_size,
                    step=step // 2,
                    run=name,
                    loss=loss,
                    want_grad=step % 2 == 0,
                    shape=(1 + self._random.randrange(2), CLASSES, self._random.choice((3, 3, 3, 8))),
                )
                for rank in range(world_size)
            ]
            for step in range(6)
        ]

    def play(self) -> None:
        threads = [
            threading.Thread(target=self._play_rank, args=(run, rank, self._random.random()))
            for run in self.runs
            for rank in range(len(run[0]))
        ]
        for thread in threads:
            thread.start()
        if self._random.random() < 0.3:
            threading.Event().wait(0.2)
            self.desk.admission.close()
            threading.Event().wait(0.1)
            self.desk.joints.stop()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads), "a call does not end"
        self.desk.close()

    def _play_rank(self, run: list[list[Rank]], rank: int, seed: float) -> None:
        rng = random.Random(seed)
        for ranks in run:
            me = replace(ranks[rank], call=rng.randbytes(8))
            what = rng.choice(("well",) * 8 + ("leaves", "again", "twice", "twin", "differs", "stays away", "streams"))
            calls: list[Future[Outcome]] = []
            if what == "leaves":
                caller = DeskCarrier()
                calls.append(self._ask(me, rng, caller))
                threading.Event().wait(rng.random() * 0.02)
                caller.cancel()
                if rng.random() < 0.7:
                    calls.append(self._ask(me, rng))
            elif what == "again":
                calls.append(self._ask(me, rng))
                wait_for_all(calls)
                calls.append(self._ask(me, rng))
            elif what == "twice":
                calls += [self._ask(me, rng) for _ in range(3)]
            elif what == "twin":
                calls += [self._ask(me, rng), self._ask(me.again(), rng)]
            elif what == "differs":
                calls += [self._ask(replace(me, loss=LovaszSoftmax(classes="all"), call=b"differs"), rng)]
                calls += [self._ask(me, rng)]
            elif what == "streams":
                go_on, caller = threading.Event(), DeskCarrier()
                calls.append(self.desk.ask_in_stream(me, go_on, caller))
                threading.Event().wait(rng.random() * 0.01)
                if rng.random() < 0.5:
                    calls.append(self._ask(me, rng))
                (go_on.set if rng.random() < 0.5 else caller.cancel)()
            elif what == "well":
                for _ in range(4):
                    calls.append(self._ask(me, rng))
                    if calls[-1].result(60).code is not RESOURCE_EXHAUSTED:
                        break
                    threading.Event().wait(rng.random() * 0.02)
            for place, call in enumerate(calls):
                self._judge(what, call.result(60), ranks, rank, differs=what == "differs" and place == 0)

    def _ask(self, rank: Rank, rng: random.Random, caller: DeskCarrier | None = None) -> Future[Outcome]:
        if rng.random() < 0.2:
            go_on = threading.Event()
            go_on.set()
            return self.desk.ask_in_stream(rank, go_on, caller)
        return self.desk.ask(rank, caller)

    def _judge(self, what: str, outcome: Outcome, ranks: list[Rank], rank: int, *, differs: bool) -> None:
        with self._lock:
            self.seen[what, outcome.code] = self.seen.get((what, outcome.code), 0) + 1
        if outcome.code in NAMED:
            assert outcome.text or outcome.code is CANCELLED
            return
        whole = [replace(one, loss=LovaszSoftmax(classes="all")) for one in ranks] if differs else ranks
        try:
            assert_right(outcome, rank, whole)
        except AssertionError as error:
            with self._lock:
                self.wrong.append(f"{what}: {outcome.code} {outcome.text} {error}")


def test_whatever_ranks_do_each_call_ends_with_the_right_answer_or_a_named_error_and_nothing_is_left() -> None:
    seen: dict[tuple[str, grpc.StatusCode], int] = {}
    for seed in range(8):
        mischief = Mischief(seed)
        mischief.play()
        assert not mischief.wrong, f"seed {seed}: {mischief.wrong[:3]}"
        for key, count in mischief.seen.items():
            seen[key] = seen.get(key, 0) + count
    codes = {code for _, code in seen}
    assert codes == NAMED | {OK}, "what this is about has come up"
    assert sum(count for (_, code), count in seen.items() if code is OK) > 100
