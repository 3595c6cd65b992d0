"""What the demonstration prints: numbered steps, progress, and numbers for a person.

Owns the terminal; what is shown comes from elsewhere.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


class Screen:
    """The demonstration's output: numbered steps, and one line that is drawn over where there is a terminal."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._step = 0
        self._terminal = sys.stdout.isatty()
        self._open = False
        self._quarter = -1

    def step(self, text: str) -> None:
        """Begin the next step."""
        self._step += 1
        self.line(f"\n{self._bold(f'[{self._step}/{self._steps}]')} {self._bold(text)}")

    def line(self, text: str) -> None:
        """Print a line."""
        if self._open:
            print(flush=True)
            self._open = False
        print(text, flush=True)

    def note(self, text: str) -> None:
        """Print a line that belongs to the step."""
        self.line(f"      {text}")

    def progress(self, share: float, text: str) -> None:
        """Show progress: a bar that grows on a terminal, else a line each quarter."""
        if self._terminal:
            full = int(share * 30)
            print(f"\r      [{'#' * full}{'.' * (30 - full)}] {share:4.0%}  {text}\x1b[K", end="", flush=True)
            self._open = True
        elif int(share * 4) > self._quarter:
            self._quarter = int(share * 4)
            self.note(f"{share:4.0%}  {text}")

    def _bold(self, text: str) -> str:
        return f"\x1b[1m{text}\x1b[0m" if self._terminal and not os.environ.get("NO_COLOR") else text


def size(count: float) -> str:
    """Bytes for a person."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def milliseconds(seconds: float) -> str:
    """A pause for a person."""
    return f"{seconds * 1000:.1f} ms"


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of all are not above (nearest rank); of at least one value."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]
