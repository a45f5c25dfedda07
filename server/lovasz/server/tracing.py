"""The trace that a call belongs to, if its caller records one: W3C Trace Context, https://www.w3.org/TR/trace-context/."""

from __future__ import annotations

import re
from collections.abc import Iterable

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1


def exemplar(metadata: Iterable[tuple[str, str | bytes]]) -> dict[str, str] | None:
    """Names the caller's trace and span, as an exemplar does beside a metric.

    Args:
        metadata: a call's; the trace stands under ``traceparent``, which OpenTelemetry's instrumentation of gRPC sends.

    Returns:
        ``trace_id`` and ``span_id`` in hexadecimal; None if there is no trace, or it is not recorded.
    """
    for name, value in metadata:
        if name == "traceparent" and isinstance(value, str):
            found = _TRACEPARENT.fullmatch(value)
            if found and int(found[3], 16) & _SAMPLED:
                return {"trace_id": found[1], "span_id": found[2]}
    return None
