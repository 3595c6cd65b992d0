"""The controllers under test, as the processes that an operator would start: ``qemu-remus primary`` and ``secondary``.

Owns their command lines, directories and logs. What they do is seen through their control sockets and exit codes only.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from integration.process import Finished, Process, children, run, start_process
from integration.qmp import QmpError, open_qmp

#: The console script of the environment that the tests run in.
PROGRAM = str(Path(sys.executable).parent / "qemu-remus")

Status = dict[str, Any]
"""What ``query-replication`` answers; docs/status.md."""


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def qemu_remus(*arguments: str, scratch: Path, timeout: float = 60.0) -> Finished:
    """Run one ``qemu-remus`` command to its end."""
    return await run([PROGRAM, *arguments], scratch=scratch, timeout=timeout)


class Controller:
    """A controller's process.

    :ivar address: secondary: where it listens, ``HOST:PORT``; primary: where it connects to.
    :ivar directory: all that is its own: store or state, fleece, control socket, log.
    """

    def __init__(self, process: Process, directory: Path, address: str) -> None:
        self.process = process
        self.directory = directory
        self.address = address
        self.control = directory / "control"

    @property
    def log(self) -> str:
        """What it has logged, over all starts in this directory."""
        return self.process.err.read_text(errors="replace")

    async def execute(self, command: str, arguments: dict[str, Any] | None = None, *, timeout: float = 30.0) -> Any:
        """Run a command of the control socket.

        :raise QmpError: when it is refused.
        :raise OSError: when the controller is not there.
        """
        async with open_qmp(self.control) as qmp:
            return await qmp.execute(command, arguments, timeout=timeout)

    async def status(self) -> Status:
        """Its status report."""
        report: Status = await self.execute("query-replication")
        return report

    async def wait_until(self, condition: Callable[[Status], bool], *, timeout: float = 60.0) -> Status:
        """Ask for its status until the condition holds, and return that status.

        :raise AssertionError: when the controller ends first, or the condition does not hold within ``timeout``
            seconds; with the last status and the log's end.
        """
        last: Status | str = "none was had"
        with trio.move_on_after(timeout):
            while self.process.running:
                try:
                    last = await self.status()
                except (OSError, EOFError) as error:
                    last = f"none was had: {error}"
                else:
                    if condition(last):
                        return last
                await trio.sleep(0.05)
            raise AssertionError(f"the controller ended with {self.process.returncode}:\n{self.process.tail()}")
        raise AssertionError(f"not within {timeout:g} s; last status: {last}\nlog:\n{self.process.tail()}")

    async def protected(self, *, timeout: float = 120.0) -> Status:
        """Wait until the VM is protected, and a checkpoint committed."""
        return await self.wait_until(
            lambda status: status["replication"] == "protected" and committed(status) > 0, timeout=timeout
        )

    async def progress(self, checkpoints: int = 2, *, timeout: float = 60.0) -> Status:
        """Wait until so many more checkpoints are committed."""
        first = committed(await self.status())
        return await self.wait_until(lambda status: committed(status) >= first + checkpoints, timeout=timeout)

    @property
    def guardian(self) -> int:
        """Process id of a primary's guardian: its only child.

        :raise AssertionError: when it has none, or several, at the moment.
        """
        found = children(self.process.pid)
        assert len(found) == 1, found
        return found[0]

    async def kill(self) -> None:
        """SIGKILL; returns when it has ended."""
        self.process.kill()
        await self.process.wait()

    async def stop(self, *, timeout: float = 30.0) -> int:
        """SIGTERM, and its exit status."""
        self.process.signal(signal.SIGTERM)
        return await self.process.wait(timeout)


def committed(status: Status) -> int:
    """The last committed checkpoint, 0 for none."""
    return int(status["checkpoint"].get("committed") or 0)


@asynccontextmanager
async def start_secondary(
    directory: Path,
    targets: Mapping[str, Path | str],
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    options: Sequence[str] = (),
    within: Sequence[str] = (),
    wait: bool = True,
) -> AsyncIterator[Controller]:
    """Run a secondary for the length of the block, with its store in ``directory``/secondary.

    Starting one again in the same directory is a restart of the same secondary.

    :param targets: image for each disk name, or what else ``--disk NAME=`` takes.
    :param host: address to listen on.
    :param port: to listen on; by default a free one of the loopback interface.
    :param options: more of the command's.
    :param within: command that runs it, such as ``nsenter`` with its options; it must not fork.
    :param wait: until its control socket answers.
    """
    here = directory / "secondary"
    here.mkdir(exist_ok=True)
    address = f"{host}:{port or free_port()}"
    command = [PROGRAM, "secondary", "--listen", address, "--store", str(here / "store")]
    command += ["--control", str(here / "control")]
    for name, path in targets.items():
        command += ["--disk", f"{name}={path}"]
    async with _start([*within, *command, *options], here, address, wait) as controller:
        yield controller


@asynccontextmanager
async def start_primary(
    directory: Path,
    qmp: Path,
    peer: str,
    *,
    nodes: Mapping[str, str] | None = None,
    interval_ms: int | None = 200,
    options: Sequence[str] = (),
    within: Sequence[str] = (),
    wait: bool = True,
) -> AsyncIterator[Controller]:
    """Run a primary for the length of the block, with its state in ``directory``/primary.

    Starting one again in the same directory is a restart of the same primary.

    :param qmp: QEMU's socket for it, :attr:`integration.machine.Machine.qmp_path`.
    :param peer: :attr:`Controller.address` of the secondary, or of a proxy.
    :param nodes: node for each disk name; by default all writable disks of the VM.
    :param interval_ms: milliseconds between checkpoints; None: a toolstack says when.
    :param options: more of the command's.
    :param within: command that runs it, such as ``nsenter`` with its options; it must not fork.
    :param wait: until its control socket answers.
    """
    here = directory / "primary"
    here.mkdir(parents=True, exist_ok=True)
    command = [PROGRAM, "primary", "--qmp", str(qmp), "--peer", peer]
    command += ["--toolstack"] if interval_ms is None else ["--interval", str(interval_ms)]
    command += ["--state-dir", str(here / "state"), "--control", str(here / "control")]
    for name, node in (nodes or {}).items():
        command += ["--disk", f"{name}={node}"]
    async with _start([*within, *command, *options], here, peer, wait) as controller:
        yield controller


@asynccontextmanager
async def _start(command: list[str], here: Path, address: str, wait: bool) -> AsyncIterator[Controller]:
    environment = {"PYTHONUNBUFFERED": "1", "NO_COLOR": "1", "XDG_RUNTIME_DIR": os.fspath(here)}
    async with start_process(
        command, out=here / "out", err=here / "log", environment=environment, grace=20.0
    ) as process:
        controller = Controller(process, here, address)
        if wait:
            await controller.wait_until(lambda _: True)
        yield controller


__all__ = [
    "PROGRAM",
    "Controller",
    "QmpError",
    "Status",
    "committed",
    "free_port",
    "qemu_remus",
    "start_primary",
    "start_secondary",
]
