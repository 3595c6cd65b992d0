"""The demonstration as its users run it: it succeeds, it leaves nothing behind, also interrupted, and it can fail."""

from __future__ import annotations

import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from integration.demo import leftovers
from integration.demo.facts import Failed, Sample, Story
from integration.demo.judge import judge_end, judge_guest, judge_outside
from integration.demo.setting import Vitals
from integration.harness import Process, Verdict, run, start_process
from integration.witness import FULL_TURN, Account

DEMO = (sys.executable, "-m", "integration.demo")


async def test_demo_holds_what_it_shows(scratch: Path) -> None:
    # a directory of its own, since what is left there is looked at
    temporary = scratch / "t"
    temporary.mkdir()
    done = await run([*DEMO, "--seconds", "4"], scratch=scratch, timeout=240, environment={"TMPDIR": str(temporary)})
    assert done.status == 0, done.out + done.err
    assert "All of it held" in done.out
    assert done.out.count("\n      ok  ") == 10
    assert list(temporary.iterdir()) == []
    assert leftovers(temporary) == {}


async def test_interrupted_demo_leaves_nothing_behind(scratch: Path) -> None:
    temporary = scratch / "t"
    temporary.mkdir()
    log = scratch / "log"
    environment = {"TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}
    async with start_process([*DEMO, "--seconds", "600"], out=log, environment=environment) as process:
        await _wait_for_text(process, "guest up")
        [memory] = re.findall(r"mem-path=([^,]+)/ram,", " ".join(leftovers(temporary).values()))
        assert await trio.Path(memory).is_dir()
        process.signal(signal.SIGINT)
        assert await process.wait(60) == 130, process.tail()
    assert not await trio.Path(memory).exists()
    assert list(temporary.iterdir()) == []
    assert leftovers(temporary) == {}


async def _wait_for_text(process: Process, text: str) -> None:
    with trio.fail_after(240):
        while text not in process.out.read_text():
            assert process.running, process.tail()
            await trio.sleep(0.1)


def heard(first: int, last: int) -> Account:
    return Account(records={number: f"{number:08x}" for number in range(first, last + 1)})


GUEST = Vitals("one", 10.0, frozenset({"7 (witness) 100", "8 (ledger) 101"}))
LATER = 41 + FULL_TURN
WHOLE = Verdict(90, 90, ())


def told() -> Story:
    """A story in which all holds: checkpoint 5 was the last one, committed and let out."""
    return Story(
        samples=[Sample(12.0, 3), Sample(14.0, 5)],
        before=GUEST,
        after=replace(GUEST, uptime=13.0),
        at_end=replace(GUEST, uptime=17.0),
        reported=50,
        heard=heard(1, 40),
        held=6,
        heard_later=heard(41, LATER),
        committed=5,
        released=5,
        checkpoint=5,
        reported_later=80,
    )


def judge(story: Story, verdict: Verdict = WHOLE) -> list[str]:
    return [*judge_guest(story), *judge_outside(story), *judge_end(story, verdict)]


def test_verdict_on_a_guest_that_went_on_is_good() -> None:
    assert len(judge(told())) == 10


def test_output_held_of_a_checkpoint_that_was_never_let_out_may_be_missing_outside() -> None:
    story = replace(told(), released=4, heard_later=heard(47, LATER + 6))
    assert any("and 6 more" in line for line in judge(story))


BEHIND = heard(41, LATER)
BEHIND.enter("FAULT disk 0 is behind memory")
GAP = heard(1, 40)
del GAP.records[20]


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ({"checkpoint": 4}, "5 had been committed"),
        ({"after": replace(GUEST, boot_id="two", uptime=13.0)}, "has booted"),
        ({"after": replace(GUEST, uptime=13.0, processes=frozenset())}, "other processes"),
        ({"after": replace(GUEST, uptime=11.0)}, "has seen 12.0 s"),
        ({"heard": GAP}, "with faults"),
        ({"torn": True}, "inside a record"),
        ({"heard_later": heard(40, LATER)}, "has not said it yet"),
        ({"heard_later": heard(42, LATER + 1)}, "are missing, though checkpoint 5 was released"),
        ({"released": 4, "heard_later": heard(48, LATER + 7)}, "are missing, though checkpoint 4 was released"),
        ({"heard_later": BEHIND}, "behind memory"),
        ({"heard_later": heard(41, 50)}, "10 records only"),
        ({"at_end": replace(GUEST, processes=frozenset())}, "have ended"),
        ({"reported_later": 50}, "had reported 50"),
        ({"reported_later": 91}, "ends at 90"),
    ],
)
def test_verdict_is_bad_when_anything_does_not_hold(fault: dict[str, Any], complaint: str) -> None:
    with pytest.raises(Failed, match=re.escape(complaint)):
        judge(replace(told(), **fault))


def test_verdict_is_bad_when_the_disks_are() -> None:
    with pytest.raises(Failed, match="file: gap"):
        judge(told(), replace(WHOLE, faults=("file: gap",)))
