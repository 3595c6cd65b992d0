"""Every kind of disk that QEMU offers: under load it is replicated exactly, or refused by name with what would help.

One row of :data:`KINDS` each. What the guest sees of the primary's disk is put aside with that QEMU's own ``qemu-img``,
through all formats and filters, and compared with the secondary's raw image byte for byte.

Disks in iothreads are written by a guest where QEMU is older than 10.0, which does not survive ``Machine.qemu_io`` on
them. Under a later one without KVM a guest would hang (``IOTHREAD_STOP_TCG``); there what ``qemu_io`` writes goes
through the thread.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from integration.harness import (
    Disk,
    GuestImage,
    Interface,
    Machine,
    background,
    qemu_remus,
    start_block_load,
    start_machine,
    start_primary,
    start_process,
    start_secondary,
)
from integration.pair import KIB, MIB, Scribbler, fill, image, pair_of, scribble
from integration.process import listens, run
from integration.qemus import OTHERS, Qemu, selected
from qemu_remus.qemu.faults import Fault, has_fault

SIZE = 12 * MIB
ODD = SIZE + 22_016
SECRET = "not a real secret"

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class AnyDisk(Disk):
    """A disk whose arguments are written out.

    :param words: of QEMU's command line.
    :param length: what the guest sees, in bytes.
    :param source: how ``qemu-img`` is told of it, as an image-opts JSON without ``read-only``.
    """

    words: tuple[str, ...] = ()
    length: int = SIZE
    source: str = ""

    @property
    def size(self) -> int:
        return self.length

    def arguments(self) -> Iterator[str]:
        yield from self.words

    async def copy_to(self, target: Path) -> None:
        img = selected().img
        secret = ("--object", f"secret,id=key,data={SECRET}")
        command = [*img, "convert", "-U", *secret, "-O", "raw", f"json:{self.source}", str(target)]
        (await run(command, scratch=self.image.parent)).check()


@dataclass(frozen=True)
class Setting:
    """Where a kind's disks are made."""

    directory: Path
    qemu: Qemu

    @property
    def image(self) -> Path:
        return self.image_of("d")

    def image_of(self, name: str) -> Path:
        return self.directory / f"{name}.img"

    def raw(self, size: int = SIZE, name: str = "d") -> Json:
        with self.image_of(name).open("wb") as file:
            file.truncate(size)
            # a disk with something on it, the two of a pair not the same
            file.seek(5 * MIB)
            file.write(name.encode() * MIB)
        return {"driver": "raw", "file": self.file(self.image_of(name))}

    def file(self, path: Path | None = None, **options: Any) -> Json:
        return {"driver": "file", "filename": str(path or self.image), "discard": "unmap", **options}

    async def make(self, form: str, *options: str, path: Path | None = None, size: int = SIZE) -> Path:
        where = path or self.image
        secret = ("--object", f"secret,id=key,data={SECRET}")
        command = [*self.qemu.img, "create", "-q", *secret, "-f", form, *options, str(where), str(size)]
        (await run(command, scratch=self.directory)).check()
        return where


def blockdev(setting: Setting, node: Json, *device: str, length: int = SIZE, before: Sequence[str] = ()) -> AnyDisk:
    """A node and a device over it, both of our own naming."""
    top = {"node-name": "d-node", "discard": "unmap", **node}
    words = (*before, "-blockdev", json.dumps(top), *(device or ("-device", "virtio-blk-pci,drive=d-node,id=d")))
    # qemu-img finds the same data below filters that limit or debug
    below = node["file"] if node["driver"] == "throttle" else node
    return AnyDisk("d", setting.image, words=words, length=length, source=json.dumps(below))


def drive(setting: Setting, options: str, *device: str) -> AnyDisk:
    """A ``-drive``, which QEMU names the nodes of."""
    source = setting.raw()
    words = ("-drive", f"file={setting.image},format=raw,discard=unmap,id=d{options}", *device)
    return AnyDisk("d", setting.image, words=words, source=json.dumps(source))


def alike(
    setting: Setting,
    interface: Interface,
    devices: Mapping[str, str | Json],
    before: Sequence[str] = (),
) -> list[AnyDisk]:
    """A disk of each name, all on what ``before`` makes.

    :param devices: by the disk's name, what ``-device`` is told; ``drive`` and ``id`` are added.
    """
    disks = []
    for number, (name, device) in enumerate(devices.items()):
        node = setting.raw(SIZE + 512 * number, name) | {"node-name": f"{name}-node", "discard": "unmap"}
        if isinstance(device, str):
            device = f"{device},drive={name}-node,id={name}"
        else:
            device = json.dumps(device | {"drive": f"{name}-node", "id": name})
        words = ("-blockdev", json.dumps(node), "-device", device)
        below = json.dumps({"driver": "raw", "file": setting.file(setting.image_of(name))})
        disks.append(
            AnyDisk(
                name,
                setting.image_of(name),
                interface=interface,
                words=words if number else (*before, *words),
                length=SIZE + 512 * number,
                source=below,
            )
        )
    return disks


MAPPING = [{"iothread": "t0"}, {"iothread": "t1"}]


def threads(count: int) -> list[str]:
    return [word for number in range(count) for word in ("-object", f"iothread,id=t{number}")]


# --- devices


async def virtio_blk(setting: Setting) -> AnyDisk:
    return blockdev(setting, setting.raw())


async def virtio_scsi(setting: Setting) -> AnyDisk:
    return blockdev(setting, setting.raw(), "-device", "virtio-scsi-pci,id=hba", "-device", "scsi-hd,drive=d-node,id=d")


async def lsi_scsi(setting: Setting) -> AnyDisk:
    return blockdev(setting, setting.raw(), "-device", "lsi53c895a,id=hba", "-device", "scsi-hd,drive=d-node,id=d")


async def ide(setting: Setting) -> AnyDisk:
    return blockdev(setting, setting.raw(), "-device", "ide-hd,drive=d-node,id=d")


async def ahci(setting: Setting) -> AnyDisk:
    return blockdev(setting, setting.raw(), "-device", "ahci,id=sata", "-device", "ide-hd,drive=d-node,id=d,bus=sata.0")


async def nvme(setting: Setting) -> AnyDisk:
    return blockdev(setting, setting.raw(), "-device", "nvme,serial=d,drive=d-node,id=d")


async def usb_storage(setting: Setting) -> AnyDisk:
    return blockdev(setting, setting.raw(), "-device", "qemu-xhci", "-device", "usb-storage,drive=d-node,id=d")


async def usb_uas(setting: Setting) -> list[AnyDisk]:
    before = ("-device", "qemu-xhci", "-device", "usb-uas,id=uas")
    devices = {name: f"scsi-hd,bus=uas.0,scsi-id=0,lun={lun}" for lun, name in enumerate("de")}
    return alike(setting, Interface.SCSI, devices, before)


async def pflash(setting: Setting) -> AnyDisk:
    """Where UEFI keeps its variables; small, and never the only disk of a VM."""
    size = 7 * MIB
    places = (*setting.qemu.system, "/usr/share/seabios")
    bios = next(path for place in places if (path := Path(place) / "bios-256k.bin").exists())
    source = setting.raw(size)
    code = ("-drive", f"if=pflash,unit=0,readonly=on,format=raw,file={bios}")
    words = (*code, "-drive", f"if=pflash,unit=1,format=raw,id=d,file={setting.image}")
    return AnyDisk("d", setting.image, words=words, length=size, source=json.dumps(source))


# --- in iothreads


async def virtio_blk_in_a_thread(setting: Setting) -> list[AnyDisk]:
    return alike(setting, Interface.VIRTIO, {"d": "virtio-blk-pci,iothread=t0"}, threads(1))


async def two_virtio_blk_in_one_thread(setting: Setting) -> list[AnyDisk]:
    return alike(setting, Interface.VIRTIO, dict.fromkeys("de", "virtio-blk-pci,iothread=t0"), threads(1))


async def virtio_blk_in_threads(setting: Setting) -> list[AnyDisk]:
    device = {"driver": "virtio-blk-pci", "num-queues": 2, "iothread-vq-mapping": MAPPING}
    return alike(setting, Interface.VIRTIO, dict.fromkeys("de", device), threads(2))


async def virtio_scsi_in_a_thread(setting: Setting) -> list[AnyDisk]:
    before = [*threads(1), "-device", "virtio-scsi-pci,id=hba,iothread=t0"]
    return alike(setting, Interface.SCSI, {"d": "scsi-hd,bus=hba.0"}, before)


async def two_virtio_scsi_in_a_thread(setting: Setting) -> list[AnyDisk]:
    before = [*threads(1), "-device", "virtio-scsi-pci,id=hba,iothread=t0"]
    return alike(setting, Interface.SCSI, dict.fromkeys("de", "scsi-hd,bus=hba.0"), before)


async def virtio_scsi_in_threads(setting: Setting) -> list[AnyDisk]:
    hba = {"driver": "virtio-scsi-pci", "id": "hba", "num_queues": 2, "iothread-vq-mapping": MAPPING}
    # devices in JSON are made after those in words, so all of them
    disks: dict[str, str | Json] = {name: {"driver": "scsi-hd", "bus": "hba.0"} for name in "de"}
    before = [*threads(2), "-device", json.dumps(hba)]
    return alike(setting, Interface.SCSI, disks, before)


# --- several on one controller


async def two_virtio_scsi(setting: Setting) -> list[AnyDisk]:
    before = ("-device", "virtio-scsi-pci,id=hba")
    return alike(setting, Interface.SCSI, dict.fromkeys("de", "scsi-hd,bus=hba.0"), before)


async def two_ide(setting: Setting) -> list[AnyDisk]:
    return alike(setting, Interface.IDE, {"d": "ide-hd,bus=ide.0,unit=0", "e": "ide-hd,bus=ide.0,unit=1"})


async def two_ahci(setting: Setting) -> list[AnyDisk]:
    before = ("-device", "ahci,id=sata")
    return alike(setting, Interface.IDE, {"d": "ide-hd,bus=sata.0", "e": "ide-hd,bus=sata.1"}, before)


async def two_nvme_namespaces(setting: Setting) -> list[AnyDisk]:
    before = ("-device", "nvme,id=nvme0,serial=d")
    return alike(setting, Interface.NVME, dict.fromkeys("de", "nvme-ns,bus=nvme0"), before)


async def two_nvme(setting: Setting) -> list[AnyDisk]:
    return alike(setting, Interface.NVME, {"d": "nvme,serial=d", "e": "nvme,serial=e"})


async def drive_virtio(setting: Setting) -> AnyDisk:
    return drive(setting, ",if=virtio")


async def drive_ide(setting: Setting) -> AnyDisk:
    return drive(setting, ",if=ide")


async def drive_none(setting: Setting) -> AnyDisk:
    return drive(setting, ",if=none", "-device", "virtio-blk-pci,drive=d,id=d")


async def drive_usb(setting: Setting) -> AnyDisk:
    return drive(setting, ",if=none", "-device", "qemu-xhci", "-device", "usb-storage,drive=d,id=d")


async def drive_scsi(setting: Setting) -> AnyDisk:
    return drive(setting, ",if=none", "-device", "virtio-scsi-pci,id=hba", "-device", "scsi-hd,drive=d,id=d")


async def drive_ahci(setting: Setting) -> AnyDisk:
    return drive(setting, ",if=none", "-device", "ahci,id=sata", "-device", "ide-hd,drive=d,id=d,bus=sata.0")


async def drive_nvme(setting: Setting) -> AnyDisk:
    return drive(setting, ",if=none", "-device", "nvme,serial=d,drive=d,id=d")


async def sectors_of_4_kib(setting: Setting) -> AnyDisk:
    device = "virtio-blk-pci,drive=d-node,id=d,logical_block_size=4096,physical_block_size=4096"
    return blockdev(setting, setting.raw(), "-device", device)


# --- formats


async def qcow2(setting: Setting) -> AnyDisk:
    await setting.make("qcow2")
    return blockdev(setting, {"driver": "qcow2", "file": setting.file()})


async def qcow2_with_backing_chain(setting: Setting) -> AnyDisk:
    base, middle = setting.directory / "base.img", setting.directory / "middle.img"
    await setting.make("raw", path=base)
    with base.open("r+b") as file:
        file.seek(5 * MIB)
        file.write(b"\x77" * MIB)
    await setting.make("qcow2", "-b", str(base), "-F", "raw", path=middle)
    await setting.make("qcow2", "-b", str(middle), "-F", "qcow2")
    return blockdev(setting, {"driver": "qcow2", "file": setting.file()})


async def qcow2_with_data_file(setting: Setting) -> AnyDisk:
    data = setting.directory / "data.img"
    await setting.make("qcow2", "-o", f"data_file={data},data_file_raw=on")
    return blockdev(setting, {"driver": "qcow2", "file": setting.file(), "data-file": setting.file(data)})


async def qcow2_of_odd_size(setting: Setting) -> AnyDisk:
    await setting.make("qcow2", size=ODD)
    return blockdev(setting, {"driver": "qcow2", "file": setting.file()}, length=ODD)


async def luks(setting: Setting) -> AnyDisk:
    await setting.make("luks", "-o", "key-secret=key,iter-time=10")
    node = {"driver": "luks", "file": setting.file(), "key-secret": "key"}
    return blockdev(setting, node, before=("-object", f"secret,id=key,data={SECRET}"))


async def raw_with_offset(setting: Setting) -> AnyDisk:
    setting.raw(SIZE + 3 * MIB)
    return blockdev(setting, {"driver": "raw", "file": setting.file(), "offset": MIB + 512, "size": SIZE})


async def raw_of_odd_size(setting: Setting) -> AnyDisk:
    return blockdev(setting, setting.raw(ODD), length=ODD)


async def over_nbd(setting: Setting) -> AnyDisk:
    setting.raw()
    server = {"type": "unix", "path": str(setting.directory / "nbd")}
    disk = blockdev(setting, {"driver": "raw", "file": {"driver": "nbd", "server": server, "export": ""}})
    # its server has the image open; the same bytes are in the file
    source = json.dumps({"driver": "raw", "file": setting.file()})
    return AnyDisk("d", setting.image, words=disk.words, source=source)


# --- how QEMU is told to treat it


def cached(name: str, **cache: bool) -> Callable[[Setting], Any]:
    async def make(setting: Setting) -> AnyDisk:
        setting.raw()
        write_cache = "off" if name == "writethrough" else "on"
        options = {key.replace("_", "-"): value for key, value in cache.items()}
        node = {"driver": "raw", "cache": options, "file": setting.file(cache=options)}
        device = f"virtio-blk-pci,drive=d-node,id=d,write-cache={write_cache}"
        disk = blockdev(setting, node, "-device", device)
        plain = json.dumps({"driver": "raw", "file": setting.file()})
        return AnyDisk("d", setting.image, words=disk.words, source=plain)

    return make


async def under_a_throttle(setting: Setting) -> AnyDisk:
    node = {"driver": "throttle", "throttle-group": "limit", "file": setting.raw()}
    return blockdev(setting, node, before=("-object", "throttle-group,id=limit,x-iops-total=2000"))


async def limited_by_drive(setting: Setting) -> AnyDisk:
    return drive(setting, ",if=virtio,throttling.iops-total=2000")


@dataclass(frozen=True)
class Kind:
    """A row of the table.

    :param make: makes the images and describes the disks, or the one.
    :param server: an NBD server has to serve the image.
    :param threaded: the disks' I/O runs in iothreads.
    :param since: the first QEMU that has it.
    """

    make: Callable[[Setting], Any]
    server: bool = False
    threaded: bool = False
    since: tuple[int, int, int] = (0, 0, 0)


KINDS = {
    "virtio-blk": Kind(virtio_blk),
    "virtio-scsi": Kind(virtio_scsi),
    "lsi-scsi": Kind(lsi_scsi),
    "ide": Kind(ide),
    "ahci": Kind(ahci),
    "nvme": Kind(nvme),
    "usb-storage": Kind(usb_storage),
    "usb-uas": Kind(usb_uas),
    "pflash": Kind(pflash),
    "virtio-blk-iothread": Kind(virtio_blk_in_a_thread, threaded=True),
    "virtio-blk-two-in-one-iothread": Kind(two_virtio_blk_in_one_thread, threaded=True),
    "virtio-blk-iothreads": Kind(virtio_blk_in_threads, threaded=True, since=(9, 0, 0)),
    "virtio-scsi-iothread": Kind(virtio_scsi_in_a_thread, threaded=True),
    "virtio-scsi-two-in-one-iothread": Kind(two_virtio_scsi_in_a_thread, threaded=True),
    "virtio-scsi-iothreads": Kind(virtio_scsi_in_threads, threaded=True, since=(10, 0, 0)),
    "virtio-scsi-two": Kind(two_virtio_scsi),
    "ide-two": Kind(two_ide),
    "ahci-two": Kind(two_ahci),
    "nvme-two": Kind(two_nvme),
    "nvme-namespaces": Kind(two_nvme_namespaces),
    "drive-virtio": Kind(drive_virtio),
    "drive-ide": Kind(drive_ide),
    "drive-none": Kind(drive_none),
    "drive-usb": Kind(drive_usb),
    "drive-scsi": Kind(drive_scsi),
    "drive-ahci": Kind(drive_ahci),
    "drive-nvme": Kind(drive_nvme),
    "sectors-of-4-kib": Kind(sectors_of_4_kib),
    "qcow2": Kind(qcow2),
    "qcow2-backing-chain": Kind(qcow2_with_backing_chain),
    "qcow2-data-file": Kind(qcow2_with_data_file),
    "qcow2-odd-size": Kind(qcow2_of_odd_size),
    "luks": Kind(luks),
    "raw-offset": Kind(raw_with_offset),
    "raw-odd-size": Kind(raw_of_odd_size),
    "nbd": Kind(over_nbd, server=True),
    "cache-none": Kind(cached("none", direct=True)),
    "cache-writethrough": Kind(cached("writethrough", direct=False)),
    "cache-unsafe": Kind(cached("unsafe", no_flush=True)),
    "throttle-filter": Kind(under_a_throttle),
    "throttle-drive": Kind(limited_by_drive),
}
QUICK = ("qcow2-backing-chain", "throttle-filter", "usb-storage", "virtio-scsi-two-in-one-iothread")
"""Of those that no other test has, one of each sort; the others are left to ``make check-all``."""


@asynccontextmanager
async def served(setting: Setting) -> AsyncIterator[None]:
    """An NBD server for the image."""
    path = setting.directory / "nbd"
    command = [*setting.qemu.nbd, "--persistent", "--shared=4", "-f", "raw", "--discard=unmap", f"--socket={path}"]
    async with start_process([*command, str(setting.image)], out=setting.directory / "server.out") as process:
        with trio.fail_after(30):
            while not listens(path):
                assert process.running, process.tail()
                await trio.sleep(0.01)
        yield


async def ways(scratch: Path, machine: Machine) -> dict[str, tuple[str, bool]]:
    """How each disk would be read, and whether it is in an iothread."""
    done = await qemu_remus("probe", "--qmp", str(machine.qmp_path), "--json", scratch=scratch)
    disks = json.loads(done.check().out)["disks"]
    return {disk["name"]: (disk["way"], disk["iothread"]) for disk in disks if disk["way"]}


async def turns(machine: Machine) -> int:
    """How often the iothreads have waited for work, all together."""
    threads = await machine.qmp.execute("query-iothreads")
    return sum(waits_of(Path(f"/proc/{machine.pid}/task/{thread['thread-id']}/status")) for thread in threads)


def waits_of(status: Path) -> int:
    return int(status.read_text().partition("\nvoluntary_ctxt_switches:")[2].split()[0])


@asynccontextmanager
async def loaded(machine: Machine, by_guest: bool) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Writes, zeroes and discards on every disk.

    :return: ends it; a guest's goes on, for the VM is paused soon.
    """
    if by_guest:
        for number, disk in enumerate(machine.disks, 1):
            await start_block_load(machine, disk.name, start=0, size=6 * MIB, rate=200, seed=number)
        yield trio.lowlevel.checkpoint
        return
    await fill(machine)
    async with background() as nursery:
        scribbler = Scribbler(machine)
        nursery.start_soon(scribbler.run)
        yield scribbler.end


@pytest.fixture
def kind(qemu: Qemu, name: str) -> Kind:
    found = KINDS[name]
    if qemu.version < found.since:
        pytest.skip(f"not in this QEMU, {qemu}")
    return found


@pytest.mark.every_qemu(slow=OTHERS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in KINDS]
)
async def test_a_disk_of_any_kind_is_replicated_exactly_under_load(
    scratch: Path, guest: GuestImage, qemu: Qemu, kind: Kind
) -> None:
    setting = Setting(scratch, qemu)
    made = await kind.make(setting)
    disks: list[AnyDisk] = made if isinstance(made, list) else [made]
    fragile = kind.threaded and has_fault(qemu.version, Fault.IOTHREAD_GRAPH)
    async with AsyncExitStack() as stack:
        if kind.server:
            await stack.enter_async_context(served(setting))
        pair = await stack.enter_async_context(pair_of(scratch, disks, guest=guest if fragile else None))
        way = "push" if fragile else "pull"
        assert await ways(scratch, pair.machine) == {disk.name: (way, kind.threaded) for disk in disks}
        before = await turns(pair.machine)
        end = await stack.enter_async_context(loaded(pair.machine, by_guest=fragile))
        await pair.start_primary()
        await pair.primary.protected()
        status = await pair.primary.progress(6)
        assert {disk["name"] for disk in status["disks"]} == {disk.name for disk in disks}
        await end()
        if kind.threaded:
            assert await turns(pair.machine) > before + 100
        await pair.see_exact_after_crash()
        assert all(pair.targets[disk.name].stat().st_size == disk.size for disk in disks)


@pytest.mark.slow
@pytest.mark.every_qemu
async def test_a_sparse_disk_of_2_tib_is_replicated_to_a_sparse_image(scratch: Path, qemu: Qemu) -> None:
    """Images are preallocated on the secondary unless it is told otherwise; few have room for this one."""
    sparse = ["--target-option", "d=preallocation=off"]
    disk, copy = image(scratch, "d", 2 << 40), scratch / "d.qcow2"
    async with (
        start_machine(scratch, [disk], memory_mb=32) as machine,
        start_secondary(scratch, {"d": f"qcow2:{copy}"}, options=sparse) as secondary,
        start_primary(scratch, machine.qmp_path, secondary.address) as primary,
    ):
        await fill(machine)
        await primary.protected(timeout=300)
        for offset in (3 << 30, 1 << 40, (2 << 40) - 5 * MIB):
            await machine.qemu_io("d", f"write -P 0x5b {offset + 512} 200k")
        await scribble(machine, 7)
        await machine.pause()
        await primary.progress(3)
        await primary.kill()
        await machine.kill()
        await secondary.wait_until(lambda status: status["connection"] != "connected")
        (await qemu_remus("failover", "--control", str(secondary.control), scratch=scratch)).check()
    compare = [*qemu.img, "compare", "-f", "raw", "-F", "qcow2", str(disk.image), str(copy)]
    (await run(compare, scratch=scratch, timeout=300)).check()


REFUSED = {
    "cd-rom": (
        ["-drive", "if=none,id=cd,media=cdrom,file={image},format=raw", "-device", "ide-cd,drive=cd,id=d"],
        "CD-ROM",
    ),
    "floppy": (["-drive", "if=none,id=fd,file={image},format=raw", "-device", "floppy,drive=fd,id=d"], "removable"),
    "read-only": (
        [
            "-blockdev",
            "driver=file,filename={image},node-name=n,read-only=on",
            "-device",
            "virtio-blk-pci,drive=n,id=d",
        ],
        "read-only",
    ),
    "no-device": (["-blockdev", "driver=file,filename={image},node-name=n"], "no disk"),
}


@pytest.mark.every_qemu(slow=OTHERS)
@pytest.mark.parametrize("name", REFUSED)
async def test_a_disk_that_cannot_be_replicated_is_refused_by_name(scratch: Path, name: str) -> None:
    words, why = REFUSED[name]
    image = scratch / "d.img"
    with image.open("wb") as file:
        file.truncate(1440 * KIB)
    extra = [word.format(image=image) for word in words]
    async with start_machine(scratch, [], accelerator="tcg", memory_mb=32, extra=extra) as machine:
        state, control = scratch / "state", scratch / "control"
        done = await qemu_remus(
            *("primary", "--qmp", str(machine.qmp_path), "--peer", "127.0.0.1:1", "--state-dir", str(state)),
            *("--control", str(control), "--disk", "x=d" if name != "no-device" else "x=n"),
            scratch=scratch,
        )
        assert done.status == 2
        assert why in done.err
        await machine.running()
