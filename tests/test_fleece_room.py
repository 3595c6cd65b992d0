"""Where an epoch's fleeces are, and how much memory they may take: never more than the VM can spare."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from qemu_remus.core.errors import FleeceTooSmall
from qemu_remus.core.model import BitmapName, DiskName, Generation, NodeName, PairName, QdevPath
from qemu_remus.qemu.client import Done
from qemu_remus.qemu.disks import VmDisk
from qemu_remus.qemu.epoch import CLUSTER, BitmapLook
from qemu_remus.qemu.fleece import FleeceFile
from qemu_remus.qemu.fleece_room import FleeceRoom
from qemu_remus.qemu.memory_room import memory_room
from qemu_remus.qemu.nodes import BitmapIdentity
from tests.message_strategies import GENERATIONS

MIB = 1 << 20
DISK = VmDisk(
    DiskName("vda"),
    "",
    QdevPath("vda"),
    NodeName("vda"),
    1 << 40,
    read_only=False,
    removable=False,
    driver="raw",
    filename="",
)
FINISHED = BitmapIdentity(PairName("vm"), Generation(GENERATIONS[0]), None, 1)  # type: ignore[arg-type]


class Counting:
    """A QEMU that counts so many bytes in dirty clusters."""

    def __init__(self, exact: int) -> None:
        self.exact = exact

    async def execute_many(self, commands: Any) -> list[Done]:
        name = commands[0].arguments["actions"][0]["data"]["name"]
        bitmap = {"name": name, "count": self.exact, "granularity": CLUSTER, "recording": False, "busy": False}
        bitmap |= {"persistent": False, "inconsistent": False}
        nodes = [{"node-name": "vda", "drv": "raw", "dirty-bitmaps": [bitmap]}]
        return [Done(None, 0), Done(nodes, 0), Done(None, 0)]


def dirty(clusters: int) -> dict[int, BitmapLook]:
    return {0: BitmapLook(BitmapName("b"), clusters * 4096, 4096, recording=True, busy=False, inconsistent=False)}


def room(memory: int | None, *, files: int = 1 << 40, exact: int = 0) -> FleeceRoom:
    probe = None if memory is None else lambda: memory
    return FleeceRoom(Counting(exact), [DISK], lambda: files, probe)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("memory", "clusters", "in_memory"),
    [(None, 1, False), (0, 1, False), (32 * MIB, 256, True), (32 * MIB, 257, False)],
)
async def test_memory_is_used_where_twice_of_what_may_be_needed_is_there(
    memory: int | None, clusters: int, in_memory: bool
) -> None:
    rooms = room(memory)
    await rooms.choose(FINISHED, dirty(clusters))
    assert rooms.in_memory == in_memory


async def test_a_disk_that_is_dirtied_in_the_last_moment_is_kept_in_memory_too() -> None:
    rooms = room(32 * MIB)
    await rooms.choose(FINISHED, {})
    assert rooms.in_memory
    await rooms.check(FINISHED, dirty(1))


@pytest.mark.parametrize(("exact", "in_memory"), [(16 * MIB, True), (17 * MIB, False)])
async def test_where_there_is_time_for_it_what_may_not_fit_is_counted(exact: int, in_memory: bool) -> None:
    rooms = room(32 * MIB, exact=exact)
    await rooms.choose(FINISHED, dirty(4096), count=True)
    assert rooms.in_memory == in_memory


async def test_what_the_guest_changed_meanwhile_may_take_the_rest_and_no_more() -> None:
    rooms = room(32 * MIB, exact=33 * MIB)
    await rooms.choose(FINISHED, dirty(256))
    await rooms.check(FINISHED, dirty(512))
    with pytest.raises(FleeceTooSmall):
        await rooms.check(FINISHED, dirty(513))


async def test_each_epoch_chooses_anew() -> None:
    rooms = room(32 * MIB)
    await rooms.choose(FINISHED, dirty(1000))
    assert not rooms.in_memory
    await rooms.choose(FINISHED, dirty(10))
    assert rooms.in_memory


async def test_an_epoch_for_which_there_is_no_room_anywhere_is_lost() -> None:
    with pytest.raises(FleeceTooSmall):
        await room(MIB, files=MIB, exact=2 * MIB).choose(FINISHED, dirty(1000))


# --- how much there is -----------------------------------------------------------------------------------------------


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A machine with 8 GiB of free memory; process 7 is in group ``/machine/vm``."""
    (tmp_path / "proc" / "7").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:  99999999 kB\nMemAvailable:    8388608 kB\n")
    (tmp_path / "proc" / "7" / "cgroup").write_text("0::/machine/vm\n")
    (tmp_path / "groups" / "machine" / "vm").mkdir(parents=True)
    return tmp_path


def limits(group: Path, limit: str, usage: int, *, inactive: int = 0) -> None:
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{usage}\n")
    (group / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\n")


def measured(host: Path, limit: int | None = None) -> int:
    return memory_room(7, limit, proc=host / "proc", cgroups=host / "groups")


def test_a_quarter_of_what_is_free_may_be_used_or_what_was_asked_for(host: Path) -> None:
    assert measured(host) == 2048 * MIB
    assert measured(host, 64 * MIB) == 64 * MIB
    assert measured(host, 1 << 40) == 2048 * MIB


def test_the_limit_of_qemus_group_counts_and_of_those_above(host: Path) -> None:
    limits(host / "groups" / "machine" / "vm", "max", 300 * MIB)
    assert measured(host) == 2048 * MIB
    limits(host / "groups" / "machine", str(1024 * MIB), 700 * MIB)
    assert measured(host) == 81 * MIB
    limits(host / "groups" / "machine" / "vm", str(400 * MIB), 390 * MIB, inactive=30 * MIB)
    assert measured(host) == 10 * MIB
    limits(host / "groups" / "machine" / "vm", str(400 * MIB), 401 * MIB)
    assert measured(host) == 0


def test_groups_of_the_first_version_count(host: Path) -> None:
    (host / "proc" / "7" / "cgroup").write_text("12:cpu,memory:/vm\n1:name=systemd:/vm\n")
    group = host / "groups" / "memory" / "vm"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text(str(100 * MIB))
    (group / "memory.usage_in_bytes").write_text(str(60 * MIB))
    assert measured(host) == 10 * MIB


def test_where_nothing_is_known_nothing_is_used(tmp_path: Path) -> None:
    assert memory_room(7, None, proc=tmp_path, cgroups=tmp_path) == 0


def test_this_machine_has_some() -> None:
    assert memory_room(os.getpid(), None) > 0


# --- a fleece in memory ----------------------------------------------------------------------------------------------


def test_a_fleece_in_memory_has_no_name_and_can_be_emptied() -> None:
    fleece = FleeceFile.in_memory(MIB + 512)
    try:
        assert fleece.size == MIB + CLUSTER
        os.pwrite(fleece.descriptor, b"x" * 4096, 0)
        assert fleece.allocated() > 0
        fleece.empty()
        assert fleece.allocated() == 0
        assert os.fstat(fleece.descriptor).st_size == fleece.size
        fleece.unlink()
    finally:
        fleece.close()
