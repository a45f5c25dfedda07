"""Writes what a server is made of: out/sbom.json (CycloneDX 1.6) and out/licences.md.

Run by ``make sbom``, with the Python of ``.venv-sbom``, which has the tools. Both list what ``lovasz[server,cpu,gpu]``
needs, as installed in ``.venv``, without the tools of developers. Not in them: Python, and what an image's base has.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("server", "cpu", "gpu")

CLOSURE = """
import json, sys
from importlib.metadata import PackageNotFoundError, distribution
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

found, missing, todo = {}, set(), [("lovasz", extra) for extra in ("", *sys.argv[1:])]
seen = set(todo)
while todo:
    name, extra = todo.pop()
    try:
        package = distribution(name)
    except PackageNotFoundError:
        missing.add(name)
        continue
    found[name] = package.version
    for requirement in map(Requirement, package.requires or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            for wanted in ("", *requirement.extras):
                needed = canonicalize_name(requirement.name), wanted
                if needed not in seen:
                    seen.add(needed)
                    todo.append(needed)
print(json.dumps({"found": found, "missing": sorted(missing)}))
"""
"""Run by the environment's own Python, as markers depend on it: the versions of all that ``lovasz`` needs."""


def output(*command: object) -> str:
    return subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True).stdout


def name_of(component: dict[str, Any]) -> str:
    return str(component["name"]).lower().replace("_", "-").replace(".", "-")


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the SBOM and the licences of a server.")
    parser.add_argument("python", type=Path, help="the Python of the environment that has lovasz")
    parser.add_argument("folder", type=Path, help="where to write")
    given = parser.parse_args()
    tools = Path(sys.executable).parent
    closure = json.loads(output(given.python, "-c", CLOSURE, *EXTRAS))
    wanted = closure["found"]

    pyproject = ("--pyproject", ROOT / "pyproject.toml", "--mc-type", "application")
    options = ("--output-reproducible", "--spec-version", "1.6", "--output-format", "JSON")
    sbom = json.loads(output(tools / "cyclonedx-py", "environment", *pyproject, *options, given.python))
    sbom["components"] = [one for one in sbom["components"] if name_of(one) in wanted and name_of(one) != "lovasz"]
    kept = {one["bom-ref"] for one in (*sbom["components"], sbom["metadata"]["component"])}
    sbom["dependencies"] = [
        {**one, "dependsOn": [ref for ref in one.get("dependsOn", ()) if ref in kept]}
        for one in sbom["dependencies"]
        if one["ref"] in kept
    ]
    sbom["metadata"]["component"]["version"] = wanted["lovasz"]
    lost = wanted.keys() - {"lovasz"} - {name_of(one) for one in sbom["components"]}
    if lost:
        sys.exit(f"not in the SBOM: {', '.join(sorted(lost))}")
    text = json.dumps(sbom, indent=1) + "\n"
    if (problem := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)) is not None:
        sys.exit(f"not valid CycloneDX: {problem}")
    given.folder.mkdir(parents=True, exist_ok=True)
    (given.folder / "sbom.json").write_text(text, encoding="utf-8")

    table = output(
        *(tools / "pip-licenses", "--python", given.python, "--format", "markdown", "--from", "mixed", "--with-urls"),
        *("--with-system", "--packages", *wanted),
    )
    (given.folder / "licences.md").write_text(table, encoding="utf-8")
    unknown = [row for row in table.splitlines() if row.split("|")[3].strip() == "UNKNOWN"]
    print(f"{given.folder}/sbom.json, {given.folder}/licences.md: {len(wanted)} packages")
    if closure["missing"]:
        print(f"not installed here, so not listed: {', '.join(closure['missing'])}")
    if unknown:
        print("licence unknown:", *unknown, sep="\n")


if __name__ == "__main__":
    main()
