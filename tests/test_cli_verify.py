"""``qemu-remus verify`` as a person and a script meet it: the ranges, the words, and the exit codes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog

from qemu_remus.cli import main
from qemu_remus.cli.exits import ExitCode
from qemu_remus.core.commands import Nothing, VerifyArguments, VerifyStarted
from qemu_remus.core.errors import NotProtected, OutOfOrder
from qemu_remus.core.model import DiskName
from qemu_remus.core.report import DiskRange, VerifyReport, VerifyState
from qemu_remus.status import verify_numbers
from tests.fake_controller import REPORT, Controller, in_a_thread

A, B = DiskName("a"), DiskName("long")
GOOD = VerifyReport(
    3, VerifyState.COMPLETED, False, (A, B), done_bytes=1 << 30, total_bytes=1 << 30, ended_age_seconds=0.1
)
BAD = replace(
    GOOD,
    differing_ranges=2,
    differing_bytes=12288,
    ranges=(DiskRange(A, 4096, 8192), DiskRange(B, 0, 4096)),
)


@pytest.fixture
def controller(tmp_path: Path) -> Controller:
    controller = Controller(tmp_path / "control.sock")
    controller.answers |= {"verify": VerifyStarted(3, 1 << 30), "verify-cancel": Nothing()}
    return controller


@pytest.fixture(autouse=True)
def no_log() -> Iterator[None]:
    """The servers in this process log nowhere, so that what the commands print can be told from it."""

    def drop(*_: object) -> str:
        raise structlog.DropEvent

    structlog.configure(processors=[drop])
    yield
    structlog.reset_defaults()


def run(controller: Controller, *words: str) -> int:
    with in_a_thread(controller):
        return main(["verify", *words, "--control", str(controller.path)])


def reports(controller: Controller, result: VerifyReport | None) -> None:
    controller.answers["query-replication"] = replace(REPORT, verify=result)


def test_a_good_copy_is_said_to_be_the_same(controller: Controller, capsys: pytest.CaptureFixture[str]) -> None:
    reports(controller, GOOD)
    assert run(controller) == 0
    assert controller.arguments["verify"] == VerifyArguments()
    assert "the same as the VM's disks" in capsys.readouterr().out


def test_the_arguments_reach_the_controller(controller: Controller) -> None:
    reports(controller, GOOD)
    assert run(controller, "--disk", "a", "--disk", "long", "--repair", "--rate", "20M") == 0
    assert controller.arguments["verify"] == VerifyArguments((A, B), True, 20 << 20)


def test_what_differs_is_listed_and_has_an_exit_code(
    controller: Controller, capsys: pytest.CaptureFixture[str]
) -> None:
    reports(controller, BAD)
    assert run(controller) == ExitCode.DIFFERENT
    out = capsys.readouterr().out
    assert "DIFFERENT: 12.0 KiB in 2 ranges" in out
    assert [line.split() for line in out.splitlines() if line.startswith("    ")] == [
        ["a", "4096", "8192"],
        ["long", "0", "4096"],
    ]
    assert "--repair" in out


def test_a_list_that_is_cut_says_so(controller: Controller, capsys: pytest.CaptureFixture[str]) -> None:
    reports(controller, replace(BAD, differing_ranges=999, ranges_truncated=True))
    assert run(controller) == ExitCode.DIFFERENT
    assert "... and more: only 2 are listed" in capsys.readouterr().out


def test_what_was_repaired_is_good_and_what_was_not_is_not(
    controller: Controller, capsys: pytest.CaptureFixture[str]
) -> None:
    reports(controller, replace(BAD, repair=True, repaired_bytes=12288))
    assert run(controller, "--repair") == 0
    assert "repaired" in capsys.readouterr().out
    reports(controller, replace(BAD, repair=True, repaired_bytes=4096))
    assert run(controller, "--repair") == ExitCode.DIFFERENT


@pytest.mark.parametrize("state", [VerifyState.CANCELLED, VerifyState.FAILED])
def test_one_that_did_not_come_to_its_end_proves_nothing(
    controller: Controller, capsys: pytest.CaptureFixture[str], state: VerifyState
) -> None:
    reports(controller, replace(GOOD, state=state, done_bytes=5, reason="the disk cannot be read"))
    assert run(controller) == ExitCode.FAILURE
    out = capsys.readouterr().out
    assert "no differences so far" in out
    assert "the disk cannot be read" in out


def test_json_is_the_reports_member(controller: Controller, capsys: pytest.CaptureFixture[str]) -> None:
    reports(controller, BAD)
    assert run(controller, "--json") == ExitCode.DIFFERENT
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert value["ranges"] == [
        {"disk": "a", "offset": 4096, "length": 8192},
        {"disk": "long", "offset": 0, "length": 4096},
    ]


def test_ctrl_c_ends_the_verification_and_shows_what_was_found(
    controller: Controller, capsys: pytest.CaptureFixture[str]
) -> None:
    reports(controller, replace(BAD, state=VerifyState.RUNNING, done_bytes=7, ended_age_seconds=None))

    async def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    async def cancelled() -> None:
        reports(controller, replace(BAD, state=VerifyState.CANCELLED, done_bytes=7))

    controller.instead = {"query-replication": [interrupt], "verify-cancel": [cancelled]}
    assert run(controller) == ExitCode.INTERRUPTED
    assert "verify-cancel" in controller.asked
    assert "ended early" in capsys.readouterr().out


def test_one_that_is_under_way_can_be_ended_by_another_command(controller: Controller) -> None:
    assert run(controller, "--cancel") == 0
    assert controller.asked == ["verify-cancel"]
    controller.instead = {"verify-cancel": [OutOfOrder("no verification is under way")]}
    assert run(controller, "--cancel") == ExitCode.REFUSED


def test_a_refusal_is_told(controller: Controller, capsys: pytest.CaptureFixture[str]) -> None:
    controller.instead = {"verify": [NotProtected("there is no checkpoint to compare with now")]}
    assert run(controller) == ExitCode.REFUSED
    assert capsys.readouterr().err.startswith("error: there is no checkpoint")


@pytest.mark.parametrize("words", [["--rate", "1K"], ["--rate", "fast"], ["--disk", "no such name"]])
def test_wrong_words_are_usage_errors(controller: Controller, words: list[str]) -> None:
    assert run(controller, *words) == ExitCode.USAGE
    assert controller.asked == []


def test_a_secondary_is_told_from_a_primary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Controller(tmp_path / "control.sock")) == ExitCode.REFUSED
    assert "not a primary" in capsys.readouterr().err


@pytest.mark.parametrize("other", [None, replace(GOOD, number=4)])
def test_a_result_that_is_another_ones_is_not_taken(controller: Controller, other: VerifyReport | None) -> None:
    reports(controller, other)
    assert run(controller) == ExitCode.UNREACHABLE


def test_the_progress_says_how_far_how_fast_and_what_was_found() -> None:
    running = replace(BAD, state=VerifyState.RUNNING, done_bytes=1 << 28, bytes_per_second=1 << 20, seconds_left=90.0)
    assert verify_numbers(running) == "25% of 1.0 GiB, 1.0 MiB/s, 1 min 30 s left, 2 ranges differ"
    assert "waits" in verify_numbers(replace(running, state=VerifyState.SUSPENDED))
