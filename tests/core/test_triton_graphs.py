"""Which batches are recorded as CUDA graphs, which are kept and who may use them; on a GPU see test_cuda.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lovasz.core import LovaszSoftmax
from lovasz.spec import weighted_sum

pytest.importorskip("triton")

STREAM, OTHER_STREAM = 1, 2
BYTES = 100


class FakeProgram:
    """What the recordings ask of a program."""

    def __init__(self, nbytes: int = BYTES) -> None:
        self.device = torch.device("cuda")
        self.workspace_bytes = nbytes
        self.times_seen = 0
        self.is_ready = True


class FakeRecording:
    """A recording whose work is done when a test says so."""

    error: Exception | None = None

    def __init__(self, program: FakeProgram) -> None:
        if FakeRecording.error is not None:
            raise FakeRecording.error
        self.nbytes, self.done, self.stream, self.waited = program.workspace_bytes, True, STREAM, False
        self.is_inference = torch.is_inference_mode_enabled()

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


def recorded(graphs: Any, program: FakeProgram) -> Any:
    """Uses a program until it is recorded."""
    for _ in range(50):
        recording = graphs.take(program, STREAM)
        if recording is not None:
            graphs.put_back(program, recording)
            return recording
    raise AssertionError("never recorded")


def test_a_kind_is_recorded_when_it_comes_for_the_third_time(graphs: Any) -> None:
    program = FakeProgram()
    assert [graphs.take(program, STREAM) is None for _ in range(3)] == [True, True, False]


def test_no_other_thread_is_given_the_stream_of_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it queues there, such as the upload of a request, would become a part of the graph."""
    from lovasz.core.backends.triton import graphs

    counts: dict[int, int] = {}

    def stream(device: torch.device, priority: int = 0) -> tuple[int, int]:
        """As torch: 32 streams of each priority in turn."""
        counts[priority] = counts.get(priority, -1) + 1
        return priority, counts[priority] % 32

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    own = graphs._capture_stream.__wrapped__(torch.device("cuda"))
    others = [torch.cuda.Stream(torch.device("cuda"), priority) for priority in (0, -1, -3) for _ in range(32)]
    assert own not in others


def test_what_is_not_compiled_yet_is_not_recorded(graphs: Any) -> None:
    program = FakeProgram()
    program.is_ready = False
    assert all(graphs.take(program, STREAM) is None for _ in range(5))
    program.is_ready = True
    assert graphs.take(program, STREAM) is not None


def test_a_recording_belongs_to_one_caller_at_a_time_and_to_one_stream_until_it_is_done(graphs: Any) -> None:
    program = FakeProgram()
    recording = recorded(graphs, program)
    assert graphs.take(program, STREAM) is recording
    assert graphs.take(program, STREAM) is None
    graphs.put_back(program, recording)
    recording.done = False
    assert graphs.take(program, OTHER_STREAM) is None
    assert graphs.take(program, STREAM) is recording


def test_memory_is_bounded_and_the_oldest_goes_and_waits_before_it_comes_back(graphs: Any) -> None:
    programs = [FakeProgram() for _ in range(4)]
    recordings = [recorded(graphs, program) for program in programs[:3]]
    assert len(graphs) == 3
    recorded(graphs, programs[0])  # used again: now the second is the oldest
    recorded(graphs, programs[3])
    assert len(graphs) == 3
    assert [recording.waited for recording in recordings] == [False, True, False]
    assert all(graphs.take(programs[1], STREAM) is None for _ in range(20))
    assert len(graphs) == 3


def test_recordings_in_use_count_and_stay(graphs: Any) -> None:
    programs = [FakeProgram() for _ in range(4)]
    for program in programs[:3]:
        recorded(graphs, program)
    recordings = [graphs.take(program, STREAM) for program in programs[:3]]
    assert all(graphs.take(programs[3], STREAM) is None for _ in range(5))
    graphs.clear()
    assert len(graphs) == 3
    graphs.put_back(programs[1], recordings[1])
    assert graphs.take(programs[3], STREAM) is not None
    assert len(graphs) == 3
    assert [recording.waited for recording in recordings] == [False, True, False]


def test_recordings_serve_calls_outside_of_inference_mode(graphs: Any) -> None:
    """Such calls may not write to a tensor that was made inside of it."""
    with torch.inference_mode():
        assert not recorded(graphs, FakeProgram()).is_inference


def test_a_replay_that_fails_or_would_be_captured_gives_the_recording_back(
    graphs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lovasz.core.backends.triton import compute

    logits, labels, loss = torch.zeros(1, 3, 2), torch.zeros(1, 2, dtype=torch.uint8), weighted_sum(LovaszSoftmax())
    program = FakeProgram()
    recording = recorded(graphs, program)
    monkeypatch.setattr(compute, "GRAPHS", graphs)
    monkeypatch.setattr(compute, "_replays", {compute._key(logits, labels, loss): program})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: logits.device.index)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: STREAM)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert compute.replay(logits, labels, loss) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def full(*shape: object, **options: object) -> None:
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        with pytest.raises(torch.OutOfMemoryError):
            compute.replay(logits, labels, loss)
    assert graphs.take(program, STREAM) is recording


def test_what_does_not_fit_is_never_recorded(graphs: Any) -> None:
    program = FakeProgram(BYTES * 4)
    assert all(graphs.take(program, STREAM) is None for _ in range(10))


def test_full_memory_puts_one_signature_off_and_another_error_all(graphs: Any) -> None:
    full, fine, broken = FakeProgram(), FakeProgram(), FakeProgram()
    FakeRecording.error = torch.OutOfMemoryError("full")
    assert all(graphs.take(full, STREAM) is None for _ in range(5))
    FakeRecording.error = None
    recorded(graphs, fine)
    FakeRecording.error = RuntimeError("no graphs here")
    assert all(graphs.take(broken, STREAM) is None for _ in range(5))
    FakeRecording.error = None
    assert all(graphs.take(broken, STREAM) is None for _ in range(50))


def test_memory_is_given_back(graphs: Any) -> None:
    program = FakeProgram()
    recording = recorded(graphs, program)
    graphs.clear()
    assert recording.waited
    assert len(graphs) == 0
    assert graphs.take(program, STREAM) is None
