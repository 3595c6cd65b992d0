"""The command line as a person or a script meets it: exit codes, one clear message, signals."""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import pytest
import structlog
import trio

from qemu_remus import __version__
from qemu_remus.cli import main
from qemu_remus.cli.exits import ExitCode, describe, exit_code, leaves
from qemu_remus.cli.parser import build_parser, parse
from qemu_remus.control import ControlServer, Handler
from qemu_remus.core import errors
from qemu_remus.core.commands import FailoverArguments, FailoverResult, Nothing, StorageWorks
from qemu_remus.core.errors import (
    ConfigError,
    LinkLost,
    NotConsistent,
    PeerUnreachable,
    QemuRemusError,
    StorageError,
)
from qemu_remus.core.model import Connection, DiskName, DiskState, EpochNumber, PairName, Replication, Role
from qemu_remus.core.report import DiskReport, Report

DOCUMENT = Path(__file__).parent.parent / "docs" / "cli.md"
COMMANDS = ("secondary", "primary", "status", "failover", "retry-storage", "epoch", "verify", "detach", "probe", "demo")
STEPS = ("prepare", "start", "finish", "commit", "abort", "received")

REPORT = Report(PairName("vm"), Role.SECONDARY, Connection.CONNECTED, DiskState.UP_TO_DATE, Replication.PROTECTED)


@contextmanager
def controller(
    path: Path,
    *,
    replication: Replication = Replication.PROTECTED,
    failover: QemuRemusError | None = None,
    role: Role = Role.SECONDARY,
) -> Iterator[list[FailoverArguments]]:
    """A control server in a thread of its own."""
    report = Report(PairName("vm"), role, Connection.CONNECTED, DiskState.UP_TO_DATE, replication)
    ready = threading.Event()
    asked: list[FailoverArguments] = []
    stop: list[Callable[[], None]] = []

    async def query(_: Nothing) -> Report:
        return report

    async def take_over(arguments: FailoverArguments) -> FailoverResult:
        asked.append(arguments)
        if failover is not None:
            raise failover
        return FailoverResult(EpochNumber(7), disks=(DiskReport(DiskName("disk0"), 512, target="/srv/disk0"),))

    async def retry(_: Nothing) -> StorageWorks:
        if failover is not None:
            raise failover
        return StorageWorks(DiskState.CONSISTENT, EpochNumber(7), EpochNumber(7))

    async def serve() -> None:
        handlers: dict[str, Handler] = {"query-replication": query}
        if role is Role.SECONDARY:
            handlers["failover"] = take_over
            handlers["retry-storage"] = retry
        async with trio.open_nursery() as nursery:
            await nursery.start(ControlServer(path, handlers).serve)
            stop.append(partial(trio.lowlevel.current_trio_token().run_sync_soon, nursery.cancel_scope.cancel))
            ready.set()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    assert ready.wait(20)
    try:
        yield asked
    finally:
        stop[0]()
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither root's sockets nor this user's are looked at."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)


@pytest.fixture(autouse=True)
def no_log() -> Iterator[None]:
    """The servers in this process log nowhere, so that what the commands print can be told from it."""

    def drop(*_: object) -> str:
        raise structlog.DropEvent

    structlog.configure(processors=[drop])
    yield
    structlog.reset_defaults()


@contextmanager
def start(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Python in a process of its own, with pipes, that does not outlive its test."""
    pipe = subprocess.PIPE
    words = [sys.executable, *arguments]
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def out_of(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdout is not None
    return process.stdout


def err_of(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stderr is not None
    return process.stderr


def failed(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    """Run a command that must fail with one line, and give its code and that line."""
    code = main([str(word) for word in argv])
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert "Traceback" not in err
    return code, err


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "exit codes:" in text
    assert command == "demo" or f"qemu-remus {command}" in text


def test_every_example_in_the_help_is_a_command_line_that_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    examples = []
    # The overview of the steps is a script, which tests/test_cli_epoch.py runs.
    pages = [[], *([command] for command in COMMANDS if command != "epoch"), *(["epoch", step] for step in STEPS)]
    for page in pages:
        with pytest.raises(SystemExit):
            main([*page, "--help"])
        text = capsys.readouterr().out.replace("\\\n", " ")
        found = (
            r"^ .*?qemu-remus ((?:secondary|primary|status|failover|retry-storage|epoch|verify|detach|probe)(?: .*)?)$"
        )
        examples += re.findall(found, text, re.M)
    lines = [re.split(r"\s{3,}\(| > | \|\| ", example)[0].split() for example in examples]
    assert len(lines) >= 18
    for line in lines:
        parse(line)


def test_the_version_is_this_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.split() == ["qemu-remus", __version__]


@pytest.mark.parametrize(
    "argv",
    [[], ["nonsense"], ["primary"], ["secondary", "--listen", "h:1"], ["status", "--jso"],
     ["failover", "--checkpoint", "1", "--last-committed"], ["failover", "--timeout", "-1"],
     ["primary", "--qmp", "q", "--peer", "h:1", "--toolstack", "--interval", "100"],
     ["resize"], ["resize", "a"], ["resize", "a", "1G", "--timeout", "0"],
     ["epoch"], ["epoch", "commit"], ["epoch", "commit", "0"], ["epoch", "abort", "x"], ["epoch", "start", "7"],
     ["epoch", "finish", "7", "--timeout", "0"], ["epoch", "finish", "7", "--timeout", "86401"]],
)  # fmt: skip
def test_wrong_arguments_are_usage_errors(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == ExitCode.USAGE
    assert "usage:" in capsys.readouterr().err


# Errors


def test_the_documented_exit_codes_are_the_codes() -> None:
    documented = dict(re.findall(r"^\| (\d+) \| (.*) \|$", DOCUMENT.read_text(), re.M))
    assert {int(code) for code in documented} == {int(code) for code in ExitCode}
    parser = build_parser()
    assert all(f"{int(code)} " in (parser.epilog or "") for code in ExitCode)


def subclasses(kind: type[QemuRemusError]) -> set[type[QemuRemusError]]:
    return {kind} | {below for child in kind.__subclasses__() for below in subclasses(child)}


def test_every_refusal_of_the_control_socket_but_a_time_out_is_told_apart_from_a_failure() -> None:
    for kind in subclasses(errors.ControlError) - {errors.ControlError, errors.TimedOut, errors.CommitInDoubt}:
        assert exit_code(kind("x")) is ExitCode.REFUSED


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), ExitCode.USAGE),
        (errors.UnknownDisk("x"), ExitCode.USAGE),
        (errors.TargetInUse("x"), ExitCode.USAGE),
        (errors.NotQmp("x"), ExitCode.UNREACHABLE),
        (errors.CommandInDoubt("stop", "x"), ExitCode.FAILURE),
        (errors.CommitInDoubt("x"), ExitCode.IN_DOUBT),
        (errors.SnapshotBroken("x"), ExitCode.EPOCH_LOST),
        (errors.JournalDamaged("x"), ExitCode.FAILURE),
        (errors.InternalError("x"), ExitCode.FAILURE),
        (KeyError("x"), ExitCode.FAILURE),
        (ExceptionGroup("", [KeyError("x"), ExceptionGroup("", [PeerUnreachable("x")])]), ExitCode.UNREACHABLE),
        (BaseExceptionGroup("", [KeyboardInterrupt()]), ExitCode.INTERRUPTED),
    ],
)
def test_exit_codes_follow_the_error_tree(error: Any, code: ExitCode) -> None:
    assert exit_code(error) is code


def test_an_error_says_what_happened_what_is_safe_and_what_next_as_sentences() -> None:
    error = QemuRemusError("the disk is gone", safe="the VM goes on", hint="look for it")
    assert describe(error) == "error: the disk is gone. The VM goes on. Look for it"


def test_a_defect_is_said_to_be_one() -> None:
    for defect in (KeyError("x"), errors.InternalError("an event that is not known")):
        assert "defect of qemu-remus" in describe(defect)


def test_a_group_of_errors_is_each_of_them_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    group = ExceptionGroup("", [KeyError("odd"), ExceptionGroup("", [LinkLost("gone"), LinkLost("gone")])])
    assert [type(leaf) for leaf in leaves(group)] == [LinkLost, LinkLost, KeyError]

    def fail(options: argparse.Namespace) -> None:
        raise group

    monkeypatch.setattr("qemu_remus.cli.status.status", fail)
    assert main(["status"]) == ExitCode.FAILURE
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: gone"
    assert "KeyError" in second


def test_a_traceback_comes_only_when_asked_for(path: Path) -> None:
    with pytest.raises(errors.ControlUnreachable):
        main(["status", "--debug", "--control", str(path)])


def test_ctrl_c_has_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(options: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qemu_remus.cli.failover.failover", interrupt)
    assert main(["failover"]) == ExitCode.INTERRUPTED
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "options",
    [
        ["--peer", "nowhere"],
        ["--peer", "h:1", "--interval", "0"],
        ["--peer", "h:1", "--disk", "x"],
        ["--peer", "h:1", "--pair", "a b"],
    ],
)
def test_a_primary_that_cannot_be_started_is_one_clear_error(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = failed(capsys, "primary", "--qmp", "/nowhere", *options)
    assert code == ExitCode.USAGE


def test_a_secondary_that_cannot_be_started_is_one_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    code, err = failed(capsys, "secondary", "--listen", "7400", "--store", "s", "--disk", "a=b")
    assert code == ExitCode.USAGE
    assert "--listen" in err


# status


def test_status_of_a_protected_vm_is_a_success(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with controller(path):
        assert main(["status", "--control", str(path)]) == ExitCode.OK
    assert capsys.readouterr().out.startswith("vm (secondary here): PROTECTED\n")


@pytest.mark.parametrize("replication", [Replication.DEGRADED, Replication.INITIAL_SYNC, Replication.RESYNC])
def test_status_of_an_unprotected_vm_is_no_success(
    path: Path, capsys: pytest.CaptureFixture[str], replication: Replication
) -> None:
    with controller(path, replication=replication):
        assert main(["status", "--control", str(path)]) == ExitCode.NOT_PROTECTED
    assert "NOT PROTECTED" in capsys.readouterr().out


def test_status_as_json_is_the_report(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with controller(path):
        main(["status", "--json", "--control", str(path)])
    assert json.loads(capsys.readouterr().out) == REPORT.to_json()


def test_status_finds_the_pairs_controller_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    with controller(tmp_path / "run" / "qemu-remus" / "web.secondary.sock"):
        assert main(["status", "--pair", "web"]) == ExitCode.OK


def test_status_without_a_controller_is_one_clear_error(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert failed(capsys, "status", "--control", path)[0] == ExitCode.UNREACHABLE
    code, err = failed(capsys, "status", "--pair", "web")
    assert code == ExitCode.UNREACHABLE
    assert "web.primary.sock and no" in err
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    code, err = failed(capsys, "status", "--control", path)
    assert code == ExitCode.UNREACHABLE
    assert "Start the controller again" in err


def watching(path: Path, *options: str) -> AbstractContextManager[subprocess.Popen[str]]:
    return start("-m", "qemu_remus.cli", "status", "--watch", *options, "--control", str(path))


def test_watching_ends_with_ctrl_c_and_the_last_state(path: Path) -> None:
    with controller(path, replication=Replication.DEGRADED), watching(path, "--json") as process:
        assert json.loads(out_of(process).readline())["replication"] == "degraded"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == ExitCode.NOT_PROTECTED
    assert err == ""


def test_watching_says_when_the_controller_goes_away(path: Path) -> None:
    with ExitStack() as serving:
        serving.enter_context(controller(path))
        with watching(path) as process:
            assert "PROTECTED" in out_of(process).readline()
            serving.close()
            _, err = process.communicate(timeout=20)
    assert process.returncode == ExitCode.UNREACHABLE
    assert err.startswith("error: the controller on")


def test_a_reader_that_goes_away_gets_no_traceback(path: Path) -> None:
    with controller(path), watching(path, "--json") as process:
        out_of(process).readline()
        out_of(process).close()
        assert process.wait(20) == ExitCode.FAILURE
        assert err_of(process).read() == ""


# failover


def test_failover_prints_the_checkpoint_and_where_the_disks_are(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with controller(path) as asked:
        assert main(["failover", "--control", str(path), "--checkpoint", "8", "--checkpoint", "7", "--force"]) == 0
    assert asked[0].checkpoints == (8, 7)
    assert asked[0].force
    assert not asked[0].last_committed
    out = capsys.readouterr().out
    assert "checkpoint 7" in out
    assert "/srv/disk0" in out


def test_failover_as_json_is_the_controllers_answer(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with controller(path) as asked:
        assert main(["failover", "--json", "--last-committed", "--control", str(path)]) == 0
    assert asked[0].last_committed
    assert json.loads(capsys.readouterr().out)["checkpoint"] == 7


def test_a_refused_failover_is_told_apart_and_says_why(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refusal = NotConsistent("the disks hold no complete checkpoint", hint="wait for the initial sync")
    with controller(path, failover=refusal):
        code, err = failed(capsys, "failover", "--control", path)
    assert code == ExitCode.REFUSED
    assert "no complete checkpoint" in err
    assert "Wait for the initial sync" in err


def test_failover_of_a_primary_is_refused_as_such(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with controller(path, role=Role.PRIMARY):
        code, err = failed(capsys, "failover", "--control", path)
    assert code == ExitCode.REFUSED
    assert "is not a secondary" in err


@pytest.mark.parametrize("command", ["probe", "detach", "primary"])
def test_a_qmp_socket_that_is_not_there_or_not_qmp_is_one_clear_error(path: Path, command: str) -> None:
    options = ["--peer", "127.0.0.1:1", "--state-dir", str(path.parent / "state")] if command == "primary" else []

    def run() -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "qemu_remus.cli", command, "--qmp", str(path), *options]
        return subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)

    def greet(listener: socket.socket) -> None:
        peer, _ = listener.accept()
        with peer:
            peer.sendall(b"SSH-2.0-OpenSSH\x1b[31m\r\n")

    missing = run()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        stranger = threading.Thread(target=greet, args=(listener,), daemon=True)
        stranger.start()
        wrong = run()
        stranger.join(20)
    for done in (missing, wrong):
        assert done.returncode == ExitCode.UNREACHABLE
        *log, error = done.stderr.splitlines()
        assert error.startswith("error: ")
        assert str(path) in error
        assert not [line for line in log if line.startswith(("error:", "Traceback"))]
        assert "\x1b" not in done.stderr


def test_storage_that_works_again_is_said(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with controller(path):
        assert main(["retry-storage", "--control", str(path)]) == 0
        assert "checkpoint 7 (consistent)" in capsys.readouterr().out
        assert main(["retry-storage", "--json", "--control", str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == {"disk": "consistent", "committed": 7, "applied": 7}


def test_storage_that_still_does_not_work_is_a_failure(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with controller(path, failover=StorageError("it still does not work: no space")):
        code, err = failed(capsys, "retry-storage", "--control", path)
    assert code == ExitCode.FAILURE
    assert "no space" in err


def test_retrying_the_storage_of_a_primary_is_refused_as_such(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with controller(path, role=Role.PRIMARY):
        code, err = failed(capsys, "retry-storage", "--control", path)
    assert code == ExitCode.REFUSED
    assert "not a secondary" in err


def test_failover_with_an_impossible_number_asks_nobody(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert failed(capsys, "failover", "--checkpoint", "0", "--control", path)[0] == ExitCode.USAGE


# Signals

CONTROLLER = """\
import sys, trio
from qemu_remus.cli.controllers import run_controller
from qemu_remus.logs import LogFormat, set_up

async def controller():
    try:
        print("running", flush=True)
        await trio.sleep_forever()
    finally:
        with trio.CancelScope(shield=True):
            print("cleaning", flush=True)
            await trio.to_thread.run_sync(sys.stdin.readline)
            print("clean", flush=True)

set_up(LogFormat.JSON, verbose=False)
sys.exit(run_controller(controller))
"""


def _hear_signals() -> None:
    """These tests may themselves be run under nohup, or in a shell's background, where signals are ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def running(**options: Any) -> Iterator[subprocess.Popen[str]]:
    options.setdefault("preexec_fn", _hear_signals)
    with start("-c", CONTROLLER, **options) as process:
        assert out_of(process).readline() == "running\n"
        yield process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_the_controller_clean_up_and_a_second_one_does_not_cut_it_short(number: signal.Signals) -> None:
    with running() as process:
        process.send_signal(number)
        assert out_of(process).readline() == "cleaning\n"
        process.send_signal(signal.SIGTERM)
        lines = [json.loads(err_of(process).readline()) for _ in range(2)]
        assert lines[0]["event"] == "stopping"
        assert lines[0]["signal"] == number.name
        assert "already stopping" in lines[1]["event"]
        out, err = process.communicate("\n", timeout=20)
        assert out == "clean\n"
        assert err == ""
        assert process.returncode == ExitCode.OK


def test_a_controller_started_with_nohup_outlives_the_terminal() -> None:
    with running(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as process:
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert json.loads(err_of(process).readline())["signal"] == "SIGTERM"


def test_status_does_not_import_the_controllers() -> None:
    code = textwrap.dedent("""
        import sys
        from qemu_remus.cli import main
        main(["status", "--control", "/nowhere"])
        heavy = {"construct", "structlog", "google_crc32c", "qemu", "rich"}
        heavy |= {"qemu_remus.primary", "qemu_remus.secondary", "qemu_remus.qemu"}
        print(*sorted(heavy & sys.modules.keys()))
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
