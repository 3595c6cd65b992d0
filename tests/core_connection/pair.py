"""Two connections coupled without I/O, and what they say to each other.

A script is a list of ``(speaker, message)``; each message is sent by one end and taken by the other at once, unless a
test delays it on purpose.
"""

from __future__ import annotations

import copy
from collections import deque
from uuid import UUID

from qemu_remus.core import messages as m
from qemu_remus.core import wire
from qemu_remus.core.connection import NEED_DATA, Connection, ConnectionClosed
from qemu_remus.core.conversation import State
from qemu_remus.core.errors import RefusalCode
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import Base, DiskName, DiskSpec, EpochNumber, Generation, Role
from tests.message_strategies import hello

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


def forged(message: m.Message, number: int) -> bytes:
    """What a peer without our checks would send."""
    return b"".join(wire.encode(message, number))


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
