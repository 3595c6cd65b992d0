"""A VM on a fake QEMU, attached and tracked, for checkpoints to be taken of.

Rules: after every test's fault the VM is in the state in which its owner wants it, its devices have their own nodes,
and every block that the guest wrote is in some bitmap of ours. ``Rig.see_harmless`` says so in one place.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from qemu_remus.core.model import EpochNumber, Generation, pair_name
from qemu_remus.qemu.attachment import Attachment, open_attachment
from qemu_remus.qemu.capabilities import query_capabilities
from qemu_remus.qemu.client import QmpClient
from qemu_remus.qemu.discover import discover
from qemu_remus.qemu.disks import choose_disks
from qemu_remus.qemu.guardian_client import Guardian
from qemu_remus.qemu.nodes import BitmapIdentity, Kind, kind_of
from tests.fake_qemu import FakeQemu
from tests.faulty_qmp import FaultyQmp

PAIR = pair_name("web")
GENERATION = Generation(UUID(int=7))
BLOCK = 4096


def identity(number: int) -> BitmapIdentity:
    return BitmapIdentity(PAIR, GENERATION, None, EpochNumber(number))


def named(number: int) -> Callable[[object], BitmapIdentity]:
    """Names the bitmap that takes over whatever is found."""
    return lambda _: identity(number)


class FakeGuardian:
    """Says what it was asked for, and resumes the fake."""

    def __init__(self, qemu: FakeQemu) -> None:
        self._qemu = qemu
        self.calls: list[str] = []

    async def arm(self, seconds: float = 0.0) -> None:
        assert seconds > 0
        self.calls.append("arm")

    def disarm(self) -> None:
        self.calls.append("disarm")

    async def resume_now(self, timeout: float = 0.0) -> None:
        self.calls.append("resume")
        self._qemu.execute("cont", {})


@dataclass
class Rig:
    """A VM with disks a and b, attached and tracked in bitmap 1."""

    qemu: FakeQemu
    client: FaultyQmp
    attachment: Attachment
    guardian: FakeGuardian

    async def capture(self, *, pause: bool = True, finished: int = 1) -> Any:
        return await self.attachment.capture(identity(finished), identity(finished + 1), pause=pause)

    def see_harmless(self, written: set[int], *, status: str = "running") -> None:
        assert self.qemu.aborted == ""
        assert self.qemu.status == status
        assert [device.node for device in self.qemu.devices.values()] == ["a-node", "b-node"]
        assert [name for name in self.qemu.nodes if kind_of(name) in (Kind.FILTER, Kind.ACCESS)] == []
        assert self.qemu.exports == {}
        assert written <= recorded(self.qemu, "a-node")


def recorded(qemu: FakeQemu, node: str) -> set[int]:
    """Blocks that are in some bitmap of ours."""
    return set[int]().union(*(bitmap.dirty for bitmap in qemu.nodes[node].bitmaps.values()))


@asynccontextmanager
async def attached(
    qemu: FakeQemu, directory: Path, *, guardian: FakeGuardian | None = None, track: bool = True
) -> AsyncIterator[Rig]:
    async with qemu.connect() as plain, attach(qemu, plain, directory, guardian or FakeGuardian(qemu)) as rig:
        if track:
            await rig.attachment.start_tracking(identity(1))
        yield rig


@asynccontextmanager
async def attach(qemu: FakeQemu, plain: QmpClient, directory: Path, guardian: FakeGuardian) -> AsyncIterator[Rig]:
    client = FaultyQmp(plain)
    capabilities = await query_capabilities(plain)
    disks = choose_disks(await discover(plain, capabilities), None, capabilities)
    async with open_attachment(
        client.as_client(),
        capabilities,
        PAIR,
        disks,
        fleece_dir=directory,
        runtime_dir=directory,
        guardian=cast(Guardian, guardian),
    ) as attachment:
        yield Rig(qemu, client, attachment, guardian)


def list_fleeces(directory: Path) -> list[Path]:
    return list(directory.glob("*.fleece"))


def directory_entries(directory: Path) -> list[Path]:
    return list(directory.iterdir())
