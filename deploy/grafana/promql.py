"""Expressions of Prometheus, of the servers that are selected at the top of a dashboard."""

from __future__ import annotations


def of(metric: str, **labels: str) -> str:
    """The metric of the selected servers with these labels. A value that begins with ~ is a regular expression."""
    selected = {"instance": "~$instance", **labels}
    matchers = [
        f'{name}=~"{value[1:]}"' if value[0] == "~" else f'{name}="{value}"' for name, value in selected.items()
    ]
    return f"{metric}{{{', '.join(matchers)}}}"


def rate(metric: str, **labels: str) -> str:
    return f"rate({of(metric, **labels)}[$__rate_interval])"


def rise(metric: str, by: str) -> tuple[tuple[str, str], ...]:
    """How often it was counted in the last minute, for rare events: one series with its legend."""
    legend = " in ".join(f"{{{{{label}}}}}" for label in by.split(", "))
    return ((legend, f"sum by ({by}) (increase({of(metric)}[1m]))"),)


def quantile(share: float, metric: str, by: str = "le", **labels: str) -> str:
    return f"histogram_quantile({share}, sum by ({by}) ({rate(f'{metric}_bucket', **labels)}))"


def mean(metric: str) -> str:
    return f"sum({rate(f'{metric}_sum')}) / sum({rate(f'{metric}_count')})"
