"""Epochs that the secondary commits of its own accord: whenever that may be said, whatever it crosses."""

from __future__ import annotations

import pytest

from qemu_remus.core import messages as m
from qemu_remus.core.conversation import State
from qemu_remus.core.errors import LocalProtocolError, RemoteProtocolError
from tests.core_connection.pair import (
    DISKS,
    E5,
    E6,
    E7,
    E8,
    FLUSHED,
    GENERATION,
    STAGED,
    P,
    Pair,
    S,
    Script,
    begin,
    cross,
    end,
    extents,
    forged,
    refused,
    states,
)


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
