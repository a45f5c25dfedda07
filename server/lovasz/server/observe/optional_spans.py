"""Spans where they are asked for: they need the extra otel, which is imported only then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lovasz.server.settings import ConfigError

if TYPE_CHECKING:
    from lovasz.server.observe.spans import Spans


def spans_to(endpoint: str) -> Spans | None:
    """Spans for the collector at this address; None if it is empty.

    Raises:
        ConfigError: the extra is not installed.
    """
    if not endpoint:
        return None
    try:
        from lovasz.server.observe.spans import Spans
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("lovasz."):
            raise
        raise ConfigError(
            f"--otlp-endpoint: got {endpoint!r} without {error.name}: pip install 'lovasz[otel]'"
        ) from None
    return Spans(endpoint)
