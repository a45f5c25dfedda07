"""CUDA graphs of programs that are used again and again, since trainers send batches of the same kind for days.

A program is recorded when it is used for the third time, over a workspace of its own; the addresses of the tensors are
an input of the graphs. To replay a recording takes the host two calls instead of a dozen. The number of recordings and
their memory are limited; the least recently used one is dropped first.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from functools import cache

import numpy as np
import torch
from torch import Tensor

from lovasz.core.backends.triton.program import Program, Workspace, host_bytes

_log = logging.getLogger(__name__)

RECORDED_AT = 3
"""The use at which a program is recorded: the first uses compile the kernels and try them."""
KEPT_GRAPHS = 8
KEPT_SHARE = 1 / 16
"""The most memory of all recordings, as a share of the device's memory."""
PAUSE = 32
"""The further uses that a program needs after its recording was dropped: recording costs more than a few launches."""
_CAPTURE_PRIORITY = -2
"""Most streams have priority 0, some of trainers -1, and those of NCCL, where they are urgent, the highest one, -3."""


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which all programs of a device are recorded.

    What another thread queues on the stream of a recording becomes a part of it. Torch has 32 streams of each priority,
    which it hands out again and again: this one is of a priority that others hardly ask for.
    """
    return torch.cuda.Stream(device, priority=_CAPTURE_PRIORITY)


class Recording:
    """A program's launches as two graphs: those after which the faults of a batch are known, and the remaining ones."""

    def __init__(self, program: Program) -> None:
        device = program.device
        self.nbytes = program.workspace_bytes
        # Not in the captures: what is allocated there cannot be used by anything else, also after it was freed.
        memory = program.memory()
        self._addresses = torch.empty(program.address_bytes, dtype=torch.uint8, device=device)
        # Only for ``replay``: it waits for the device before it returns, so the memory can be reused.
        self._pinned = host_bytes(program.address_bytes, device)
        self._host_addresses = self._pinned.numpy().view(np.int64)
        self._known = torch.cuda.Event()
        self._done = torch.cuda.Event()
        self._stream: torch.cuda.Stream | None = None
        self._begin, self._finish = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        stream = _capture_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            # "thread_local" lets other threads use the device in the meantime, but not draw random numbers on it with a
            # PyTorch whose generator takes part in every capture.
            self._begin.capture_begin(capture_error_mode="thread_local")
            try:
                self.workspace = program.begin(self._addresses, stream, memory)
            finally:
                self._begin.capture_end()
            self._finish.capture_begin(pool=self._begin.pool(), capture_error_mode="thread_local")
            try:
                program.finish(self.workspace)
            finally:
                self._finish.capture_end()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._host_faults = host_bytes(len(self.workspace.faults), device)
        self._faults = self._host_faults.numpy()

    def is_free(self, stream: torch.cuda.Stream) -> bool:
        """Whether no work on the workspace is pending, except on this stream."""
        return self._stream in (None, stream) or self._done.query()

    def begin(self, addresses: Tensor, stream: torch.cuda.Stream) -> Workspace:
        """Queues the launches after which a batch's faults are known; the caller may copy these, then calls ``finish``.

        Args:
            addresses: the addresses of the batch as bytes, in pinned memory.
            stream: the current stream.
        """
        self._stream = stream
        self._addresses.copy_(addresses, non_blocking=True)
        self._begin.replay()
        return self.workspace

    def finish(self) -> None:
        """Queues the remaining launches."""
        self._finish.replay()

    def replay(self, logits: int, labels: int, grad: int, total: int, stream: torch.cuda.Stream) -> bool:
        """Queues all launches for a request of one plane, and waits until it is known whether the request has a fault.

        Args:
            logits, labels, grad, total: addresses on the device.
            stream: the current stream.

        Returns:
            True if it has no fault. If false, the results are undefined.
        """
        self._host_addresses[:] = logits, labels, grad, total
        self.begin(self._pinned, stream)
        self._host_faults.copy_(self.workspace.faults, non_blocking=True)
        self._known.record(stream)
        self.finish()
        self._known.synchronize()
        return not any(self._faults.tobytes())

    def used(self) -> None:
        """Marks the point in the stream after which the workspace is no longer read."""
        self._done.record(self._stream)

    def wait(self) -> None:
        """Waits until the point that ``used`` has marked."""
        self._done.synchronize()


class Graphs:
    """The recordings of the programs that were used last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recordings: OrderedDict[Program, Recording] = OrderedDict()
        self._taken: set[Program] = set()
        self._works = True

    def take(self, program: Program, stream: torch.cuda.Stream) -> Recording | None:
        """Lends the recording of a program to the caller, until ``put_back``; records it first if it is time.

        Args:
            stream: the current stream.

        Returns:
            None if there is no recording, or if another thread or stream still uses it.
        """
        with self._lock:
            if program in self._taken:
                return None
            recording = self._recordings.get(program)
            if recording is None:
                program.times_seen += 1
                if program.times_seen < RECORDED_AT or not self._works or not program.is_ready:
                    return None
                recording = self._record(program)
                if recording is None:
                    return None
                self._recordings[program] = recording
            elif not recording.is_free(stream):
                return None
            self._recordings.move_to_end(program)
            self._taken.add(program)
            return recording

    def put_back(self, program: Program, recording: Recording) -> None:
        """Returns a recording, after all work that reads its workspace is queued."""
        try:
            recording.used()
        finally:
            with self._lock:
                self._taken.discard(program)

    def _record(self, program: Program) -> Recording | None:
        room = KEPT_SHARE * torch.cuda.get_device_properties(program.device).total_memory
        if program.workspace_bytes > room:
            return None
        while len(self._recordings) >= KEPT_GRAPHS or self.nbytes + program.workspace_bytes > room:
            evicted = next((known for known in self._recordings if known not in self._taken), None)
            if evicted is None:
                return None
            self._recordings.pop(evicted).wait()
            evicted.times_seen = -PAUSE
        try:
            # Calls outside of inference mode may not write to a tensor that was made inside of it.
            with torch.inference_mode(False):
                return Recording(program)
        except torch.OutOfMemoryError:
            program.times_seen = -PAUSE
        except Exception:
            self._works = False
            _log.exception("CUDA graphs cannot be recorded here; batches are launched kernel by kernel")
        return None

    def clear(self) -> None:
        """Drops all recordings that no caller has taken, and frees their memory."""
        with self._lock:
            for program in [known for known in self._recordings if known not in self._taken]:
                self._recordings.pop(program).wait()
                program.times_seen = 0

    @property
    def nbytes(self) -> int:
        """The device memory of all recordings."""
        return sum(recording.nbytes for recording in self._recordings.values())

    def __len__(self) -> int:
        return len(self._recordings)


GRAPHS = Graphs()
