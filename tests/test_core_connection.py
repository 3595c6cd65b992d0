"""The conversation: two connections coupled without I/O, and readers fed whole, in pieces, cut, damaged and too much.

A script is a list of ``(speaker, message)``; each message is sent by one end and taken by the other at once, unless a
test delays it on purpose.
"""

from __future__ import annotations

import copy
from collections import deque
from itertools import pairwise
from random import Random
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_remus.core import messages as m
from qemu_remus.core import wire
from qemu_remus.core.comparison import QUESTIONS_LIMIT
from qemu_remus.core.connection import NEED_DATA, RECEIVE_LIMIT, Connection, ConnectionClosed, Side
from qemu_remus.core.conversation import SPEAKER, TABLE, State
from qemu_remus.core.errors import LocalProtocolError, RefusalCode, RemoteProtocolError, VersionMismatch
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import Base, DiskName, DiskSpec, EpochNumber, Generation, Role

from .message_strategies import hello

P, S = Role.PRIMARY, Role.SECONDARY
OTHER = {P: S, S: P}
Script = list[tuple[Role, m.Message]]

E5, E6, E7, E8 = map(EpochNumber, (5, 6, 7, 8))
GENERATION = Generation(UUID(int=77))
DISKS = (DiskSpec(DiskName("vda"), 1 << 20),)
FULL = RefusalCode.NO_SPACE


class Pair:
    """Two ends; what one sends waits in ``wires`` until it is delivered."""

    def __init__(self, *, staged: Base = None, handshake: bool = True) -> None:
        self.ends = {P: Connection(P), S: Connection(S)}
        self.wires: dict[Role, deque[bytes]] = {P: deque(), S: deque()}
        for role, end in self.ends.items():
            self.wires[role].append(end.start())
        if handshake:
            self.run([(P, hello(P)), (S, hello(S, staged=staged))])

    def send(self, speaker: Role, message: m.Message) -> None:
        self.wires[speaker].append(b"".join(self.ends[speaker].send(message)))

    def deliver(self, speaker: Role) -> list[m.Message]:
        """Bring everything that this side has sent to the other one."""
        end = self.ends[OTHER[speaker]]
        while self.wires[speaker]:
            end.receive_data(self.wires[speaker].popleft())
        events = []
        while (event := end.next_event()) is not NEED_DATA:
            assert not isinstance(event, ConnectionClosed)
            events.append(event)
        return events

    def run(self, script: Script) -> None:
        for speaker, message in script:
            self.send(speaker, message)
            assert self.deliver(speaker) == [message]

    def copy(self) -> Pair:
        return copy.deepcopy(self)


def begin(epoch: EpochNumber = E6, base: Base = E5) -> m.EpochBegin:
    return m.EpochBegin(epoch, base)


def extents(epoch: EpochNumber = E6) -> m.EpochExtents:
    return m.EpochExtents(epoch, (Extent(0, 4096, 3), Extent(0, 8192, 512, True)), b"abc")


def end(epoch: EpochNumber = E6, *, commit: bool = False, count: int = 2) -> m.EpochEnd:
    return m.EpochEnd(epoch, count, 3 if count else 0, 0, commit)


def refused(epoch: EpochNumber = E6) -> m.EpochRefused:
    return m.EpochRefused(epoch, FULL, "full")


def question(block: int = 0, blocks: int = 1) -> m.CompareBlocks:
    return m.CompareBlocks(0, block * 4096, 4096, bytes(16 * blocks))


def answer(block: int = 0, differing: bytes = b"\x00") -> m.BlocksDiffer:
    return m.BlocksDiffer(0, block * 4096, differing)


SYNC: Script = [(P, m.SyncBegin(GENERATION, DISKS)), (S, m.SyncReady((True,)))]
FLUSHED: Script = [
    *SYNC,
    (P, m.SyncExtents((Extent(0, 0, 2),), b"ab")),
    (P, m.SyncFlush(1)),
    (S, m.SyncFlushed(1)),
]
STAGED: Script = [(P, begin()), (P, extents()), (P, end()), (S, m.EpochStaged(E6))]


# --- conversations that work -----------------------------------------------------------------------------------------


def test_a_full_copy_and_its_first_checkpoint_then_ordinary_ones() -> None:
    pair = Pair()
    pair.run(FLUSHED)
    pair.run([(P, begin(E6, None)), (P, extents()), (P, end(commit=True)), (S, m.Committed(E6))])
    pair.run([(P, begin(E7, E6)), (P, end(E7, count=0, commit=True)), (S, m.Committed(E7))])
    pair.run([(S, m.Heartbeat(committed=E7)), (P, m.Heartbeat(captured=E8))])
    pair.run([(P, m.Goodbye(RefusalCode.SHUTTING_DOWN, "done")), (S, m.Goodbye(RefusalCode.SHUTTING_DOWN, "done"))])


def test_a_toolstack_stages_then_commits_or_aborts() -> None:
    pair = Pair()
    pair.run([*STAGED, (P, m.CommitEpoch(E6)), (S, m.Committed(E6))])
    pair.run([(P, begin(E7, E6)), (P, end(E7, count=0)), (S, m.EpochStaged(E7))])
    pair.run([(P, m.AbortEpoch(E7)), (S, m.EpochAborted(E7))])
    pair.run([(P, begin(E8, E6)), (P, m.AbortEpoch(E8)), (S, m.EpochAborted(E8))])


def test_a_failed_first_checkpoint_can_be_tried_again_without_a_second_copy() -> None:
    pair = Pair()
    pair.run([*FLUSHED, (P, begin(E6, None)), (S, refused())])
    assert pair.ends[P].state is pair.ends[S].state is State.SYNCING
    pair.run([(P, begin(E7, None)), (P, m.AbortEpoch(E7)), (S, m.EpochAborted(E7))])
    pair.run([(P, begin(E8, None)), (P, end(E8, count=0, commit=True)), (S, m.Committed(E8))])
    assert pair.ends[P].state is pair.ends[S].state is State.IDLE


@pytest.mark.parametrize("answer", [m.Committed(E6), refused()])
def test_an_epoch_staged_on_an_earlier_link_can_be_committed(answer: m.Message) -> None:
    pair = Pair(staged=E6)
    pair.run([(P, m.CommitEpoch(E6)), (S, answer), (P, begin(E7))])


def test_an_epoch_staged_on_an_earlier_link_can_be_aborted_or_passed_over() -> None:
    pair = Pair(staged=E6)
    pair.run([(P, m.AbortEpoch(E6)), (S, m.EpochAborted(E6)), (P, begin(E7))])
    pair = Pair(staged=E6)
    with pytest.raises(LocalProtocolError):
        pair.copy().send(P, begin(E6))
    pair.run([(P, begin(E7)), (P, end(E7, count=0, commit=True)), (S, m.Committed(E7))])
    pair.run([(P, m.CommitEpoch(E6)), (S, refused(E6)), (P, begin(E8, E7))])


def test_a_repeated_commit_is_answered_each_time() -> None:
    pair = Pair()
    pair.run([*STAGED, (P, m.CommitEpoch(E6)), (P, m.CommitEpoch(E6)), (S, m.Committed(E6))])
    pair.run([(P, m.CommitEpoch(E6)), (S, m.Committed(E6)), (P, begin(E7, E6)), (S, m.Committed(E6))])
    # Answers that were not asked for are not counted, but nothing new is committed by one.
    pair.run([(S, m.Committed(E6)), (P, extents(E7))])
    with pytest.raises(LocalProtocolError):
        pair.send(S, m.Committed(E7))


# --- messages that cross ---------------------------------------------------------------------------------------------


def test_a_refusal_may_meet_extents_that_are_still_coming() -> None:
    pair = Pair()
    pair.run([(P, begin()), (P, extents())])
    pair.send(S, refused())
    pair.send(P, extents())
    pair.send(P, m.EpochEnd(E6, 4, 6, 0, True))
    assert len(pair.deliver(P)) == 2
    assert pair.deliver(S) == [refused()]
    pair.run([(P, extents()), (P, begin(E7)), (P, extents(E7)), (P, end(E7)), (S, m.EpochStaged(E7))])


def test_an_abort_of_an_epoch_without_an_end_may_meet_its_refusal_and_need_not_be_waited_for() -> None:
    for answers in ([], [refused()]):
        pair = Pair()
        pair.run([(P, begin()), (P, extents())])
        for answer in answers:
            pair.send(S, answer)
        pair.send(P, m.AbortEpoch(E6))
        pair.send(P, begin(E7))
        assert pair.deliver(P) == [m.AbortEpoch(E6), begin(E7)]
        assert pair.deliver(S) == answers
        pair.run([(P, extents(E7)), (S, m.EpochAborted(E6)), (P, end(E7)), (S, m.EpochStaged(E7))])


@pytest.mark.parametrize(
    "following", [begin(E7), begin(E7, None), m.SyncExtents((), b""), m.SyncFlush(2), m.SyncBegin(GENERATION, DISKS)]
)
@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("syncing", [False, True])
def test_after_the_end_an_abort_is_waited_for(following: m.Message, staged: bool, syncing: bool) -> None:
    pair = Pair()
    pair.run(FLUSHED if syncing else [])
    pair.run([(P, begin(E6, None if syncing else E5)), (P, end(count=0))])
    pair.run([(S, m.EpochStaged(E6))] if staged else [])
    pair.run([(P, m.AbortEpoch(E6))])
    with pytest.raises(LocalProtocolError):
        pair.copy().send(P, following)
    pair.run([(S, m.EpochAborted(E6))])
    assert states(pair) == {State.SYNCING if syncing else State.IDLE}
    pair.run([(P, begin(E7, None if syncing else E5))])


def test_an_abort_that_overtakes_a_refusal_is_answered_too_and_need_not_be_waited_for() -> None:
    pair = Pair()
    pair.run([(P, begin()), (P, end(count=0))])
    pair.send(S, refused())
    pair.send(P, m.AbortEpoch(E6))
    assert pair.deliver(S) == [refused()]
    pair.send(P, begin(E7))
    assert pair.deliver(P) == [m.AbortEpoch(E6), begin(E7)]
    pair.run([(S, m.EpochAborted(E6)), (P, end(E7, count=0, commit=True)), (S, m.Committed(E7))])


def test_the_secondary_may_finish_staging_after_the_abort_has_arrived() -> None:
    pair = Pair()
    pair.run([(P, begin()), (P, extents()), (P, end()), (P, m.AbortEpoch(E6))])
    pair.run([(S, m.EpochStaged(E6)), (S, m.EpochAborted(E6)), (P, begin(E7))])


def test_an_abort_of_an_epoch_refused_meanwhile_is_answered_too() -> None:
    pair = Pair()
    pair.run([(P, begin())])
    pair.send(S, refused())
    assert pair.deliver(S) == [refused()]
    pair.run([(P, m.AbortEpoch(E6)), (S, m.EpochAborted(E6))])


# --- epochs that the secondary commits of its own accord -------------------------------------------------------------


def states(pair: Pair) -> set[State]:
    """Where the two ends stand."""
    return {end.state for end in pair.ends.values()}


def cross(pair: Pair, ours: list[m.Message], theirs: list[m.Message]) -> None:
    """Both sides say all of that before either hears of it."""
    for message in ours:
        pair.send(P, message)
    for message in theirs:
        pair.send(S, message)
    assert pair.deliver(S) == theirs
    assert pair.deliver(P) == ours


def test_a_staged_epoch_may_be_committed_unasked_and_the_next_builds_on_it() -> None:
    pair = Pair()
    pair.run([*STAGED, (S, m.Committed(E6))])
    assert states(pair) == {State.IDLE}
    with pytest.raises(LocalProtocolError):
        pair.copy().send(P, begin(E6))
    pair.run([(P, begin(E7, E6)), (P, end(E7, count=0)), (S, m.EpochStaged(E7)), (S, m.Committed(E7))])


def test_the_first_epoch_of_a_full_copy_may_be_committed_unasked() -> None:
    pair = Pair()
    pair.run([*FLUSHED, (P, begin(E6, None)), (P, end(count=0)), (S, m.EpochStaged(E6)), (S, m.Committed(E6))])
    assert states(pair) == {State.IDLE}
    with pytest.raises(LocalProtocolError):
        pair.copy().send(P, m.SyncFlush(2))
    pair.run([(P, begin(E7, E6))])


@pytest.mark.parametrize("wish", [m.CommitEpoch(E6), m.AbortEpoch(E6)], ids=["commit", "abort"])
@pytest.mark.parametrize("syncing", [False, True])
def test_what_the_primary_wants_may_meet_an_unasked_commit_and_is_answered_with_another(
    wish: m.Message, syncing: bool
) -> None:
    pair = Pair()
    pair.run(FLUSHED if syncing else [])
    pair.run([(P, begin(E6, None if syncing else E5)), (P, end(count=0)), (S, m.EpochStaged(E6))])
    cross(pair, [wish], [m.Committed(E6)])
    assert states(pair) == {State.IDLE}
    # The primary need not wait for the other answer.
    pair.run([(P, begin(E7, E6)), (S, m.Committed(E6)), (P, extents(E7)), (P, end(E7))])
    assert states(pair) == {State.ENDED}


def test_an_abort_right_after_the_end_may_meet_both_staging_and_an_unasked_commit() -> None:
    pair = Pair()
    pair.run([(P, begin()), (P, end(count=0))])
    cross(pair, [m.AbortEpoch(E6)], [m.EpochStaged(E6), m.Committed(E6)])
    assert states(pair) == {State.IDLE}
    pair.run([(S, m.Committed(E6)), (P, begin(E7, E6))])


def test_an_abort_that_comes_while_a_commit_is_under_way_is_answered_by_it() -> None:
    pair = Pair()
    pair.run([*STAGED, (P, m.AbortEpoch(E6)), (S, m.Committed(E6)), (P, begin(E7, E6))])


@pytest.mark.parametrize(
    "script",
    [
        [],
        [(P, begin(E7))],
        [(P, begin(E7)), (P, end(E7, count=0))],
        [(P, begin(E7)), (P, end(E7, count=0, commit=True))],
        [(P, begin(E7)), (P, end(E7, count=0)), (S, m.EpochStaged(E7))],
    ],
    ids=["idle", "open", "ended", "in doubt", "staged"],
)
def test_an_epoch_of_an_earlier_link_may_be_committed_unasked_whatever_the_present_one_does(script: Script) -> None:
    pair = Pair(staged=E6)
    pair.run(script)
    before = states(pair)
    pair.run([(S, m.Committed(E6))])
    assert states(pair) == before
    # It is known as committed now.
    pair.run([(P, m.CommitEpoch(E6)), (S, m.Committed(E6))])
    assert states(pair) == before


@pytest.mark.parametrize(
    "ours",
    [
        [m.CommitEpoch(E6)],
        [m.CommitEpoch(E6), m.CommitEpoch(E6)],
        [m.AbortEpoch(E6)],
        [m.AbortEpoch(E6), begin(E7)],
        [begin(E7), extents(E7)],
    ],
    ids=["commit", "commit twice", "abort", "abort and begin", "begin"],
)
def test_an_unasked_commit_of_an_epoch_of_an_earlier_link_may_cross_everything(ours: list[m.Message]) -> None:
    pair = Pair(staged=E6)
    cross(pair, ours, [m.Committed(E6)])
    begun = any(isinstance(message, m.EpochBegin) for message in ours)
    assert states(pair) == {State.OPEN if begun else State.IDLE}
    pair.run([(S, m.Committed(E6)) for message in ours if isinstance(message, m.CommitEpoch | m.AbortEpoch)])
    pair.run([] if begun else [(P, begin(E7, E6))])
    assert states(pair) == {State.OPEN}


def test_an_unasked_commit_that_crosses_a_full_copys_beginning_changes_nothing() -> None:
    pair = Pair(staged=E6)
    cross(pair, [m.SyncBegin(GENERATION, DISKS)], [m.Committed(E6)])
    assert states(pair) == {State.SYNC_ASKED}
    for wish in (m.CommitEpoch(E6), m.AbortEpoch(E6)):
        with pytest.raises(LocalProtocolError):
            pair.copy().send(P, wish)
    pair.run([(S, m.SyncReady((True,))), (P, m.SyncFlush(1)), (S, m.SyncFlushed(1))])
    pair.run([(P, begin(E7, None)), (P, end(E7, count=0, commit=True)), (S, m.Committed(E7))])
    assert states(pair) == {State.IDLE}


@pytest.mark.parametrize(
    "script",
    [
        [],
        [(P, begin())],
        [(P, begin()), (P, end(count=0))],
        [(P, begin()), (S, refused())],
        [(P, begin()), (P, m.AbortEpoch(E6))],
        [*STAGED, (P, m.AbortEpoch(E6)), (S, m.EpochAborted(E6))],
    ],
    ids=["unknown", "open", "ended", "refused", "aborted while open", "aborted"],
)
def test_only_what_is_staged_may_be_committed_unasked(script: Script) -> None:
    pair = Pair()
    pair.run(script)
    number = pair.ends[S]._sent
    pair.ends[P].receive_data(forged(m.Committed(E6), number))
    with pytest.raises(RemoteProtocolError):
        pair.ends[P].next_event()
    with pytest.raises(LocalProtocolError):
        pair.send(S, m.Committed(E6))


def test_an_epoch_of_an_earlier_link_is_no_longer_committed_unasked_once_it_was_aborted() -> None:
    pair = Pair(staged=E6)
    pair.run([(P, m.AbortEpoch(E6)), (S, m.EpochAborted(E6))])
    with pytest.raises(LocalProtocolError):
        pair.send(S, m.Committed(E6))


def test_an_epoch_of_an_earlier_link_is_answered_only_when_something_is_wanted_of_it() -> None:
    pair = Pair(staged=E6)
    pair.run([(P, begin(E7)), (P, end(E7, count=0)), (S, m.EpochStaged(E7)), (P, m.CommitEpoch(E7)), (S, refused(E7))])
    for answer in (refused(E6), m.EpochAborted(E6)):
        with pytest.raises(LocalProtocolError):
            pair.copy().send(S, answer)
    pair.run([(P, m.CommitEpoch(E6))])
    # With this the primary has done with the refused one.
    with pytest.raises(LocalProtocolError):
        pair.copy().send(P, end(E7, count=0))
    pair.run([(S, refused(E6)), (P, begin(E8))])


@pytest.mark.parametrize("wish", [m.CommitEpoch(E6), m.AbortEpoch(E6)], ids=["commit", "abort"])
def test_nothing_more_is_wanted_of_an_epoch_of_an_earlier_link_that_is_being_aborted(wish: m.Message) -> None:
    pair = Pair(staged=E6)
    pair.run([(P, m.AbortEpoch(E6))])
    with pytest.raises(LocalProtocolError):
        pair.send(P, wish)


def test_an_unasked_commit_does_not_hide_the_answers_that_a_later_epoch_has_to_get() -> None:
    pair = Pair(staged=E6)
    pair.run([(P, begin(E7)), (P, end(E7, count=0, commit=True)), (P, m.CommitEpoch(E7))])
    pair.run([(S, m.Committed(E6)), (S, refused(E7)), (S, refused(E7)), (P, begin(E8, E6))])


# --- comparisons -----------------------------------------------------------------------------------------------------


def test_an_epoch_may_ask_what_differs_before_it_sends() -> None:
    pair = Pair()
    pair.run([(P, begin()), (P, question(0, 9)), (P, question(9)), (P, extents())])
    pair.run([(S, answer(0, b"\xff\x01")), (S, answer(9)), (P, end()), (S, m.EpochStaged(E6))])


def test_a_full_copy_may_ask_what_differs_before_it_sends() -> None:
    pair = Pair()
    pair.run([*SYNC, (P, question()), (P, m.SyncExtents((), b"")), (P, m.SyncFlush(1))])
    pair.run([(S, answer()), (S, m.SyncFlushed(1)), (P, begin(E6, None)), (P, question()), (S, answer())])
    pair.run([(P, end(count=0, commit=True)), (S, m.Committed(E6))])


@pytest.mark.parametrize("commit", [False, True])
def test_an_epoch_is_not_ended_before_all_of_its_questions_are_answered(commit: bool) -> None:
    pair = Pair()
    pair.run([(P, begin()), (P, question()), (P, question(1)), (S, answer())])
    with pytest.raises(LocalProtocolError):
        pair.copy().send(P, end(count=0, commit=commit))
    pair.run([(S, answer(1)), (P, end(count=0, commit=commit))])


def test_a_full_copy_is_not_over_before_all_of_its_questions_are_answered() -> None:
    pair = Pair()
    pair.run([*SYNC, (P, question()), (P, m.SyncFlush(1)), (S, m.SyncFlushed(1))])
    with pytest.raises(LocalProtocolError):
        pair.copy().send(P, begin(E6, None))
    pair.run([(S, answer()), (P, begin(E6, None))])


def test_a_refusal_may_meet_questions_that_are_still_coming_and_each_is_answered() -> None:
    pair = Pair()
    pair.run([(P, begin()), (P, question())])
    cross(pair, [question(1), question(2), m.AbortEpoch(E6), begin(E7)], [refused()])
    # None of them is an answer about the epoch that has begun.
    pair.run([(S, answer(0)), (S, answer(1)), (S, m.EpochAborted(E6)), (P, question(3)), (S, answer(2))])
    with pytest.raises(LocalProtocolError):
        pair.copy().send(P, end(E7, count=0))
    pair.run([(S, answer(3)), (P, end(E7, count=0)), (S, m.EpochStaged(E7))])


def test_an_abort_may_meet_answers() -> None:
    pair = Pair()
    pair.run([(P, begin()), (P, question()), (P, question(1))])
    cross(pair, [m.AbortEpoch(E6)], [answer(), answer(1)])
    pair.run([(S, m.EpochAborted(E6)), (P, begin(E7)), (P, end(E7, count=0))])


def test_only_so_many_questions_wait_for_their_answers() -> None:
    pair = Pair()
    pair.run([(P, begin()), *((P, question(block)) for block in range(QUESTIONS_LIMIT))])
    with pytest.raises(LocalProtocolError, match="wait"):
        pair.copy().send(P, question(99))
    pair.run([(S, answer()), (P, question(99))])


def test_the_last_block_of_a_disk_may_be_short_and_is_the_last() -> None:
    disks = (DiskSpec(DiskName("vda"), 4096 + 512),)
    pair = Pair()
    pair.run([(P, m.SyncBegin(GENERATION, disks)), (S, m.SyncReady((False,))), (P, question(0, 2)), (P, question(1))])
    for beyond in (question(0, 3), question(1, 2), question(2)):
        with pytest.raises(LocalProtocolError, match="not within"):
            pair.copy().send(P, beyond)


# --- any order -------------------------------------------------------------------------------------------------------

LINES: dict[Role, list[m.Message]] = {
    P: [
        m.SyncBegin(GENERATION, DISKS),
        m.SyncExtents((), b""),
        m.SyncFlush(1),
        m.SyncFlush(2),
        question(0),
        question(5, 3),
        *(m.EpochBegin(epoch, base) for epoch in map(EpochNumber, range(6, 16)) for base in (None, E5)),
        *(
            kind(epoch)
            for kind in (
                lambda epoch: m.EpochExtents(epoch, (), b""),
                lambda epoch: m.EpochEnd(epoch, 0, 0, 0, False),
                lambda epoch: m.EpochEnd(epoch, 0, 0, 0, True),
                m.CommitEpoch,
                m.AbortEpoch,
            )
            for epoch in map(EpochNumber, range(5, 16))
        ),
    ],
    S: [
        m.SyncReady((True,)),
        m.SyncFlushed(1),
        m.SyncFlushed(2),
        answer(0),
        answer(5, b"\x05"),
        *(
            kind(epoch)
            for kind in (m.EpochStaged, m.Committed, m.EpochAborted, refused)
            for epoch in map(EpochNumber, range(5, 16))
        ),
    ],
}


def try_to_send(pair: Pair, speaker: Role, message: m.Message) -> bool:
    """Send it if it may be sent; else leave everything as it was."""
    end = pair.ends[speaker]
    talk = {name: copy.copy(value) for name, value in vars(end._talk).items()}
    try:
        pair.send(speaker, message)
    except LocalProtocolError:
        vars(end._talk).update(talk)
        end.our_side = Side.TALKING
        return False
    return True


@given(
    st.sampled_from([None, E6]),
    st.lists(st.tuples(st.sampled_from([P, S]), st.integers(0, 3)), max_size=80),
    st.randoms(),
)
def test_whatever_one_side_lets_itself_send_the_other_takes_however_late_it_comes(
    staged: Base, steps: list[tuple[Role, int]], random: Random
) -> None:
    """The two sides' records may differ while messages are under way; never so that one blames the other."""
    pair = Pair(staged=staged)
    for speaker, action in steps:
        if action == 0:
            pair.deliver(speaker)
            continue
        lines = LINES[speaker]
        if action != 3:
            # Repeated answers may be said at any time: most of the time, something new.
            known = pair.ends[speaker]._talk._answerable
            lines = [message for message in lines if getattr(message, "epoch", known + 1) > known]
        any(try_to_send(pair, speaker, message) for message in random.sample(lines, len(lines)))
    pair.deliver(P)
    pair.deliver(S)
    assert pair.ends[P].state is pair.ends[S].state


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


def forged(message: m.Message, number: int) -> bytes:
    """What a peer without our checks would send."""
    return b"".join(wire.encode(message, number))


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


# --- readers ---------------------------------------------------------------------------------------------------------

CONVERSATION: list[m.Message] = [
    hello(P),
    m.Heartbeat(captured=E6),
    begin(),
    extents(),
    m.EpochExtents(E6, (Extent(0, 0, 70_000),), bytes(range(250)) * 280),
    m.EpochEnd(E6, 3, 70_003, 1, True),
]


def listening() -> Connection:
    """A secondary that has said hello."""
    secondary = Connection(S)
    secondary.start()
    secondary.send(hello(S))
    return secondary


def spoken() -> bytes:
    primary = Connection(P)
    raw = primary.start()
    secondary = Connection(S)
    for message in CONVERSATION:
        raw += b"".join(primary.send(message))
        if isinstance(message, m.Hello):
            primary.receive_data(secondary.start() + b"".join(secondary.send(hello(S))))
            primary.next_event()
    return raw


SPOKEN = spoken()


def events(reader: Connection) -> list[object]:
    """All that is there, and whether the end was reached."""
    found: list[object] = []
    while (event := reader.next_event()) is not NEED_DATA:
        found.append(event)
        if isinstance(event, ConnectionClosed):
            break
    return found


def test_a_reader_fed_whole_or_byte_by_byte_hears_the_same() -> None:
    whole = listening()
    whole.receive_data(SPOKEN)
    assert events(whole) == CONVERSATION
    bytewise = listening()
    heard: list[object] = []
    for number in range(len(SPOKEN)):
        bytewise.receive_data(SPOKEN[number : number + 1])
        heard += events(bytewise)
    assert heard == CONVERSATION


@given(st.lists(st.integers(0, len(SPOKEN)), max_size=10))
def test_a_reader_fed_in_any_pieces_hears_the_same(cuts: list[int]) -> None:
    reader = listening()
    heard: list[object] = []
    edges = [0, *sorted(cuts), len(SPOKEN)]
    for start, stop in pairwise(edges):
        if start != stop:
            reader.receive_data(memoryview(SPOKEN)[start:stop])
            heard += events(reader)
    assert heard == CONVERSATION


@given(st.integers(0, len(SPOKEN)))
def test_a_reader_cut_off_anywhere_hears_what_was_complete_and_that_it_was_cut(length: int) -> None:
    reader = listening()
    if length:
        reader.receive_data(SPOKEN[:length])
    reader.receive_data(b"")
    *heard, last = events(reader)
    assert heard == CONVERSATION[: len(heard)]
    boundaries = {0, len(wire.BANNER)}
    position = len(wire.BANNER)
    for number, message in enumerate(CONVERSATION):
        position += len(forged(message, number))
        boundaries.add(position)
    assert last == ConnectionClosed(mid_frame=length not in boundaries)
    assert events(reader) == [last]


@given(st.binary(min_size=wire.HEADER_SIZE, max_size=300))
def test_garbage_behind_good_messages_spoils_none_of_them(garbage: bytes) -> None:
    reader = listening()
    reader.receive_data(SPOKEN + garbage)
    for message in CONVERSATION:
        assert reader.next_event() == message
    with pytest.raises(RemoteProtocolError):
        reader.next_event()


@given(st.integers(0, len(SPOKEN) - 1), st.integers(1, 255))
def test_a_reader_of_a_changed_byte_hears_a_true_beginning_then_a_protocol_error_or_nothing(at: int, by: int) -> None:
    raw = bytearray(SPOKEN)
    raw[at] ^= by
    reader = listening()
    reader.receive_data(raw)
    heard: list[object] = []
    with pytest.raises(RemoteProtocolError):
        heard.extend(iter(reader.next_event, NEED_DATA))
    assert heard == CONVERSATION[: len(heard)]


@given(st.binary(max_size=400))
def test_any_first_bytes_are_waited_on_or_a_protocol_error(raw: bytes) -> None:
    reader = listening()
    reader.receive_data(raw)
    try:
        event = reader.next_event()
    except RemoteProtocolError:
        return
    assert event is NEED_DATA or event == ConnectionClosed(mid_frame=False)


def test_what_waits_to_be_heard_is_bounded() -> None:
    reader = listening()
    reader.receive_data(SPOKEN)
    with pytest.raises(LocalProtocolError):
        reader.receive_data(bytes(RECEIVE_LIMIT - len(SPOKEN) + 1))
    assert len(reader._buffer) == len(SPOKEN)


def test_nothing_can_be_received_after_the_end() -> None:
    reader = listening()
    reader.receive_data(b"")
    with pytest.raises(LocalProtocolError):
        reader.receive_data(b"x")


def test_data_of_a_message_stay_as_they_are_while_more_is_received() -> None:
    reader = listening()
    reader.receive_data(SPOKEN)
    data = [event.data for event in events(reader) if isinstance(event, m.EpochExtents)]
    reader.receive_data(bytes(100_000))
    assert [bytes(view) for view in data] == [b"abc", bytes(range(250)) * 280]


def test_an_interrupted_sync_goes_on_where_the_secondary_says() -> None:
    pair = Pair()
    pair.run([(P, m.SyncResume(GENERATION, DISKS)), (S, m.SyncResumed(True, 512, (True,)))])
    assert states(pair) == {State.SYNCING}
    pair.run([(P, m.SyncExtents((), b"")), (P, m.SyncFlush(1)), (S, m.SyncFlushed(1)), (P, begin(E6, None))])


def test_a_sync_that_does_not_go_on_may_begin_anew() -> None:
    pair = Pair()
    pair.run([(P, m.SyncResume(GENERATION, DISKS)), (S, m.SyncResumed(False, 0, ()))])
    assert states(pair) == {State.IDLE}
    pair.run(SYNC)
