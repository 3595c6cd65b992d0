"""The report of ``qemu-remus probe`` for a person: the verdict, the facts, each disk with its graph.  Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Final

from qemu_remus.core.text import one_line, size
from qemu_remus.qemu.block_tree import draw
from qemu_remus.qemu.probe_model import Finding, Level, ProbedDisk, ProbeReport

_LABEL: Final = 13
_MARKS: Final = {Level.OK: " ", Level.WARN: "!", Level.NO: "X"}
_FACTS: Final = ("QEMU", "machine", "VM", "process", "NBD server", "fleece", "secondary")
"""What is told in rows at the top, in this order."""
_ASCII: Final = str.maketrans({"├": "|", "└": "`", "│": "|", "─": "-", "→": ">"})


def render(report: ProbeReport, *, width: int = 100) -> list[str]:
    """The report as lines without ends.

    :param width: columns that sentences are wrapped to.
    """
    lines = [_verdict(report), ""]
    for label in _FACTS:
        first = next((finding for finding in report.findings if finding.subject == label), None)
        if first is not None:
            lines += _row(label, first, width)
    lines += _row("features", _features(report), width)
    for disk in report.disks:
        lines += ["", *_disk(report, disk, width)]
    others = [finding for finding in _others(report) if finding.level is not Level.OK or finding.hint]
    if others:
        lines.append("")
        for finding in others:
            lines += _remark(finding, f"{finding.subject}: ", width)
    return lines


def plain(line: str) -> str:
    """``line`` without box characters, for a terminal that has none."""
    return line.translate(_ASCII)


def _verdict(report: ProbeReport) -> str:
    name = one_line(report.name) or "this VM"
    worst = [finding for finding in report.findings if finding.level is not Level.OK]
    bad = sum(finding.level is Level.NO for finding in worst)
    used = sum(disk.way is not None for disk in report.disks)
    if not report.ok:
        reasons = "for one reason, marked X" if bad == 1 else f"for {bad} reasons, marked X"
        return f"NO: {name} cannot be protected as it is, {reasons} below"
    notes = f"; read what is marked ! below ({len(worst)})" if worst else ""
    return f"YES: {name} can be protected, with {used} disk{'s' if used != 1 else ''}{notes}"


def _row(label: str, finding: Finding, width: int) -> list[str]:
    mark = _MARKS[finding.level]
    lead = f"{mark} {label:<{_LABEL}}"
    lines = _wrap(finding.text, lead, " " * len(lead), width)
    if finding.hint:
        lines += _wrap(finding.hint, " " * len(lead) + "-> ", " " * (len(lead) + 3), width)
    return lines


def _features(report: ProbeReport) -> Finding:
    """All of QEMU's in one row; those that are missing come with their own remarks."""
    needed = [finding for finding in report.findings if finding.subject == "needed"]
    missing = sum(finding.level is Level.NO for finding in needed)
    text = f"{missing} of the {len(needed)} needed are missing" if missing else f"all {len(needed)} needed are there"
    optional = [finding.text for finding in report.findings if finding.subject == "optional" and not finding.hint]
    there = sum(": absent; " not in text for text in optional)
    text += f", and {there} of the {len(optional)} useful ones"
    return Finding(Level.NO if missing else Level.OK, "features", text)


def _others(report: ProbeReport) -> Iterator[Finding]:
    """Findings that have no row of their own and are about no disk that is shown."""
    shown = {f"disk {disk.name}" for disk in report.disks}
    rows: set[str] = set()
    for finding in report.findings:
        if finding.subject in shown:
            continue
        if finding.subject in _FACTS and finding.subject not in rows:
            rows.add(finding.subject)
            continue
        yield finding


def _disk(report: ProbeReport, disk: ProbedDisk, width: int) -> Iterator[str]:
    device = " ".join(filter(None, (disk.device, f"at {disk.qdev}" if disk.qdev else "no device")))
    thread = ", in an iothread" if disk.iothread else ""
    yield f"  disk {disk.name}: {size(disk.size) if disk.size else 'empty'}, {device}{thread}"
    for finding in report.about(disk):
        yield from _remark(finding, "", width)
    if disk.graph is not None:
        yield from (f"    {line}" for line in draw(disk.graph))


def _remark(finding: Finding, lead: str, width: int) -> Iterator[str]:
    yield from _wrap(f"{lead}{finding.text}", f"{_MARKS[finding.level]}   ", "    ", width)
    if finding.hint:
        yield from _wrap(finding.hint, "    -> ", "       ", width)


def _wrap(text: str, first: str, rest: str, width: int) -> list[str]:
    return textwrap.wrap(
        one_line(text),
        max(40, width),
        initial_indent=first,
        subsequent_indent=rest,
        break_on_hyphens=False,
        break_long_words=False,
    )
