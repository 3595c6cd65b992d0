"""One slice of a verification: what is read, asked, looked up in the bitmap and sent, in this order."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from qemu_remus.core import messages as m
from qemu_remus.core import primary_machine as machine
from qemu_remus.core.errors import LinkLost, NbdConnectionLost, QemuRemusError
from qemu_remus.core.extents import Extent, coalesce
from qemu_remus.core.model import EpochNumber, Generation, PairName
from qemu_remus.core.primary_machine import Opened, SliceVerified
from qemu_remus.core.verification import COARSE, FINE, SLICE_DATA, SLICE_DATA_LEAST, SLICE_SPAN, Findings, Piece
from qemu_remus.nbd.batches import BATCH_BYTES, Batch
from qemu_remus.primary import verifier as module
from qemu_remus.primary.outgoing import OutgoingEpoch
from qemu_remus.primary.verifier import PATIENCE, Verifier
from qemu_remus.qemu.attachment import Attachment
from qemu_remus.qemu.nodes import BitmapIdentity
from tests.primary_machine.states import recording
from tests.test_comparison_primary import DISK, Secondary, is_zero, serving

KIB, MIB = 1 << 10, 1 << 20
IDENTITY = BitmapIdentity(PairName("vm"), Generation(UUID(int=1)), EpochNumber(7), EpochNumber(8))


@dataclass
class Vm:
    """The VM's side of QEMU: a live disk and what its bitmap holds.

    :param after_reading: done when a part was read, as a guest that writes.
    :param pause: seconds for each batch.
    """

    live: bytearray
    dirty: list[Extent] = field(default_factory=list)
    after_reading: Callable[[Vm], None] = lambda _: None
    pause: float = 0
    failure: QemuRemusError | None = None
    looks: int = 0

    @property
    def disks(self) -> Any:
        return {DISK: SimpleNamespace(name="a", size=len(self.live))}

    @asynccontextmanager
    async def read_part(self, part: Extent) -> AsyncIterator[AsyncIterator[Batch]]:
        yield _Reading(self, part)

    async def written(self, identity: BitmapIdentity, part: Extent) -> tuple[Extent, ...]:
        assert identity == IDENTITY
        self.looks += 1
        return tuple(self.dirty)

    def write(self, offset: int, data: bytes) -> None:
        self.live[offset : offset + len(data)] = data
        start, end = offset // FINE * FINE, -(-(offset + len(data)) // FINE) * FINE
        self.dirty.append(Extent(DISK, start, end - start))


class _Reading:
    """The batches of a part, as the guest lets them be."""

    def __init__(self, vm: Vm, part: Extent) -> None:
        self._vm = vm
        self._at = part.offset
        self._end = min(part.end, len(vm.live))

    def __aiter__(self) -> _Reading:
        return self

    async def __anext__(self) -> Batch:
        await trio.sleep(self._vm.pause)
        if self._vm.failure is not None:
            raise self._vm.failure
        if self._at >= self._end:
            raise StopAsyncIteration
        start, self._at = self._at, min(self._at + BATCH_BYTES, self._end)
        content = bytes(self._vm.live[start : self._at])
        pieces = [content[at : at + FINE] for at in range(0, len(content), FINE)]
        extents = coalesce(
            Extent(DISK, start + at * FINE, len(piece), is_zero(piece)) for at, piece in enumerate(pieces)
        )
        batch = Batch(tuple(extents), b"".join(piece for piece in pieces if not is_zero(piece)))
        self._vm.after_reading(self._vm)
        return batch


class Sent:
    """What has gone into the epoch."""

    def __init__(self) -> None:
        self.messages: list[m.EpochExtents] = []

    async def send(self, message: m.Message) -> None:
        await trio.lowlevel.checkpoint()
        assert isinstance(message, m.EpochExtents)
        self.messages.append(message)

    def apply(self, image: bytearray) -> None:
        for message in self.messages:
            at = 0
            for extent in message.extents:
                data = bytes(extent.length) if extent.zero else bytes(message.data[at : at + extent.length])
                at += extent.payload
                image[extent.offset : extent.end] = data


def noise(size: int, seed: int = 1) -> bytearray:
    return bytearray(random.Random(seed).randbytes(size))


def piece_of(size: int, start: int = 0, block: int = COARSE, data: int = SLICE_DATA) -> Piece:
    return Piece(Extent(DISK, start, min(SLICE_SPAN, size - start)), block, data)


@pytest.fixture(autouse=True)
def no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """How slow this machine is must not matter."""
    monkeypatch.setattr(module, "READ_SECONDS", float("inf"))


async def look(
    vm: Vm,
    copy: bytes | bytearray,
    piece: Piece,
    *,
    repair: bool = False,
    sent: Sent | None = None,
    secondary: Secondary | None = None,
) -> SliceVerified:
    secondary = secondary or Secondary(bytes(copy))
    verifier = Verifier(cast(Attachment, vm), secondary.comparison)
    effect = machine.VerifySlice(piece, recording(7, 8), Opened(2, 100, 3), repair)
    epoch = OutgoingEpoch(EpochNumber(8), effect.opened, (sent or Sent()).send)
    async with serving(secondary):
        verifier.begin()
        return await verifier.look(effect, IDENTITY, epoch)


async def test_a_part_that_is_the_same_is_known_without_a_look_at_the_bitmap() -> None:
    vm = Vm(noise(2 * MIB + 512))
    result = await look(vm, vm.live, piece_of(len(vm.live)))
    assert result == SliceVerified(Opened(2, 100, 3), Findings(len(vm.live)))
    assert vm.looks == 0


async def test_what_differs_is_told_by_the_4_kib() -> None:
    vm = Vm(noise(MIB + 512))
    copy = bytearray(vm.live)
    for at in (0, 70_000, 70_000 + FINE, MIB + 511):
        copy[at] ^= 1
    result = await look(vm, copy, piece_of(len(copy)))
    assert result.findings.wrong == (
        Extent(DISK, 0, FINE),
        Extent(DISK, 69_632, 2 * FINE),
        Extent(DISK, MIB, 512),
    )
    assert result.findings.written == result.findings.sent == ()


async def test_what_the_guest_has_written_is_no_difference_and_hides_nothing() -> None:
    vm = Vm(noise(MIB))
    copy = bytes(vm.live)
    vm.write(100, b"guest")
    damaged = bytearray(copy)
    damaged[2 * FINE] ^= 1
    result = await look(vm, damaged, piece_of(MIB))
    assert result.findings == Findings(MIB, (Extent(DISK, 2 * FINE, FINE),), (Extent(DISK, 0, FINE),))


async def test_what_it_writes_while_it_is_being_read_is_no_difference_either() -> None:
    vm = Vm(noise(MIB))
    copy = bytes(vm.live)
    rng = random.Random(5)
    vm.after_reading = lambda vm: vm.write(rng.randrange(MIB - 9), b"guest")
    result = await look(vm, copy, piece_of(MIB))
    assert result.findings.wrong == ()


async def test_a_repair_sends_what_was_read_and_tells_zeroes_apart() -> None:
    vm = Vm(noise(MIB + 512))
    vm.live[2 * FINE : 3 * FINE] = bytes(FINE)
    vm.live[MIB:] = bytes(512)
    copy = bytearray(vm.live)
    for at in (FINE, 2 * FINE, 3 * FINE, MIB, *range(300 * KIB, 800 * KIB, 512)):
        copy[at] ^= 1
    sent = Sent()
    result = await look(vm, copy, piece_of(len(copy)), repair=True, sent=sent)
    sent.apply(copy)
    assert copy == vm.live
    zeroes = [extent for message in sent.messages for extent in message.extents if extent.zero]
    assert zeroes == [Extent(DISK, 2 * FINE, FINE, zero=True), Extent(DISK, MIB, 512, zero=True)]
    found = result.findings
    assert sum(extent.length for extent in found.sent) == sum(extent.length for extent in found.wrong)
    assert result.opened.extents == 2 + sum(len(message.extents) for message in sent.messages)
    assert result.opened.payload == 100 + sum(len(message.data) for message in sent.messages)


async def test_a_slice_reads_a_bounded_amount_and_says_how_far_it_came() -> None:
    vm = Vm(noise(12 * MIB + 512))
    result = await look(vm, vm.live, piece_of(len(vm.live)))
    assert result.findings.reached % COARSE == 0
    assert SLICE_DATA <= result.findings.reached <= SLICE_DATA + 256 * KIB


async def test_a_slow_disk_is_read_for_a_short_while_only(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "READ_SECONDS", 0.03)
    vm = Vm(noise(12 * MIB), pause=0.03)
    result = await look(vm, vm.live, piece_of(len(vm.live)))
    assert SLICE_DATA_LEAST <= result.findings.reached <= 4 * SLICE_DATA_LEAST


async def test_zeroes_cost_no_reading() -> None:
    vm = Vm(bytearray(SLICE_SPAN + COARSE))
    result = await look(vm, vm.live, piece_of(len(vm.live)))
    assert result.findings == Findings(SLICE_SPAN)


async def test_another_look_at_a_range_is_by_the_4_kib_from_the_start() -> None:
    vm = Vm(noise(12 * MIB))
    copy = bytearray(vm.live)
    copy[5 * FINE] ^= 1
    copy[8 * MIB] ^= 1
    piece = Piece(Extent(DISK, 3 * FINE, 9 * FINE), FINE, SLICE_DATA)
    result = await look(vm, copy, piece)
    assert result.findings == Findings(12 * FINE, (Extent(DISK, 5 * FINE, FINE),))


async def test_an_interruption_at_once_finds_nothing_and_one_that_is_patient_waits_a_while(
    autojump_clock: MockClock,
) -> None:
    vm = Vm(noise(MIB))
    for patient, expected in ((False, 0.0), (True, PATIENCE)):
        await interrupted(vm, patient, expected)


async def interrupted(vm: Vm, patient: bool, expected: float) -> None:
    """A slice that waits for an answer is interrupted."""
    secondary = Secondary(b"")
    verifier = Verifier(cast(Attachment, vm), secondary.comparison)
    effect = machine.VerifySlice(piece_of(MIB), recording(7, 8), Opened())
    epoch = OutgoingEpoch(EpochNumber(8), Opened(), Sent().send)
    results: list[SliceVerified] = []
    began = trio.current_time()
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            verifier.begin()
            results.append(await verifier.look(effect, IDENTITY, epoch))

        nursery.start_soon(run)
        await trio.testing.wait_all_tasks_blocked()
        verifier.interrupt(patient=patient)
    assert results == [SliceVerified(Opened(), Findings(0))]
    assert trio.current_time() - began == pytest.approx(expected)


async def test_a_lost_link_is_nothing_that_ends_a_verification() -> None:
    vm = Vm(noise(MIB), failure=cast(QemuRemusError, LinkLost("cut")))
    assert await look(vm, vm.live, piece_of(MIB)) == SliceVerified(Opened(2, 100, 3), Findings(0))


async def test_what_cannot_be_read_ends_it_with_the_reason() -> None:
    vm = Vm(noise(MIB), failure=NbdConnectionLost("QEMU has closed the connection"))
    assert "closed the connection" in (await look(vm, vm.live, piece_of(MIB))).problem


async def test_a_disk_that_has_shrunk_ends_it() -> None:
    vm = Vm(noise(MIB))
    result = await look(vm, vm.live, Piece(Extent(DISK, 0, 2 * MIB), COARSE, SLICE_DATA))
    assert "ends at" in result.problem


@given(st.data())
async def test_exactly_the_damage_is_found_wherever_the_guest_writes(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 5)) * COARSE + data.draw(st.sampled_from([0, 512, FINE, FINE + 512]))
    vm = Vm(bytearray(size))
    for at in data.draw(st.lists(st.integers(0, size - 1), max_size=8)):
        vm.live[at] = 7
    copy = bytearray(vm.live)
    blocks = -(-size // FINE)
    written = data.draw(st.sets(st.integers(0, blocks - 1), max_size=20))
    damaged = data.draw(st.sets(st.integers(0, blocks - 1), max_size=20))
    for block in written:
        vm.write(block * FINE, b"\x55")
    for block in damaged:
        copy[block * FINE] ^= 0xAA
    sent = Sent()
    result = await look(vm, copy, piece_of(size), repair=True, sent=sent)
    wrong = {at // FINE for extent in result.findings.wrong for at in range(extent.offset, extent.end, FINE)}
    assert wrong == damaged - written
    sent.apply(copy)
    assert {at // FINE for at in range(size) if copy[at] != vm.live[at]} <= written
