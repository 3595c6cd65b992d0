"""The tables of docs/control.md say what the machines do: every cell is compared with the code."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from qemu_remus.core import secondary_machine as secondary
from qemu_remus.core.errors import CommitInDoubt
from qemu_remus.core.model import EpochNumber
from qemu_remus.core.secondary_machine import Failover, Phase, SecondaryState
from qemu_remus.core.toolstack_machine import Kind, TimeUp, ToolstackState, step
from tests.secondary_machine.states import LINK, TWO, at
from tests.toolstack_machine.situations import ME, SITUATIONS, N, asked, cell, replies

PAGE: Final = (Path(__file__).parent.parent / "docs" / "control.md").read_text(encoding="utf-8")

Table = dict[str, dict[str, str]]


def tables(heading: str) -> list[Table]:
    """The tables of one section: for each, the rows by their first cell, their cells by the column's heading."""
    section = PAGE.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    found: list[Table] = []
    for block in re.findall(r"(?:^\|.*\|\n)+", section, flags=re.MULTILINE):
        rows = [[part.strip().replace("`", "") for part in line.strip("|\n").split("|")] for line in block.splitlines()]
        table = {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}
        assert len(table) == len(rows) - 2, "a row stands there twice"
        found.append(table)
    return found


PRIMARY, SECONDARY = tables("State and command")

# --- the primary -----------------------------------------------------------------------------------------------------

COMMANDS: Final = {
    "prepare-epoch": Kind.PREPARE,
    "start-new-epoch": Kind.START,
    "finish-disk-sync N": Kind.FINISH,
    "commit-epoch N": Kind.COMMIT,
    "abort-epoch N": Kind.ABORT,
}


def answer(state: ToolstackState, kind: Kind) -> str:
    """A cell, with what a time-out is answered."""
    said = cell(state, kind)
    if not said.endswith("waits"):
        return said
    then, _ = step(state, asked(kind))
    late = replies(step(then, TimeUp(ME))[1])[ME]
    return f"{said} (doubt)" if late is CommitInDoubt else said


def test_the_primarys_table_has_all_rows_and_columns() -> None:
    assert list(PRIMARY) == list(SITUATIONS)
    assert all(list(row) == list(COMMANDS) for row in PRIMARY.values())


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_primary_answers_as_its_table_says(situation: str, command: str) -> None:
    for state in SITUATIONS[situation]:
        assert answer(state, COMMANDS[command]) == PRIMARY[situation][command]


# --- the secondary ---------------------------------------------------------------------------------------------------

EARLIER: Final = EpochNumber(7)
LATER: Final = EpochNumber(10)


def empty(phase: Phase, **fields: Any) -> SecondaryState:
    return at(phase, **{"committed": None, "applied": None, "consistent": False, "highest": 0} | fields)


def failing(target: EpochNumber, phase: Phase, **fields: Any) -> SecondaryState:
    return at(phase, failover=Failover(target, TWO, done=phase is Phase.FAILED_OVER), highest=N, **fields)


SECONDARIES: Final[dict[str, tuple[SecondaryState, ...]]] = {
    "nothing copied yet": (empty(Phase.LISTENING, generation=None), empty(Phase.IDLE, generation=None)),
    "first copy not complete": (
        empty(Phase.SYNC),
        empty(Phase.EPOCH, receiving=(N, None), flushed=True, highest=N),
        empty(Phase.LISTENING),
    ),
    "first copy, N is staged": (empty(Phase.STAGED, highest=N),),
    "first copy, N is staged, primary not connected": (empty(Phase.LISTENING, staged=N, highest=N),),
    "first copy, N is staged, primary connected again": (empty(Phase.STAGED, highest=N, may_sync=True),),
    "connected, N not begun": (at(Phase.IDLE),),
    "connected, N is coming": (at(Phase.EPOCH, highest=N),),
    "connected, N is staged": (at(Phase.STAGED, highest=N),),
    "connected for another full copy, N is staged": (at(Phase.STAGED, highest=N, may_sync=True),),
    "connected, N is staged and a later one is coming": (
        at(Phase.EPOCH, staged=N, highest=LATER, receiving=(LATER, EARLIER)),
    ),
    "connected, N is committed": (at(Phase.IDLE, committed=N, highest=N),),
    "connected, N is not there any more": (at(Phase.IDLE, highest=N),),
    "not connected, N not begun": (at(Phase.LISTENING),),
    "not connected, N is staged": (at(Phase.LISTENING, staged=N, highest=N),),
    "not connected, N and a later one are staged": (at(Phase.LISTENING, staged=LATER, doubted=(N,), highest=LATER),),
    "not connected, N is committed": (at(Phase.LISTENING, committed=N, applied=N, highest=N),),
    "not connected, N is not there": (at(Phase.LISTENING, highest=N),),
    "store failed, N is staged": (at(Phase.LISTENING, staged=N, highest=N, failed=True),),
    "store failed, N is committed": (at(Phase.LISTENING, committed=N, highest=N, failed=True),),
    "failing over to N": (
        failing(N, Phase.FAILING_OVER, staged=N),
        failing(N, Phase.FAILING_OVER, staged=N, askers=(5,)),
        failing(N, Phase.FAILING_OVER, committed=N),
    ),
    "failing over to N-1": (failing(EARLIER, Phase.FAILING_OVER, staged=N),),
    "failed over to N": (failing(N, Phase.FAILED_OVER, committed=N, generation=TWO),),
    "failed over to N-1": (failing(EARLIER, Phase.FAILED_OVER, generation=TWO),),
}


def failover(*checkpoints: int, last: bool = False, force: bool = False) -> secondary.FailoverRequested:
    return secondary.FailoverRequested(ME, tuple(map(EpochNumber, checkpoints)), last, force, TWO)


FAILOVERS: Final = {
    "failover N, N-1": failover(N, EARLIER),
    "failover of others": failover(12, 5),
    "failover": failover(),
    "failover, last-committed": failover(last=True),
}
REQUESTS: Final[dict[str, secondary.Event]] = {"memory-received N": secondary.MemoryReceived(ME, N), **FAILOVERS}


def said(state: SecondaryState, event: secondary.Event) -> str:
    """A cell of the secondary's table; fails where the request changes what it should not."""
    after, effects = secondary.step(state, event)
    answers = [effect for effect in effects if isinstance(effect, secondary.Answer)]
    if answers:
        (told,) = answers
        assert len(effects) == 1
        assert told.request == ME
        if told.error is not None:
            assert after == state, "a refusal changes nothing"
            assert all((told.error.what, told.error.safe, told.error.hint))
            return type(told.error).__name__
        if told.checkpoint is None:
            assert after == replace(state, memory=N)
            return "noted"
        assert after == state
        return "done" if isinstance(event, secondary.MemoryReceived) else f"takes {short(told.checkpoint)}"
    if isinstance(event, secondary.MemoryReceived):
        assert effects == (secondary.CommitEpoch(N),)
        assert secondary.step(after, secondary.CommitDone(N))[1][-2:] == (
            secondary.Answer(ME, N),
            secondary.WakeApply(),
        )
        return "acts, waits"
    assert after.failover is not None
    assert after.askers[-1] == ME
    # Another asker's decision is being saved already, or this one's is first of all.
    assert effects == (() if state.askers else (secondary.SaveFailover(after.failover),))
    return f"takes {short(after.failover.target)}"


def short(epoch: EpochNumber) -> str:
    return {N: "N", EARLIER: "N-1"}[epoch]


def test_the_secondarys_table_has_all_rows_and_columns() -> None:
    assert list(SECONDARY) == list(SECONDARIES)
    assert all(list(row) == list(REQUESTS) for row in SECONDARY.values())


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("situation", SECONDARIES)
def test_the_secondary_answers_as_its_table_says(situation: str, request_name: str) -> None:
    for state in SECONDARIES[situation]:
        assert said(state, REQUESTS[request_name]) == SECONDARY[situation][request_name]


@pytest.mark.parametrize("request_name", FAILOVERS)
@pytest.mark.parametrize("situation", SECONDARIES)
def test_force_is_answered_as_though_no_primary_were_connected(situation: str, request_name: str) -> None:
    event = FAILOVERS[request_name]
    for state in SECONDARIES[situation]:
        cut, _ = secondary.step(state, secondary.LinkDown(LINK, "cut"))
        assert said(state, replace(event, force=True)) == said(cut, event)
