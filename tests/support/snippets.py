"""The Python snippets of a page, as code whose errors name the page's lines."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Snippet:
    """A fenced block of Python.

    Attributes:
        page: the page.
        line: the line of the page before the code's first.
        heading: the heading that it stands under.
        number: its place among the snippets under this heading, from 0.
        code: the code.
    """

    page: Path
    line: int
    heading: str
    number: int
    code: str

    def __str__(self) -> str:
        return f"{self.heading} {self.number}"

    def changed(self, old: str, new: str) -> Snippet:
        """This snippet with a part of its code replaced; the part must be there."""
        assert old in self.code
        return replace(self, code=self.code.replace(old, new))

    def run(self, names: dict[str, Any]) -> None:
        """Runs the code with these names, to which it adds its own."""
        exec(compile("\n" * self.line + self.code, str(self.page), "exec"), names)


def snippets_of(page: Path) -> list[Snippet]:
    """The snippets of a page, in their order."""
    text = page.read_text(encoding="utf-8")
    found: list[Snippet] = []
    heading = ""
    for match in re.finditer(r"^#+ ([^\n]+)$|^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if match[1]:
            heading = match[1]
        else:
            number = sum(one.heading == heading for one in found)
            found.append(Snippet(page, text.count("\n", 0, match.start(2)), heading, number, match[2]))
    return found
