"""The models that no walk is sure to come by: what the simulation's secondary answers when it is asked what differs."""

from __future__ import annotations

from dataclasses import fields
from uuid import UUID

import pytest

from qemu_remus.core import messages as m
from qemu_remus.core import secondary_machine as secondary
from qemu_remus.core.comparison import blocks_in, digest_blocks
from qemu_remus.core.model import EpochNumber, Generation
from tests.simulation.models import BLOCK, BLOCKS, Commit, Data, End, bytes_of
from tests.simulation.secondary_host import SecondaryHost, StoreError
from tests.simulation.world import World

E1, E2, E3 = map(EpochNumber, (1, 2, 3))


@pytest.fixture
def host() -> SecondaryHost:
    """Disk 0 is 1 1 1 1 in checkpoint 1, and 1 2 1 1 in checkpoint 2, which is not applied; 3 writes block 3."""
    world = World(1)
    for fault in fields(world.faults):
        setattr(world.faults, fault.name, 0.0)
    host = world.secondary
    host.store.begin_sync(Generation(UUID(int=1)))
    host.store.write_images([(0, block, 1) for block in range(BLOCKS)])
    host.store.records += [End(E1, True), Data(E2, ((0, 1, 2),)), End(E2, True)]
    host.store.records += [Data(E3, ((0, 3, 9), (1, 0, 9))), End(E3, False)]
    return host


def differ(host: SecondaryHost, *blocks: int, first: int = 0, block_size: int = BLOCK) -> list[int]:
    digests = digest_blocks(bytes_of(blocks), block_size)
    compared = host._perform(secondary.CompareBlocks(m.CompareBlocks(0, first * BLOCK, block_size, digests)))
    assert isinstance(compared, secondary.Compared)
    return list(blocks_in(compared.differing))


def test_the_committed_checkpoint_is_compared_and_what_is_in_doubt_differs(host: SecondaryHost) -> None:
    assert differ(host, 1, 2, 1, 1) == [3]
    assert differ(host, 1, 1, 0, 1) == [1, 2, 3]
    assert differ(host, 2, 1, first=1) == []
    assert differ(host, 1, 2, 1, 1, block_size=2 * BLOCK) == [1]
    assert [news for news in host.news if isinstance(news, secondary.Applied)] == [
        secondary.Applied(E1),
        secondary.Applied(E2),
    ]


def test_what_is_committed_meanwhile_differs_no_more_by_itself(host: SecondaryHost) -> None:
    host.store.append(Commit(E3))
    assert differ(host, 1, 2, 1, 9) == []


def test_an_image_that_cannot_be_written_is_not_compared(host: SecondaryHost) -> None:
    host.world.faults.apply = 10.0
    with pytest.raises(StoreError):
        differ(host, 1, 2, 1, 1)
    assert isinstance(host.news[-1], secondary.ApplyFailed)
