"""The promises of both machines together, over many seeded walks through faults of every kind.

A failing walk is printed with its seed: ``SIMULATION_SEEDS=17 pytest tests/simulation`` replays it, and
``SIMULATION_SEEDS=1000-9999`` looks further than there is time for every day.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.simulation.world import World

_first, _, _last = os.environ.get("SIMULATION_SEEDS", "0-79").partition("-")
SEEDS = range(int(_first), int(_last or _first) + 1)


def walked(seed: int, end: Callable[[World], object]) -> World:
    """A world after a random walk and the given end.

    Walks of 30 to 800 steps, as many between 30 and 155 as beyond: young pairs have the most to go wrong.
    """
    world = World(seed)
    try:
        for _ in range(int(30 * 27 ** world.rng.random())):
            world.step()
        end(world)
    except Exception as error:
        walk = "\n".join(world.trace)
        pytest.fail(f"seed {seed}, step {world.steps}: {error!r}\n{world.faults}\n{walk}", pytrace=True)
    return world


@pytest.mark.parametrize("seed", SEEDS)
def test_failover_yields_one_checkpoint_after_any_faults(seed: int) -> None:
    walked(seed, lambda world: world.fail_over(force=world.rng.random() < 0.5))


@pytest.mark.parametrize("seed", SEEDS)
def test_quiet_brings_protection_back_after_any_faults(seed: int) -> None:
    walked(seed, lambda world: world.settle(limit=600))


@pytest.mark.parametrize("seed", SEEDS)
def test_stopping_ends_although_the_secondary_is_silent(seed: int) -> None:
    walked(seed, lambda world: world.stop_primary())


def test_a_seed_replays_exactly() -> None:
    first, second = walked(7, lambda world: None), walked(7, lambda world: None)
    assert first.steps == second.steps > 0
    assert list(first.trace) == list(second.trace)
