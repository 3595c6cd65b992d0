"""What the primary tells of its disks: never more than its machine knows, though the attachment may be ahead of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from qemu_remus.core import messages as m
from qemu_remus.core import primary_machine as machine
from qemu_remus.core.commands import DiskChanged
from qemu_remus.core.model import Connection, DiskName, DiskSpec, DiskStanding, NodeName, PairName, QdevPath
from qemu_remus.core.primary_machine import Phase, Surveyed, step
from qemu_remus.core.report import Pause
from qemu_remus.core.settings import Address, PrimaryConfig
from qemu_remus.primary.telling import Telling
from qemu_remus.qemu.disks import VmDisk
from tests.primary_machine.states import DISKS, at

HERE = Path("/nowhere")
CONFIG = PrimaryConfig(PairName("vm"), HERE, Address("host", 1), None, 0.2, HERE, HERE, HERE, HERE)


def vm_disk(name: DiskName, size: int) -> VmDisk:
    return VmDisk(name, "", QdevPath(f"/{name}"), NodeName(f"{name}-node"), size, False, False, "raw", "")


@dataclass
class Attached:
    disks: tuple[VmDisk, ...] = tuple(vm_disk(disk.name, disk.size) for disk in DISKS)


class Control:
    def __init__(self) -> None:
        self.disks: list[DiskChanged] = []

    def emit(self, _: object, data: object) -> None:
        if isinstance(data, DiskChanged):
            self.disks.append(data)


def told_with(attached: Attached, control: Control) -> Telling:
    surveyor = SimpleNamespace(outside=())
    link = SimpleNamespace(connection=Connection.CONNECTED, peer_numbers=m.Heartbeat(), bytes_sent=0, bytes_received=0)
    work = SimpleNamespace(dirty_bytes=0, progress=None, pauses=SimpleNamespace(report=Pause))
    return Telling(CONFIG, *cast(Any, (attached, surveyor, link, work, control)))


def test_disks_that_are_being_surveyed_are_told_as_they_were_before() -> None:
    attached, control = Attached(), Control()
    telling = told_with(attached, control)
    idle = at(Phase.IDLE)
    telling.tell(idle, idle)
    before = telling.report(idle).disks
    surveying, _ = step(idle, machine.DisksChanged())
    assert surveying.phase is Phase.SURVEY
    telling.tell(idle, surveying)
    # the work is done, and the machine has not heard of it
    disks = (replace(DISKS[0], size=2 * DISKS[0].size), *DISKS[1:], DiskSpec(DiskName("new"), 1 << 20))
    attached.disks = tuple(vm_disk(disk.name, disk.size) for disk in disks)
    telling.tell(surveying, surveying)
    assert telling.report(surveying).disks == before
    assert control.disks == []
    after, _ = step(surveying, Surveyed(True, disks, ((),) * len(disks), "other disks"))
    telling.tell(surveying, after)
    assert [(disk.name, disk.state) for disk in telling.report(after).disks] == [
        ("system", DiskStanding.SYNCING),
        ("data", DiskStanding.PROTECTED),
        ("new", DiskStanding.SYNCING),
    ]
    assert [told.disk for told in control.disks] == ["system", "new"]
