"""Who is killed for silence, and who must not be, over a clock of the test's own."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_remus.qemu import guardian
from qemu_remus.qemu.guardian import SIGNS, Verdict, Watch, arm_message
from tests.guardian.rig import PATIENCE


def a_watch(*, deadline: float | None = None, heard: float = 0.0, parted: bool = False) -> Watch:
    return Watch(PATIENCE, heard=heard, due=heard, deadline=deadline, parted=parted)


@pytest.mark.parametrize(
    ("deadline", "parted", "gone", "verdict"),
    [
        (None, False, False, Verdict.WAIT),
        (None, False, True, Verdict.CLEAN_UP),
        (None, True, True, Verdict.EXIT),
        (5.0, False, False, Verdict.WAIT),
        (4.0, False, False, Verdict.KILL),
        (5.0, False, True, Verdict.RESUME),
        (3.0, False, True, Verdict.RESUME),
        (5.0, True, True, Verdict.RESUME),
    ],
)
def test_what_is_to_be_done(deadline: float | None, parted: bool, gone: bool, verdict: Verdict) -> None:
    assert a_watch(deadline=deadline, parted=parted).verdict(gone=gone, now=4.0) is verdict


def test_silence_beyond_the_patience_is_death_unless_it_was_announced() -> None:
    assert a_watch().verdict(gone=False, now=PATIENCE - 0.001) is Verdict.WAIT
    assert a_watch().verdict(gone=False, now=PATIENCE) is Verdict.KILL
    assert a_watch(parted=True).verdict(gone=False, now=10 * PATIENCE) is Verdict.WAIT


@pytest.mark.parametrize("message", [guardian.ALIVE, guardian.DISARM, arm_message(1000), guardian.FAREWELL])
def test_every_message_is_a_sign_of_life(message: bytes) -> None:
    watch = a_watch()
    watch.receive(message, now=7.0)
    assert watch.verdict(gone=False, now=7.0 + PATIENCE - 0.001) is Verdict.WAIT


def killed_at(signs: Iterable[float], *, still: tuple[float, float] = (0.0, 0.0), until: float = 200.0) -> float | None:
    """Play a guardian's life.

    :param signs: when the controller gives signs of life.
    :param still: from when to when the whole machine stands still, the guardian with it.
    :return: when it would kill the controller; None: not until ``until``.
    """
    watch = Watch.begin(PATIENCE, 0.0)
    coming = sorted(signs)
    now = 0.0
    while now < until:
        due = now + watch.sleep(now)
        now = min([due, *coming[:1]])
        if still[0] <= now < still[1]:
            now = still[1]
        watch.look(now)
        while coming and coming[0] <= now:
            coming.pop(0)
            watch.receive(guardian.ALIVE, now)
        if watch.verdict(gone=False, now=now) is Verdict.KILL:
            return now
    return None


@given(st.lists(st.floats(0.0, PATIENCE * 0.999), max_size=100))
def test_a_busy_controller_whose_signs_come_late_is_not_killed(gaps: list[float]) -> None:
    signs = [sum(gaps[: end + 1]) for end in range(len(gaps))]
    assert killed_at(signs, until=signs[-1] if signs else 0.0) is None


@given(st.floats(0.0, PATIENCE * 0.999))
def test_a_controller_that_falls_silent_is_killed_when_the_patience_is_over(last: float) -> None:
    killed = killed_at([last])
    assert killed is not None
    assert PATIENCE - 0.001 <= killed - last <= PATIENCE + PATIENCE / SIGNS


@given(st.floats(0.01, PATIENCE * 0.999), st.floats(PATIENCE / SIGNS * 2.001, 1e6), st.floats(0.0, PATIENCE * 0.999))
def test_a_machine_that_stood_still_is_no_silence_of_the_controllers(begin: float, length: float, late: float) -> None:
    """Nor is it where the controller had been silent for a while before, and takes its time afterwards."""
    end = begin + length
    assert killed_at([end + late], still=(begin, end), until=end + late) is None
    killed = killed_at([], still=(begin, end), until=end + 2 * PATIENCE)
    assert killed is not None
    assert PATIENCE - 0.001 <= killed - end <= PATIENCE + PATIENCE / SIGNS


def test_a_pause_in_which_the_machine_stood_still_may_last_longer_by_as_much() -> None:
    watch = Watch.begin(PATIENCE, 0.0)
    watch.receive(arm_message(2.0), 0.0)
    watch.due = 0.5
    watch.look(100.5)
    assert watch.verdict(gone=False, now=100.5) is Verdict.WAIT
    assert watch.deadline == pytest.approx(102.0)
    # a look that is a little late is no standstill
    watch.due = 101.0
    watch.look(101.5)
    assert watch.deadline == pytest.approx(102.0)


def test_arming_again_moves_the_deadline_and_disarming_takes_it_away() -> None:
    watch = Watch.begin(1000.0, 100.0)
    assert watch.receive(arm_message(2.5), now=100.0) == guardian.ARMED
    assert watch.deadline == pytest.approx(102.5)
    assert watch.sleep(now=102.0) == pytest.approx(0.5)
    watch.receive(arm_message(10), now=102.0)
    assert watch.sleep(now=102.0) == pytest.approx(10)
    assert watch.sleep(now=113.0) == 0
    assert watch.receive(guardian.DISARM, now=103.0) is None
    assert watch.deadline is None


@pytest.mark.parametrize("message", [b"", b"arm", b"arm x", b"hello 1"])
def test_a_message_of_nobody_changes_nothing(message: bytes) -> None:
    watch = a_watch(deadline=5.0)
    with pytest.raises(ValueError, match=r"not a message|to float"):
        watch.receive(message, now=1.0)
    assert watch == a_watch(deadline=5.0)
