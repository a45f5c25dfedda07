"""The path of Triton: compiled for the GPU, all groups counted in tables, no step waits for the device.

Logits are read where they are, twice, and the gradient is written once, straight to its place. All else is a table a
segment (a class, or a binary label, over the pixels of a group), whose words the scan turns into shares of the gradient
in place, and a word a pixel.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from lovasz.core import torch_path
from lovasz.core.bins import BINS, SOFTMAX_TOP
from lovasz.core.computed import PROBABILITY_TOLERANCE, Computed, TermValues, score
from lovasz.core.ragged import Batch
from lovasz.core.segments import Groups, exact_sum, on_device
from lovasz.core.softmax import sum_over_classes
from lovasz.core.triton_kernels import hinge, softmax, tables
from lovasz.core.triton_kernels.batch import TritonBatch, is_per_image
from lovasz.spec import CrossEntropy, LovaszHinge, WeightedSum

MAX_CLASSES = 512
"""Requests of more classes are sorted: each class takes a table of 4 MB."""

_SMALLEST_TOP = -62
"""With this exponent at the top, the last octave still ends above the smallest normal float32."""

_COUNTED, _ABSENT = tables.COUNTED.value, tables.ABSENT.value
_MANTISSA_BITS, _EXPONENT_BIAS = tables.MANTISSA_BITS.value, tables.EXPONENT_BIAS.value


def compute(batch: Batch, loss: WeightedSum, device: torch.device, *, want_grad: bool) -> Computed:
    """Queues the computation of a batch (not of float64)."""
    only_cross_entropy = all(isinstance(term, CrossEntropy) for _, term in loss.terms)
    if only_cross_entropy or (not loss.is_hinge and batch.requests[0].layout.channels > MAX_CLASSES):
        return torch_path.compute(batch, loss, device, want_grad=want_grad)
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with torch.no_grad(), current:  # Triton launches on the current device.
        planes = TritonBatch.of(batch, loss, device, want_grad=want_grad)
        terms, predictions = (_hinge if loss.is_hinge else _softmax)(planes, want_grad)
        intersection, union = planes.overlap(predictions)
        grads = tuple(placed.grad_of_request() for placed in planes.placed) if want_grad else None
        return Computed(terms, grads, intersection, union, planes.of_joints(planes.faults).T)


@dataclass(frozen=True)
class _Tables:
    """The segments of all Lovász terms behind one another (term, group, class), and their tables.

    Attributes:
        parameters: int64, shape (terms, 3): the rule, whether a group is an image, the first segment.
        scored: bool, shape (K, groups), one a term.
        states: int8, one a segment, as all below: whether it has a table.
        foreground: int64: foreground pixels.
        valid: int64: foreground and background pixels.
        weights: float64: what the gradient is multiplied with.
        winners: int64: if it has no foreground, the pixel of the largest error.
        words: int64, 2 x BINS for each segment: background, foreground.
        any_absent: whether there can be segments that are scored without foreground.
    """

    parameters: Tensor
    scored: tuple[Tensor, ...]
    states: Tensor
    foreground: Tensor
    valid: Tensor
    weights: Tensor
    winners: Tensor
    words: Tensor
    any_absent: bool

    @classmethod
    def of(cls, batch: TritonBatch) -> _Tables:
        parameters: list[int] = []
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        all_scored: list[Tensor] = []
        any_absent, segments = False, 0
        for weight, term in batch.loss.terms:
            if isinstance(term, CrossEntropy):
                continue
            foreground, valid = batch.group_counts(batch.rule(term), per_image=term.per_image)
            counts = valid if isinstance(term, LovaszHinge) else foreground
            scored, weights = score(term, weight, counts.T, _shares(batch, per_image=term.per_image))
            states = torch.where(foreground > 0, _COUNTED, _ABSENT).mul_(scored.T).to(torch.int8)
            parts.append((states, foreground, valid, weights.T))
            all_scored.append(scored)
            parameters += [batch.rule(term), term.per_image, segments]
            segments += states.numel()
            any_absent |= isinstance(term, LovaszHinge) or term.classes != "present"
        states, foreground, valid, weights = (
            torch.cat([p.reshape(-1) for p in part]) for part in zip(*parts, strict=True)
        )
        return cls(
            on_device(parameters, torch.int64, batch.device),
            tuple(all_scored),
            states,
            foreground,
            valid,
            weights,
            winners=torch.full_like(valid, -1),
            words=torch.zeros(segments * 2 * BINS, dtype=torch.int64, device=batch.device),
            any_absent=any_absent,
        )

    def scan(self, tops: Tensor, *, want_grad: bool) -> list[Tensor]:
        """Turns the words into entries if a gradient is wanted. Returns each term's losses, in the shape of ``scored``.

        Args:
            tops: int32, one a segment: the exponent of the first octave.
        """
        chunk = tables.CHUNK if tops.is_cuda else tables.INTERPRETED_CHUNK
        chunks = triton.cdiv(BINS, chunk)
        grid = (len(self.states) * chunks,)
        totals = torch.empty(len(self.states), chunks, dtype=torch.int64, device=tops.device)
        losses = torch.zeros_like(totals, dtype=torch.float64)
        constants = {"CHUNK": chunk, "CHUNKS": chunks}
        tables.sum_chunks[grid](self.words, self.states, totals, **constants, num_warps=tables.SCAN_WARPS)
        tables.scan[grid](
            self.words,
            self.states,
            self.foreground,
            self.valid,
            tops,
            self.weights,
            totals,
            losses,
            **constants,
            CHUNKS_PADDED=triton.next_power_of_2(chunks),
            WANT_GRAD=want_grad,
            num_warps=tables.SCAN_WARPS,
        )
        values = sum_over_classes(losses.T)
        if self.any_absent:
            largest = (self.winners >> 32).to(torch.int32).view(torch.float32).to(torch.float64)
            values = torch.where(self.states == _ABSENT, largest, values)
        parts = values.split([scored.numel() for scored in self.scored])
        return [part.view(scored.T.shape).T for part, scored in zip(parts, self.scored, strict=True)]


def _shares(batch: TritonBatch, *, per_image: bool) -> Tensor:
    """Each group's share of its joint's loss (float64, one a group)."""
    shares = [1.0 for _ in batch.source.sizes]
    if per_image:
        shares = [1 / images for images in batch.source.images for _ in range(images)]
    return on_device(shares, torch.float64, batch.device)


def _softmax(batch: TritonBatch, want_grad: bool) -> tuple[tuple[TermValues, ...], Tensor]:
    counted, cross = _Tables.of(batch), _CrossEntropies.of(batch)
    predictions = torch.zeros(len(batch.planes), 2, batch.channels, dtype=torch.int64, device=batch.device)
    constants = {
        "DTYPE": batch.logits_type,
        "PROBABILITIES": batch.loss.probabilities,
        "TERMS": len(counted.scored),
        "CROSS_TERMS": len(cross.terms),
    }
    inputs = (batch.words, batch.channels, counted.parameters, counted.states, counted.words, counted.winners)
    batch.launch(
        softmax.softmax_sweep,
        *inputs,
        batch.faults,
        predictions,
        cross.parameters,
        cross.constants,
        cross.weights,
        cross.losses,
        len(batch.words),
        PROBABILITY_TOLERANCE,
        **constants,
    )
    tops = torch.full_like(counted.states, SOFTMAX_TOP, dtype=torch.int32)
    losses, cross_losses = iter(counted.scan(tops, want_grad=want_grad)), iter(cross.values(batch))
    if want_grad:
        batch.launch(
            softmax.softmax_backward,
            *inputs,
            counted.weights,
            cross.parameters,
            cross.constants,
            cross.weights,
            cross.scales,
            **constants,
        )
    scored = iter(counted.scored)
    terms = []
    for _, term in batch.loss.terms:
        if isinstance(term, CrossEntropy):
            values = next(cross_losses).unsqueeze(0)
            terms.append(TermValues(values, torch.ones_like(values, dtype=torch.bool), per_image=False))
        else:
            terms.append(TermValues(next(losses), next(scored), term.per_image))
    return tuple(terms), predictions


def _hinge(batch: TritonBatch, want_grad: bool) -> tuple[tuple[TermValues, ...], Tensor]:
    counted = _Tables.of(batch)
    predictions = torch.zeros(len(batch.planes), 2, dtype=torch.int64, device=batch.device)
    largest = torch.zeros_like(counted.states, dtype=torch.int32)
    constants = {"DTYPE": batch.logits_type, "TERMS": len(counted.scored)}
    batch.launch(
        hinge.largest_hinges,
        batch.words,
        batch.channels,
        counted.parameters,
        largest,
        batch.faults,
        predictions,
        **constants,
    )
    tops = ((largest >> _MANTISSA_BITS) - _EXPONENT_BIAS).clamp_(min=_SMALLEST_TOP)
    inputs = (batch.words, batch.channels, counted.parameters, counted.states, tops, counted.words, counted.winners)
    batch.launch(hinge.hinge_sweep, *inputs, **constants)
    losses = counted.scan(tops, want_grad=want_grad)
    if want_grad:
        batch.launch(hinge.hinge_backward, *inputs, counted.weights, **constants)
    terms = [
        TermValues(values, scored, is_per_image(term))
        for values, scored, (_, term) in zip(losses, counted.scored, batch.loss.terms, strict=True)
    ]
    return tuple(terms), predictions.view(-1, batch.maps, 2).transpose(1, 2)


@dataclass(frozen=True)
class _CrossEntropies:
    """The cross-entropy terms for the kernels; ``cross_entropy`` has the same for the path of torch.

    Attributes:
        parameters: int64, shape (terms,): the rule.
        constants: float32, shape (terms, 3): what the label's part of the target is multiplied with, what the part
            spread over all classes is, and the sum of the class weights.
        weights: float32, shape (terms, K): class weights.
        means: float64, shape (terms, joints): 1 / the sum of its pixels' class weights; 0 where nothing has weight.
        scales: float32, shape (joints, terms, 2): what a pixel's class weight is multiplied with to be its pull, and
            the spread of the smoothed part.
        losses: float32, shape (terms, pixels): filled by the first sweep.
    """

    terms: tuple[CrossEntropy, ...]
    parameters: Tensor
    constants: Tensor
    weights: Tensor
    means: Tensor
    scales: Tensor
    losses: Tensor

    @classmethod
    def of(cls, batch: TritonBatch) -> _CrossEntropies:
        classes, device = batch.channels, batch.device
        weighted = [(weight, term) for weight, term in batch.loss.terms if isinstance(term, CrossEntropy)]
        terms = tuple(term for _, term in weighted)
        if not terms:
            return cls(terms, *[torch.empty(0, device=device)] * 6)
        numbers: list[float] = []
        class_weights: list[float] = []
        rules: list[int] = []
        for weight, term in weighted:
            keep, spread = 1 - term.label_smoothing, term.label_smoothing / classes
            numbers += [keep, spread, weight * keep, weight * spread]
            rules.append(batch.rule(term))
            class_weights += term.class_weights or [1.0] * classes
        uploaded = on_device(numbers, torch.float64, device).view(-1, 4)
        weights = on_device(class_weights, torch.float64, device).view(-1, classes)
        means = weights.new_zeros(len(terms), len(batch.source.sizes))
        for row, rule in enumerate(rules):
            counts, _ = batch.group_counts(rule, per_image=False)
            total = sum_over_classes(counts.T * weights[row].unsqueeze(1))
            means[row] = torch.where(total > 0, 1 / total, 0)
        single = weights.to(torch.float32)
        return cls(
            terms=terms,
            parameters=on_device(rules, torch.int64, device),
            constants=torch.cat([uploaded[:, :2].to(torch.float32), sum_over_classes(single.T).unsqueeze(1)], dim=1),
            weights=single,
            means=means,
            scales=(means.T.unsqueeze(2) * uploaded[:, 2:]).to(torch.float32),
            losses=torch.empty(len(terms), len(batch.words), dtype=torch.float32, device=device),
        )

    def values(self, batch: TritonBatch) -> list[Tensor]:
        """Each term's loss: float64, shape (joints,)."""
        if not self.terms:
            return []
        groups = Groups.of_sizes(batch.source.pixels, batch.device)
        sizes = on_device(groups.sizes, torch.float64, batch.device)
        values = []
        for losses, means in zip(self.losses, self.means, strict=True):
            # A joint's sum is at most its largest term times the number of its pixels.
            exponent = torch.frexp(groups.max(losses).to(torch.float64) * sizes).exponent
            values.append(exact_sum(losses.to(torch.float64).unsqueeze(0), groups, exponent)[0] * means)
        return values
