"""What ``qemu-remus probe`` looks at, and what it reports.  Pure data.

:class:`Observations` go in, a :class:`ProbeReport` comes out; :mod:`qemu_remus.qemu.probe` gathers the first,
:mod:`qemu_remus.qemu.probe_checks` make the second of it.  The report as JSON is a contract: docs/probe.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qemu_remus.core.model import DiskName, NodeName, QdevPath
from qemu_remus.qemu.block_tree import TreeNode
from qemu_remus.qemu.capabilities import Capabilities
from qemu_remus.qemu.disks import VmDisk

if TYPE_CHECKING:
    from qemu_remus.qemu.client import PeerCredentials


# --- what is reported


class Level(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    WARN = "warn"
    """The VM can be protected; somebody should know this all the same."""
    NO = "no"
    """The VM cannot be protected as it is."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found.

    :param subject: what it is about; ``disk NAME`` for a disk.
    :param hint: what to do; empty where there is nothing to do.
    """

    level: Level
    subject: str
    text: str
    hint: str = ""


class Way(StrEnum):
    """How a checkpoint's data leave QEMU."""

    PULL = "pull"
    """We read them from an NBD export of QEMU's."""
    PUSH = "push"
    """QEMU copies them into a file of ours: the disk may not be exported, or QEMU's NBD server is somebody else's."""


@dataclass(frozen=True, slots=True)
class ProbedDisk:
    """One disk of the VM.

    :param node: the disk's own, below our filter where that is in.
    :param device: the type of its device, such as ``virtio-blk-device``; empty where it has none.
    :param size: bytes.
    :param iothread: whether its I/O runs in a thread of its own; None where that could not be found out.
    :param protectable: it can be protected.
    :param way: how it would be, by what ``qemu-remus primary`` with the same options would choose; None: not at all.
    :param why: why it cannot be protected; empty where it can.
    :param graph: the block graph from the device's node down; None where there is no medium, or QEMU does not show it.
    """

    name: DiskName
    node: NodeName
    qdev: QdevPath
    device: str
    size: int
    iothread: bool | None
    protectable: bool
    way: Way | None
    why: str
    hint: str
    graph: TreeNode | None


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What a QEMU and its disks allow.

    :param ok: nothing is in the way: ``qemu-remus primary`` with the same options would start.
    :param name: the VM's, as QEMU was given it; empty where it was not.
    :param version: QEMU's.
    :param package: the distributor's version text; may be empty.
    :param machine: QEMU's machine type; empty where it does not say.
    :param kvm: None where QEMU does not say.
    :param status: the VM's run state; empty where QEMU does not say.
    """

    ok: bool
    name: str
    version: str
    package: str
    machine: str
    kvm: bool | None
    status: str
    findings: tuple[Finding, ...]
    disks: tuple[ProbedDisk, ...]

    def about(self, disk: ProbedDisk) -> tuple[Finding, ...]:
        """What was found about one disk."""
        return tuple(finding for finding in self.findings if finding.subject == f"disk {disk.name}")


# --- what is looked at


@dataclass(frozen=True, slots=True)
class Confinement:
    """What a security module confines QEMU to.

    :param module: ``AppArmor`` or ``SELinux``.
    :param label: the profile or context.
    """

    module: str
    label: str


@dataclass(frozen=True, slots=True)
class DirectoryLook:
    """A directory that the controller would use together with QEMU, whether it is there already or not.

    :param path: absolute.
    :param nearest: the part of it that is there.
    :param free: bytes that an unprivileged user may still write.
    :param writable: we may make files, or the missing directories, in it.
    :param blocked: the directory through which QEMU's user may not go, or into which it may not write; None: none.
    :param elsewhere: QEMU sees another file system tree there; None: unknown.
    """

    path: Path
    nearest: Path
    free: int
    writable: bool = True
    blocked: Path | None = None
    elsewhere: bool | None = None


@dataclass(frozen=True, slots=True)
class HostLook:
    """What the host says.

    :param qemu: QEMU's process and its effective ids.
    :param user: the name of QEMU's user; its number where it has none.
    :param our_uid: the user that asks.
    :param fleece: where the fleeces would be.
    :param runtime: where QEMU would make its NBD server's socket.
    :param listeners: where QEMU listens: paths of Unix sockets, and ``TCP port N``; None: unknown.
    :param xen_domain: its number, where QEMU serves a Xen domain.
    :param kernel_disks: that domain's disks that the kernel serves, without QEMU, by the names that the guest has.
    :param memory: bytes of memory that an epoch's fleeces may take.
    """

    qemu: PeerCredentials
    user: str
    our_uid: int
    confinement: Confinement | None = None
    fleece: DirectoryLook | None = None
    runtime: DirectoryLook | None = None
    listeners: tuple[str, ...] | None = None
    xen_domain: int | None = None
    kernel_disks: tuple[str, ...] = ()
    memory: int = 0


@dataclass(frozen=True, slots=True)
class WriteRate:
    """What the guest wrote while we looked, over all disks.

    :param operations: a second.
    :param bytes: a second.
    """

    operations: float
    bytes: float


@dataclass(frozen=True, slots=True)
class Intent:
    """What ``qemu-remus primary`` would be told.

    :param disks: as :func:`qemu_remus.qemu.disks.choose_disks` takes them.
    :param fleece_dir: None: not looked at.
    :param runtime_dir: None: not looked at.
    :param fleece_memory: most bytes of memory for the fleeces; None: what is free decides.
    """

    disks: Mapping[DiskName, NodeName] | None = None
    fleece_dir: Path | None = None
    runtime_dir: Path | None = None
    fleece_memory: int | None = None


@dataclass(frozen=True, slots=True)
class Observations:
    """The answers that a report is made of; what nobody would tell is empty.

    :param trees: by the disk's name, from the device's node down.
    :param devices: types of the disks' devices, by the disk's name.
    :param peripherals: types of all devices that QEMU was asked for, by their id.
    :param io_status: of the devices that have one, by the disk's name: ``ok``, ``failed``, ``nospace``.
    :param sockets: what QEMU's own queries say of its sockets, as text.
    """

    capabilities: Capabilities
    intent: Intent = Intent()
    package: str = ""
    name: str = ""
    machine: str = ""
    status: str = ""
    kvm: bool | None = None
    disks: Sequence[VmDisk] = ()
    trees: Mapping[DiskName, TreeNode] = field(default_factory=dict)
    devices: Mapping[DiskName, str] = field(default_factory=dict)
    peripherals: Mapping[str, str] = field(default_factory=dict)
    io_status: Mapping[DiskName, str] = field(default_factory=dict)
    nodes: Sequence[Mapping[str, Any]] = ()
    exports: Sequence[Mapping[str, Any]] = ()
    jobs: Sequence[Mapping[str, Any]] = ()
    sockets: str = ""
    host: HostLook | None = None
    writes: WriteRate | None = None
