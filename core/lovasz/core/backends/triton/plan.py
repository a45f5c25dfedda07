"""What the kernels need to know of a batch: worked out once for all batches of its signature, and kept.

All that depends on shapes, element types and the loss is here; what differs from call to call are three addresses a
plane. So a batch whose like came before takes one allocation of zeros, one copy to the device, the launches, and one
copy back.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from lovasz.core.backends.triton import bins, hinge, segments, softmax, softmax_backward, softmax_ranks, sorting, tables
from lovasz.core.backends.triton.columns import Address, Cross, Fault, Group, Grouping, Plane, Rule, Segment, Term
from lovasz.core.backends.triton.launches import Launch, Room, Rooms
from lovasz.core.computed import PROBABILITY_TOLERANCE
from lovasz.spec import CrossEntropy, Layout, LovaszSoftmax, WeightedSum

SORTED_PIXELS = 4096
"""Groups of at most so many pixels are sorted, each segment by one program."""
RANKED_PIXELS = 1 << 18
RANKED_ELEMENTS = 1 << 21
"""Larger groups have tables. With fewer pixels than these, or at most so many logits, all pixels are ranked in buckets,
and so they are for the hinge, whose small errors weigh as much as its large ones;"""
RANKED_FOREGROUND = 4096
"""in others those of classes with fewer pixels than these, ..."""
RANKED_BUCKETS = 5
"""... in so many buckets."""

UNROLLED_CLASSES = 32
"""Up to so many classes stay in the first sweep's registers; more are read again, in rounds of ..."""
ROUND_CLASSES = 4
"""... so many."""
SOFTMAX_BLOCK = 128
HINGE_BLOCK = 1024
"""Pixels that a program of a sweep works on, with ..."""
SOFTMAX_WARPS = 4
HINGE_WARPS = 4
"""... so many warps."""
_PADDED_CLASSES = 4
"""Numbers of classes are rounded up to a multiple of this, so that few kernels are compiled."""

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
_CHUNK = 512
_SCAN_WARPS = 4
_LAUNCHES_FOR_FAULTS = 1
"""After so many launches the faults of a batch are known."""
_SORT_WARPS = 8
_SORT_REGISTERS = 128
"""So that two programs share a multiprocessor: sorting waits for other warps more than it computes."""


class Signature(NamedTuple):
    """Batches that agree in this share a plan."""

    loss: WeightedSum
    layouts: tuple[Layout, ...]
    sizes: tuple[int, ...]
    logits: torch.dtype
    labels: torch.dtype
    want_grad: bool
    device: torch.device


@dataclass(frozen=True)
class Origin:
    """Where a plane's tensors are: in which request, and how many elements behind its first ones."""

    request: npt.NDArray[np.int64]
    logits: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]


class Workspace(NamedTuple):
    """The buffers of a batch, and of its results, as bytes: all of them, and the faults alone."""

    buffers: dict[str, Tensor]
    small: Tensor
    faults: Tensor


class Plan:
    """See the module.

    Attributes:
        origin: of each plane.
        launches: in their order.
        address_bytes: size of the addresses of a batch.
        workspace_bytes: memory of the device that a batch takes beyond its tensors.
        times_seen: how often it was used before its work was recorded as a graph.
        small: bytes of the zeroed buffer, from its beginning, that hold the results.
    """

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        loss, layouts = signature.loss, signature.layouts
        self.channels = layouts[0].channels
        self.joints = len(signature.sizes)
        self.lovasz = [(weight, term) for weight, term in loss.terms if not isinstance(term, CrossEntropy)]
        self.entropies = [(weight, term) for weight, term in loss.terms if isinstance(term, CrossEntropy)]
        self.rules = list(dict.fromkeys(term.ignore_index for _, term in loss.terms))
        self.per_image = any(term.per_image for _, term in self.lovasz)
        self._static: dict[str, npt.NDArray[Any]] = {}
        self._lock = threading.Lock()
        self._static_bytes: Tensor | None = None
        self._upload: torch.cuda.Event | None = None
        self._upload_stream: torch.cuda.Stream | None = None
        self.times_seen = 0
        self._zeroed, self._scratch = Rooms("zeroed"), Rooms("scratch")
        self.numbers: dict[str, int | float] = {"channels": self.channels, "classes": self.channels}
        self.numbers |= {"joints": self.joints, "values": layouts[0].label_values}
        self._lay_planes_out()
        self._lay_groups_out()
        self._lay_results_out()
        self._lay_tables_out()
        self._keep_static()
        self.launches = list(self._hinge() if loss.is_hinge else self._softmax())

    # --- Layout ---------------------------------------------------------------------------------------------------

    def _lay_planes_out(self) -> None:
        """Planes by joint, channel (for the hinge), request and image."""
        layouts, channels = self.signature.layouts, self.channels
        maps = channels if self.signature.loss.is_hinge else 1
        stops = list(accumulate(self.signature.sizes))
        parts: list[npt.NDArray[np.int64]] = []
        image = pixel = plane = 0
        self._joint_groups: list[dict[Group, int]] = []
        self._image_groups: list[dict[Group, int]] = []
        self.images_of_joints: list[int] = []
        for joint, (stop, size) in enumerate(zip(stops, self.signature.sizes, strict=True)):
            members = range(stop - size, stop)
            pixels = sum(layouts[r].images * layouts[r].pixels for r in members)
            planes = sum(layouts[r].images if self.per_image else 1 for r in members)
            steps = {Group.PLANE_STEP: planes, Group.PIXEL_STEP: pixels}
            of_joint = {Group.FIRST_PLANE: plane, Group.PLANES: planes, Group.FIRST_PIXEL: pixel, Group.PIXELS: pixels}
            self._joint_groups.append(of_joint | steps)
            for channel in range(maps):
                first_image = image
                for r in members:
                    layout = layouts[r]
                    numbers = np.arange(layout.images if self.per_image else 1)
                    own = layout.pixels * (1 if self.per_image else layout.images)
                    rows = np.zeros((len(numbers), len(Plane) + 3), np.int64)
                    rows[:, Plane.PIXELS] = own
                    rows[:, Plane.IMAGE_PIXELS] = layout.pixels
                    rows[:, Plane.FIRST_PIXEL] = pixel + own * numbers
                    rows[:, Plane.JOINT] = joint
                    rows[:, Plane.IMAGE] = first_image + numbers
                    rows[:, Plane.CHANNEL] = channel
                    rows[:, -3] = r
                    rows[:, -2] = numbers * channels * layout.pixels + channel * layout.pixels
                    rows[:, -1] = rows[:, -2] if maps > 1 else numbers * layout.pixels
                    parts.append(rows)
                    if self.per_image and channel == 0:
                        self._image_groups += [
                            {
                                Group.FIRST_PLANE: plane + n,
                                Group.PLANES: 1,
                                Group.FIRST_PIXEL: pixel + own * n,
                                Group.PIXELS: own,
                            }
                            | steps
                            for n in range(layout.images)
                        ]
                    first_image += layout.images
                    pixel += own * len(numbers)
                    plane += len(numbers)
            self.images_of_joints.append(first_image - image)
            image = first_image
        rows = np.concatenate(parts)
        self.origin = Origin(rows[:, -3], rows[:, -2], rows[:, -1])
        self._planes = np.ascontiguousarray(rows[:, : len(Plane)])
        self.pixels = pixel
        self.elements = pixel * (1 if self.signature.loss.is_hinge else channels)

    def _lay_groups_out(self) -> None:
        """The rows of the groups, by term, and the groupings, each with its counters."""
        rules = self.rules
        fields = hinge.COUNTERS.value if self.signature.loss.is_hinge else 2
        wanted: dict[tuple[int, bool], None] = {(0 if len(rules) == 1 else -1, False): None}
        wanted |= {(rules.index(term.ignore_index), term.per_image): None for _, term in self.lovasz}
        wanted |= {(rules.index(term.ignore_index), False): None for _, term in self.entropies}
        counters, self.counters_of = 0, {}
        for rule, per_image in wanted:
            self.counters_of[rule, per_image] = counters
            counters += len(self._groups_of(per_image)) * fields * self.channels
        self.counters = counters
        keep = np.array([[*key, at] for key, at in self.counters_of.items()], np.int64)
        self._static["groupings"] = keep[:, [Grouping.RULE, Grouping.PER_IMAGE, Grouping.COUNTERS]]
        in_use = [(0, 0) if rule is None else (rule, 1) for rule in rules]
        self._static["rules"] = np.array(in_use, np.int64)[:, [Rule.VALUE, Rule.IN_USE]]
        shares = np.repeat([1 / images for images in self.images_of_joints], self.images_of_joints)
        rows: list[npt.NDArray[np.int64]] = []
        terms = np.zeros((len(self.lovasz), len(Term)), np.int64)
        self.first_rows = []
        for t, (_, term) in enumerate(self.lovasz):
            groups = self._groups_of(term.per_image)
            own = np.zeros((len(groups), len(Group)), np.int64)
            for row, known in zip(own, groups, strict=True):
                row[list(known)] = list(known.values())
            key = rules.index(term.ignore_index), term.per_image
            own[:, Group.TERM] = t
            own[:, Group.COUNTERS] = self.counters_of[key] + np.arange(len(groups)) * fields * self.channels
            own[:, Group.SHARE] = (shares if term.per_image else np.ones(len(groups))).view(np.int64)
            first_row = sum(map(len, rows))
            terms[t, [Term.RULE, Term.PER_IMAGE, Term.FIRST_ROW]] = *key, first_row
            terms[t, Term.LISTS_CLASSES] = isinstance(term, LovaszSoftmax) and term.classes != "present"
            self.first_rows.append(first_row)
            rows.append(own)
        self._static["terms"] = terms
        self.groups = np.concatenate(rows) if rows else np.zeros((0, len(Group)), np.int64)
        self._static["groups"] = self.groups

    def _groups_of(self, per_image: bool) -> list[dict[Group, int]]:
        return self._image_groups if per_image else self._joint_groups

    def _lay_results_out(self) -> None:
        zeroed, scratch = self._zeroed, self._scratch
        self.segments = len(self.groups) * self.channels
        zeroed.add("segments", torch.int64, self.segments * len(Segment))
        zeroed.add("cross_sums", torch.int64, len(self.entropies) * self.joints * len(Cross))
        zeroed.add("counters", torch.int32, self.counters)
        zeroed.add("predictions", torch.int32, self.joints * 2 * self.channels)
        zeroed.add("faults", torch.int32, self.joints * len(Fault))
        self.small = zeroed.nbytes
        scratch.add("least", torch.int32, self.segments)
        scratch.add("ranked", torch.int32, self.segments)
        zeroed.add("ranked_rows", torch.int32, len(self.groups))

    def _lay_tables_out(self) -> None:
        """Which groups have tables, and where these, their maps, lists and buckets are."""
        groups, channels, is_hinge = self.groups, self.channels, self.signature.loss.is_hinge
        step, crowd = tables.BUCKET_STEP.value, tables.CROWD.value
        words = cells = listed = buckets = 0
        maps: dict[int, int] = {}
        chunk_segments, chunk_firsts, bucket_segments = [], [], []
        chunks = 0
        self.chunk = _CHUNK if self.signature.device.type == "cuda" else 1 << 15
        self.most_chunks = 1
        self.largest_bucket = 1
        for row, group in enumerate(groups):
            pixels, numbers = int(group[Group.PIXELS]), row * channels + np.arange(channels)
            own_buckets, room = 1, pixels
            if pixels > SORTED_PIXELS:
                coarser = bins.coarser_by(pixels)
                if is_hinge:
                    count, group[Group.MAP] = bins.hinge_bins(coarser), cells
                    cells += channels * bins.HINGE_CELLS
                else:
                    if coarser not in maps:
                        maps[coarser] = len(maps) * bins.SOFTMAX_CELLS
                    count, group[Group.MAP] = bins.softmax_bins(coarser), maps[coarser]
                group[Group.BINS], group[Group.WORDS] = count, words
                words += channels * 2 * count
                if is_hinge or pixels < RANKED_PIXELS or pixels * channels <= RANKED_ELEMENTS:
                    group[Group.RANKED_BELOW], own_buckets = pixels + 1, pixels // step + 1
                else:
                    group[Group.RANKED_BELOW], own_buckets = RANKED_FOREGROUND, RANKED_BUCKETS
                    room = own_buckets * step + crowd
                own_chunks = -(-count // self.chunk)
                self.most_chunks = max(self.most_chunks, own_chunks)
                chunk_segments.append(np.repeat(numbers, own_chunks))
                chunk_firsts.append(np.repeat(chunks + own_chunks * np.arange(channels), own_chunks))
                chunks += own_chunks * channels
            self.largest_bucket = max(self.largest_bucket, min(pixels, tables.BUCKET_ROOM.value))
            group[Group.LIST], group[Group.LIST_ROOM] = listed, room
            group[Group.FIRST_BUCKET], group[Group.BUCKETS] = buckets, own_buckets
            listed += channels * room
            bucket_segments.append(np.repeat(numbers, own_buckets))
            buckets += own_buckets * channels
        none = [np.zeros(0, np.int64)]
        self._static["chunk_segments"] = np.concatenate(chunk_segments or none)
        self._static["chunk_firsts"] = np.concatenate(chunk_firsts or none)
        self._static["bucket_segments"] = np.concatenate(bucket_segments or none)
        self._static["maps"] = np.concatenate([bins.softmax_map(c) for c in maps] or [np.zeros(0, np.int32)])
        self.chunks, self.buckets, self.any_table = chunks, buckets, words > 0
        zeroed, scratch = self._zeroed, self._scratch
        zeroed.add("bucket_befores", torch.int64, buckets)
        zeroed.add("bucket_counts", torch.int32, buckets)
        zeroed.add("cells", torch.int32, cells)
        zeroed.add("words", torch.int64, words)
        scratch.add("totals", torch.int64, chunks)
        scratch.add("lists", torch.int64, listed)
        if not is_hinge:
            for name in ("maxima", "reciprocals"):
                scratch.add(name, torch.float32, 0 if self.signature.loss.probabilities else self.pixels)
            scratch.add("label_errors", torch.float32, self.pixels)
        else:
            for name in ("maxima", "reciprocals", "label_errors"):
                scratch.add(name, torch.float32, 0)
        more = max(len(self.lovasz) - 1, 0) if self.signature.want_grad else 0
        scratch.add("more_grads", torch.float32, more * self.elements)
        self.numbers |= {"element_count": self.elements, "pixel_count": self.pixels}

    def _keep_static(self) -> None:
        """Brings what never changes to the device."""
        block = self._block()
        blocks = -(-self._planes[:, Plane.PIXELS] // block)
        self._planes[:, Plane.FIRST_BLOCK] = np.cumsum(blocks) - blocks
        self.blocks = int(blocks.sum())
        self._static["planes"] = self._planes
        self._static["block_planes"] = np.repeat(np.arange(len(blocks)), blocks)
        classes = self.channels
        self._static["cross_weights"] = np.array([weight for weight, _ in self.entropies], np.float64)
        if self.signature.loss.is_hinge:
            self._static["term_weights"] = np.array([weight for weight, _ in self.lovasz], np.float64)
        else:
            weights, flags = np.zeros((len(self.lovasz), classes)), np.zeros((len(self.lovasz), classes), np.int64)
            for t, (weight, term) in enumerate(self.lovasz):
                assert isinstance(term, LovaszSoftmax)
                weights[t] = weight * np.asarray(term.class_weights or [1.0] * classes)
                if isinstance(term.classes, tuple):
                    flags[t, list(term.classes)] = 1
                else:
                    flags[t] = term.classes == "all"
            self._static["class_weights"], self._static["class_flags"] = weights, flags
            self._add_cross_entropies()
        static = Rooms("static")
        for name, array in self._static.items():
            static.add(name, _TORCH_TYPES[array.dtype.type], array.size)
        host = np.zeros(max(static.nbytes, 1), np.uint8)
        for name, array in self._static.items():
            at = static.rooms[name].offset
            host[at : at + array.nbytes] = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        self._host = torch.from_numpy(host)
        addresses = Room("addresses", 0, torch.int64, len(self._planes) * len(Address) + 1)
        loss_address = Room("addresses", len(self._planes) * len(Address) * 8, torch.int64, 1)
        self.rooms = (
            {"addresses": addresses, "loss_address": loss_address}
            | static.rooms
            | self._zeroed.rooms
            | self._scratch.rooms
        )
        if self.signature.loss.is_hinge:
            self.rooms["maps"] = self.rooms["cells"]
        self.address_bytes = addresses.stop
        self.workspace_bytes = self._zeroed.nbytes + self._scratch.nbytes

    def _add_cross_entropies(self) -> None:
        entropies, classes = self.entropies, self.channels
        numbers = [(w * (1 - t.label_smoothing), w * t.label_smoothing / classes) for w, t in entropies]
        rules = [self.rules.index(term.ignore_index) for _, term in entropies]
        sizes = [float(group[Group.PIXELS]) for group in self._joint_groups]
        self._static |= {
            "cross_rules": np.array(rules, np.int64),
            "cross_counters": np.array([self.counters_of[rule, False] for rule in rules], np.int64),
            "cross_class_weights": np.array([t.class_weights or [1.0] * classes for _, t in entropies], np.float64),
            "cross_smoothings": np.array([term.label_smoothing for _, term in entropies], np.float64),
            "cross_factors": np.array(numbers, np.float64),
            "cross_sizes": np.array(sizes, np.float64),
        }
        self._scratch.add("cross_scales", torch.float32, self.joints * len(entropies) * 2)
        self._scratch.add("pixel_losses", torch.float32, len(entropies) * self.pixels)

    # --- Launches -------------------------------------------------------------------------------------------------

    def _block(self) -> int:
        if self.signature.device.type != "cuda":
            return 4096  # The interpreter takes tens of milliseconds for each program, whatever its size.
        return HINGE_BLOCK if self.signature.loss.is_hinge else SOFTMAX_BLOCK

    def _softmax(self) -> list[Launch]:
        padded = -(-self.channels // _PADDED_CLASSES) * _PADDED_CLASSES
        all_classes = padded <= UNROLLED_CLASSES
        of_logits = {
            "LOGIT": _TYPES[self.signature.logits],
            "LABEL": _TYPES[self.signature.labels],
            "PROBABILITIES": self.signature.loss.probabilities,
            "RULES": len(self.rules),
        }
        terms = {"TERMS": len(self.lovasz), "BLOCK": self._block()}
        cross = {"CROSS_TERMS": len(self.entropies)}
        classes = {"CLASSES": padded if all_classes else ROUND_CLASSES}
        kept = classes | {"ALL_CLASSES": all_classes}
        classes_padded = max(32, triton.next_power_of_2(self.channels))
        absent = {"ANY_ABSENT": self.any_table and bool((self._static["terms"][:, Term.LISTS_CLASSES] != 0).any())}
        table = {"ANY_TABLE": self.any_table}
        self.numbers |= {"tolerance": PROBABILITY_TOLERANCE, "rows": len(self.groups)}
        rows = len(self.groups) + len(self.entropies) * self.joints
        launches = [
            Launch(
                softmax.softmax_statistics,
                self.blocks,
                SOFTMAX_WARPS,
                **of_logits,
                **cross,
                **kept,
                GROUPINGS=len(self.counters_of),
                CLASSES_PADDED=classes_padded,
                BLOCK=self._block(),
            ),
            Launch(segments.plan_softmax, rows, 4, CHANNELS_PADDED=classes_padded),
        ]
        if self.any_table or self.entropies:
            launches.append(
                Launch(
                    softmax_ranks.softmax_count,
                    self.blocks,
                    SOFTMAX_WARPS,
                    **of_logits,
                    **terms,
                    **cross,
                    **table,
                    **absent,
                )
            )
        if self.any_table:
            launches += self._scans(bins.SOFTMAX_SHIFT, bins.SOFTMAX_TOP, bins.SOFTMAX_CELLS)
        if self.buckets:
            launches.append(
                Launch(softmax_ranks.softmax_collect, self.blocks, SOFTMAX_WARPS, **of_logits, **terms, **table)
            )
            launches.append(self._sort_buckets())
        launches += self._add_up()
        if self.signature.want_grad:
            launches.append(
                Launch(
                    softmax_backward.softmax_backward,
                    self.blocks,
                    SOFTMAX_WARPS,
                    **of_logits,
                    **terms,
                    **cross,
                    **table,
                    **absent,
                )
            )
        return launches

    def _hinge(self) -> list[Launch]:
        of_logits = {
            "LOGIT": _TYPES[self.signature.logits],
            "LABEL": _TYPES[self.signature.labels],
            "RULES": len(self.rules),
            "TERMS": len(self.lovasz),
            "BLOCK": self._block(),
        }
        table = {"ANY_TABLE": self.any_table}
        launches = [
            Launch(
                hinge.hinge_statistics, self.blocks, HINGE_WARPS, **of_logits, **table, GROUPINGS=len(self.counters_of)
            ),
            Launch(hinge.plan_hinge, self.segments, 4),
        ]
        if self.any_table:
            launches.append(Launch(hinge.hinge_count, self.blocks, HINGE_WARPS, **of_logits))
            launches += self._scans(bins.HINGE_SHIFT, bins.HINGE_TOP, bins.HINGE_CELLS)
        launches.append(Launch(hinge.hinge_collect, self.blocks, HINGE_WARPS, **of_logits, **table))
        launches.append(self._sort_buckets())
        launches += self._add_up()
        if self.signature.want_grad:
            launches.append(Launch(hinge.hinge_backward, self.blocks, HINGE_WARPS, **of_logits, **table))
        return launches

    def _scans(self, shift: int, top: int, cells: int) -> list[Launch]:
        constants = {
            "CHUNKS_PADDED": triton.next_power_of_2(self.most_chunks),
            "SHIFT": shift,
            "TOP": top,
            "CELLS": cells,
            "CELLS_LOG2": (cells - 1).bit_length(),
            "WANT_GRAD": self.signature.want_grad,
        }
        return [
            Launch(tables.sum_chunks, self.chunks, _SCAN_WARPS, CHUNK=self.chunk),
            Launch(tables.scan, self.chunks, _SCAN_WARPS, CHUNK=self.chunk, **constants),
        ]

    def _add_up(self) -> list[Launch]:
        """The loss of a single request also comes as a tensor, for autograd."""
        if self.joints > 1 or not self.signature.want_grad:
            return []
        self.numbers |= {"segment_count": self.segments, "cross_count": len(self.entropies)}
        return [Launch(segments.add_up, 1, 4)]

    def _sort_buckets(self) -> Launch:
        constants = {"HINGE": self.signature.loss.is_hinge, "WANT_GRAD": self.signature.want_grad}
        room = max(32, triton.next_power_of_2(self.largest_bucket))
        warps = max(1, min(_SORT_WARPS, room // 512))
        constants |= {"HALVES": room == tables.BUCKET_ROOM.value and self.any_table}
        rooms = {"ROOM": room, "THREADS": min(room, 32 * warps)}
        return Launch(sorting.sort_buckets, self.buckets, warps, _SORT_REGISTERS, **constants, **rooms)

    def begin(self, addresses: Tensor) -> Workspace:
        """Queues the first part of a batch's work on the current stream, after which its faults are known.

        Args:
            addresses: int64, shape (planes, 3) and one more, as bytes, on the device: :class:`Address`, and where the
                loss goes (0: nowhere).
        """
        device = self.signature.device
        buffers = {
            "static": self._uploaded(),
            "addresses": addresses,
            "zeroed": torch.zeros(self._zeroed.nbytes, dtype=torch.uint8, device=device),
            "scratch": torch.empty(self._scratch.nbytes, dtype=torch.uint8, device=device),
        }
        self._launch(self.launches[:_LAUNCHES_FOR_FAULTS], buffers)
        faults = self.rooms["faults"]
        zeroed = buffers["zeroed"]
        return Workspace(buffers, zeroed[: self.small], zeroed[faults.offset : faults.stop])

    @property
    def is_ready(self) -> bool:
        """Whether all kernels are compiled, and what never changes has come to the device."""
        if self._upload is not None and self._upload.query():
            self._upload = None
        is_there = self._static_bytes is not None and self._upload is None
        return is_there and all(launch.is_compiled for launch in self.launches)

    def _uploaded(self) -> Tensor:
        """What never changes, for the current stream: the first one queues the copy, others wait for it."""
        device = self.signature.device
        if device.type != "cuda":
            return self._host
        stream = torch.cuda.current_stream(device)
        with self._lock:
            if self._static_bytes is None:
                static = to_device(self._host, device)
                self._upload, self._upload_stream = torch.cuda.Event(), stream
                self._upload.record(stream)
                self._static_bytes = static
            elif stream != self._upload_stream and not torch.cuda.is_current_stream_capturing():
                if self._upload is not None:
                    stream.wait_event(self._upload)
                self._static_bytes.record_stream(stream)
        return self._static_bytes

    def finish(self, workspace: Workspace) -> None:
        """Queues the rest."""
        self._launch(self.launches[_LAUNCHES_FOR_FAULTS:], workspace.buffers)

    def _launch(self, launches: list[Launch], buffers: dict[str, Tensor]) -> None:
        if all(launch.is_compiled for launch in launches):
            bases = {name: buffer.data_ptr() for name, buffer in buffers.items()}
            stream = torch.cuda.current_stream(self.signature.device).cuda_stream
            for launch in launches:
                launch(bases, stream)
        else:
            for launch in launches:
                launch.compile(self.rooms, self.numbers, buffers)

    def result(self, name: str, small: npt.NDArray[np.uint8], *shape: int) -> npt.NDArray[Any]:
        """An array of the results."""
        room = self.rooms[name]
        array: npt.NDArray[Any] = small[room.offset : room.stop].view(_NUMPY_TYPES[room.dtype])
        return array.reshape(shape)


_TORCH_TYPES = {np.int64: torch.int64, np.int32: torch.int32, np.float64: torch.float64}
_NUMPY_TYPES = {torch.int64: np.int64, torch.int32: np.int32}


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """To a GPU from pinned memory: the host would wait for any other copy."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
