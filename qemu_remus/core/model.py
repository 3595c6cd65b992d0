"""The words of the field as types: names, numbers and the four state fields. Pure data, no behaviour beyond parsing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NewType
from uuid import UUID

from qemu_remus.core.errors import ConfigError

PairName = NewType("PairName", str)
DiskName = NewType("DiskName", str)
NodeName = NewType("NodeName", str)
BitmapName = NewType("BitmapName", str)
QdevPath = NewType("QdevPath", str)

EpochNumber = NewType("EpochNumber", int)
"""1, 2, 3, ... within a generation; never used twice in it. Epoch N ends at checkpoint N."""

Base = EpochNumber | None
"""The committed checkpoint that an epoch's extents build on; None for a full sync that is not complete."""

Generation = NewType("Generation", UUID)
"""One uninterrupted history of a pair. Failover starts a new one."""

InstanceId = NewType("InstanceId", UUID)
"""One controller's state directory: stays the same over restarts of that controller."""

NAME_LIMIT: Final = 64
"""Longest pair or disk name, in characters (all of them ASCII)."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\Z")


def _name(kind: str, text: str) -> str:
    if len(text) > NAME_LIMIT or not _NAME.match(text):
        raise ConfigError(
            f"{text!r} cannot be a {kind} name",
            hint=f"use letters, digits, '-' and '_', beginning with a letter or digit, at most {NAME_LIMIT} in all",
        )
    return text


def pair_name(text: str) -> PairName:
    """Check a pair's name.

    :raise ConfigError: when it is empty, too long or has other characters than letters, digits, ``-`` and ``_``.
    """
    return PairName(_name("pair", text))


def disk_name(text: str) -> DiskName:
    """Check a disk's name.

    :raise ConfigError: as for :func:`pair_name`.
    """
    return DiskName(_name("disk", text))


class Role(StrEnum):
    """Which side of the pair a controller is."""

    PRIMARY = "primary"
    SECONDARY = "secondary"


class Connection(StrEnum):
    """State of the link between the controllers."""

    STANDALONE = "standalone"
    CONNECTING = "connecting"
    HANDSHAKE = "handshake"
    CONNECTED = "connected"


class DiskState(StrEnum):
    """What the secondary's disks (images plus journal) hold."""

    INCONSISTENT = "inconsistent"
    """No complete checkpoint: before the first commit. Failover is refused."""
    CONSISTENT = "consistent"
    """A complete checkpoint; nobody here knows how far the primary has gone on."""
    UP_TO_DATE = "up-to-date"
    """A complete checkpoint, and the link to the primary works."""
    OUTDATED = "outdated"
    """A complete checkpoint, and it is known that the primary has later ones."""
    FAILED = "failed"
    """The store or an image is damaged or cannot be written."""


class Replication(StrEnum):
    """What protection the VM has at this moment."""

    OFF = "off"
    INITIAL_SYNC = "initial-sync"
    RESYNC = "resync"
    PROTECTED = "protected"
    DEGRADED = "degraded"
    VERIFYING = "verifying"
    FAILED_OVER = "failed-over"


class DiskStanding(StrEnum):
    """How one disk of the VM stands."""

    PROTECTED = "protected"
    """It is one of the disks of the last committed checkpoint."""
    SYNCING = "syncing"
    """No committed checkpoint has it yet, or has it in its present size; its first copy is under way or waits."""
    UNPROTECTED = "unprotected"
    """The VM has it, and it cannot be protected: ``reason`` says why."""
    GONE = "gone"
    """The VM has it no more; the secondary keeps what it held at the last checkpoint that had it."""
    FREE = "free"
    """A place on the secondary for a disk that the VM does not have."""


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """One disk of a pair.

    :param name: its name in the pair, the same on both sides.
    :param size: bytes, a multiple of 512, as QEMU counts them.
    :param base: primary: what its recording bitmap builds on; None also where there is no usable bitmap.
        Secondary: always None.
    """

    name: DiskName
    size: int
    base: Base = None
