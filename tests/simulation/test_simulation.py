"""The promises of both machines together, over many seeded walks through faults of every kind.

A failing walk is printed with its seed: ``SIMULATION_SEEDS=17 pytest tests/simulation`` replays it, and
``SIMULATION_SEEDS=1000-9999`` looks further than there is time for every day.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from qemu_remus.core.toolstack_machine import Kind
from tests.simulation.world import World

FAILED = (
    25,  # a link lost before "staged" was heard: the epoch was called lost, and its memory had committed it
    263,  # the same, where a controller had to stop
    271,  # an epoch was called lost by a controller that could wait no longer for its answer
    492,  # an epoch under way was called not begun by a controller that had not looked yet
    870,  # an epoch in doubt was called aborted before the secondary had said so
    908,  # what became of an epoch was told behind the controller's end
    1135,  # memory committed a checkpoint that a full copy was about to replace
)
"""Walks that have found something. What they meet changes with the machines: each find has a test of its own, too."""

_seeds = os.environ.get("SIMULATION_SEEDS", "")
_first, _, _last = (_seeds or "0-69").partition("-")
SEEDS = sorted({*range(int(_first), int(_last or _first) + 1), *(() if _seeds else FAILED)})


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
def test_switch_over_moves_the_vm_whole_or_leaves_it_where_it_is(seed: int) -> None:
    walked(seed, lambda world: world.switch_over(limit=600))


def test_the_walks_come_by_every_end_of_a_switch_over() -> None:
    met = set[str]().union(
        *(walked(seed, lambda world: world.switch_over(limit=600)).switches.answers for seed in range(120))
    )
    assert met >= {"done", "NotProtected", "TimedOut", "OutOfOrder", "CommitInDoubt"}


@pytest.mark.parametrize("seed", SEEDS)
def test_stopping_ends_although_the_secondary_is_silent(seed: int) -> None:
    walked(seed, lambda world: world.stop_primary())


def test_the_walks_come_by_every_kind_of_answer() -> None:
    met = set[tuple[str, str]]().union(*(walked(seed, lambda world: None).toolstack.answers for seed in range(120)))
    assert {(kind.value, "done") for kind in Kind} <= met
    assert {
        ("prepare-epoch", "NotProtected"),
        ("start-new-epoch", "OutOfOrder"),
        ("finish-disk-sync", "TimedOut"),
    } <= met
    assert {("finish-disk-sync", "EpochLost"), ("commit-epoch", "CommitInDoubt")} <= met
    assert {("memory-received", "done"), ("memory-received", "noted")} <= met


def test_the_walks_verify_the_copy_and_repair_it() -> None:
    worlds = [walked(seed, lambda world: None) for seed in range(120)]
    assert sum(world.primary.worker.verified for world in worlds) > 30
    assert sum(world.primary.worker.repaired for world in worlds) > 3


def test_a_seed_replays_exactly() -> None:
    first, second = walked(7, lambda world: None), walked(7, lambda world: None)
    assert first.steps == second.steps > 0
    assert list(first.trace) == list(second.trace)
