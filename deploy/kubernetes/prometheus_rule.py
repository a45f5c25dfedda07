"""The alerts as the Prometheus Operator takes them: those of deploy/prometheus/alerts.yml, in a resource."""

from __future__ import annotations

import textwrap
from pathlib import Path

ALERTS = Path(__file__).parents[1] / "prometheus" / "alerts.yml"

_HEAD = """\
# Made by `make docs` from deploy/prometheus/alerts.yml.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: lovasz
  labels: { app.kubernetes.io/name: lovasz }
spec:
"""


def prometheus_rule() -> str:
    """The resource as YAML, with the comments of the alerts' groups."""
    _, groups, rules = ALERTS.read_text(encoding="utf-8").partition("\ngroups:\n")
    return _HEAD + textwrap.indent(groups.lstrip() + rules, "  ")
