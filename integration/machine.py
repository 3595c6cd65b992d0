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
import shlex
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import trio

from integration.agent import Agent, GuestError
from integration.guest.build import GuestImage, guest_image
from integration.images import copy_image
from integration.process import Process, background, start_process
from integration.qemus import selected
from integration.qmp import Qmp, open_qmp

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
    :param errors: that the storage beneath makes, as blkdebug's ``inject-error`` has them; only of style ``BLOCKDEV``.
    """

    name: str
    image: Path
    interface: Interface = Interface.VIRTIO
    style: Style = Style.BLOCKDEV
    format: str = "raw"
    iothread: bool = False
    read_only: bool = False
    errors: tuple[Mapping[str, Any], ...] = ()

    @property
    def size(self) -> int:
        """What the guest sees, in bytes."""
        return self.image.stat().st_size

    async def copy_to(self, target: Path) -> None:
        """Put aside, as a raw image, what the disk holds; while nobody writes to it."""
        await copy_image(self.image, target)

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
        file: dict[str, Any] = {"driver": "file", "filename": str(self.image), "discard": "unmap"}
        file["node-name"] = f"{self.name}-file"
        if self.errors:
            node = f"{self.name}-errors"
            file = {"driver": "blkdebug", "node-name": node, "image": file, "inject-error": list(self.errors)}
            file["discard"] = "unmap"
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
    :ivar ram: the file that is its memory, where it was started with one.
    :ivar output: our end of the guest's port ``output``, non-blocking.
    """

    def __init__(
        self,
        process: Process,
        directory: Path,
        disks: Sequence[Disk],
        qmp: Qmp,
        output: socket.socket,
        ram: Path | None = None,
    ) -> None:
        self.process = process
        self.directory = directory
        self.disks = tuple(disks)
        self.qmp = qmp
        self.qmp_path = directory / "qmp"
        self.spare_qmp_path = directory / "spare-qmp"
        self.console = directory / "console"
        self.ram = ram
        self.output = output
        self._agent: Agent | None = None
        self._resumes = 0

    async def _boot(self, nursery: trio.Nursery, agent: Agent, timeout: float, *, restored: bool) -> None:
        self._agent = agent
        nursery.start_soon(agent.receive)
        try:
            with trio.fail_after(timeout):
                if restored:
                    # it was ready long ago, on another QEMU, and does not say so again
                    await agent.run("true", timeout=timeout)
                else:
                    await agent.ready()
        except (trio.TooSlowError, TimeoutError, GuestError) as error:
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

    @asynccontextmanager
    async def input_held(self) -> AsyncIterator[None]:
        """Send the guest nothing during the block.

        QEMU hands on what a port receives while the VM is stopped, too: into the guest's memory, and into the device's
        state. A checkpoint that takes these one after the other must not have that between them.
        """
        if self._agent is None:
            yield
        else:
            async with self._agent.held():
                yield

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

    async def running(self, *, timeout: float = 30.0) -> None:
        """Wait until it runs, as where the pause of a checkpoint may be under way."""
        status = "not known"
        with trio.move_on_after(timeout):
            while True:
                status = await self.status()
                if status == "running":
                    return
                await trio.sleep(0.005)
        raise AssertionError(f"the VM is {status} after {timeout:g} s")

    async def pause(self) -> None:
        """Stop the VM; QEMU flushes its disks. The images are its disks from now on, while it is stopped."""
        await self.qmp.execute("stop")
        self._resumes = self.qmp.counts["RESUME"]

    async def stays_paused(self) -> bool:
        """Whether nobody has let it run since :meth:`pause`.

        One that came inside a checkpoint's own pause ends with that: ask when a later checkpoint has been captured.
        """
        # of whatever happened before the answer, the event comes before the answer
        paused = await self.status() == "paused"
        return paused and self.qmp.counts["RESUME"] == self._resumes

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
                return f"/dev/scsi-disk{index}"

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
    ram: Path | None = None,
    device_state: Path | None = None,
    earlier: Agent | None = None,
    extra: Sequence[str] = (),
    within: Sequence[str] = (),
    boot_timeout: float = BOOT_TIMEOUT,
) -> AsyncIterator[Machine]:
    """Run a machine for the length of the block; at its end, and whatever ends us, QEMU is killed.

    :param directory: existing, with a short path (it holds sockets); a directory ``name`` is made in it.
    :param guest: boot this and wait until it is up; None: no operating system.
    :param accelerator: ``kvm`` or ``tcg``; by default what :func:`best_accelerator` finds.
    :param ram: file to have as the guest's memory, shared, so that all of the VM can be checkpointed; QEMU makes it
        where it is not there.
    :param device_state: go on with this and ``ram`` instead of booting; the guest must be the one, and the disks in
        number and order, of when they were taken.
    :param earlier: with ``device_state``: agent of the guest's life until then; its jobs' output is followed further.
    :param extra: more of QEMU's arguments.
    :param within: command that runs QEMU, such as ``nsenter`` with its options; it must not fork.
    :param boot_timeout: seconds until the guest must be up.
    :raise GuestError: when the guest does not come up; with the console's last lines.
    """
    accelerator = accelerator or await best_accelerator()
    here = directory / name
    here.mkdir()
    with contextlib.closing(_Sockets(here)) as sockets:
        command = _command(name, here, disks, guest, accelerator, memory_mb, ram, sockets)
        if device_state:
            command += ["-incoming", f"exec:cat {shlex.quote(str(device_state))}"]
        async with start_process([*within, *command, *extra], out=here / "log", pass_fds=sockets.fds) as process:
            sockets.started()
            async with _connected(process, here / "harness-qmp") as qmp, background() as nursery:
                machine = Machine(process, here, disks, qmp, sockets.output, ram)
                if guest:
                    agent = Agent(trio.SocketStream(trio.socket.from_stdlib_socket(sockets.agent)))
                    if earlier:
                        agent.adopt(earlier)
                    await machine._boot(nursery, agent, boot_timeout, restored=device_state is not None)
                yield machine


@asynccontextmanager
async def _connected(process: Process, path: Path) -> AsyncIterator[Qmp]:
    async with contextlib.AsyncExitStack() as stack:
        try:
            qmp = await stack.enter_async_context(open_qmp(path, timeout=60.0))
        except (EOFError, OSError) as error:
            with trio.move_on_after(5):
                await process.wait()
            raise GuestError(f"QEMU does not start (status {process.returncode}):\n{process.tail()}") from error
        yield qmp


class _Sockets:
    """QEMU's sockets, made before it: nobody must wait for it to make them.

    The guest's ports are connected from the beginning. A guest whose port is not connected for a moment sees that, and
    reads an end of file: one that goes on here from a checkpoint must not.

    :ivar agent: our end of the agent's port.
    :ivar output: our end of the port that stands for the network.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._theirs: list[socket.socket] = []
        self.agent, self._agent = self._pair()
        self.output, self._output = self._pair()

    @property
    def fds(self) -> list[int]:
        return [one.fileno() for one in self._theirs]

    def _pair(self) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._theirs.append(theirs)
        return ours, theirs

    def listener(self, name: str) -> str:
        """A new listening one, as the value of ``-chardev``; its id and its file's name are ``name``."""
        listener = socket.socket(socket.AF_UNIX)
        self._theirs.append(listener)
        listener.bind(str(self._directory / name))
        listener.listen(4)
        return f"socket,id={name},fd={listener.fileno()},server=on,wait=off"

    def ports(self) -> Iterator[str]:
        """The guest's ports, ``agent`` and ``output``, as arguments."""
        yield from ("-device", "virtio-serial-pci,id=ports")
        for name, theirs in (("agent", self._agent), ("output", self._output)):
            yield from ("-chardev", f"socket,id={name},fd={theirs.fileno()}")
            yield from ("-device", f"virtserialport,bus=ports.0,chardev={name},name={name}")

    def started(self) -> None:
        """Close QEMU's ends: it has its own, and when it is gone nobody must be able to connect."""
        for one in self._theirs:
            one.close()

    def close(self) -> None:
        """Close all."""
        self.started()
        self.agent.close()
        self.output.close()


def _command(
    name: str,
    here: Path,
    disks: Sequence[Disk],
    guest: GuestImage | None,
    accelerator: str,
    memory_mb: int,
    ram: Path | None,
    sockets: _Sockets,
) -> list[str]:
    # line-buffered, for Machine.qemu_io
    command = ["stdbuf", "-oL", *selected().system, "-name", name, "-nodefaults", "-display", "none", "-no-reboot"]
    command += ["-m", str(memory_mb), "-machine"]
    if ram:
        command += [f"pc,accel={accelerator},memory-backend=ram,suppress-vmdesc=on"]
        command += ["-object", f"memory-backend-file,id=ram,size={memory_mb}M,mem-path={ram},share=on"]
        command += ["-global", "migration.send-configuration=off"]
    else:
        command += [f"pc,accel={accelerator}"]
    if accelerator == "kvm":
        command += ["-cpu", "host"]
    for disk in disks:
        command += disk.arguments()
    if guest:
        words = f"console=ttyS0 loglevel=4 panic=-1 mitigations=off disks={len(disks)}"
        command += ["-kernel", str(guest.kernel), "-initrd", str(guest.initrd), "-append", words]
    for path in ("harness-qmp", "qmp", "spare-qmp"):
        command += ["-chardev", sockets.listener(path), "-mon", f"chardev={path},mode=control"]
    command += ["-chardev", f"file,id=console,path={here / 'console'}", "-serial", "chardev:console"]
    return [*command, *sockets.ports()]


_best: dict[str, str] = {}


async def best_accelerator() -> str:
    """``kvm`` where a trial boot of the guest succeeds with the selected QEMU, else ``tcg``.

    ``QEMU_REMUS_ACCEL`` overrides it.

    ``/dev/kvm`` may be there and still not work, and even a QEMU that starts with it may not get far.
    """
    qemu = selected().name
    if qemu not in _best:
        _best[qemu] = os.environ.get("QEMU_REMUS_ACCEL") or ("kvm" if await _kvm_works() else "tcg")
    return _best[qemu]


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
