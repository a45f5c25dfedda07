"""The page api.md: the public names of the packages, from their signatures and docstrings.

Types and constants are taken from the source, so the page is the same whichever Python writes it.
"""

from __future__ import annotations

import ast
import enum
import inspect
import re
from collections.abc import Iterator
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from docs.docstrings import Link, inline, summary_of, to_markdown

MODULES: dict[str, tuple[str, ...]] = {
    "lovasz.core": (),
    "lovasz.core.dispatch": ("Backend",),
    "lovasz.client": (),
    "lovasz.client.torch": (),
    "lovasz.client.adapters": (),
    "lovasz.spec": (),
    "lovasz.server.launch": ("ServerProcess",),
}
"""The modules of the page, with the names to describe; if none are listed, those of ``__all__``."""

ROOTS = tuple(Path(__file__).parents[1] / root for root in ("proto", "core", "client"))
LINE = 100
"""A longer signature has a line for each parameter."""


def api_page() -> str:
    return "\n\n".join(_Page().blocks()) + "\n"


class Constant(NamedTuple):
    """What is assigned to a name, as source, with the docstring that follows."""

    value: str
    doc: str
    is_type: bool


class _Page:
    """Where on the page each name is described, and the page itself."""

    def __init__(self) -> None:
        self.names = {module: sorted(names or import_module(module).__all__) for module, names in MODULES.items()}
        self.home = {name: _home(module, name) for module, names in self.names.items() for name in names}
        things = [(name, getattr(import_module(module), name)) for name, module in self.home.items()]
        described = [*self.home, *(f"{name}.{method}" for name, thing in things for method in _methods(thing))]
        self.anchors = {name: _anchor(name) for name in described}

    def link(self, name: str, inside: str = "") -> str:
        """A name as code, with a link if this page describes it. Methods of the class ``inside`` come first."""
        short = name.rpartition(".")[2] if name.startswith("lovasz.") else name
        anchor = self.anchors.get(f"{inside}.{short}") or self.anchors.get(short)
        return f"[`{short}`](#{anchor})" if anchor else f"`{short}`"

    def blocks(self) -> Iterator[str]:
        yield "# API reference"
        yield (
            "The public names: their arguments, results and errors. [usage.md](usage.md) shows how to train with them. "
            "A name that several modules export is described once. `make docs` writes this page from the docstrings."
        )
        contents = ((module, summary_of(import_module(module).__doc__, self.link)) for module in self.names)
        yield "\n".join(f"- [`{module}`](#{_anchor(module)}): {summary}" for module, summary in contents)
        for module, names in self.names.items():
            yield f"## `{module}`"
            yield from to_markdown(import_module(module).__doc__, self.link)
            rows = (f"| {self.link(name)} | {self._what(name)} |" for name in names)
            yield "\n".join(["| name | description |", "|---|---|", *rows])
            for name in names:
                if self.home[name] == module:
                    yield f"### `{name}`"
                    yield from self._entry(name, getattr(import_module(module), name))

    def _what(self, name: str) -> str:
        """One line about a name, for a table."""
        thing = getattr(import_module(self.home[name]), name)
        constant = _constants().get(name)
        text = constant.doc or f"``{constant.value}``" if constant else thing.__doc__
        return summary_of(text, self.link).replace("|", "\\|")

    def _entry(self, name: str, thing: Any) -> Iterator[str]:
        if inspect.isclass(thing):
            yield from self._class(name, thing)
        elif inspect.isfunction(thing):
            yield from self._function(name, thing, self.link)
        else:
            yield _fenced(f"{name} = {_constants()[name].value}")
            yield from to_markdown(_constants()[name].doc, self.link)

    def _function(self, name: str, function: Any, link: Link) -> Iterator[str]:
        parameters = _parameters(function)
        result = _type(inspect.signature(function).return_annotation)
        yield _fenced(f"{_call(name, parameters)} -> {result}")
        yield from to_markdown(inspect.getdoc(function), link, {one.name: _type(one.annotation) for one in parameters})

    def _class(self, name: str, cls: type[Any]) -> Iterator[str]:
        def link(other: str) -> str:
            return self.link(other, inside=name)

        bases = [_base(base) for base in _public_bases(cls)]
        made_by_users = not issubclass(cls, BaseException | enum.Enum)
        parameters = _parameters(cls) if made_by_users else []
        yield _fenced(f"class {_call(name, parameters)}" if made_by_users else f"class {name}({', '.join(bases)})")
        if made_by_users and bases:
            yield f"A subclass of {', '.join(map(link, bases))}."
        types = {one.name: _type(one.annotation) for one in parameters}
        types |= {field: _type(annotation) for field, annotation in vars(cls).get("__annotations__", {}).items()}
        yield from to_markdown(cls.__doc__, link, types)
        if made_by_users and "__init__" in vars(cls):
            yield from to_markdown(vars(cls)["__init__"].__doc__, link, types)
        if issubclass(cls, enum.Enum):
            docs = _assignments(ast.parse(inspect.getsource(cls)).body[0])
            yield "\n".join(f"- `{name}.{member.name}`: {inline(docs[member.name].doc, link)}" for member in cls)
        properties = _properties(cls)
        if properties:
            yield "**Properties:**"
            yield "\n".join(
                f"- `{key}` (`{_type(inspect.signature(get).return_annotation)}`): {inline(get.__doc__ or '', link)}"
                for key, get in properties.items()
            )
        for method, function in _methods(cls).items():
            yield f"#### `{name}.{method}`"
            yield from self._function(f"{name}.{method}", function, link)


def _home(module: str, name: str) -> str:
    """The module of the page that describes a name: that which defines it, or the package that this is in."""
    defined = getattr(getattr(import_module(module), name), "__module__", None)
    if defined is None or not defined.startswith("lovasz."):
        return "lovasz.spec" if name in import_module("lovasz.spec").__all__ else module
    return max((one for one in MODULES if f"{defined}.".startswith(f"{one}.")), key=len)


def _anchor(heading: str) -> str:
    """As GitHub makes it from a heading."""
    return re.sub(r"[^\w-]", "", heading.lower())


def _methods(thing: Any) -> dict[str, Any]:
    """The methods of a class that have a docstring, but its constructor."""
    found = {}
    if inspect.isclass(thing):
        for name, value in vars(thing).items():
            function = value.__func__ if isinstance(value, classmethod) else value
            shown = name == "__enter__" or not name.startswith("_")
            if inspect.isfunction(function) and shown and function.__doc__:
                found[name] = function
    return found


def _properties(cls: type[Any]) -> dict[str, Any]:
    """The functions of its public properties, also of those that are computed once."""
    found = {}
    for name, value in vars(cls).items():
        if isinstance(value, property | cached_property) and not name.startswith("_"):
            found[name] = value.fget if isinstance(value, property) else value.func
    return found


def _parameters(thing: Any) -> list[inspect.Parameter]:
    parameters = inspect.signature(thing).parameters.values()
    return [one for one in parameters if one.name not in ("self", "cls") and not one.name.startswith("_")]


def _call(name: str, parameters: list[inspect.Parameter]) -> str:
    """A signature as source, in one line, or in one for each parameter."""
    shown: list[str] = []
    for one in parameters:
        if one.kind is one.KEYWORD_ONLY and not any(part.startswith("*") for part in shown):
            shown.append("*")
        star = "*" if one.kind is one.VAR_POSITIONAL else "**" if one.kind is one.VAR_KEYWORD else ""
        default = "" if one.default is one.empty else f" = {_quoted(one.default)}"
        shown.append(f"{star}{one.name}: {_type(one.annotation)}{default}")
    line = f"{name}({', '.join(shown)})"
    return line if len(line) <= LINE else f"{name}(\n    " + ",\n    ".join(shown) + ",\n)"


def _quoted(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _type(annotation: Any) -> str:
    """A type as source; names of types that are not public are replaced by what they stand for."""
    # Of a NamedTuple they are references in place of texts.
    text = str(getattr(annotation, "__forward_arg__", annotation)).replace("spec.", "")
    public, constants = import_module("lovasz.spec").__all__, _constants()
    return re.sub(
        r"(?<![\w.])[A-Z]\w+(?![\w.])",
        lambda name: constants[name[0]].value if name[0] in constants and name[0] not in public else name[0],
        text,
    )


def _public_bases(cls: type[Any]) -> Iterator[type[Any]]:
    """Its bases; in place of a private one, the bases of that."""
    for base in cls.__bases__:
        if base.__name__.startswith("_"):
            yield from _public_bases(base)
        elif base.__name__ not in ("object", "Generic"):
            yield base


def _base(base: type[Any]) -> str:
    return f"torch.nn.{base.__name__}" if base.__module__.startswith("torch.nn.") else base.__name__


@cache
def _constants() -> dict[str, Constant]:
    """The public constants of ``lovasz.spec``, and all types that have a name of their own."""
    public = import_module("lovasz.spec").__all__
    files = (path for root in ROOTS for path in sorted((root / "lovasz").glob("*/*.py")))
    return {
        name: constant
        for path in files
        for name, constant in _assignments(ast.parse(path.read_text(encoding="utf-8"))).items()
        if constant.is_type or name in public
    }


def _assignments(tree: ast.AST) -> dict[str, Constant]:
    """What a module or a class assigns to names, each with the docstring that follows."""
    found: dict[str, Constant] = {}
    name = ""
    for node in getattr(tree, "body", ()):
        if isinstance(node, ast.Expr) and name and isinstance(node.value, ast.Constant):
            found[name] = found[name]._replace(doc=str(node.value.value))
        target = node.target if isinstance(node, ast.AnnAssign) else (getattr(node, "targets", None) or [None])[0]
        name = target.id if isinstance(target, ast.Name) else ""
        if name and node.value:
            is_type = isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "TypeAlias"
            found[name] = Constant(ast.unparse(node.value).replace("'", '"'), "", is_type)
    return found


def _fenced(code: str) -> str:
    return f"```python\n{code}\n```"
