"""Writes the dashboards that Grafana is provisioned with, as JSON: their panels are in operations.py and training.py.

python deploy/grafana/dashboards.py            # make docs
python deploy/grafana/dashboards.py --check    # fails if a file is not up to date
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from layout import CHOICE_OF_RUNS, SERVERS, dashboard
from operations import OPERATIONS
from training import TRAINING

FOLDER = Path(__file__).parent / "dashboards"

FILES = {
    "operations.json": dashboard("lovasz-operations", "Lovász loss service", OPERATIONS, [SERVERS]),
    "training.json": dashboard("lovasz-training", "Lovász losses of trainings", TRAINING, [SERVERS, CHOICE_OF_RUNS]),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is not up to date")
    check = parser.parse_args().check
    stale = []
    for name, content in FILES.items():
        file, text = FOLDER / name, json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        if check and (not file.exists() or file.read_text() != text):
            stale.append(name)
        elif not check:
            file.write_text(text)
    if stale:
        print(f"not up to date: {', '.join(stale)}; run make docs", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
