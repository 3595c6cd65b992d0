"""Conversations that work, in turns, with messages that cross, and in any order."""

from __future__ import annotations

import copy
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_remus.core import messages as m
from qemu_remus.core.connection import Side
from qemu_remus.core.conversation import State
from qemu_remus.core.errors import LocalProtocolError, RefusalCode
from qemu_remus.core.model import Base, EpochNumber, Role
from tests.core_connection.pair import (
    DISKS,
    E5,
    E6,
    E7,
    E8,
    FLUSHED,
    GENERATION,
    STAGED,
    SYNC,
    P,
    Pair,
    S,
    answer,
    begin,
    end,
    extents,
    question,
    refused,
    states,
)

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
        for early in answers:
            pair.send(S, early)
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
