"""The names of everything that is ours in a QEMU, and how to know them again after a crash.

Pure.  Names are the only memory that survives in a QEMU when a controller dies, so a name says whose it is, and a
bitmap's name says in full what the bitmap means.  Nothing whose name does not parse here is ever touched.

::

    bitmap   qemu-remus.PAIR.GENERATION.BASE.EPOCH     32 hex digits; decimal, or "none"; decimal
    others   qemu-remus-PPPPPPPP-KDDDDEEEEEE           31 characters, as many as QEMU allows a node name

    P  the first 8 hex digits of the pair's name's SHA-256       D  4 of the disk's name's
    K  one letter, see :class:`Kind`                            E  the epoch modulo 2**24, 6 hex digits
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from typing import Any, Final
from uuid import UUID

from qemu_remus.core.model import Base, BitmapName, DiskName, EpochNumber, Generation, NodeName, PairName

NODE_NAME_LIMIT: Final = 31
"""QEMU's longest node name, in bytes."""

_EPOCH_MODULUS: Final = 1 << 24
_NODE: Final = re.compile(r"qemu-remus-([0-9a-f]{8})-([ftaesmqj])([0-9a-f]{4})([0-9a-f]{6})\Z")
_BITMAP: Final = re.compile(
    r"qemu-remus\.([A-Za-z0-9][A-Za-z0-9_-]{0,63})\.([0-9a-f]{32})\.(none|[1-9][0-9]{0,17})\.([1-9][0-9]{0,17})\Z"
)


class Kind(StrEnum):
    """What a thing of ours in the block graph is."""

    FILTER = "f"
    FLEECE = "t"
    ACCESS = "a"
    EXPORT = "e"
    STAGING = "s"
    MAP_FILE = "m"
    MAP = "q"
    JOB = "j"


@dataclass(frozen=True, slots=True)
class BitmapIdentity:
    """What one of our dirty bitmaps means.

    :param base: the committed checkpoint since which nothing is missing in it; None for a full sync not complete.
    :param epoch: the epoch that it records; its checkpoint is the bitmap's end.
    """

    pair: PairName
    generation: Generation
    base: Base
    epoch: EpochNumber

    @property
    def name(self) -> BitmapName:
        """The bitmap's name in QEMU: this identity, in full."""
        base = "none" if self.base is None else str(self.base)
        return BitmapName(f"qemu-remus.{self.pair}.{self.generation.hex}.{base}.{self.epoch}")

    @classmethod
    def parse(cls, name: str) -> BitmapIdentity | None:
        """Read a bitmap's name; None for one that we did not make."""
        match = _BITMAP.match(name)
        if match is None:
            return None
        pair, generation, base, epoch = match.groups()
        return cls(
            PairName(pair),
            Generation(UUID(hex=generation)),
            None if base == "none" else EpochNumber(int(base)),
            EpochNumber(int(epoch)),
        )


def is_a_look(name: str) -> bool:
    """Whether a bitmap of ours tracks nothing, but was made to look into others; such a one has no generation."""
    identity = BitmapIdentity.parse(name)
    return identity is not None and not identity.generation.int


def _digest(text: str, digits: int) -> str:
    return sha256(text.encode()).hexdigest()[:digits]


def _node(pair: PairName, kind: Kind, disk: DiskName, epoch: int) -> NodeName:
    return NodeName(f"qemu-remus-{_digest(pair, 8)}-{kind}{_digest(disk, 4)}{epoch % _EPOCH_MODULUS:06x}")


def filter_node(pair: PairName, disk: DiskName, epoch: EpochNumber) -> NodeName:
    """The replication filter of one disk in one epoch."""
    return _node(pair, Kind.FILTER, disk, epoch)


def access_node(pair: PairName, disk: DiskName, epoch: EpochNumber) -> NodeName:
    """The ``snapshot-access`` node over that filter."""
    return _node(pair, Kind.ACCESS, disk, epoch)


def fleece_node(pair: PairName, disk: DiskName, *, in_memory: bool = False) -> NodeName:
    """The disk's fleece, which serves one epoch after the other.

    :param in_memory: the one in memory; else the one in a file.
    """
    return _node(pair, Kind.FLEECE, disk, int(in_memory))


def export_id(pair: PairName, disk: DiskName, epoch: EpochNumber) -> str:
    """The NBD export of the access node (id in QEMU, and export name)."""
    return _node(pair, Kind.EXPORT, disk, epoch)


def live_export_id(pair: PairName, disk: DiskName) -> str:
    """The NBD export of the live disk for the initial sync: there is no epoch 0, so no other export has its name."""
    return _node(pair, Kind.EXPORT, disk, 0)


def staging_node(pair: PairName, disk: DiskName) -> NodeName:
    """The file into which a job copies an epoch's clusters."""
    return _node(pair, Kind.STAGING, disk, 0)


def map_file_node(pair: PairName, disk: DiskName) -> NodeName:
    """The file that carries bitmaps in and out of QEMU."""
    return _node(pair, Kind.MAP_FILE, disk, 0)


def map_node(pair: PairName, disk: DiskName) -> NodeName:
    """The image in that file, there for some milliseconds only."""
    return _node(pair, Kind.MAP, disk, 0)


def job_id(pair: PairName, disk: DiskName) -> str:
    """The job that copies from the access node."""
    return _node(pair, Kind.JOB, disk, 0)


def scratch_bitmap(pair: PairName, epoch: EpochNumber) -> BitmapIdentity:
    """A bitmap that records nothing: no generation and base "none", so that nobody ever takes it for a record.

    :param epoch: whose clusters are counted or copied with it.
    """
    return BitmapIdentity(pair, Generation(UUID(int=0)), None, epoch)


WINDOW: Final = EpochNumber(10**18 - 1)
"""In the place of an epoch's number in the names of what is put in to read a part of a live disk."""


def foreign_exports(query_block_exports: Iterable[Mapping[str, Any]]) -> list[str]:
    """Ids of the NBD exports that are not ours."""
    return [entry["id"] for entry in query_block_exports if entry["type"] == "nbd" and not is_ours(entry["id"])]


def clashing(disks: Iterable[DiskName]) -> tuple[DiskName, DiskName] | None:
    """Two disks of one pair whose nodes would have the same names (one chance in 65,536); None where there are none."""
    seen: dict[str, DiskName] = {}
    for disk in disks:
        other = seen.setdefault(_digest(disk, 4), disk)
        if other is not disk:
            return other, disk
    return None


def kind_of(name: str) -> Kind | None:
    """What a node or export of ours is; None for one that we did not make."""
    match = _NODE.match(name)
    return Kind(match.group(2)) if match else None


def is_ours(name: str, pair: PairName | None = None) -> bool:
    """Whether we made the node, export or bitmap of this name.

    :param pair: only things of this pair count; None for those of any.
    """
    node = _NODE.match(name)
    if node is not None:
        return pair is None or node.group(1) == _digest(pair, 8)
    identity = BitmapIdentity.parse(name)
    return identity is not None and (pair is None or identity.pair == pair)
