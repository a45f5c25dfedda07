"""The metrics of joint steps that wait."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from lovasz.server.observe.waiting_steps import WaitingStep, WaitingSteps


def waiting(run: str, step: int, seconds: float, missing: tuple[int, ...]) -> WaitingStep:
    return WaitingStep(run, step, seconds, 8, "", len(missing), missing[0])


def shown(steps: list[WaitingStep], max_runs: int) -> dict[tuple[str, str], float]:
    registry = CollectorRegistry()
    registry.register(WaitingSteps(lambda: steps, max_runs))
    samples = [sample for family in registry.collect() for sample in family.samples]
    return {(sample.name.removeprefix("lovasz_joint_step_"), sample.labels["run"]): sample.value for sample in samples}


def test_of_each_run_the_step_that_has_waited_longest_is_shown() -> None:
    steps = [waiting("a", 7, 9.0, (2, 5)), waiting("b", 3, 4.0, (1,)), waiting("a", 8, 1.0, (0, 1, 2))]
    assert shown(steps, max_runs=20) == {
        ("wait_seconds", "a"): 9.0,
        ("number", "a"): 7,
        ("missing_ranks", "a"): 2,
        ("first_missing_rank", "a"): 2,
        ("wait_seconds", "b"): 4.0,
        ("number", "b"): 3,
        ("missing_ranks", "b"): 1,
        ("first_missing_rank", "b"): 1,
    }


def test_the_number_of_runs_is_bounded() -> None:
    steps = [waiting(str(number), 0, 100.0 - number, (0,)) for number in range(50)]
    assert {run for _, run in shown(steps, max_runs=3)} == {"0", "1", "2"}
    assert shown([], max_runs=3) == {}
