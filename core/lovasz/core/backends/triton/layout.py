"""The layout of a batch's buffers: the arrays that host and kernels share, and the place of each in its buffer.

The layout depends on the plan and the element types alone; only the addresses of the tensors differ from call to call.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lovasz.core.backends.triton import bins, tables
from lovasz.core.backends.triton.bins import SORTED_PIXELS
from lovasz.core.backends.triton.columns import (
    Address,
    BinaryCounter,
    Cross,
    Factor,
    Group,
    Grouping,
    Half,
    Outcome,
    Plane,
    Rule,
    Scale,
    Segment,
    SoftmaxCounter,
    Term,
)
from lovasz.core.computed import Fault
from lovasz.core.plan import FUSE_ALL, Plan

RANKED_PIXELS = 1 << 18
"""In a group with tables and fewer pixels than this, all buckets are sorted. The same holds for every group of binary
losses: the hinge's small errors weigh as much as its large ones."""
RANKED_ELEMENTS = 1 << 21
"""In a group with tables and at most this many logits, all buckets are sorted."""

RANKED_FOREGROUND = 4096
"""In other groups, buckets are sorted only for classes with fewer pixels than this."""
RANKED_BUCKETS = 5
"""The number of buckets that are sorted for such a class."""

BLOCK_PIXELS = {"softmax": 128, "binary": 1024}
"""The pixels of a block, on which one kernel instance of a sweep works."""

INTERPRETED_BLOCK_PIXELS = 4096
"""The pixels of a block under the interpreter, which takes tens of milliseconds per kernel instance of any size."""
INTERPRETED_CHUNK = 1 << 15
"""The bins of a chunk under the interpreter."""

CHUNK = 512
"""The bins of a chunk, on which one kernel instance of a scan works."""

_ALIGNMENT = 64

Integers = npt.NDArray[np.int64]


class Room(NamedTuple):
    """The place of an array in a buffer."""

    buffer: str
    offset: int
    dtype: torch.dtype
    size: int

    @property
    def stop(self) -> int:
        return self.offset + self.size * self.dtype.itemsize


@dataclass
class Rooms:
    """The places of the arrays in one buffer."""

    buffer: str
    rooms: dict[str, Room] = field(default_factory=dict)
    nbytes: int = 0

    def add(self, name: str, dtype: torch.dtype, count: int) -> None:
        """Adds an array of ``count`` elements after the others."""
        self.rooms[name] = Room(self.buffer, self.nbytes, dtype, count)
        self.nbytes += -(-max(count, 1) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


class Kind(NamedTuple):
    """A kind of batch: batches with equal kinds use one layout and one program."""

    plan: Plan
    logits: torch.dtype
    labels: torch.dtype
    want_grad: bool


@dataclass(frozen=True)
class Origin:
    """Where the tensors of each plane are.

    Attributes:
        request: the plane's request.
        offsets: in bytes, one column for each of ``columns.Address``: where the plane's first element is, counted from
            the first element of the request.
    """

    request: Integers
    offsets: Integers


class Layout:
    """The arrays of a kind of batch, and their places.

    Attributes:
        static: the arrays that never change, by the names of the kernels' arguments; the program takes them.
        zeroed: the buffer that has to be 0 at the start of each call; it begins with the results.
        results_bytes: the number of bytes of ``zeroed`` that hold the results.
        scratch: the buffer whose contents are undefined at the start of each call.
        groups: shape (rows, columns of ``Group``): the groups of each Lovász term.
        first_rows: the row of the first group of each Lovász term.
        entropies: the cross-entropy terms, of softmax or binary.
        counters_of: where the counters of each grouping (rule or -1, ``per_image``) begin.
    """

    def __init__(self, kind: Kind) -> None:
        self.kind, self.plan = kind, kind.plan
        self.is_interpreted = self.plan.device.type != "cuda"
        self.channels, self.joints = self.plan.channels, len(self.plan.sizes)
        self.entropies = self.plan.cross_entropies + self.plan.binary_cross_entropies
        self.static: dict[str, npt.NDArray[Any]] = {}
        self.zeroed, self.scratch = Rooms("zeroed"), Rooms("scratch")
        self._planes = self.plan.planes(FUSE_ALL)
        self._add_planes()
        self._add_groups()
        self._add_results()
        self._add_tables()
        self._add_pixels()
        self._add_terms()

    def _add_planes(self) -> None:
        """Adds the planes, ordered by joint, then by binary label, then by request."""
        planes, label_maps = self._planes, self._label_maps
        plane, channel = np.tile(np.arange(len(planes)), label_maps), np.repeat(np.arange(label_maps), len(planes))
        order = np.lexsort((plane, channel, planes.joint[plane]))
        plane, channel = plane[order], channel[order]
        pixels = planes.pixels[plane]
        first_logits = planes.logits[plane] + channel * planes.image_pixels[plane]
        first_labels = first_logits if self.plan.is_binary else planes.labels[plane]
        offsets = np.zeros((len(plane), len(Address)), np.int64)
        offsets[:, Address.LOGITS] = first_logits * self.kind.logits.itemsize
        offsets[:, Address.LABELS] = first_labels * self.kind.labels.itemsize
        offsets[:, Address.GRAD] = first_logits * torch.float32.itemsize
        self.origin = Origin(planes.request[plane], offsets)
        self.pixels = int(pixels.sum())
        self.elements = self.pixels * (1 if self.plan.is_binary else self.channels)
        self.block = BLOCK_PIXELS["binary" if self.plan.is_binary else "softmax"]
        if self.is_interpreted:
            self.block = INTERPRETED_BLOCK_PIXELS
        blocks = -(-pixels // self.block)
        self.blocks = int(blocks.sum())
        rows = np.zeros((len(plane), len(Plane)), np.int64)
        rows[:, Plane.PIXELS] = pixels
        rows[:, Plane.IMAGE_PIXELS] = planes.image_pixels[plane]
        rows[:, Plane.FIRST_BLOCK] = np.cumsum(blocks) - blocks
        rows[:, Plane.FIRST_PIXEL] = np.cumsum(pixels) - pixels
        rows[:, Plane.JOINT] = planes.joint[plane]
        rows[:, Plane.IMAGE] = plane
        rows[:, Plane.CHANNEL] = channel
        self.static |= {"planes": rows, "block_planes": np.repeat(np.arange(len(plane)), blocks)}
        count = len(plane) * len(Address)
        self.addresses = {
            "addresses": Room("addresses", 0, torch.int64, count + 1),
            "loss_address": Room("addresses", count * 8, torch.int64, 1),
        }

    @property
    def _label_maps(self) -> int:
        return self.channels if self.plan.is_binary else 1

    def _add_groups(self) -> None:
        """Adds the groups of each Lovász term, and the groupings with their counters."""
        plan, rules = self.plan, self.plan.rules
        fields = len(BinaryCounter) if plan.is_binary else len(SoftmaxCounter)
        wanted = dict.fromkeys(
            [(0 if len(rules) == 1 else -1, False), *((term.rule, term.per_image) for term in plan.terms)]
        )
        self.counters, self.counters_of = 0, {}
        for rule, per_image in wanted:
            self.counters_of[rule, per_image] = self.counters
            groups = self._planes.images if per_image else self._planes.joints
            self.counters += len(groups.pixels) * fields * self.channels
        groupings = np.array([[*key, at] for key, at in self.counters_of.items()], np.int64)
        self.static["groupings"] = groupings[:, [Grouping.RULE, Grouping.PER_IMAGE, Grouping.COUNTERS]]
        in_use = np.array([(0, 0) if rule is None else (rule, 1) for rule in rules], np.int64)
        self.static["rules"] = in_use[:, [Rule.VALUE, Rule.IN_USE]]
        joints = self._planes.joints
        terms = np.zeros((len(plan.lovasz), len(Term)), np.int64)
        rows = [np.zeros((0, len(Group)), np.int64)]
        self.first_rows = []
        for t, term in enumerate(plan.lovasz):
            groups, first_row = self._planes.groups(term), sum(map(len, rows))
            joint = self._planes.joint[groups.first_plane]
            first_plane, start = joints.first_plane[joint], joints.start[joint]
            own = np.zeros((len(joint), len(Group)), np.int64)
            own[:, Group.TERM] = t
            own[:, Group.COUNTERS] = self.counters_of[term.rule, term.per_image]
            own[:, Group.COUNTERS] += np.arange(len(joint)) * fields * self.channels
            # For binary losses, the planes of a joint's other labels come after those of its first label.
            own[:, Group.FIRST_PLANE] = first_plane * self._label_maps + groups.first_plane - first_plane
            own[:, Group.PLANE_STEP], own[:, Group.PIXEL_STEP] = joints.planes[joint], joints.pixels[joint]
            own[:, Group.PLANES] = groups.planes
            own[:, Group.FIRST_PIXEL] = start * self._label_maps + groups.start - start
            own[:, Group.PIXELS] = groups.pixels
            own[:, Group.SHARE] = groups.share.view(np.int64)
            terms[t, [Term.RULE, Term.PER_IMAGE, Term.FIRST_ROW]] = term.rule, term.per_image, first_row
            terms[t, Term.LISTS_CLASSES] = term.listed is not None
            self.first_rows.append(first_row)
            rows.append(own)
        self.groups = np.concatenate(rows)
        self.segments = len(self.groups) * self.channels
        self.lists_classes = any(term.listed is not None for term in plan.lovasz)
        self.static |= {"terms": terms, "groups": self.groups}

    def _add_results(self) -> None:
        zeroed = self.zeroed
        zeroed.add("segments", torch.int64, self.segments * len(Segment))
        zeroed.add("cross_sums", torch.int64, len(self.entropies) * self.joints * len(Cross))
        zeroed.add("counters", torch.int32, self.counters)
        zeroed.add("predictions", torch.int32, self.joints * len(Outcome) * self.channels)
        zeroed.add("faults", torch.int32, self.joints * len(Fault))
        self.results_bytes = zeroed.nbytes

    def _add_tables(self) -> None:
        """Decides which groups have tables; adds tables, their maps, and the lists and buckets of all groups."""
        groups, channels, is_binary = self.groups, self.channels, self.plan.is_binary
        pixels = groups[:, Group.PIXELS]
        large = pixels > SORTED_PIXELS
        coarser = np.array([bins.coarser_by(int(count)) for count in pixels[large]], np.int64)
        kinds = np.unique(coarser)
        _, cells = bins.binary_cells(is_sigmoid=self.plan.is_sigmoid)
        bins_of = bins.binary_bins if is_binary else bins.softmax_bins
        groups[large, Group.BINS] = [bins_of(int(c)) for c in coarser]
        if is_binary:
            groups[large, Group.MAP] = np.arange(len(coarser)) * channels * cells
        else:
            groups[large, Group.MAP] = np.searchsorted(kinds, coarser) * bins.SOFTMAX_CELLS
        maps = [] if is_binary else [bins.softmax_map(int(c)) for c in kinds]
        self.static["maps"] = np.concatenate([np.zeros(0, np.int32), *maps])
        words = len(Half) * channels * groups[:, Group.BINS]
        groups[:, Group.WORDS] = np.cumsum(words) - words

        step, crowd = tables.BUCKET_STEP.value, tables.CROWD.value
        all_ranked = large & (is_binary | (pixels < RANKED_PIXELS) | (pixels * channels <= RANKED_ELEMENTS))
        buckets = np.where(all_ranked, pixels // step + 1, np.where(large, RANKED_BUCKETS, 1))
        listed = np.where(large & ~all_ranked, RANKED_BUCKETS * step + crowd, pixels)
        groups[large, Group.RANKED_BELOW] = np.where(all_ranked, pixels + 1, RANKED_FOREGROUND)[large]
        groups[:, Group.BUCKETS], groups[:, Group.LIST_ROOM] = buckets, listed
        groups[:, Group.FIRST_BUCKET] = (np.cumsum(buckets) - buckets) * channels
        groups[:, Group.LIST] = (np.cumsum(listed) - listed) * channels
        self.largest_bucket = int(np.minimum(pixels, tables.BUCKET_ROOM.value).max(initial=1))

        self.chunk = INTERPRETED_CHUNK if self.is_interpreted else CHUNK
        chunks = np.repeat(-(-groups[:, Group.BINS] // self.chunk), channels)
        self.most_chunks = int(chunks.max(initial=1))
        self.chunks, self.buckets, self.any_table = int(chunks.sum()), int(buckets.sum()) * channels, bool(large.any())
        numbers = np.arange(self.segments)
        self.static |= {
            "chunk_segments": np.repeat(numbers, chunks),
            "chunk_firsts": np.repeat(np.cumsum(chunks) - chunks, chunks),
            "bucket_segments": np.repeat(numbers, np.repeat(buckets, channels)),
        }
        zeroed, scratch = self.zeroed, self.scratch
        scratch.add("least", torch.int32, self.segments)
        scratch.add("ranked", torch.int32, self.segments)
        zeroed.add("ranked_rows", torch.int32, len(groups))
        zeroed.add("bucket_befores", torch.int64, self.buckets)
        zeroed.add("bucket_counts", torch.int32, self.buckets)
        zeroed.add("cells", torch.int32, len(coarser) * channels * cells if is_binary else 0)
        zeroed.add("words", torch.int64, int(words.sum()))
        scratch.add("totals", torch.int64, self.chunks)
        scratch.add("lists", torch.int64, int(listed.sum()) * channels)

    def _add_pixels(self) -> None:
        """Adds the values that are kept for each pixel between the sweeps."""
        statistics = 0 if self.plan.is_binary else self.pixels
        exponentials = 0 if self.plan.loss.probabilities else statistics
        for name in ("maxima", "reciprocals"):
            self.scratch.add(name, torch.float32, exponentials)
        self.scratch.add("label_errors", torch.float32, statistics)
        more = max(len(self.plan.lovasz) - 1, 0) if self.kind.want_grad else 0
        self.scratch.add("more_grads", torch.float32, more * self.elements)

    def _add_terms(self) -> None:
        """Adds the weights of the terms and of their classes."""
        plan, entropies, pixels = self.plan, self.entropies, self._planes.joints.pixels
        self.static |= {
            "cross_weights": np.array([term.weight for term in entropies], np.float64),
            "cross_rules": np.array([term.rule for term in entropies], np.int64),
            "cross_counters": np.array([self.counters_of[term.rule, False] for term in entropies], np.int64),
            "cross_sizes": (pixels * self._label_maps).astype(np.float64),
        }
        if plan.is_binary:
            self.static["term_weights"] = np.array([term.weight for term in plan.lovasz], np.float64)
            self.static["pos_weights"] = np.array([term.pos_weight for term in entropies], np.float64)
            return
        listed = [term.listed if term.listed is not None else np.zeros(self.channels) for term in plan.lovasz]
        factors = np.zeros((len(entropies), len(Factor)))
        factors[:, Factor.LABEL] = [term.label_factor for term in entropies]
        factors[:, Factor.SPREAD] = [term.spread_factor for term in entropies]
        self.static |= {
            "class_weights": np.array([term.weight * term.class_weights for term in plan.lovasz], np.float64),
            "class_flags": np.array(listed, np.int64),
            "cross_class_weights": np.array([term.class_weights for term in entropies], np.float64),
            "cross_smoothings": np.array([term.label_smoothing for term in entropies], np.float64),
            "cross_factors": factors,
        }
        self.scratch.add("cross_scales", torch.float32, self.joints * len(entropies) * len(Scale))
        self.scratch.add("pixel_losses", torch.float32, len(entropies) * self.pixels)
