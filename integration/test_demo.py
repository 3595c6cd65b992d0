"""The demonstration as its users run it: it succeeds, and it leaves nothing behind, also when it is interrupted."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import trio

from integration.demo import leftovers
from integration.harness import Process, run, start_process

DEMO = (sys.executable, "-m", "integration.demo")


async def test_demo_holds_what_it_shows(scratch: Path) -> None:
    # a directory of its own, since what is left there is looked at
    temporary = scratch / "t"
    temporary.mkdir()
    done = await run([*DEMO, "--seconds", "4"], scratch=scratch, timeout=240, environment={"TMPDIR": str(temporary)})
    assert done.status == 0, done.out + done.err
    assert "All of it held" in done.out
    assert list(temporary.iterdir()) == []
    assert leftovers(temporary) == {}


async def test_interrupted_demo_leaves_nothing_behind(scratch: Path) -> None:
    temporary = scratch / "t"
    temporary.mkdir()
    log = scratch / "log"
    environment = {"TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}
    async with start_process([*DEMO, "--seconds", "600"], out=log, environment=environment) as process:
        await _wait_for_text(process, "committed")
        assert leftovers(temporary) != {}
        process.signal(signal.SIGINT)
        assert await process.wait(60) == 130, process.tail()
    assert list(temporary.iterdir()) == []
    assert leftovers(temporary) == {}


async def _wait_for_text(process: Process, text: str) -> None:
    with trio.fail_after(240):
        while text not in process.out.read_text():
            assert process.running, process.tail()
            await trio.sleep(0.1)
