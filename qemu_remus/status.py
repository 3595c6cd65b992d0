"""The status report for a person: plain words first, then the numbers.

Owns how a report looks as text, and how a terminal is refreshed.  It gets reports and asks nobody; what the fields mean
is :mod:`qemu_remus.core.report`'s.
"""

from __future__ import annotations

import importlib.util
import io
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Final, Protocol, TextIO

from qemu_remus.core.model import Connection, DiskStanding, DiskState, Replication, Role
from qemu_remus.core.report import Checkpoints, Pause, Report, SyncProgress, VerifyReport, VerifyState
from qemu_remus.core.text import one_line
from qemu_remus.core.text import size as size

_LABEL: Final = 13
_BAR: Final = 30
_CLEAR_BELOW: Final = "\x1b[J"
_RESET: Final = "\x1b[0m"
_ESCAPE: Final = re.compile(r"\x1b\[[0-9;]*m")


class Mood(Enum):
    """How worried to be; the value is a terminal's colour."""

    GOOD = "\x1b[1;32m"
    WAIT = "\x1b[1;33m"
    BAD = "\x1b[1;31m"


@dataclass(frozen=True, slots=True)
class Headline:
    """The first thing to read.

    :param text: a few words.
    :param detail: a sentence, or empty.
    """

    mood: Mood
    text: str
    detail: str


def headline(report: Report) -> Headline:
    """What state the VM's protection is in, in words."""
    if report.failover is not None or report.replication is Replication.FAILED_OVER:
        return _failover_headline(report)
    if report.disk is DiskState.FAILED:
        return Headline(Mood.BAD, "NOT PROTECTED, STORAGE FAILED", _held(report))
    match report.replication:
        case Replication.PROTECTED:
            return Headline(Mood.GOOD, "PROTECTED", _held(report))
        case Replication.VERIFYING:
            return Headline(Mood.GOOD, "PROTECTED, the copy is being verified", _held(report))
        case Replication.INITIAL_SYNC:
            return Headline(
                Mood.WAIT, "NOT PROTECTED YET", "the first copy is being made; it cannot be used before it is"
            )
        case Replication.RESYNC:
            return Headline(Mood.WAIT, "NOT PROTECTED, CATCHING UP", _held(report))
        case _:
            return Headline(Mood.BAD, "NOT PROTECTED", _held(report))


def _failover_headline(report: Report) -> Headline:
    failover = report.failover
    if failover is None:
        return Headline(Mood.WAIT, "FAILED OVER", "")
    if failover.complete:
        return Headline(
            Mood.WAIT, f"FAILED OVER to checkpoint {failover.checkpoint}", "the disks hold it and are free for use"
        )
    return Headline(
        Mood.WAIT, f"FAILING OVER to checkpoint {failover.checkpoint}", "do not start the VM from the disks yet"
    )


def _held(report: Report) -> str:
    committed = report.checkpoint.committed
    who = "the secondary" if report.role is Role.PRIMARY else "this secondary"
    if committed is None or report.disk is DiskState.INCONSISTENT:
        return f"{who} holds no complete checkpoint"
    age = report.checkpoint.committed_age_seconds
    return f"{who} holds checkpoint {committed}" + ("" if age is None else f", {duration(age)} old")


def advice(report: Report) -> str:
    """What to do next, or empty; only where it does not depend on what we cannot know."""
    if report.failover is not None or report.role is not Role.SECONDARY or report.connection is Connection.CONNECTED:
        return ""
    if report.disk in (DiskState.INCONSISTENT, DiskState.FAILED) or report.checkpoint.committed is None:
        return ""
    if report.checkpoint.in_doubt is not None:
        return (
            f"if the primary is lost: see that it is off, then 'qemu-remus failover', saying with --checkpoint which "
            f"memory there is, or with --last-committed that epoch {report.checkpoint.in_doubt} may be dropped"
        )
    return "if the primary is lost: see that it is off, then 'qemu-remus failover'"


def text_bar(share: float, width: int) -> str:
    """A progress bar in ASCII.

    :param share: done, 0 to 1.
    :param width: columns.
    """
    full = int(share * (width - 2))
    return f"[{'#' * full}{'.' * (width - 2 - full)}]"


@dataclass(frozen=True, slots=True)
class Style:
    """What the output can show.

    :param colour: a terminal's colours.
    :param bar: draws a progress bar from the share done (0 to 1) and the columns it may take.
    """

    colour: bool = False
    bar: Callable[[float, int], str] = text_bar


PLAIN: Final = Style()


def render(report: Report, *, width: int = 100, style: Style = PLAIN) -> list[str]:
    """The whole report, as lines without ends.

    :param width: columns that sentences are wrapped to; the rows of numbers are as long as they are.
    """
    first = headline(report)
    title = f"{first.mood.value}{first.text}{_RESET}" if style.colour else first.text
    lines = [f"{report.pair} ({report.role} here): {title}"]
    for text in (first.detail, one_line(report.reason or ""), advice(report)):
        lines += textwrap.wrap(text, max(20, width), initial_indent="  ", subsequent_indent="  ")
    lines.append("")
    if report.sync is not None:
        share = _share(report.sync)
        lines.append(_row("sync", f"{style.bar(share, _BAR)} {share:.0%}"))
        lines.append(_row("", sync_numbers(report.sync)))
    if report.verify is not None:
        lines.append(_row("verify", _verified(report.verify)))
    peer = f" {'to' if report.role is Role.PRIMARY else 'from'} {report.peer}" if report.peer else ""
    lines.append(_row("connection", f"{report.connection}{peer}"))
    lines.append(_row("disk", report.disk))
    lines.append(_row("replication", report.replication))
    lines.append(_row("checkpoint", _checkpoints(report.checkpoint)))
    if report.dirty_bytes is not None:
        lines.append(_row("waiting", f"{size(report.dirty_bytes)} changed and not committed"))
    if report.backlog_bytes is not None:
        lines.append(_row("backlog", f"{size(report.backlog_bytes)} committed and not in the images yet"))
    if report.pause.count:
        lines.append(_row("pause", _pause(report.pause)))
    epochs = report.epochs
    lines.append(_row("epochs", f"{epochs.captured} captured, {epochs.committed} committed, {epochs.lost} lost"))
    lines.append(_row("traffic", f"{size(report.bytes_sent)} sent, {size(report.bytes_received)} received"))
    lines += _disks(report)
    return lines


def summary(report: Report) -> str:
    """The report as one line, for output that is not a terminal."""
    first = headline(report)
    parts = [f"{report.pair} ({report.role}): {first.text}", f"{report.connection}, disk {report.disk}"]
    if report.sync is not None:
        parts.append(f"{_share(report.sync):.0%} synchronised")
    if report.checkpoint.committed is not None:
        parts.append(f"checkpoint {report.checkpoint.committed} committed")
    if report.reason:
        parts.append(one_line(report.reason))
    return "; ".join(parts)


def duration(seconds: float) -> str:
    """Seconds for a person, in one or two units."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for name, length, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= length:
            return f"{whole // length} {name} {whole % length // part} {smaller}"
    return f"{whole} s"


def sync_numbers(sync: SyncProgress) -> str:
    """How far a sync is, how fast, and how long it will take."""
    left = "" if sync.seconds_left is None else f", {duration(sync.seconds_left)} left"
    return f"{size(sync.done_bytes)} of {size(sync.total_bytes)}, {size(sync.bytes_per_second)}/s{left}"


def verify_numbers(verify: VerifyReport) -> str:
    """How far a verification is, how fast, and what it has found so far."""
    share = verify.done_bytes / verify.total_bytes if verify.total_bytes else 1.0
    parts = [f"{share:.0%} of {size(verify.total_bytes)}"]
    if verify.state is VerifyState.SUSPENDED:
        parts.append("waits until the VM is protected again")
    else:
        parts.append(f"{size(verify.bytes_per_second)}/s")
        if verify.seconds_left is not None:
            parts.append(f"{duration(verify.seconds_left)} left")
    if verify.differing_ranges:
        parts.append(f"{verify.differing_ranges} ranges differ")
    return ", ".join(parts)


def _verified(verify: VerifyReport) -> str:
    if verify.ended_age_seconds is None:
        return verify_numbers(verify)
    found = "no differences"
    if verify.differing_ranges:
        mended = f", {size(verify.repaired_bytes)} repaired" if verify.repaired_bytes else ""
        found = f"{size(verify.differing_bytes)} differ in {verify.differing_ranges} ranges{mended}"
    return f"{verify.state} {duration(verify.ended_age_seconds)} ago: {found}"


def _row(label: str, text: str) -> str:
    return f"  {label:<{_LABEL}}{text}"


def _checkpoints(checkpoint: Checkpoints) -> str:
    stages = (
        ("captured", checkpoint.captured),
        ("staged", checkpoint.staged),
        ("committed", checkpoint.committed),
        ("applied", checkpoint.applied),
    )
    text = "  ".join(f"{name} {'-' if number is None else number}" for name, number in stages)
    return text if checkpoint.in_doubt is None else f"{text}  in doubt {checkpoint.in_doubt}"


def _pause(pause: Pause) -> str:
    def of(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f} ms"

    return f"last {of(pause.last_ms)}, median {of(pause.median_ms)}, p99 {of(pause.p99_ms)}, {pause.count} pauses"


def _disks(report: Report) -> Iterator[str]:
    label = "disks"
    width = max((len(disk.name) for disk in report.disks), default=0)
    for disk in report.disks:
        where = disk.target or (f"node {disk.node}" if disk.node else "")
        length = "size unknown" if disk.size is None else size(disk.size)
        standing = "" if disk.state is DiskStanding.PROTECTED else f"  {disk.state.upper()}"
        why = f": {one_line(disk.reason)}" if disk.reason else ""
        yield _row(label, f"{disk.name:<{width}}  {length:>12}  {where}{standing}{why}".rstrip())
        label = ""


def _share(sync: SyncProgress) -> float:
    return min(1.0, sync.done_bytes / sync.total_bytes) if sync.total_bytes else 1.0


class Display(Protocol):
    """Shows one report after another."""

    def show(self, report: Report) -> None:
        """Show this one in place of, or after, the last."""


class LineDisplay:
    """For files and pipes: a line whenever something changed."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._last = ""

    def show(self, report: Report) -> None:
        """Print the report's line, unless it is the last one again."""
        line = summary(report)
        if line != self._last:
            self._last = line
            print(line, file=self._out, flush=True)


class TerminalDisplay:
    """Redraws in place."""

    def __init__(self, out: TextIO, style: Style) -> None:
        self._out = out
        self._style = style
        self._height = 0

    def show(self, report: Report) -> None:
        """Draw over the last one."""
        columns, rows = shutil.get_terminal_size()
        # A line that wraps, or a report that scrolls, could not be drawn over.
        lines = [_cut(line, columns - 1) for line in render(report, width=columns - 1, style=self._style)][: rows - 1]
        up = f"\x1b[{self._height}A" if self._height else ""
        self._out.write(f"{up}\r{_CLEAR_BELOW}" + "\n".join(lines) + "\n")
        self._out.flush()
        self._height = len(lines)


def display_for(out: TextIO, *, colour: bool) -> Display:
    """The display that suits the output.

    :param colour: whether colours are wanted, where the output is a terminal.
    """
    return TerminalDisplay(out, style_for(out, colour=colour)) if out.isatty() else LineDisplay(out)


def style_for(out: TextIO, *, colour: bool) -> Style:
    """The style that suits the output: rich's progress bar where there is a terminal and rich is installed."""
    if not out.isatty():
        return PLAIN
    if importlib.util.find_spec("rich") is None:
        return Style(colour=colour)
    return Style(colour=colour, bar=partial(_rich_bar, colour=colour))


def _rich_bar(share: float, width: int, *, colour: bool) -> str:
    from rich.console import Console
    from rich.progress_bar import ProgressBar

    drawn = io.StringIO()
    console = Console(file=drawn, width=width, force_terminal=colour, color_system="standard" if colour else None)
    console.print(ProgressBar(total=1.0, completed=share, width=width), end="")
    return drawn.getvalue()


def _cut(line: str, columns: int) -> str:
    plain = _ESCAPE.sub("", line)
    return line if len(plain) <= columns else plain[:columns]
