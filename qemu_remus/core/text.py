"""Text that others wrote, made fit for a terminal; times and sizes, made fit for a person.  Pure: no clock."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

_LAST: Final = 253_402_300_799
"""The end of the year 9999."""


def one_line(text: str) -> str:
    """``text`` on one line, with nothing in it that could command a terminal.

    Reasons and descriptions travel from the peer and from QEMU, and end on an operator's screen.
    """
    return "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))


def written(when: int) -> str:
    """A time, in seconds since 1970, for a person; empty where it is not known."""
    if not 0 < when <= _LAST:
        return ""
    return f"{datetime.fromtimestamp(when, UTC):%Y-%m-%d %H:%M:%S} UTC"


def size(count: float) -> str:
    """Bytes for a person: at most four digits and a binary unit."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1023.5 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.1f} {unit}"
