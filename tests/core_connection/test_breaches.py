"""What may not be said is neither sent nor taken, and what still works after an error."""

from __future__ import annotations

import pytest

from qemu_remus.core import messages as m
from qemu_remus.core.connection import Connection, Side
from qemu_remus.core.conversation import SPEAKER, TABLE, State
from qemu_remus.core.errors import LocalProtocolError, RefusalCode, RemoteProtocolError, VersionMismatch
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import DiskName, DiskSpec
from tests.core_connection.pair import (
    DISKS,
    E5,
    E6,
    E7,
    FLUSHED,
    GENERATION,
    OTHER,
    STAGED,
    SYNC,
    P,
    Pair,
    S,
    Script,
    answer,
    begin,
    end,
    extents,
    forged,
    question,
    refused,
)
from tests.message_strategies import hello

# --- what may not be said --------------------------------------------------------------------------------------------


SCRIPTS: dict[State, Script] = {
    State.IDLE: [],
    State.SYNC_ASKED: SYNC[:1],
    State.RESUME_ASKED: [(P, m.SyncResume(GENERATION, DISKS))],
    State.SYNCING: FLUSHED,
    State.OPEN: [(P, begin()), (P, extents())],
    State.ENDED: [(P, begin()), (P, extents()), (P, end())],
    State.STAGED: STAGED,
    State.IN_DOUBT: [*STAGED, (P, m.CommitEpoch(E6))],
    State.ABORTING: [*STAGED, (P, m.AbortEpoch(E6))],
    State.HANDING: [(P, m.HandOver(E5, GENERATION))],
}

SENSIBLE: dict[type, m.Message] = {
    m.SyncBegin: m.SyncBegin(GENERATION, DISKS),
    m.SyncReady: m.SyncReady((True,)),
    m.SyncResume: m.SyncResume(GENERATION, DISKS),
    m.SyncResumed: m.SyncResumed(False, 0, ()),
    m.SyncExtents: m.SyncExtents((), b""),
    m.SyncFlush: m.SyncFlush(3),
    m.SyncFlushed: m.SyncFlushed(3),
    m.EpochBegin: begin(),
    m.EpochExtents: extents(),
    m.EpochEnd: end(),
    m.EpochStaged: m.EpochStaged(E6),
    m.CommitEpoch: m.CommitEpoch(E6),
    m.Committed: m.Committed(E6),
    m.AbortEpoch: m.AbortEpoch(E6),
    m.EpochAborted: m.EpochAborted(E6),
    m.EpochRefused: refused(),
    m.CompareBlocks: question(),
    m.BlocksDiffer: answer(),
    m.HandOver: m.HandOver(E5, GENERATION),
    m.HandedOver: m.HandedOver(E5, GENERATION),
    m.HandoverRefused: m.HandoverRefused(E5, RefusalCode.STORAGE_FAILED, "no"),
}

MAY: dict[State, set[type]] = {
    State.IDLE: {m.SyncBegin, m.SyncResume, m.EpochBegin, m.HandOver},
    State.SYNC_ASKED: {m.SyncReady},
    State.RESUME_ASKED: {m.SyncResumed},
    State.SYNCING: {m.SyncExtents, m.SyncFlush, m.EpochBegin, m.CompareBlocks},
    State.OPEN: {m.EpochExtents, m.EpochEnd, m.AbortEpoch, m.EpochRefused, m.CompareBlocks},
    State.ENDED: {m.AbortEpoch, m.EpochStaged, m.EpochRefused},
    State.STAGED: {m.CommitEpoch, m.AbortEpoch, m.Committed},
    State.IN_DOUBT: {m.CommitEpoch, m.Committed, m.EpochRefused},
    State.ABORTING: {m.EpochStaged, m.EpochRefused, m.EpochAborted, m.Committed},
    State.HANDING: {m.HandedOver, m.HandoverRefused},
}
"""Written down a second time, so that the table cannot change unnoticed."""


@pytest.mark.parametrize("kind", SENSIBLE, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("state", SCRIPTS, ids=lambda state: state.name)
def test_what_does_not_fit_the_state_is_neither_sent_nor_taken(state: State, kind: type) -> None:
    pair = Pair()
    pair.run(SCRIPTS[state])
    assert pair.ends[P].state is pair.ends[S].state is state
    message = SENSIBLE[kind]
    if kind is m.EpochBegin and state is State.SYNCING:
        message = begin(E6, None)
    if kind is m.EpochEnd and state is State.OPEN:
        message = end()
    speaker = SPEAKER[kind]
    if kind in MAY[state]:
        pair.run([(speaker, message)])
        return
    number = pair.ends[speaker]._sent
    receiver = pair.ends[OTHER[speaker]]
    receiver.receive_data(forged(message, number))
    with pytest.raises(RemoteProtocolError, match=kind.__name__):
        receiver.next_event()
    with pytest.raises(LocalProtocolError, match=kind.__name__):
        pair.ends[speaker].send(message)


@pytest.mark.parametrize("kind", SENSIBLE, ids=lambda kind: kind.__name__)
def test_nobody_says_the_other_sides_lines_or_anything_before_both_hellos(kind: type) -> None:
    message, speaker = SENSIBLE[kind], SPEAKER[kind]
    pair = Pair(handshake=False)
    with pytest.raises(LocalProtocolError):
        pair.ends[OTHER[speaker]].send(message)
    pair = Pair(handshake=False)
    pair.run([(speaker, hello(speaker))])
    with pytest.raises(LocalProtocolError):
        pair.ends[speaker].send(message)


def test_every_message_has_a_speaker_or_belongs_to_both_and_every_state_is_tried() -> None:
    assert set(m.Message.__args__) == set(SPEAKER) | {m.Hello, m.Heartbeat, m.Goodbye}
    assert set(SENSIBLE) == set(SPEAKER)
    assert set(SCRIPTS) | {State.HANDSHAKE} == set(State) == set(TABLE)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ([], begin(E6, E6)),
        ([], begin(E6, None)),
        ([(P, begin()), (P, m.AbortEpoch(E6))], begin(E6)),
        (FLUSHED, begin(E6, E5)),
        (SYNC, begin(E6, None)),
        ([*FLUSHED, (P, m.SyncExtents((), b""))], begin(E6, None)),
        ([*FLUSHED, (P, m.SyncFlush(2))], begin(E6, None)),
        (SYNC, m.SyncExtents((Extent(1, 0, 1),), b"a")),
        (SYNC, m.SyncExtents((Extent(0, 1 << 20, 1),), b"a")),
        ([(P, begin())], m.EpochExtents(E6, (Extent(0, (1 << 20) - 1, 2, True),), b"")),
        ([(P, begin())], m.EpochExtents(E7, (), b"")),
        ([(P, begin()), (P, extents())], end(count=0)),
        ([(P, begin()), (P, extents())], m.EpochEnd(E6, 2, 4, 0, False)),
        ([(P, begin()), (P, extents()), (P, end(commit=True))], m.AbortEpoch(E6)),
        ([*STAGED, (P, m.CommitEpoch(E6))], m.AbortEpoch(E6)),
        ([*STAGED, (P, m.CommitEpoch(E6))], begin(E7)),
        (STAGED, m.CommitEpoch(E7)),
        ([*SYNC, (P, m.SyncFlush(1)), (P, m.SyncFlush(2))], m.SyncFlushed(2)),
        ([(P, m.SyncBegin(GENERATION, DISKS))], m.SyncReady((True, True))),
        ([], m.SyncBegin(GENERATION, (DiskSpec(DiskName("vdb"), 1 << 20),))),
        (SYNC, m.CompareBlocks(1, 0, 4096, bytes(16))),
        ([(P, begin())], question(256)),
        ([(P, begin())], question(255, 2)),
        ([(P, begin()), (P, question(1))], answer(0)),
        ([(P, begin()), (P, question())], m.BlocksDiffer(1, 0, b"\x00")),
        ([(P, begin()), (P, question())], answer(0, b"\x00\x00")),
        ([(P, begin()), (P, question())], answer(0, b"\x02")),
        ([(P, begin()), (P, question()), (S, answer())], answer()),
    ],
    ids=[
        "base not before epoch",
        "no base without a sync",
        "number used twice",
        "a base in a sync",
        "sync never flushed",
        "sync not flushed to its end",
        "flush not answered",
        "no such disk",
        "behind the disk's end",
        "over the disk's end",
        "extents of another epoch",
        "fewer extents counted",
        "more bytes counted",
        "abort after a committing end",
        "abort after commit",
        "next epoch while in doubt",
        "commit of another epoch",
        "flushes answered out of order",
        "answer for another number of disks",
        "sync of other disks",
        "question about no such disk",
        "question behind the disk's end",
        "question over the disk's end",
        "answer to another question",
        "answer about another disk",
        "answer about more blocks",
        "answer about a block behind the last",
        "answered twice",
    ],
)
def test_numbers_that_do_not_fit_are_neither_sent_nor_taken(script: Script, message: m.Message) -> None:
    pair = Pair()
    pair.run(script)
    speaker = SPEAKER[type(message)]
    receiver = pair.ends[OTHER[speaker]]
    receiver.receive_data(forged(message, pair.ends[speaker]._sent))
    with pytest.raises(RemoteProtocolError):
        receiver.next_event()
    with pytest.raises(LocalProtocolError):
        pair.ends[speaker].send(message)


# --- after an error --------------------------------------------------------------------------------------------------


def test_after_a_local_error_nothing_can_be_sent_but_one_goodbye() -> None:
    pair = Pair()
    with pytest.raises(LocalProtocolError):
        pair.send(P, m.CommitEpoch(E7))
    assert pair.ends[P].our_side is Side.ERROR
    with pytest.raises(LocalProtocolError):
        pair.send(P, m.Heartbeat())
    goodbye = m.Goodbye(RefusalCode.PROTOCOL, "a defect")
    pair.run([(P, goodbye)])
    with pytest.raises(LocalProtocolError):
        pair.send(P, goodbye)


def test_a_message_over_a_limit_is_a_local_error_too() -> None:
    pair = Pair()
    with pytest.raises(LocalProtocolError):
        pair.send(P, m.Heartbeat(backlog=-1))
    assert pair.ends[P].our_side is Side.ERROR


def test_after_a_remote_error_nothing_is_taken_and_our_direction_still_works() -> None:
    pair = Pair()
    secondary = pair.ends[S]
    secondary.receive_data(b"garbage that is longer than a header" + forged(m.Heartbeat(), 1))
    for _ in range(3):
        with pytest.raises(RemoteProtocolError, match="garbage"):
            secondary.next_event()
    secondary.receive_data(forged(m.Heartbeat(), 1) * 1000)
    assert not secondary._buffer
    assert secondary.their_side is Side.ERROR
    pair.run([(S, m.Heartbeat()), (S, m.Goodbye(RefusalCode.PROTOCOL, "you sent garbage"))])


def test_another_version_stays_a_version_mismatch() -> None:
    secondary = Connection(S)
    secondary.receive_data(b"QEMU-REMUS/2 replication\r\n")
    for _ in range(2):
        with pytest.raises(VersionMismatch):
            secondary.next_event()


def test_frames_lost_or_repeated_are_noticed() -> None:
    for number in (0, 2):
        pair = Pair()
        pair.ends[S].receive_data(forged(m.Heartbeat(), number))
        with pytest.raises(RemoteProtocolError, match=f"frame {number} came instead of frame 1"):
            pair.ends[S].next_event()


def test_nothing_comes_before_the_banner_nor_after_a_goodbye() -> None:
    with pytest.raises(LocalProtocolError):
        Connection(P).send(hello(P))
    twice = Connection(P)
    twice.start()
    with pytest.raises(LocalProtocolError):
        twice.start()
    pair = Pair()
    pair.run([(P, m.Goodbye(RefusalCode.SHUTTING_DOWN, "done"))])
    with pytest.raises(LocalProtocolError):
        pair.send(P, m.Heartbeat())
    pair.ends[S].receive_data(b"x")
    with pytest.raises(RemoteProtocolError, match="goodbye"):
        pair.ends[S].next_event()


def test_a_goodbye_may_come_in_place_of_a_hello() -> None:
    Pair(handshake=False).run([(S, m.Goodbye(RefusalCode.OTHER_PRIMARY, "another one is connected"))])


def test_a_second_hello_and_a_heartbeat_before_the_first_are_refused() -> None:
    pair = Pair()
    with pytest.raises(LocalProtocolError):
        pair.send(P, hello(P))
    pair = Pair(handshake=False)
    with pytest.raises(LocalProtocolError):
        pair.send(P, m.Heartbeat())
