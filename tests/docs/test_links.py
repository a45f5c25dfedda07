"""The links of the pages lead somewhere: to files of this tree, and to headings of its pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.imports import REPOSITORY

PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")


def anchors_of(page: Path) -> set[str]:
    """As GitHub makes them: lower case, spaces as hyphens, without punctuation; further ones of a kind are numbered."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found: dict[str, int] = {}
    anchors = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        before = found[anchor] = found.get(anchor, -1) + 1
        anchors.add(f"{anchor}-{before}" if before else anchor)
    return anchors


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target, anchor in LINK.findall(text):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors_of(file), f"{page.name}: {target}#{anchor}"


def test_there_are_links_to_check() -> None:
    links = [link for page in PAGES for link in LINK.findall(page.read_text(encoding="utf-8"))]
    assert len(links) > 100
    assert any(anchor for _, anchor in links)
