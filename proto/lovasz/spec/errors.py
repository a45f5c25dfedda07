"""The error for a loss description or a tensor that cannot be computed with."""

from __future__ import annotations


class InvalidInput(ValueError):
    """A loss description or a tensor is invalid.

    The message names the field, the value that it got and what was expected.

    Attributes:
        field: the field's name.
        problem: the rest of the message.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem

    def __reduce__(self) -> tuple[type[InvalidInput], tuple[str, str]]:
        return type(self), (self.field, self.problem)
