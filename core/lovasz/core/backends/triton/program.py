"""Programs: the launches that compute a kind of batch, in order, and the buffers that they use.

A program is made once for all batches of a kind. Its launches depend on shapes, element types and the loss alone. So a
further batch of the kind needs one fill, one copy to the device, the launches, and one copy back.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from lovasz.core.backends.triton import (
    binary,
    binary_backward,
    binary_ranks,
    binary_segments,
    bins,
    segments,
    softmax,
    softmax_backward,
    softmax_ranks,
    sorting,
    tables,
)
from lovasz.core.backends.triton.launches import Launch
from lovasz.core.backends.triton.layout import Kind, Layout, Room, Rooms
from lovasz.core.computed import PROBABILITY_TOLERANCE

UNROLLED_CLASSES = 32
"""The most classes whose logits the first sweep keeps in registers; with more, it reads logits several times."""
ROUND_CLASSES = 4
"""The number of classes per round if there are more than ``UNROLLED_CLASSES``."""

_SWEEP_WARPS = 4
_PADDED_CLASSES = 4
"""The number of classes is rounded up to a multiple of this, so that fewer kernels are compiled."""

_SCAN_WARPS = 4
_SORT_WARPS = 8
_SORT_REGISTERS = 128
"""Few enough registers per thread for two sorts on one multiprocessor: a sort mostly waits for its other warps."""

_LAUNCHES_FOR_FAULTS = 1
"""The number of launches after which the faults of a batch are known."""

_TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.uint8: tl.uint8,
    torch.int8: tl.int8,
    torch.int16: tl.int16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
}
_HOST = torch.device("cpu")
_COMPILING = threading.Lock()
"""Triton hands a kernel out to other threads before it is loaded."""
_TORCH_TYPES = {np.int64: torch.int64, np.int32: torch.int32, np.float64: torch.float64}
_NUMPY_TYPES = {torch.int64: np.int64, torch.int32: np.int32}


class Workspace(NamedTuple):
    """The buffers of a batch.

    Attributes:
        stream: the stream of its launches; None under the interpreter.
        results: the bytes of all results.
        faults: the bytes of the faults, a part of the results.
    """

    stream: torch.cuda.Stream | None
    buffers: dict[str, Tensor]
    results: Tensor
    faults: Tensor


class Program:
    """The launches and buffers for a kind of batch.

    Attributes:
        rooms: the place of each array, by the names of the kernels' arguments.
        numbers: the kernels' arguments that are not arrays, by name.
        static_bytes: the size of the arrays that never change; they are on the device as long as the program is kept.
        address_bytes: the size of the addresses of a batch.
        workspace_bytes: the device memory that a batch takes in addition to its tensors.
        times_seen: the number of uses before the program is recorded; negative after its recording was dropped.
    """

    def __init__(self, kind: Kind) -> None:
        self.kind, self.layout = kind, Layout(kind)
        self.device = kind.plan.device
        self.times_seen = 0
        self._lock = threading.Lock()
        self._static_bytes: Tensor | None = None
        self._upload: torch.cuda.Event | None = None
        self._upload_stream: torch.cuda.Stream | None = None
        layout = self.layout
        static = Rooms("static")
        for name, array in layout.static.items():
            static.add(name, _TORCH_TYPES[array.dtype.type], array.size)
        self._host = _packed(layout.static, static)
        self.static_bytes = len(self._host)
        layout.static.clear()  # They are as large again.
        self.rooms = layout.addresses | static.rooms | layout.zeroed.rooms | layout.scratch.rooms
        if kind.plan.is_binary:
            self.rooms["maps"] = self.rooms["cells"]
        self.address_bytes = self.rooms["addresses"].stop
        self.workspace_bytes = layout.zeroed.nbytes + layout.scratch.nbytes
        self.numbers: dict[str, int | float] = {
            "channels": layout.channels,
            "classes": layout.channels,
            "joints": layout.joints,
            "values": kind.plan.label_values,
            "element_count": layout.elements,
            "pixel_count": layout.pixels,
            "rows": len(layout.groups),
            "segment_count": layout.segments,
            "cross_count": len(layout.entropies),
            "tolerance": PROBABILITY_TOLERANCE,
        }
        self.launches = self._binary() if kind.plan.is_binary else self._softmax()

    # --- Launches -------------------------------------------------------------------------------------------------

    def _softmax(self) -> list[Launch]:
        kind, plan, layout = self.kind, self.kind.plan, self.layout
        padded = -(-layout.channels // _PADDED_CLASSES) * _PADDED_CLASSES
        all_classes = padded <= UNROLLED_CLASSES
        classes_padded = max(32, triton.next_power_of_2(layout.channels))
        of_pixels = {
            "LOGIT": _TYPES[kind.logits],
            "LABEL": _TYPES[kind.labels],
            "PROBABILITIES": plan.loss.probabilities,
            "RULES": len(plan.rules),
            "BLOCK": layout.block,
        }
        cross_terms = {"CROSS_TERMS": len(plan.cross_entropies)}
        of_terms = of_pixels | {"TERMS": len(plan.lovasz), "ANY_TABLE": layout.any_table}
        of_losses = of_terms | cross_terms | {"ANY_ABSENT": layout.any_table and layout.lists_classes}
        of_statistics = (
            of_pixels
            | cross_terms
            | {
                "CLASSES": padded if all_classes else ROUND_CLASSES,
                "ALL_CLASSES": all_classes,
                "GROUPINGS": len(layout.counters_of),
                "CLASSES_PADDED": classes_padded,
            }
        )
        rows = len(layout.groups) + len(plan.cross_entropies) * layout.joints
        launches = [
            self._sweep(softmax.softmax_statistics, of_statistics),
            Launch(segments.plan_softmax, rows, 4, CHANNELS_PADDED=classes_padded),
        ]
        if layout.any_table or plan.cross_entropies:
            launches.append(self._sweep(softmax_ranks.softmax_count, of_losses))
        if layout.any_table:
            launches += self._scans(bins.SOFTMAX_SHIFT, bins.SOFTMAX_TOP, bins.SOFTMAX_CELLS)
        if layout.buckets:
            launches += [self._sweep(softmax_ranks.softmax_collect, of_terms), self._sort_buckets()]
        launches += self._add_up()
        if kind.want_grad:
            launches.append(self._sweep(softmax_backward.softmax_backward, of_losses))
        return launches

    def _binary(self) -> list[Launch]:
        kind, plan, layout = self.kind, self.kind.plan, self.layout
        top, cells = bins.binary_cells(is_sigmoid=plan.is_sigmoid)
        of_cells = {"TOP": top, "CELLS": cells}
        of_terms = of_cells | {
            "LOGIT": _TYPES[kind.logits],
            "LABEL": _TYPES[kind.labels],
            "SIGMOID": plan.is_sigmoid,
            "RULES": len(plan.rules),
            "TERMS": len(plan.lovasz),
            "ANY_TABLE": layout.any_table,
            "BLOCK": layout.block,
        }
        cross_terms = {"CROSS_TERMS": len(layout.entropies)}
        of_losses = of_terms | cross_terms
        rows = layout.segments + len(layout.entropies) * layout.joints
        launches = [
            self._sweep(binary.binary_statistics, of_losses | {"GROUPINGS": len(layout.counters_of)}),
            Launch(binary_segments.plan_binary, rows, 4, **of_cells, **cross_terms),
        ]
        if layout.any_table or layout.entropies:
            launches.append(self._sweep(binary_ranks.binary_count, of_losses))
        if layout.any_table:
            launches += self._scans(bins.BINARY_SHIFT, top, cells)
        if layout.buckets:
            launches += [self._sweep(binary_ranks.binary_collect, of_terms), self._sort_buckets()]
        launches += self._add_up()
        if kind.want_grad:
            launches.append(self._sweep(binary_backward.binary_backward, of_losses))
        return launches

    def _sweep(self, kernel: Any, constants: dict[str, Any]) -> Launch:
        """The launch of a sweep: one instance per block of pixels."""
        return Launch(kernel, self.layout.blocks, _SWEEP_WARPS, **constants)

    def _scans(self, shift: int, top: int, cells: int) -> list[Launch]:
        layout = self.layout
        constants = {
            "CHUNKS_PADDED": triton.next_power_of_2(layout.most_chunks),
            "SHIFT": shift,
            "TOP": top,
            "CELLS": cells,
            "CELLS_LOG2": (cells - 1).bit_length(),
            "WANT_GRAD": self.kind.want_grad,
        }
        return [
            Launch(tables.sum_chunks, layout.chunks, _SCAN_WARPS, CHUNK=layout.chunk),
            Launch(tables.scan, layout.chunks, _SCAN_WARPS, CHUNK=layout.chunk, **constants),
        ]

    def _add_up(self) -> list[Launch]:
        """The launch that writes the loss of a single joint to a tensor, for autograd."""
        return [] if self.layout.joints > 1 or not self.kind.want_grad else [Launch(segments.add_up, 1, 4)]

    def _sort_buckets(self) -> Launch:
        room = max(32, triton.next_power_of_2(self.layout.largest_bucket))
        warps = max(1, min(_SORT_WARPS, room // 512))
        return Launch(
            sorting.sort_buckets,
            self.layout.buckets,
            warps,
            _SORT_REGISTERS,
            BINARY=self.kind.plan.is_binary,
            WANT_GRAD=self.kind.want_grad,
            HALVES=room == tables.BUCKET_ROOM.value and self.layout.any_table,
            ROOM=room,
            THREADS=min(room, 32 * warps),
        )

    # --- Running --------------------------------------------------------------------------------------------------

    def memory(self) -> tuple[Tensor, Tensor]:
        """Memory for a batch: that which is zeroed at its start, and scratch."""
        zeroed, scratch = (
            torch.empty(rooms.nbytes, dtype=torch.uint8, device=self.device)
            for rooms in (self.layout.zeroed, self.layout.scratch)
        )
        return zeroed, scratch

    def begin(
        self, addresses: Tensor, stream: torch.cuda.Stream | None, memory: tuple[Tensor, Tensor] | None = None
    ) -> Workspace:
        """Queues the launches after which a batch's faults are known.

        Args:
            addresses: int64 as bytes, on the device: one row of ``columns.Address`` per plane, then the address of the
                loss, or 0.
            stream: the current stream; None under the interpreter.
            memory: that of :meth:`memory`, if it is there already.
        """
        zeroed, scratch = memory or self.memory()
        zeroed.zero_()
        buffers = {"static": self._uploaded(stream), "addresses": addresses, "zeroed": zeroed, "scratch": scratch}
        self._launch(self.launches[:_LAUNCHES_FOR_FAULTS], buffers, stream)
        faults = self.rooms["faults"]
        return Workspace(stream, buffers, zeroed[: self.layout.results_bytes], zeroed[faults.offset : faults.stop])

    def finish(self, workspace: Workspace) -> None:
        """Queues the remaining launches."""
        self._launch(self.launches[_LAUNCHES_FOR_FAULTS:], workspace.buffers, workspace.stream)

    @property
    def is_ready(self) -> bool:
        """Whether all kernels are compiled, and the static arrays are on the device."""
        with self._lock:
            is_there = self._static_bytes is not None and (self._upload is None or self._upload.query())
        return is_there and all(launch.is_compiled for launch in self.launches)

    def _uploaded(self, stream: torch.cuda.Stream | None) -> Tensor:
        """The static arrays, for a stream. The first call queues their copy; other streams wait for it."""
        if stream is None:
            return self._host
        with self._lock:
            if self._static_bytes is None:
                static = self._host.pin_memory().to(self.device, non_blocking=True)
                self._upload, self._upload_stream = torch.cuda.Event(), stream
                self._upload.record(stream)
                self._static_bytes = static
            elif stream != self._upload_stream and not torch.cuda.is_current_stream_capturing():
                if self._upload is not None and self._upload.query():
                    self._upload = None
                if self._upload is not None:
                    stream.wait_event(self._upload)
                self._static_bytes.record_stream(stream)
        return self._static_bytes

    def _launch(self, launches: list[Launch], buffers: dict[str, Tensor], stream: torch.cuda.Stream | None) -> None:
        if stream is not None and all(launch.is_compiled for launch in launches):
            bases = {name: buffer.data_ptr() for name, buffer in buffers.items()}
            handle = stream.cuda_stream
            for launch in launches:
                launch(bases, handle)
        else:
            with _COMPILING:
                for launch in launches:
                    launch.compile(self.rooms, self.numbers, buffers)

    def result(self, name: str, results: npt.NDArray[np.uint8], *shape: int) -> npt.NDArray[Any]:
        """The array of this name in the results."""
        room: Room = self.rooms[name]
        array: npt.NDArray[Any] = results[room.offset : room.stop].view(_NUMPY_TYPES[room.dtype])
        return array.reshape(shape)


def _packed(arrays: dict[str, npt.NDArray[Any]], rooms: Rooms) -> Tensor:
    """Copies arrays to their places in one buffer on the host, as bytes."""
    host = np.zeros(max(rooms.nbytes, 1), np.uint8)
    for name, array in arrays.items():
        at = rooms.rooms[name].offset
        host[at : at + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return torch.from_numpy(host)


def host_bytes(count: int, device: torch.device) -> Tensor:
    """Memory on the host; for a GPU it is pinned, since the host would wait for copies from or to any other memory."""
    # Its device is named, as the caller of the loss may have set another one as torch's default.
    return torch.empty(count, dtype=torch.uint8, device=_HOST, pin_memory=device.type == "cuda")
