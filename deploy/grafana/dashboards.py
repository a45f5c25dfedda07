"""The dashboards that Grafana is provisioned with, as JSON: their panels are in operations.py and training.py."""

from __future__ import annotations

import json
from typing import Any

from deploy.grafana.layout import CHOICE_OF_RUNS, SERVERS, dashboard
from deploy.grafana.operations import OPERATIONS
from deploy.grafana.training import TRAINING


def operations_json() -> str:
    return _json(dashboard("lovasz-operations", "Lovász loss service", OPERATIONS, [SERVERS]))


def training_json() -> str:
    return _json(dashboard("lovasz-training", "Lovász losses of trainings", TRAINING, [SERVERS, CHOICE_OF_RUNS]))


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
