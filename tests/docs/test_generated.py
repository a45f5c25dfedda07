"""The pages that are made from code: every public name is on the API page, and stale files are found."""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support.imports import REPOSITORY, is_inside, read_sources

API = (REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8")
HEADINGS = re.findall(r"^#+ `(.+)`$", API, re.MULTILINE)
NOT_FOR_TRAINERS = ("lovasz.wire", "lovasz.core.reference")
PUBLIC = [
    module
    for module, source in read_sources().items()
    if "\n__all__ = " in source and is_inside(module, ["lovasz"]) and not is_inside(module, NOT_FOR_TRAINERS)
]


def entry_of(heading: str) -> str:
    """What the page says under a heading, up to the next one."""
    return API.partition(f"# `{heading}`\n")[2].partition("\n#")[0]


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_has_an_entry(module: str) -> None:
    assert {"lovasz.core", "lovasz.client", "lovasz.client.torch", "lovasz.spec"} <= set(PUBLIC)
    table = set(re.findall(r"^\| \[`(\w+)`\]", entry_of(module), re.MULTILINE))
    assert table == set(importlib.import_module(module).__all__)
    assert table <= set(HEADINGS)


def test_every_entry_but_those_of_constants_has_words_beside_its_signature() -> None:
    for heading in HEADINGS:
        words = re.sub(r"```python.*?```", "", entry_of(heading), count=1, flags=re.DOTALL)
        assert words.strip() or f"```python\n{heading} = " in entry_of(heading), heading


@pytest.mark.parametrize("module", PUBLIC)
def test_every_described_argument_exists(module: str) -> None:
    """A docstring that describes an argument of another name would be on the page without a type."""
    for name in importlib.import_module(module).__all__:
        public = getattr(importlib.import_module(module), name)
        arguments = entry_of(name).partition("**Args:**")[2].partition("**")[0]
        if arguments:
            described = re.findall(r"^- `(\w+)`", arguments, re.MULTILINE)
            assert described
            assert set(described) <= set(inspect.signature(public).parameters), name
            assert len(re.findall(r"^- `\w+` \(`", arguments, re.MULTILINE)) == len(described), name


def test_an_entry_has_signature_types_links_and_code() -> None:
    softmax = entry_of("LovaszSoftmax")
    assert 'classes: Literal["present", "all"] | tuple[int, ...] | Sequence[int] = "present",' in softmax
    assert "- `ignore_index` (`int | None`): pixels with this label are ignored; " in softmax
    assert "(N, C, \\*spatial)" in softmax
    assert "- [`InvalidInput`](#invalidinput): an option has an invalid value." in softmax
    assert "Like [`compute`](#lossclientcompute), but" in entry_of("LossClient.submit")
    assert "```python\niou = DatasetIoU()\nfor images" in entry_of("DatasetIoU")
    assert "- `mean_iou` (`float`): The mean" in entry_of("DatasetIoU")
    assert "```text\nLossError\n├── InvalidInputError " in entry_of("LossError")
    assert "[docs/benchmarks.md](benchmarks.md)" in entry_of("LossClient")
    assert "MAX_AXES = 16\n" in entry_of("MAX_AXES")
    assert "- `Backend.TORCH`: Runs on any device" in entry_of("Backend")


def test_no_two_entries_share_an_anchor() -> None:
    anchors = Counter(re.sub(r"[^\w-]", "", heading.lower()) for heading in HEADINGS)
    assert [anchor for anchor, count in anchors.items() if count > 1] == []


def generate(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "docs.generated", *options], cwd=folder, capture_output=True, text=True, timeout=100
    )


def test_stale_and_missing_files_are_found_and_written(tmp_path: Path) -> None:
    for part in ("docs", "deploy/grafana", "deploy/kubernetes", "deploy/prometheus", "proto", "core", "client"):
        shutil.copytree(REPOSITORY / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    stale, missing = tmp_path / "docs" / "metrics.md", tmp_path / "deploy" / "grafana" / "dashboards" / "training.json"
    was = stale.read_text(encoding="utf-8")
    stale.write_text(was.replace("counter", "gauge", 1), encoding="utf-8")
    missing.unlink()
    checked = generate(tmp_path, "--check")
    assert checked.returncode == 1
    assert checked.stderr.endswith(
        "not up to date: docs/metrics.md, deploy/grafana/dashboards/training.json; run make docs\n"
    )
    assert not missing.exists()
    assert generate(tmp_path).returncode == 0
    assert stale.read_text(encoding="utf-8") == was
    assert generate(tmp_path, "--check").returncode == 0
