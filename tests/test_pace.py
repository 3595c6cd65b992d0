"""The pace of copying: what goes at once, what waits, and that the average holds. Time is the mock clock's."""

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from qemu_remus.primary.pace import BURST_SECONDS, Pace

RATE = 1000


async def seconds(pace: Pace, *counts: int) -> float:
    """How long it takes to spend these one after the other."""
    start = trio.current_time()
    for count in counts:
        await pace.spend(count)
    return trio.current_time() - start


async def test_without_a_limit_nothing_waits_but_others_get_their_turn(autojump_clock: MockClock) -> None:
    assert await seconds(Pace(None), *[1 << 40] * 100) == 0
    with trio.move_on_after(0) as scope:
        await Pace(None).spend(1)
    assert scope.cancelled_caught


async def test_a_burst_goes_at_once_and_no_more_than_that(autojump_clock: MockClock) -> None:
    pace = Pace(RATE)
    assert await seconds(pace, *[25] * 10) == 0
    assert await seconds(pace, 100) == pytest.approx(0.1)


async def test_also_what_does_not_wait_is_a_checkpoint(autojump_clock: MockClock) -> None:
    with trio.move_on_after(0) as scope:
        await Pace(RATE).spend(0)
    assert scope.cancelled_caught


async def test_more_than_the_bucket_holds_takes_its_time(autojump_clock: MockClock) -> None:
    pace = Pace(RATE)
    assert await seconds(pace, 10_000) == pytest.approx(10 - BURST_SECONDS)
    assert await seconds(pace, 10_000) == pytest.approx(10)


async def test_idling_saves_up_one_burst_however_long_it_is(autojump_clock: MockClock) -> None:
    pace = Pace(RATE)
    await pace.spend(250)
    await trio.sleep(1000)
    assert await seconds(pace, 250, 500) == pytest.approx(0.5)


async def test_what_was_cancelled_is_not_spent(autojump_clock: MockClock) -> None:
    pace = Pace(RATE)
    await pace.spend(250)
    with trio.move_on_after(1) as scope:
        await pace.spend(1_000_000)
    assert scope.cancelled_caught
    assert await seconds(pace, 250, 100) == pytest.approx(0.1)


async def test_tasks_get_their_turns_in_order(autojump_clock: MockClock) -> None:
    pace = Pace(RATE)
    done: list[tuple[int, float]] = []

    async def spend(number: int) -> None:
        await pace.spend(500)
        done.append((number, trio.current_time() - start))

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(spend, number)
            await trio.testing.wait_all_tasks_blocked()
    assert [number for number, _ in done] == [0, 1, 2]
    assert [at for _, at in done] == pytest.approx([0.25, 0.75, 1.25])


@given(st.lists(st.tuples(st.integers(0, 2000), st.floats(0, 3)), min_size=1, max_size=30))
def test_no_stretch_of_time_has_more_than_the_rate_and_one_burst(steps: list[tuple[int, float]]) -> None:
    spent: list[tuple[float, int]] = []

    async def spend() -> None:
        pace = Pace(RATE)
        for count, idle in steps:
            await pace.spend(count)
            spent.append((trio.current_time(), count))
            await trio.sleep(idle)

    trio.run(spend, clock=MockClock(autojump_threshold=0))
    for first, (start, _) in enumerate(spent):
        total = 0
        for end, count in spent[first + 1 :]:
            total += count
            assert total <= RATE * (end - start + BURST_SECONDS) + 1e-6


@pytest.mark.parametrize("rate", [0, -1, float("nan")])
def test_what_is_no_pace_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="no pace"):
        Pace(rate)
