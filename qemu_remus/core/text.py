"""Text that others wrote, made fit for a terminal.  Pure."""

from __future__ import annotations


def one_line(text: str) -> str:
    """``text`` on one line, with nothing in it that could command a terminal.

    Reasons and descriptions travel from the peer and from QEMU, and end on an operator's screen.
    """
    return "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))
