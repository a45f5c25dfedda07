"""Which batches are recorded as CUDA graphs, which are kept and who may use them; on a GPU see test_cuda.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

STREAM, OTHER_STREAM = 1, 2
BYTES = 100


class FakePlan:
    """What the recordings ask of a plan."""

    def __init__(self, nbytes: int = BYTES) -> None:
        self.signature = SimpleNamespace(device=torch.device("cuda"))
        self.workspace_bytes = nbytes
        self.times_seen = 0
        self.is_ready = True


class FakeRecording:
    """A recording whose work is done when a test says so."""

    error: Exception | None = None

    def __init__(self, plan: FakePlan) -> None:
        if FakeRecording.error is not None:
            raise FakeRecording.error
        self.nbytes, self.done, self.stream, self.waited = plan.workspace_bytes, True, STREAM, False

    def is_free(self, stream: int) -> bool:
        return stream == self.stream or self.done

    def used(self) -> None:
        pass

    def wait(self) -> None:
        self.waited = True


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Any:
    from lovasz.core.backends.triton import graphs

    monkeypatch.setattr(graphs, "Recording", FakeRecording)
    monkeypatch.setattr(FakeRecording, "error", None)
    properties = SimpleNamespace(total_memory=BYTES * 3 / graphs.KEPT_SHARE)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return graphs.Graphs()


def recorded(graphs: Any, plan: FakePlan) -> Any:
    """Uses a plan until it is recorded."""
    for _ in range(50):
        recording = graphs.take(plan, STREAM)
        if recording is not None:
            graphs.put_back(plan, recording)
            return recording
    raise AssertionError("never recorded")


def test_a_signature_is_recorded_when_it_comes_for_the_third_time(graphs: Any) -> None:
    plan = FakePlan()
    assert [graphs.take(plan, STREAM) is None for _ in range(3)] == [True, True, False]


def test_what_is_not_compiled_yet_is_not_recorded(graphs: Any) -> None:
    plan = FakePlan()
    plan.is_ready = False
    assert all(graphs.take(plan, STREAM) is None for _ in range(5))
    plan.is_ready = True
    assert graphs.take(plan, STREAM) is not None


def test_a_recording_belongs_to_one_caller_at_a_time_and_to_one_stream_until_it_is_done(graphs: Any) -> None:
    plan = FakePlan()
    recording = recorded(graphs, plan)
    assert graphs.take(plan, STREAM) is recording
    assert graphs.take(plan, STREAM) is None
    graphs.put_back(plan, recording)
    recording.done = False
    assert graphs.take(plan, OTHER_STREAM) is None
    assert graphs.take(plan, STREAM) is recording


def test_memory_is_bounded_and_the_oldest_goes_and_waits_before_it_comes_back(graphs: Any) -> None:
    plans = [FakePlan() for _ in range(4)]
    recordings = [recorded(graphs, plan) for plan in plans[:3]]
    assert len(graphs) == 3
    recorded(graphs, plans[0])  # used again: now the second is the oldest
    recorded(graphs, plans[3])
    assert len(graphs) == 3
    assert [recording.waited for recording in recordings] == [False, True, False]
    assert all(graphs.take(plans[1], STREAM) is None for _ in range(20))
    assert len(graphs) == 3


def test_what_does_not_fit_is_never_recorded(graphs: Any) -> None:
    plan = FakePlan(BYTES * 4)
    assert all(graphs.take(plan, STREAM) is None for _ in range(10))


def test_full_memory_puts_one_signature_off_and_another_error_all(graphs: Any) -> None:
    full, fine, broken = FakePlan(), FakePlan(), FakePlan()
    FakeRecording.error = torch.OutOfMemoryError("full")
    assert all(graphs.take(full, STREAM) is None for _ in range(5))
    FakeRecording.error = None
    recorded(graphs, fine)
    FakeRecording.error = RuntimeError("no graphs here")
    assert all(graphs.take(broken, STREAM) is None for _ in range(5))
    FakeRecording.error = None
    assert all(graphs.take(broken, STREAM) is None for _ in range(50))


def test_memory_is_given_back(graphs: Any) -> None:
    plan = FakePlan()
    recording = recorded(graphs, plan)
    graphs.clear()
    assert recording.waited
    assert len(graphs) == 0
    assert graphs.take(plan, STREAM) is None
