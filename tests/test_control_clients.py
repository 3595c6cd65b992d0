"""Other people's QMP clients drive a checkpoint: QEMU's own library, and its qmp-shell with the script of the docs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from qemu_remus.core.commands import EpochWasStaged, EventName
from qemu_remus.core.errors import OutOfOrder, SnapshotBroken, TimedOut
from qemu_remus.core.model import PairName
from tests.fake_controller import SEVEN, Controller

DOCUMENT = Path(__file__).parent.parent / "docs" / "control.md"
SHELL = Path(sys.executable).parent / "qmp-shell"

LIBRARY = """\
import asyncio, sys
from qemu.qmp import QMPClient, ExecuteError

async def main():
    client = QMPClient("toolstack")
    await client.connect(sys.argv[1])
    with client.listener(("EPOCH_STAGED",)) as staged:
        print(await client.execute("prepare-epoch", {"timeout": 2}))
        epoch = (await client.execute("start-new-epoch", {"pause": True}))["epoch"]
        for name, arguments in (
            ("commit-epoch", {"epoch": epoch}),
            ("finish-disk-sync", {"epoch": epoch, "timeout": 0.5}),
            ("finish-disk-sync", {"epoch": epoch, "timeout": 0}),
            ("finish-disk-sync", {"epoch": epoch}),
            ("commit-epoch", {"epoch": epoch}),
            ("abort-epoch", {"epoch": epoch}),
        ):
            try:
                print(await client.execute(name, arguments))
            except ExecuteError as error:
                print(error.error_class)
        print((await staged.get())["data"])
    await client.disconnect()

asyncio.run(main())
"""


@pytest.fixture
def controller(tmp_path: Path) -> Controller:
    return Controller(tmp_path / "control.sock")


async def run(*words: object, home: Path) -> str:
    """A program's output, errors included; it must succeed, and neither has a terminal nor leaves a history."""
    path = f"{SHELL.parent}{os.pathsep}{os.environ['PATH']}"
    with trio.fail_after(60):
        done = await trio.run_process(
            [str(word) for word in words],
            capture_stdout=True,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": path, "HOME": str(home)},
        )
    return done.stdout.decode()


async def test_qemus_own_client_drives_a_checkpoint(controller: Controller, tmp_path: Path) -> None:
    async def staged() -> None:
        controller.server.emit(EventName.EPOCH_STAGED, EpochWasStaged(PairName("vm"), SEVEN))

    controller.instead["commit-epoch"] = [OutOfOrder("not staged")]
    controller.instead["finish-disk-sync"] = [TimedOut("not yet"), staged]
    controller.instead["abort-epoch"] = [SnapshotBroken("the fleece is full")]
    async with controller.serving():
        printed = await run(sys.executable, "-c", LIBRARY, controller.path, home=tmp_path)
    assert printed.splitlines() == [
        "{}",
        "OutOfOrder",
        "TimedOut",
        "GenericError",
        "{'epoch': 7}",
        "{'epoch': 7}",
        "EpochLost",
        "{'pair': 'vm', 'epoch': 7}",
    ]


async def test_the_documented_script_drives_a_checkpoint_with_qmp_shell(controller: Controller, tmp_path: Path) -> None:
    if not SHELL.exists():
        pytest.skip("qmp-shell is not installed")
    [script] = re.findall(r"^```sh\n(.*?qmp-shell.*?)^```$", DOCUMENT.read_text(), re.M | re.S)
    assert len(script.splitlines()) <= 10
    async with controller.serving():
        printed = await run("bash", "-c", script, "checkpoint", controller.path, home=tmp_path)
    asked = [name for name in controller.asked if name != "query-commands"]
    assert asked == ["prepare-epoch", "start-new-epoch", "finish-disk-sync", "commit-epoch"]
    assert controller.arguments["start-new-epoch"].pause
    assert controller.arguments["finish-disk-sync"].epoch == 7
    assert controller.arguments["commit-epoch"].epoch == 7
    assert printed.count('{"return": {"epoch": 7}}') == 2
