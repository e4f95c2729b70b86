"""Values as text, and text as values."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence

PLAIN_LIST = re.compile(r"\['[^\"$`\\]*")  # in double quotes


def parse_bool(value: bool | str) -> bool:
    """Parse a bool that may be text: `--resume true` arrives as text, and any text would count as true.

    Raises:
        ValueError: neither true nor false.
    """
    words = {"true": True, "false": False}
    if str(value).lower() not in words:
        raise ValueError(f"found {value!r}, expected true or false")
    return words[str(value).lower()]


def size_text(sizes: Iterable[int]) -> str:
    """Sizes along the axes, as in `96×96×96`."""
    return "×".join(map(str, sizes))


def axis_ranges(rows: Sequence[Sequence[float]]) -> str:
    """Format the range along each of three axes, as in `31-43 x 40-59 x 24-47`."""
    ends = [(f"{min(axis):.4g}", f"{max(axis):.4g}") for axis in zip(*rows, strict=True)]
    return " x ".join(low if low == high else f"{low}-{high}" for low, high in ends)


def bytes_text(size: float) -> str:
    """Bytes in a readable unit."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def first_lines(lines: Iterable[str], most: int = 10) -> str:
    """The first lines of a list in a message, indented, and the number of the others."""
    lines = list(lines)
    more = [f"… and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join(f"  {line}" for line in [*lines[:most], *more])


def command_text(words: Iterable[str]) -> str:
    """A command as it is typed in a shell; lists stand in double quotes, as in the documentation."""
    return " ".join(f'"{word}"' if PLAIN_LIST.fullmatch(word) else shlex.quote(word) for word in words)
