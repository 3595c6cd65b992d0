"""A virtual machine for a test: a real QEMU, from a typed description of its disks, with or without a guest in it.

Owns QEMU's command line and its process. With a guest, commands run in it through :mod:`integration.agent`. Without one
(``guest=None``) the firmware finds nothing to boot and idles; its disks are written with :meth:`Machine.qemu_io`,
through the device's own BlockBackend and thus through a replication filter, as the guest's writes go, and no boot is
waited for.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import trio

from integration.agent import Agent, GuestError, connect
from integration.guest.build import GuestImage, guest_image
from integration.process import Process, background, start_process
from integration.qmp import Qmp, open_qmp

QEMU = os.environ.get("QEMU_REMUS_QEMU", "qemu-system-x86_64")

#: Seconds within which an emulated guest on a busy machine is up; some 5 on an idle one.
BOOT_TIMEOUT = 180.0


class Interface(StrEnum):
    """What kind of disk the guest sees."""

    IDE = "ide"
    VIRTIO = "virtio"
    SCSI = "scsi"
    NVME = "nvme"


class Style(StrEnum):
    """How the disk is written on QEMU's command line."""

    IMPLICIT = "implicit"
    """``-drive if=ide`` or ``if=virtio``: QEMU makes the device, which then has no id."""
    DRIVE = "drive"
    """``-drive if=none`` and ``-device``."""
    BLOCKDEV = "blockdev"
    """``-blockdev`` and ``-device``: no BlockBackend name, node names of our own (``NAME-node``)."""


@dataclass(frozen=True, slots=True)
class Disk:
    """One disk of a machine.

    :param name: id of its device, and of its drive.
    :param image: existing file.
    :param iothread: give it an iothread of its own (virtio and scsi).
    """

    name: str
    image: Path
    interface: Interface = Interface.VIRTIO
    style: Style = Style.BLOCKDEV
    format: str = "raw"
    iothread: bool = False
    read_only: bool = False

    def arguments(self) -> Iterator[str]:
        """What it adds to QEMU's command line."""
        if self.style is Style.BLOCKDEV:
            yield from ("-blockdev", json.dumps(self._node()))
        else:
            kind = self.interface if self.style is Style.IMPLICIT else "none"
            read_only = ",readonly=on" if self.read_only else ""
            yield "-drive"
            yield f"if={kind},id={self.name},file={self.image},format={self.format},discard=unmap{read_only}"
            if self.style is Style.IMPLICIT:
                return
        thread = ""
        if self.iothread:
            yield from ("-object", f"iothread,id={self.name}-thread")
            thread = f",iothread={self.name}-thread"
        drive = f"drive={self.name}-node" if self.style is Style.BLOCKDEV else f"drive={self.name}"
        common = f"{drive},id={self.name}"
        match self.interface:
            case Interface.VIRTIO:
                yield from ("-device", f"virtio-blk-pci,{common}{thread}")
            case Interface.SCSI:
                yield from ("-device", f"virtio-scsi-pci,id={self.name}-bus{thread}")
                yield from ("-device", f"scsi-hd,bus={self.name}-bus.0,{common}")
            case Interface.IDE:
                yield from ("-device", f"ide-hd,{common}")
            case Interface.NVME:
                yield from ("-device", f"nvme,serial={self.name},{common}")

    def _node(self) -> dict[str, Any]:
        file = {"driver": "file", "filename": str(self.image), "node-name": f"{self.name}-file", "discard": "unmap"}
        return {
            "driver": self.format,
            "node-name": f"{self.name}-node",
            "file": file,
            "discard": "unmap",
            "read-only": self.read_only,
        }


class Machine:
    """A running QEMU. Made by :func:`start_machine`.

    :ivar qmp: the tests' own QMP connection.
    :ivar qmp_path: a QMP socket for the controller under test.
    :ivar spare_qmp_path: one more, for another tool.
    :ivar disks: as described, in order.
    :ivar console: file with what the guest wrote to its serial console.
    """

    def __init__(self, process: Process, directory: Path, disks: Sequence[Disk], qmp: Qmp) -> None:
        self.process = process
        self.directory = directory
        self.disks = tuple(disks)
        self.qmp = qmp
        self.qmp_path = directory / "qmp"
        self.spare_qmp_path = directory / "spare-qmp"
        self.console = directory / "console"
        self._agent: Agent | None = None

    async def _boot(self, nursery: trio.Nursery, timeout: float) -> None:
        self._agent = await connect(self.directory / "agent")
        nursery.start_soon(self._agent.receive)
        try:
            with trio.fail_after(timeout):
                await self._agent.ready()
        except (trio.TooSlowError, GuestError) as error:
            text = self.console.read_text(errors="replace") if self.console.exists() else ""
            last = "\n".join(text.splitlines()[-30:])
            raise GuestError(
                f"the guest is not up after {timeout:g} s: {error}\n{last}\n{self.process.tail()}"
            ) from error

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self.process.pid

    @property
    def guest(self) -> Agent:
        """The guest's agent."""
        if self._agent is None:
            raise AssertionError("this machine was started without a guest")
        return self._agent

    async def hmp(self, line: str) -> str:
        """Run a command of the human monitor; what it prints, errors among it, is returned."""
        text: str = await self.qmp.execute("human-monitor-command", {"command-line": line})
        return text

    async def qemu_io(self, disk: str, command: str) -> str:
        """Read or write a disk as its guest would, by a ``qemu-io`` command such as ``write -P 0x5a 64k 4k``.

        Others of use: ``write -z OFFSET LENGTH`` (zeroes), ``discard OFFSET LENGTH``, ``read -P 0x5a OFFSET LENGTH``
        (fails where the contents differ), ``flush``; no others. While the VM is stopped they are done all the same.

        :raise AssertionError: when qemu-io reports anything but success.
        """
        device = (await self.block(disk))["qdev"]
        # qemu-io tells the monitor nothing: what it has to say goes to QEMU's standard output, line by line
        log = self.process.out
        before = log.stat().st_size
        told = await self.hmp(f'qemu-io -d {device} "{command}"')
        text = told + log.read_bytes()[before:].decode(errors="replace")
        # QEMU's own messages come between, such as of an NBD client that has gone; qemu-io's have no such prefix
        text = re.sub(r"^\S*qemu-system-\S+: .*\n?", "", text, flags=re.MULTILINE)
        verb = command.split()[0]
        done = {"write": "wrote", "read": "read", "discard": "discard"}.get(verb)
        success = re.search(rf"^{done} (\d+)/\1 bytes", text, re.MULTILINE) if done else verb == "flush" and not text
        if not success or "failed" in text:
            raise AssertionError(f"qemu-io {command!r} on {disk}: {text.strip()}")
        return text

    async def block(self, disk: str) -> dict[str, Any]:
        """The disk's entry in ``query-block``."""
        entries: list[dict[str, Any]] = await self.qmp.execute("query-block")
        for entry in entries:
            qdev = entry.get("qdev", "")
            if disk in (entry["device"], qdev) or f"/{disk}/" in f"{qdev}/":
                return entry
        raise AssertionError(f"QEMU has no disk {disk}: {entries}")

    async def node(self, disk: str) -> str:
        """Name of the node that the disk's device has at this moment."""
        name: str = (await self.block(disk))["inserted"]["node-name"]
        return name

    async def status(self) -> str:
        """``running``, ``paused``, ..."""
        status: str = (await self.qmp.execute("query-status"))["status"]
        return status

    async def pause(self) -> None:
        """Stop the VM; QEMU flushes its disks. The images are its disks from now on, while it is stopped."""
        await self.qmp.execute("stop")

    async def resume(self) -> None:
        """Let it run."""
        await self.qmp.execute("cont")

    def device_in_guest(self, disk: str) -> str:
        """Path of a disk in the guest, such as ``/dev/vda``."""
        wanted = next(entry for entry in self.disks if entry.name == disk)
        if {Interface.IDE, Interface.SCSI} <= {entry.interface for entry in self.disks}:
            raise AssertionError("with IDE and SCSI disks in one machine, the guest's order of them is not known")
        alike = [entry for entry in self.disks if entry.interface is wanted.interface]
        # QEMU makes the devices of if=virtio after those of -device, those of if=ide before them
        last = wanted.interface is Interface.VIRTIO
        alike.sort(key=lambda entry: (entry.style is Style.IMPLICIT) == last)
        index = alike.index(wanted)
        match wanted.interface:
            case Interface.VIRTIO:
                return f"/dev/vd{chr(ord('a') + index)}"
            case Interface.NVME:
                return f"/dev/nvme{index}n1"
            case Interface.IDE | Interface.SCSI:
                return f"/dev/sd{chr(ord('a') + index)}"

    async def kill(self) -> None:
        """SIGKILL, as when the host dies; returns when it has ended."""
        self.process.kill()
        await self.process.wait()

    async def power_off(self, *, timeout: float = 60.0) -> None:
        """Have the guest write its caches out and switch itself off, and wait for QEMU's end."""
        await self.guest.start("sync; umount -a; poweroff -f")
        await self.process.wait(timeout)


@asynccontextmanager
async def start_machine(
    directory: Path,
    disks: Sequence[Disk],
    *,
    name: str = "vm",
    guest: GuestImage | None = None,
    accelerator: str | None = None,
    memory_mb: int = 192,
    extra: Sequence[str] = (),
    boot_timeout: float = BOOT_TIMEOUT,
) -> AsyncIterator[Machine]:
    """Run a machine for the length of the block; at its end, and whatever ends us, QEMU is killed.

    :param directory: existing, with a short path (it holds sockets); a directory ``name`` is made in it.
    :param guest: boot this and wait until it is up; None: no operating system.
    :param accelerator: ``kvm`` or ``tcg``; by default what :func:`best_accelerator` finds.
    :param extra: more of QEMU's arguments.
    :param boot_timeout: seconds until the guest must be up.
    :raise GuestError: when the guest does not come up; with the console's last lines.
    """
    accelerator = accelerator or await best_accelerator()
    here = directory / name
    here.mkdir()
    with contextlib.closing(_Listeners(here)) as listeners:
        command = _command(name, here, disks, guest, accelerator, memory_mb, listeners)
        async with start_process([*command, *extra], out=here / "log", pass_fds=listeners.fds) as process:
            listeners.close()
            async with _connected(process, here / "harness-qmp") as qmp, background() as nursery:
                machine = Machine(process, here, disks, qmp)
                if guest:
                    await machine._boot(nursery, boot_timeout)
                yield machine


@asynccontextmanager
async def _connected(process: Process, path: Path) -> AsyncIterator[Qmp]:
    async with contextlib.AsyncExitStack() as stack:
        try:
            qmp = await stack.enter_async_context(open_qmp(path))
        except (EOFError, OSError) as error:
            with trio.move_on_after(5):
                await process.wait()
            raise GuestError(f"QEMU does not start (status {process.returncode}):\n{process.tail()}") from error
        yield qmp


class _Listeners:
    """Sockets that listen already when QEMU is handed them, so that nobody must wait for it to make them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._sockets: list[socket.socket] = []

    @property
    def fds(self) -> list[int]:
        return [listener.fileno() for listener in self._sockets]

    def chardev(self, name: str) -> str:
        """A new one, as the value of ``-chardev``; its id and its file's name are ``name``."""
        listener = socket.socket(socket.AF_UNIX)
        self._sockets.append(listener)
        listener.bind(str(self._directory / name))
        listener.listen(4)
        return f"socket,id={name},fd={listener.fileno()},server=on,wait=off"

    def close(self) -> None:
        """Close our ends: QEMU has its own, and when it is gone nobody must be able to connect."""
        for listener in self._sockets:
            listener.close()
        self._sockets.clear()


def _command(
    name: str,
    here: Path,
    disks: Sequence[Disk],
    guest: GuestImage | None,
    accelerator: str,
    memory_mb: int,
    listeners: _Listeners,
) -> list[str]:
    # line-buffered, for Machine.qemu_io
    command = ["stdbuf", "-oL", QEMU, "-name", name, "-nodefaults", "-display", "none", "-no-reboot"]
    command += ["-machine", f"pc,accel={accelerator}", "-m", str(memory_mb)]
    if accelerator == "kvm":
        command += ["-cpu", "host"]
    for disk in disks:
        command += disk.arguments()
    if guest:
        words = f"console=ttyS0 loglevel=4 panic=-1 mitigations=off disks={len(disks)}"
        command += ["-kernel", str(guest.kernel), "-initrd", str(guest.initrd), "-append", words]
    for path in ("harness-qmp", "qmp", "spare-qmp"):
        command += ["-chardev", listeners.chardev(path), "-mon", f"chardev={path},mode=control"]
    command += ["-chardev", f"file,id=console,path={here / 'console'}", "-serial", "chardev:console"]
    command += ["-chardev", listeners.chardev("agent"), "-device", "virtio-serial-pci,id=ports"]
    command += ["-device", "virtserialport,bus=ports.0,chardev=agent,name=agent"]
    return command


_best: list[str] = []


async def best_accelerator() -> str:
    """``kvm`` where a trial boot of the guest succeeds, else ``tcg``; ``QEMU_REMUS_ACCEL`` overrides it.

    ``/dev/kvm`` may be there and still not work, and even a QEMU that starts with it may not get far.
    """
    if not _best:
        _best.append(os.environ.get("QEMU_REMUS_ACCEL") or ("kvm" if await _kvm_works() else "tcg"))
    return _best[0]


async def _kvm_works() -> bool:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    guest = await trio.to_thread.run_sync(guest_image)
    with tempfile.TemporaryDirectory(prefix="qr-") as scratch:
        try:
            async with start_machine(Path(scratch), [], guest=guest, accelerator="kvm", boot_timeout=20.0):
                return True
        except GuestError:
            return False
