"""The report for a person: the words that matter at three in the morning, and terminals that are drawn over."""

import dataclasses
import importlib.util
import io
import re
from typing import Any
from uuid import UUID

import pytest

from qemu_remus import status
from qemu_remus.core.model import (
    Connection,
    DiskName,
    DiskStanding,
    DiskState,
    EpochNumber,
    Generation,
    PairName,
    Replication,
    Role,
)
from qemu_remus.core.report import Checkpoints, DiskReport, FailoverReport, Pause, Report, SyncProgress

PRIMARY = Report(
    PairName("vm"),
    Role.PRIMARY,
    Connection.CONNECTED,
    DiskState.UP_TO_DATE,
    Replication.PROTECTED,
    generation=Generation(UUID(int=5)),
    peer="10.0.0.2:7400",
    checkpoint=Checkpoints(EpochNumber(813), EpochNumber(812), EpochNumber(812), EpochNumber(811), 0.31),
    dirty_bytes=3 << 20,
    pause=Pause(3.4, 3.3, 6.12, 813),
)
SECONDARY = dataclasses.replace(
    PRIMARY,
    role=Role.SECONDARY,
    connection=Connection.STANDALONE,
    disk=DiskState.CONSISTENT,
    replication=Replication.DEGRADED,
    peer=None,
    disks=(DiskReport(DiskName("a"), 1 << 30, target="/srv/a"), DiskReport(DiskName("long"), None, target="/srv/b")),
)


def text(report: Report, **options: Any) -> str:
    return "\n".join(status.render(report, **options))


def change(report: Report, **members: Any) -> Report:
    return dataclasses.replace(report, **members)


def test_a_protected_vm_is_said_to_be_so_with_the_age_of_its_copy() -> None:
    lines = status.render(PRIMARY)
    assert lines[0] == "vm (primary here): PROTECTED"
    assert lines[1].strip() == "the secondary holds checkpoint 812, 0.3 s old"
    assert "last 3.4 ms, median 3.3 ms, p99 6.1 ms, 813 pauses" in text(PRIMARY)


@pytest.mark.parametrize(
    "replication", [each for each in Replication if each not in (Replication.PROTECTED, Replication.VERIFYING)]
)
def test_an_unprotected_vm_is_never_headed_as_protected(replication: Replication) -> None:
    head = status.headline(change(PRIMARY, replication=replication))
    assert head.mood is not status.Mood.GOOD
    assert head.text.startswith(("NOT PROTECTED", "FAILED OVER"))


def test_failed_storage_comes_before_what_replication_says() -> None:
    assert status.headline(change(PRIMARY, disk=DiskState.FAILED)).mood is status.Mood.BAD


def test_the_reason_is_printed_whole_and_wrapped() -> None:
    reason = "the secondary has sent nothing for 5 seconds " * 4
    lines = status.render(change(PRIMARY, replication=Replication.DEGRADED, reason=reason.strip()), width=60)
    sentences = lines[1 : lines.index("")]
    assert all(len(line) <= 60 for line in sentences)
    assert reason.strip() in " ".join(line.strip() for line in sentences)


def test_a_reason_from_the_peer_cannot_command_the_terminal() -> None:
    report = change(PRIMARY, reason="bad\x1b[2J\nworse\x9b31m")
    assert "bad?[2J worse?31m" in text(report)
    assert status.summary(report).endswith("bad?[2J worse?31m")


def test_a_copy_without_a_checkpoint_is_said_to_be_unusable() -> None:
    report = change(SECONDARY, disk=DiskState.INCONSISTENT)
    assert "holds no complete checkpoint" in text(report)
    assert status.advice(report) == ""


def test_a_secondary_without_its_primary_says_how_to_fail_over_and_what_to_see_to_first() -> None:
    assert "see that it is off, then 'qemu-remus failover'" in text(SECONDARY, width=200)
    assert status.advice(change(SECONDARY, connection=Connection.CONNECTED)) == ""
    assert status.advice(PRIMARY) == ""


def test_doubt_is_said_where_failover_would_refuse() -> None:
    report = change(SECONDARY, checkpoint=dataclasses.replace(SECONDARY.checkpoint, in_doubt=EpochNumber(813)))
    assert "--last-committed" in status.advice(report)
    assert "in doubt 813" in text(report)


def test_disks_may_be_used_only_when_the_failover_is_complete() -> None:
    begun = change(SECONDARY, failover=FailoverReport(EpochNumber(812), False), replication=Replication.FAILED_OVER)
    assert "do not start the VM" in text(begun)
    done = change(begun, failover=FailoverReport(EpochNumber(812), True))
    assert "free for use" in text(done)
    assert "/srv/a" in text(done)


def test_a_sync_shows_its_bar_rate_and_time_left() -> None:
    report = change(PRIMARY, replication=Replication.INITIAL_SYNC, sync=SyncProgress(1 << 30, 4 << 30, 2.5e8, 12.9))
    assert "[#######.....................] 25%" in text(report)
    assert "1.0 GiB of 4.0 GiB, 238 MiB/s, 13 s left" in text(report)
    assert "25% synchronised" in status.summary(report)


def test_a_sync_of_nothing_is_complete() -> None:
    assert "100%" in text(change(PRIMARY, sync=SyncProgress(0, 0, 0.0, 0.0)))


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (102_348, "99.9 KiB"), (1_048_063, "1023 KiB"),
     (1_048_576, "1.0 MiB"), (5 << 50, "5120 TiB")],
)  # fmt: skip
def test_sizes(count: int, expected: str) -> None:
    assert status.size(count) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 0 s"), (3599.9, "1 h 0 min"), (90_000, "1 d 1 h")],
)
def test_durations(seconds: float, expected: str) -> None:
    assert status.duration(seconds) == expected


def test_lines_align_at_one_column() -> None:
    lines = status.render(change(PRIMARY, sync=SyncProgress(1, 2, 3.0, 4.0), disks=SECONDARY.disks))
    table = lines[lines.index("") + 1 :]
    assert all(line[14] == " " and line[15] != " " for line in table)


def test_colours_are_there_only_when_they_are_wanted() -> None:
    assert "\x1b" not in text(PRIMARY)
    assert "\x1b[1;32mPROTECTED\x1b[0m" in text(PRIMARY, style=status.Style(colour=True))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_gets_a_line_per_change() -> None:
    out = io.StringIO()
    display = status.display_for(out, colour=True)
    assert isinstance(display, status.LineDisplay)
    for report in (PRIMARY, PRIMARY, change(PRIMARY, bytes_sent=7), change(PRIMARY, replication=Replication.DEGRADED)):
        display.show(report)
    first, second = out.getvalue().splitlines()
    assert "PROTECTED" in first
    assert "NOT PROTECTED" in second


def shown(out: str) -> list[str]:
    """What stands on the terminal after ``out``: cursor up, carriage return and clear-below understood."""
    screen, row = [""], 0
    for up, newline, chars in re.findall(r"\x1b\[(\d+)A|(\n)|([^\x1b\n]+|\x1b\[[0-9;]*[mJ])", out):
        if up:
            row -= int(up)
        elif newline:
            row += 1
            screen += [""] * (row + 1 - len(screen))
        elif chars == "\x1b[J":
            del screen[row + 1 :]
            screen[row] = ""
        elif not chars.startswith("\x1b"):
            screen[row] += chars.replace("\r", "")
    return screen


def test_a_terminal_shows_the_last_report_only_though_reports_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.get_terminal_size", lambda: (80, 40))
    out = Terminal()
    display = status.display_for(out, colour=False)
    display.show(change(PRIMARY, reason="something long " * 20, replication=Replication.DEGRADED))
    display.show(PRIMARY)
    assert shown(out.getvalue()) == [*status.render(PRIMARY, width=79), ""]


def test_a_small_terminal_is_neither_wrapped_nor_scrolled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.get_terminal_size", lambda: (30, 6))
    out = Terminal()
    display = status.display_for(out, colour=True)
    for _ in range(3):
        display.show(PRIMARY)
    screen = shown(out.getvalue())
    assert len(screen) == 6
    assert all(len(line) < 30 for line in screen)


def test_without_rich_the_bar_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert status.style_for(Terminal(), colour=True) == status.Style(colour=True)


@pytest.mark.parametrize("colour", [True, False])
def test_with_rich_the_bar_is_as_wide_as_asked(colour: bool) -> None:
    pytest.importorskip("rich")
    bar = status.style_for(Terminal(), colour=colour).bar(0.5, 30)
    assert len(re.sub(r"\x1b\[[0-9;]*m", "", bar)) == 30 if colour else len(bar) <= 30
    assert ("\x1b" in bar) is colour


def test_a_disk_that_is_not_protected_is_shouted_about_with_the_reason() -> None:
    disks = (
        DiskReport(DiskName("a"), size=1 << 20, node="n"),
        DiskReport(DiskName("b"), size=1 << 20, node="m", state=DiskStanding.UNPROTECTED, reason="no\nplace for b"),
        DiskReport(DiskName("c"), size=1 << 20, state=DiskStanding.SYNCING),
    )
    lines = status.render(change(PRIMARY, disks=disks))
    assert [line.split("MiB")[1].strip() for line in lines[-3:]] == [
        "node n",
        "node m  UNPROTECTED: no place for b",
        "SYNCING",
    ]
