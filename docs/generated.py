"""Writes the files that are made from others: the reference pages, Grafana's dashboards, the alerts for Kubernetes.

python -m docs.generated            # make docs
python -m docs.generated --check    # make docs-check: writes nothing, fails if a file is not up to date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deploy.grafana.dashboards import operations_json, training_json
from deploy.kubernetes.prometheus_rule import prometheus_rule
from docs.api import api_page
from docs.server_reference import configuration_page, metrics_page

REPOSITORY = Path(__file__).parents[1]

FILES = {
    "docs/api.md": api_page,
    "docs/configuration.md": configuration_page,
    "docs/metrics.md": metrics_page,
    "deploy/grafana/dashboards/operations.json": operations_json,
    "deploy/grafana/dashboards/training.json": training_json,
    "deploy/kubernetes/components/monitoring/prometheusrule.yaml": prometheus_rule,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is not up to date")
    check = parser.parse_args().check
    stale = []
    for name, made in FILES.items():
        file, text = REPOSITORY / name, made()
        if check and (not file.exists() or file.read_text(encoding="utf-8") != text):
            stale.append(name)
        elif not check:
            file.write_text(text, encoding="utf-8")
    if stale:
        print(f"not up to date: {', '.join(stale)}; run make docs", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
