"""What a setting is: an option and its variable, and how its text becomes a value."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

_LEAST_BARE_BYTES = 1 << 20
"""A size without a unit counts bytes from here on. A smaller one was meant in another unit."""
_MOST_BYTES = 1 << 60
"""The answer to GetServerInfo has 63 bits for a size."""
_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


class ConfigError(ValueError):
    """An invalid setting. The text names it, its value and what was expected."""


def parse_bytes(text: str) -> int:
    """``"512MiB"``, ``"4GiB"``, or a number of bytes, at least 1048576.

    Raises:
        ValueError: the text is not a size, or a small number without a unit, or larger than any memory.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]iB|B|)", text.strip())
    if match is None:
        raise ValueError(f"got {text!r}; expected a size such as 512MiB, 4GiB or a number of bytes")
    bytes_given = float(match[1]) * _UNITS[match[2]]
    if bytes_given > _MOST_BYTES:
        raise ValueError(f"got {text!r}; expected at most {format_bytes(_MOST_BYTES)}")
    count = int(bytes_given)
    if not match[2] and count < _LEAST_BARE_BYTES:
        raise ValueError(
            f"got {text!r}; expected a size with a unit, such as 512MiB or 4GiB (a number without a unit counts bytes, "
            f"and is at least {_LEAST_BARE_BYTES})"
        )
    return count


def format_bytes(count: int) -> str:
    """The size in the largest unit in which it is at least 1."""
    unit = next((u for u in ("TiB", "GiB", "MiB", "KiB") if count >= _UNITS[u]), "B")
    value = count / _UNITS[unit]
    return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"


def integer(text: str) -> int:
    """A whole number.

    Raises:
        ValueError: the text is not one.
    """
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"got {text!r}; expected a whole number") from None


def number(text: str) -> float:
    """A number.

    Raises:
        ValueError: the text is not one.
    """
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"got {text!r}; expected a number") from None


def switch(text: str) -> bool:
    """``on`` or ``off``; also ``true``, ``yes``, ``1`` and their opposites.

    Raises:
        ValueError: the text is neither.
    """
    if text.lower() in ("on", "true", "yes", "1"):
        return True
    if text.lower() in ("off", "false", "no", "0"):
        return False
    raise ValueError(f"got {text!r}; expected on or off")


def setting(
    default: object,
    flag: str,
    metavar: str,
    text: str,
    parse: Callable[[str], object] = str,
    others: Sequence[str] = (),
) -> Any:
    """A field of the configuration: its default, its option, and how its text is read.

    Args:
        others: variables that stand for it where its own is not set, the first that is set.
    """
    metadata = {"flag": flag, "metavar": metavar, "help": text, "parse": parse, "others": others}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Fields that are settings."""

    def _refuse(self, name: str, expected: str) -> None:
        flag = next(f.metadata["flag"] for f in fields(self) if f.name == name)
        raise ConfigError(f"{flag}: got {getattr(self, name)!r}; expected {expected}")


def variable_of(flag: str) -> str:
    """The environment variable that stands for a flag: ``--memory-budget`` is ``LOVASZ_MEMORY_BUDGET``."""
    return "LOVASZ_" + flag.removeprefix("--").replace("-", "_").upper()
