"""The trace that a call belongs to, if its caller records one (W3C Trace Context, https://www.w3.org/TR/trace-context/)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

_IDS_AND_FLAGS = r"(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})"
# Later versions may append more fields; ff is not a version.
_TRACEPARENT = re.compile(rf"(?:00-{_IDS_AND_FLAGS}|(?!00|ff)[0-9a-f]{{2}}-{_IDS_AND_FLAGS}(?:-.*)?)")
_SAMPLED = 1


def exemplar(metadata: Iterable[tuple[str, str | bytes]]) -> dict[str, str] | None:
    """The caller's trace and span, as the labels of an exemplar.

    Args:
        metadata: that of a call; OpenTelemetry's instrumentation of gRPC sends the trace as ``traceparent``.

    Returns:
        ``trace_id`` and ``span_id`` in hexadecimal; None if there is no trace, or its caller does not record it.
    """
    for name, value in metadata:
        if name == "traceparent" and isinstance(value, str):
            found = _TRACEPARENT.fullmatch(value)
            trace_id, span_id, flags = [group for group in found.groups() if group] if found else ("", "", "0")
            if int(flags, 16) & _SAMPLED:
                return {"trace_id": trace_id, "span_id": span_id}
    return None


@dataclass(frozen=True, kw_only=True)
class EndedCall:
    """A call that has ended.

    Attributes:
        name: the method's full name: ``lovasz.v1.LossService/Compute``.
        metadata: that of the call, which names its caller's span.
        began: when it began (``time.monotonic``).
        phases: each that it went through: (name, when it began, when it ended).
        code: the name of its status code.
        attributes: what else is known of it; empty ones are left out.
    """

    name: str
    metadata: Iterable[tuple[str, str | bytes]]
    began: float
    phases: Sequence[tuple[str, float, float]]
    code: str
    attributes: Mapping[str, str]


class SpanRecorder(Protocol):
    """Takes calls that have ended."""

    def record(self, call: EndedCall) -> None:
        """Records a call. Never raises."""
