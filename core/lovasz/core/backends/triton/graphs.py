"""CUDA graphs of programs that are used again and again, since trainers send batches of the same kind for days.

A program is recorded when it is used for the third time, over a workspace of its own; the addresses of the tensors are
an input of the graphs. To replay a recording takes the host two calls instead of a dozen. The number of recordings and
their memory are limited; the least recently used one is dropped first.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor

from lovasz.core.backends.triton.program import Program, Workspace

_log = logging.getLogger(__name__)

RECORDED_AT = 3
"""The use at which a program is recorded: the first uses compile the kernels and try them."""
KEPT_GRAPHS = 8
KEPT_SHARE = 1 / 16
"""The most memory of all recordings, as a share of the device's memory."""
PAUSE = 32
"""The further uses that a program needs after its recording was dropped: recording costs more than a few launches."""


class Recording:
    """A program's launches as two graphs: those after which the faults of a batch are known, and the remaining ones."""

    def __init__(self, program: Program) -> None:
        device = program.device
        self.nbytes = program.workspace_bytes
        self._addresses = torch.empty(program.address_bytes, dtype=torch.uint8, device=device)
        # Only for ``replay``: it waits for the device before it returns, so the memory can be reused.
        self._pinned = torch.empty(program.address_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        self._host_addresses = self._pinned.numpy().view(np.int64)
        self._known = torch.cuda.Event()
        self._done = torch.cuda.Event()
        self._stream: int | None = None
        self._begin, self._finish = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            # "thread_local" lets other threads use the device in the meantime.
            self._begin.capture_begin(capture_error_mode="thread_local")
            try:
                self.workspace = program.begin(self._addresses)
            finally:
                self._begin.capture_end()
            self._finish.capture_begin(pool=self._begin.pool(), capture_error_mode="thread_local")
            try:
                program.finish(self.workspace)
            finally:
                self._finish.capture_end()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._host_faults = torch.empty(self.workspace.faults.shape, dtype=torch.uint8, device="cpu", pin_memory=True)
        self._faults = self._host_faults.numpy()

    def is_free(self, stream: int) -> bool:
        """Whether no work on the workspace is pending, except on this stream."""
        return self._stream in (None, stream) or self._done.query()

    def begin(self, addresses: Tensor, stream: int) -> Workspace:
        """Queues the launches after which a batch's faults are known; the caller may copy these, then calls ``finish``.

        Args:
            addresses: the addresses of the batch as bytes, in pinned memory.
        """
        self._stream = stream
        self._addresses.copy_(addresses, non_blocking=True)
        self._begin.replay()
        return self.workspace

    def finish(self) -> None:
        """Queues the remaining launches."""
        self._finish.replay()

    def replay(self, logits: int, labels: int, grad: int, total: int, stream: int) -> bool:
        """Queues all launches for a request of one plane, and waits until it is known whether the request has a fault.

        Args:
            logits, labels, grad, total: addresses on the device.

        Returns:
            True if it has no fault. If false, the results are undefined.
        """
        self._host_addresses[:] = logits, labels, grad, total
        self.begin(self._pinned, stream)
        self._host_faults.copy_(self.workspace.faults, non_blocking=True)
        self._known.record()
        self.finish()
        self._known.synchronize()
        return not self._faults.any()

    def used(self) -> None:
        """Marks the point in the stream after which the workspace is no longer read."""
        self._done.record()

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

    def take(self, program: Program, stream: int) -> Recording | None:
        """Lends the recording of a program to the caller, until ``put_back``; records it first if it is time.

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
            elif not recording.is_free(stream):
                return None
            self._recordings.pop(program, None)
            self._taken.add(program)
            return recording

    def put_back(self, program: Program, recording: Recording) -> None:
        """Returns a recording, after all work that reads its workspace is queued."""
        recording.used()
        with self._lock:
            self._taken.discard(program)
            self._recordings[program] = recording

    def _record(self, program: Program) -> Recording | None:
        room = KEPT_SHARE * torch.cuda.get_device_properties(program.device).total_memory
        if program.workspace_bytes > room:
            return None
        while self._recordings and (
            len(self._recordings) >= KEPT_GRAPHS
            or sum(known.nbytes for known in self._recordings.values()) + program.workspace_bytes > room
        ):
            evicted, recording = self._recordings.popitem(last=False)
            recording.wait()
            evicted.times_seen = -PAUSE
        try:
            return Recording(program)
        except torch.OutOfMemoryError:
            program.times_seen = -PAUSE
        except Exception:
            self._works = False
            _log.exception("CUDA graphs cannot be recorded here; batches are launched kernel by kernel")
        return None

    def clear(self) -> None:
        """Drops all recordings and frees their memory."""
        with self._lock:
            for program, recording in self._recordings.items():
                recording.wait()
                program.times_seen = 0
            self._recordings.clear()

    def __len__(self) -> int:
        return len(self._recordings)


GRAPHS = Graphs()
