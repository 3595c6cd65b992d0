"""Hypothesis strategies for the replication protocol's messages."""

from __future__ import annotations

from uuid import UUID

from hypothesis import strategies as st

from qemu_remus.core import messages as m
from qemu_remus.core.comparison import DIGEST_SIZE, blocks_at_once
from qemu_remus.core.errors import RefusalCode
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import (
    Base,
    DiskName,
    DiskSpec,
    DiskState,
    EpochNumber,
    Generation,
    InstanceId,
    PairName,
    Role,
)

GENERATIONS = [Generation(UUID(int=number)) for number in (1, 2, 3)]

epochs = st.integers(1, 2**63 - 1).map(EpochNumber)
small_epochs = st.integers(1, 6).map(EpochNumber)
bases: st.SearchStrategy[Base] = st.none() | epochs
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=200)
numbers = st.integers(0, 2**63 - 1)
generations = st.uuids().map(Generation)


@st.composite
def disks(draw: st.DrawFn) -> tuple[DiskSpec, ...]:
    chosen = draw(st.lists(names.map(DiskName), max_size=4, unique=True))
    return tuple(DiskSpec(name, draw(numbers), draw(bases)) for name in chosen)


hellos = st.builds(
    m.Hello,
    pair=names.map(PairName),
    role=st.sampled_from(Role),
    instance=st.uuids().map(InstanceId),
    session=numbers,
    generation=st.none() | generations,
    disks=disks(),
    committed=bases,
    staged=bases,
    highest_epoch=numbers,
    disk_state=st.sampled_from(DiskState),
    history=st.lists(st.tuples(generations, epochs), max_size=4).map(tuple),
    begun=numbers,
    decided=numbers,
)


@st.composite
def extents_and_data(draw: st.DrawFn) -> tuple[tuple[Extent, ...], bytes]:
    extents = []
    for _ in range(draw(st.integers(0, 4))):
        zero = draw(st.booleans())
        length = draw(st.integers(1, 2**40) if zero else st.integers(1, 300))
        extents.append(Extent(draw(st.integers(0, 255)), draw(st.integers(0, 2**50)), length, zero))
    data = draw(st.binary(min_size=(size := sum(extent.payload for extent in extents)), max_size=size))
    return tuple(extents), data


sync_extents = extents_and_data().map(lambda pair: m.SyncExtents(*pair))
epoch_extents = st.builds(lambda epoch, pair: m.EpochExtents(epoch, *pair), epochs, extents_and_data())


@st.composite
def questions(draw: st.DrawFn) -> m.CompareBlocks:
    block_size = 1 << draw(st.integers(12, 20))
    blocks = draw(st.integers(1, min(40, blocks_at_once(block_size))))
    return m.CompareBlocks(
        draw(st.integers(0, 255)),
        draw(st.integers(0, 2**40)) * block_size,
        block_size,
        draw(st.binary(min_size=blocks * DIGEST_SIZE, max_size=blocks * DIGEST_SIZE)),
    )


messages: st.SearchStrategy[m.Message] = st.one_of(
    hellos,
    st.builds(m.Heartbeat, bases, bases, bases, bases, numbers),
    st.builds(m.Goodbye, st.sampled_from(RefusalCode), texts),
    st.builds(m.SyncBegin, generations, disks()),
    st.builds(m.SyncReady, st.lists(st.booleans(), max_size=5).map(tuple)),
    st.builds(m.SyncResume, generations, disks()),
    st.builds(m.SyncResumed, st.booleans(), numbers, st.lists(st.booleans(), max_size=5).map(tuple)),
    sync_extents,
    st.builds(m.SyncFlush, numbers),
    st.builds(m.SyncFlushed, numbers),
    st.builds(m.EpochBegin, epochs, bases),
    epoch_extents,
    st.builds(m.EpochEnd, epochs, numbers, numbers, st.integers(0, 2**32 - 1), st.booleans()),
    st.builds(m.EpochStaged, epochs),
    st.builds(m.CommitEpoch, epochs),
    st.builds(m.Committed, epochs),
    st.builds(m.AbortEpoch, epochs),
    st.builds(m.EpochAborted, epochs),
    st.builds(m.EpochRefused, epochs, st.sampled_from(RefusalCode), texts),
    questions(),
    st.builds(m.BlocksDiffer, st.integers(0, 255), numbers, st.binary(min_size=1, max_size=128)),
)


def hello(side: Role, /, **changes: object) -> m.Hello:
    """A hello of one disk of 1 MiB, in the middle of a generation's life."""
    primary = side is Role.PRIMARY
    facts: dict[str, object] = {
        "pair": PairName("vm"),
        "role": side,
        "instance": InstanceId(UUID(int=10 if primary else 20)),
        "session": 1,
        "generation": GENERATIONS[0],
        "disks": (DiskSpec(DiskName("vda"), 1 << 20, EpochNumber(5) if primary else None),),
        "committed": EpochNumber(5),
        "staged": None,
        "highest_epoch": 5,
        "disk_state": DiskState.UP_TO_DATE if primary else DiskState.CONSISTENT,
    }
    return m.Hello(**(facts | changes))  # type: ignore[arg-type]
