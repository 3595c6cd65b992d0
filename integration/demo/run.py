"""The demonstration as a program: what it needs, signals, errors, and that nothing is left behind."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import trio

from integration.agent import GuestError
from integration.demo.facts import Failed, Story
from integration.demo.judge import table
from integration.demo.screen import Screen, size
from integration.demo.setting import ROOM
from integration.demo.story import STEPS, demonstrate
from integration.guest.build import ROOT, GuestUnavailable
from integration.qmp import QmpError
from integration.toolstack import BackupLost, BackupRefused
from qemu_remus.core.errors import QemuRemusError

#: Seconds within which processes that end by themselves (a guardian) must have ended.
LEFTOVER_TIMEOUT = 30.0


def leftovers(scratch: Path) -> dict[int, str]:
    """Command lines, by pid, of processes that were started for the demonstration: they have its directory in them."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if f"{scratch}/" in line:
                found[int(entry.name)] = line
    return found


def _end_leftovers(scratch: Path) -> dict[int, str]:
    """Wait for what ends by itself; kill the rest and return it."""
    deadline = time.monotonic() + LEFTOVER_TIMEOUT
    while (left := leftovers(scratch)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return left


@asynccontextmanager
async def _until_signalled() -> AsyncIterator[list[int]]:
    """Cancel the block on the first Ctrl-C, SIGTERM or SIGHUP; the list then holds its number."""
    received: list[int] = []
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:

            async def listen() -> None:
                async for number in signals:
                    received.append(number)
                    nursery.cancel_scope.cancel()

            nursery.start_soon(listen)
            yield received
            nursery.cancel_scope.cancel()


async def _run(screen: Screen, scratch: Path, seconds: float) -> tuple[Story | None, list[int]]:
    story = None
    async with _until_signalled() as received:
        story = await demonstrate(screen, scratch, seconds)
    return story, received


def main(argv: Sequence[str] = ()) -> int:
    """Run the demonstration.

    :return: 0 only if everything held that it shows; 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="demo", description="A VM under load is protected, killed, and goes on at the other host."
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to watch (default %(default)g)")
    options = parser.parse_args(list(argv))
    if subprocess.run(
        [str(ROOT / "integration" / "setup.sh"), "qemu"], check=False, stdin=subprocess.DEVNULL
    ).returncode:
        return 1
    if shutil.disk_usage(tempfile.gettempdir()).free < ROOM:
        print(f"the demonstration needs {size(ROOM)} in {tempfile.gettempdir()}; set TMPDIR to a place that has them")
        return 1

    screen = Screen(STEPS)
    with tempfile.TemporaryDirectory(prefix="qr-") as directory:
        scratch = Path(directory)
        failure = ""
        story: Story | None = None
        received: list[int] = []
        try:
            story, received = trio.run(_run, screen, scratch, options.seconds)
        except* (
            Failed,
            AssertionError,
            BackupLost,
            BackupRefused,
            GuestError,
            GuestUnavailable,
            QemuRemusError,
            QmpError,
            OSError,
            EOFError,
            RuntimeError,
            ValueError,
            trio.TooSlowError,
        ) as group:
            failure = "\n".join(str(leaf) or repr(leaf) for leaf in _leaves(group))
        if left := _end_leftovers(scratch):
            failure += f"\nstill running at the end, and killed: {left}"
    if received:
        screen.line("\ninterrupted; everything that was started has ended")
        return 128 + received[0]
    if failure or story is None:
        screen.line(f"\nFAILED: {failure.strip()}")
        return 1
    screen.line(f"\n{table(story)}\n\nAll of it held; nothing is left running.")
    return 0


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    return [
        leaf
        for error in group.exceptions
        for leaf in (_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    ]
