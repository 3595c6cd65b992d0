"""Questions about blocks and their answers, in an epoch and in a full copy."""

from __future__ import annotations

import pytest

from qemu_remus.core import messages as m
from qemu_remus.core.comparison import QUESTIONS_LIMIT
from qemu_remus.core.errors import LocalProtocolError
from qemu_remus.core.model import DiskName, DiskSpec
from tests.core_connection.pair import (
    E6,
    E7,
    GENERATION,
    SYNC,
    P,
    Pair,
    S,
    answer,
    begin,
    cross,
    end,
    extents,
    question,
    refused,
)


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
