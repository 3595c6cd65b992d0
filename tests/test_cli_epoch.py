"""``qemu-remus epoch`` as a hook of a toolstack meets it: what it prints, and exit codes that a script can go by."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
import trio

from qemu_remus.cli import main
from qemu_remus.cli.exits import ExitCode
from qemu_remus.control_socket import claim
from qemu_remus.core.commands import AbortArguments, CommitArguments, MemoryReceived, PrepareArguments, StartArguments
from qemu_remus.core.errors import (
    CommitInDoubt,
    EpochLost,
    NotProtected,
    OutOfOrder,
    QemuRemusError,
    Refused,
    SnapshotBroken,
    TimedOut,
)
from tests.fake_controller import SEVEN, Controller, in_a_thread

TREE = Path(__file__).parent.parent


@pytest.fixture
def controller(tmp_path: Path) -> Controller:
    return Controller(tmp_path / "control.sock")


@pytest.fixture(autouse=True)
def no_log() -> Iterator[None]:
    """The servers in this process log nowhere, so that what the commands print can be told from it."""

    def drop(*_: object) -> str:
        raise structlog.DropEvent

    structlog.configure(processors=[drop])
    yield
    structlog.reset_defaults()


def run(controller: Controller, *words: str) -> int:
    return main(["epoch", *words, "--control", str(controller.path)])


def test_a_start_prints_the_number_alone(controller: Controller, capsys: pytest.CaptureFixture[str]) -> None:
    with in_a_thread(controller):
        assert run(controller, "start", "--pause", "--timeout", "2.5") == 0
    assert capsys.readouterr().out == "7\n"
    assert controller.arguments["start-new-epoch"] == StartArguments(pause=True, timeout=2.5)


def test_each_step_asks_for_its_command_and_says_what_was_done(
    controller: Controller, capsys: pytest.CaptureFixture[str]
) -> None:
    with in_a_thread(controller):
        for words in (["prepare"], ["finish", "7"], ["commit", "7"], ["abort", "7"], ["received", "7"]):
            assert run(controller, *words) == 0
    assert controller.asked == ["prepare-epoch", "finish-disk-sync", "commit-epoch", "abort-epoch", "memory-received"]
    assert controller.arguments["prepare-epoch"] == PrepareArguments(10)
    assert controller.arguments["commit-epoch"] == CommitArguments(SEVEN, 30)
    assert controller.arguments["abort-epoch"] == AbortArguments(SEVEN, 10)
    lines = capsys.readouterr().out.splitlines()
    assert [re.search("ready|staged|given up|committed", line)[0] for line in lines] == [  # type: ignore[index]
        "ready", "staged", "committed", "given up", "committed"
    ]  # fmt: skip


def test_memory_that_is_noted_is_told_from_a_commit(controller: Controller, capsys: pytest.CaptureFixture[str]) -> None:
    controller.answers["memory-received"] = MemoryReceived(SEVEN, committed=False)
    with in_a_thread(controller):
        assert run(controller, "received", "7") == 0
        assert run(controller, "received", "7", "--json") == 0
    text, as_json = capsys.readouterr().out.splitlines()
    assert "as soon as it is staged" in text
    assert json.loads(as_json) == {"epoch": 7, "committed": False}


def test_json_is_the_answer_in_qmps_spelling(controller: Controller, capsys: pytest.CaptureFixture[str]) -> None:
    with in_a_thread(controller):
        assert run(controller, "start", "--json") == 0
        assert run(controller, "finish", "7", "--json") == 0
        assert run(controller, "prepare", "--json") == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert answers == [{"epoch": 7, "dirty-bytes": 8192, "pause-ms": 2.5}, {"epoch": 7}, {}]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EpochLost("the link is gone"), ExitCode.EPOCH_LOST),
        (SnapshotBroken("the fleece is full"), ExitCode.EPOCH_LOST),
        (CommitInDoubt("the link is gone"), ExitCode.IN_DOUBT),
        (TimedOut("not yet"), ExitCode.FAILURE),
        (OutOfOrder("not staged"), ExitCode.REFUSED),
        (NotProtected("initial sync"), ExitCode.REFUSED),
        (Refused("failed over"), ExitCode.REFUSED),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_script_can_tell_what_to_do_by_the_exit_code(
    controller: Controller, error: QemuRemusError, code: ExitCode, capsys: pytest.CaptureFixture[str]
) -> None:
    controller.instead["commit-epoch"] = [error]
    with in_a_thread(controller):
        assert run(controller, "commit", "7") == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"error: {error}\n"


@pytest.mark.parametrize(
    ("words", "code", "advice"),
    [
        (["commit", "7"], ExitCode.IN_DOUBT, "Release no output, keep both memories"),
        (["start"], ExitCode.UNREACHABLE, "An epoch may have been begun"),
        (["finish", "7"], ExitCode.UNREACHABLE, "See its log"),
    ],
)
def test_a_controller_that_ends_in_the_midst_of_a_step_leaves_only_a_commit_in_doubt(
    controller: Controller, words: list[str], code: ExitCode, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def end() -> None:
        for client in controller.server._clients:
            client.drop()
        await trio.lowlevel.checkpoint()

    for name in ("commit-epoch", "start-new-epoch", "finish-disk-sync"):
        controller.instead[name] = [end]
    with in_a_thread(controller):
        assert run(controller, *words) == code
    assert advice in capsys.readouterr().err


def test_a_step_that_nobody_was_asked_for_is_not_in_doubt(
    controller: Controller, capsys: pytest.CaptureFixture[str]
) -> None:
    claimed = claim(controller.path)
    claimed.listener.close()
    assert run(controller, "commit", "7") == ExitCode.UNREACHABLE
    assert run(controller, "start") == ExitCode.UNREACHABLE
    assert "may have been begun" not in capsys.readouterr().err


@pytest.mark.parametrize(("step", "wanted"), [("commit", "a primary with --toolstack"), ("received", "a secondary")])
def test_the_wrong_controller_is_named_as_such(
    controller: Controller, step: str, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    controller.answers = {"query-replication": controller.answers["query-replication"]}
    with in_a_thread(controller):
        assert run(controller, step, "7") == ExitCode.REFUSED
    assert f"is not {wanted}" in capsys.readouterr().err


def test_the_controller_is_found_by_its_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    primary = Controller(tmp_path / "qemu-remus" / "web.primary.sock")
    secondary = Controller(tmp_path / "qemu-remus" / "web.secondary.sock")
    with in_a_thread(primary), in_a_thread(secondary):
        assert main(["epoch", "start", "--pair", "web"]) == 0
        assert main(["epoch", "received", "7", "--pair", "web"]) == 0
    assert primary.asked == ["start-new-epoch"]
    assert secondary.asked == ["memory-received"]
    assert capsys.readouterr().out.startswith("7\n")


def test_the_script_in_the_help_drives_a_checkpoint(controller: Controller, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["epoch", "--help"])
    lines = re.findall(r"^  ((?:#|n=|qemu-remus epoch ).*)$", capsys.readouterr().out, re.M)
    assert len(lines) == 8
    program = f'qemu-remus() {{ {sys.executable} -m qemu_remus.cli "$@" --control {controller.path}; }}'
    with in_a_thread(controller):
        subprocess.run(["bash", "-euc", "\n".join([program, *lines])], check=True, capture_output=True, timeout=60)
    assert controller.asked == ["prepare-epoch", "start-new-epoch", "finish-disk-sync", "commit-epoch"]
    assert controller.arguments["commit-epoch"].epoch == 7


def test_it_imports_neither_the_controllers_nor_the_log() -> None:
    code = (
        "import sys; from qemu_remus.cli import main; main(['epoch', 'prepare', '--control', '/nowhere']);"
        "print(*sorted({'construct', 'structlog', 'qemu', 'qemu_remus.primary', 'qemu_remus.qemu'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
