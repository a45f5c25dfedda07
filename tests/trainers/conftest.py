"""Runs the lines of docs/trainers.md in the frameworks, and sums up in a table which were run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
from support import absent_operators, recipes

from lovasz.server.launch import ServerProcess

absent_operators.declare()

PACKAGES = {
    "Plain loop": "torch",
    "DistributedDataParallel": "torch",
    "FSDP": "torch",
    "Lightning": "lightning",
    "Hugging Face Trainer": "transformers",
    "accelerate": "accelerate",
    "segmentation-models-pytorch": "segmentation-models-pytorch",
    "MONAI": "monai",
    "nnU-Net": "nnunetv2",
    "mmsegmentation": "mmsegmentation",
    "Mask2Former": "transformers",
    "Pointcept": "pointcept",
    "JAX": "jax",
    "TensorFlow": "tensorflow-cpu",
    "Stubs alone": "grpcio",
}
"""The sections of the page that are about a framework, and the package that is tested for it."""

Lines = Callable[..., None]


@pytest.fixture
def ran(record_property: Callable[[str, object], None]) -> Callable[[str, int], None]:
    """Notes that a test runs a block of a section."""
    return lambda section, block: record_property("block", f"{section}#{block}")


@pytest.fixture
def lines(ran: Callable[[str, int], None], server: ServerProcess) -> Lines:
    """Executes a block of a section in a namespace."""

    def run(section: str, block: int, namespace: dict[str, Any]) -> None:
        ran(section, block)
        recipes.run_lines(section, block, namespace, server.target)

    return run


@pytest.fixture(params=["in this process", "on a server"])
def namespace(request: pytest.FixtureRequest, server: ServerProcess) -> dict[str, Any]:
    """What a user has before the lines of a section: the criterion."""
    return recipes.criterion(request.param, server.target)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    outcomes: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", []):
                if name == "block":
                    section, _, block = str(value).partition("#")
                    outcomes[section][block].add(outcome)
    if not outcomes:
        return
    terminalreporter.section("docs/trainers.md")
    terminalreporter.write_line("| framework | version | lines | passed |")
    terminalreporter.write_line("|---|---|---:|---|")
    for section, package in PACKAGES.items():
        blocks = recipes.sections()[section]
        count = sum(bool(line.strip()) for block in blocks for line in block.splitlines())
        passed = [block for block, of_block in outcomes[section].items() if of_block == {"passed"}]
        failed = [block for block, of_block in outcomes[section].items() if of_block != {"passed"}]
        if failed:
            word = "FAILED"
        elif len(passed) == len(blocks):
            word = "yes"
        else:
            word = "not run" if not passed else f"{len(passed)} of {len(blocks)} blocks"
        terminalreporter.write_line(f"| {section} | {version_of(package)} | {count} | {word} |")


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
