"""What a controller was asked to do, as data.  Pure: no parsing of command lines, no environment, no defaults that
depend on the machine; those are :mod:`qemu_remus.config`'s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qemu_remus.core.model import DiskName, Generation, NodeName, PairName
from qemu_remus.core.target_spec import TargetSpec

DEFAULT_PAIR: Final = PairName("vm")
DEFAULT_INTERVAL_SECONDS: Final = 0.2
DEFAULT_HEARTBEAT_TIMEOUT_SECONDS: Final = 3.0
DEFAULT_WATCHDOG_SECONDS: Final = 10.0
DEFAULT_JOURNAL_LIMIT_BYTES: Final = 4 << 30


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP address.

    :param host: a name or an IPv4 or IPv6 address, without brackets; not empty.
    :param port: 0 to 65535; 0 only for listening: the system chooses.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class PrimaryConfig:
    """Everything that ``qemu-remus primary`` was told.

    :param qmp: QEMU's QMP socket.
    :param peer: where the secondary listens.
    :param disks: the disks to protect and the nodes that they are; None: all writable disks, named after their device.
    :param interval_seconds: from one checkpoint to the next, more than 0; None: a toolstack drives the checkpoints.
    :param state_dir: what must survive a restart of this controller; of this pair and role alone.
    :param fleece_dir: holds, sparse and already unlinked, what the guest overwrites during a transfer.
    :param fleece_memory_bytes: most memory for that, which is used where an epoch surely fits; None: a part of what is
        free; 0: none.
    :param runtime_dir: for short-lived sockets; its path must leave room for a name within 107 bytes.
    :param control: our control socket.
    :param heartbeat_timeout_seconds: a peer silent for longer is taken for lost.
    :param watchdog_seconds: a controller that hangs for longer is killed by its guardian.
    :param allow_inconsistent_resync: a resync too big for the secondary's journal may go straight to its images.
    :param commit_at_shutdown: by interval: QEMU's end is held off until what its guest wrote last is committed.
    :param rate_bytes_per_second: limits the first copy, resyncs and verification, not the epochs; None: no limit.
    """

    pair: PairName
    qmp: Path
    peer: Address
    disks: Mapping[DiskName, NodeName] | None
    interval_seconds: float | None
    state_dir: Path
    fleece_dir: Path
    runtime_dir: Path
    control: Path
    heartbeat_timeout_seconds: float = DEFAULT_HEARTBEAT_TIMEOUT_SECONDS
    watchdog_seconds: float = DEFAULT_WATCHDOG_SECONDS
    allow_inconsistent_resync: bool = False
    commit_at_shutdown: bool = True
    rate_bytes_per_second: float | None = None
    fleece_memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class SecondaryConfig:
    """Everything that ``qemu-remus secondary`` was told.

    :param listen: where the primary connects to.
    :param store: directory of the superblock and journal; of this pair alone.
    :param disks: the target of each disk, and of disks that the VM may get later; at least one, without ``disk_dir``.
    :param disk_dir: where the images of all others are made, named after the disk; None: nowhere.
    :param control: our control socket.
    :param sparse: do not preallocate images that we create.
    :param overwrite: targets may be used although they hold data or are larger than the primary's disk.
    :param discard: the generation whose data in the store the operator gives up; None: nothing is.
    :param journal_limit_bytes: most that the journal may take of its file system.
    :param heartbeat_timeout_seconds: a peer silent for longer is taken for lost.
    """

    pair: PairName
    listen: Address
    store: Path
    disks: Mapping[DiskName, TargetSpec]
    control: Path
    sparse: bool = False
    overwrite: bool = False
    discard: Generation | None = None
    disk_dir: Path | None = None
    journal_limit_bytes: int = DEFAULT_JOURNAL_LIMIT_BYTES
    heartbeat_timeout_seconds: float = DEFAULT_HEARTBEAT_TIMEOUT_SECONDS
