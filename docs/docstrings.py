"""Turns docstrings into Markdown: paragraphs, literal blocks, and the sections Args, Attributes, Returns and Raises."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from inspect import cleandoc
from types import MappingProxyType

Link = Callable[[str], str]
"""Takes a name as docstrings refer to it; returns it as code, with a link if the page describes it."""

_SECTION = re.compile(r"(Args|Attributes|Returns|Raises):")
_ITEM = re.compile(r"(\w[\w.]*): (.*)")
_REFERENCE = re.compile(r":(?:class|meth|func|attr):`~?([\w.]+)`")
_PAGE = re.compile(r"\bdocs/([\w-]+\.md)")


def summary_of(docstring: str | None, link: Link) -> str:
    """The first paragraph, in one line and without its last colons."""
    first = cleandoc(docstring or "").partition("\n\n")[0]
    return inline(first.removesuffix("::").rstrip(), link)


def to_markdown(docstring: str | None, link: Link, types: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """The blocks of a docstring, to be joined by empty lines.

    Args:
        docstring: as Python has it, indented or not.
        link: how names that it refers to are written.
        types: the types of arguments and attributes, as code; those that are missing are left out.
    """
    blocks: list[str] = []
    literal = False
    for paragraph in re.split(r"\n\s*\n", cleandoc(docstring or "")):
        heading, _, rest = paragraph.partition("\n")
        if literal or paragraph.startswith(" "):
            blocks.append(f"```{'python' if paragraph.isascii() else 'text'}\n{cleandoc(paragraph)}\n```")
        elif _SECTION.fullmatch(heading):
            blocks += _section(heading, cleandoc(rest), link, types)
        else:
            blocks.append(inline(paragraph.removesuffix("::").rstrip(), link))
        literal = paragraph.endswith("::")
    return [block for block in blocks if block]


def _section(heading: str, text: str, link: Link, types: Mapping[str, str]) -> list[str]:
    if heading == "Returns:":
        return [f"**Returns:** {inline(text, link)}"]
    lines = []
    for name, what in _items(text).items():
        shown = link(name) if heading == "Raises:" else f"`{name}`"
        kind = f" (`{types[name]}`)" if name in types and heading != "Raises:" else ""
        lines.append(f"- {shown}{kind}: {inline(what, link)}")
    return [f"**{heading}**", "\n".join(lines)]


def _items(text: str) -> dict[str, str]:
    items: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        item = None if line.startswith(" ") else _ITEM.match(line)
        if item:
            name, items[item[1]] = item[1], item[2]
        elif name:
            items[name] += f"\n{line}"
    return items


def inline(text: str, link: Link) -> str:
    """Text of a docstring as one line of Markdown."""
    parts = re.split(r"(``.+?``|:\w+:`.+?`)", " ".join(text.split()))
    return "".join(_code(part, link) if i % 2 else _plain(part) for i, part in enumerate(parts))


def _code(text: str, link: Link) -> str:
    reference = _REFERENCE.fullmatch(text)
    return link(reference[1]) if reference else f"`{text.strip('`')}`"


def _plain(text: str) -> str:
    return _PAGE.sub(r"[docs/\1](\1)", re.sub(r"([*<])", r"\\\1", text))
