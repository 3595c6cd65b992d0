"""What happened in the demonstration, as it is judged and shown.

Owns data only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from integration.demo.setting import Vitals
from integration.witness import Account


class Failed(Exception):
    """Something that the demonstration promises did not hold."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One committed checkpoint.

    :param pause: seconds that the VM stood still, for memory, devices and disks.
    :param disk_pause: of these, for the disks; ``capture``: for memory and devices; the rest QEMU's ``stop`` took.
    :param memory_bytes: sent.
    :param disk_bytes: changed on the disks; what is zero now is not sent as data.
    """

    epoch: int
    pause: float
    disk_pause: float
    capture: float
    memory_bytes: int
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class Sample:
    """A look at the guest while it was protected.

    :param uptime: its answer, in seconds.
    :param captured: the newest checkpoint, asked for after that: every later one holds the guest at this age at least.
    """

    uptime: float
    captured: int


@dataclass(slots=True)
class Story:
    """What happened, for the verdicts and the table.

    :ivar measured: every committed checkpoint, the first one, which carries everything, first.
    :ivar missed: checkpoints that came to nothing; the next one carried what they had.
    :ivar samples: looks at the guest, once a second.
    :ivar disk_bytes_sent: by the primary controller, after the first checkpoint.
    :ivar before: the guest before the blow; ``after``: when it had just gone on; ``at_end``: some seconds later.
    :ivar reported: the ledger's last record before the blow.
    :ivar heard: what was let out of the VM before the blow, by record.
    :ivar torn: whether that ended inside a line.
    :ivar held: records that the VM had said before the blow and that were never let out.
    :ivar heard_later: what the survivor said.
    :ivar committed: the newest checkpoint whose commit was acknowledged.
    :ivar released: the newest checkpoint whose output was let out.
    :ivar checkpoint: the one that the survivor went on from.
    :ivar outage: seconds from the blow until the guest answered.
    :ivar failover_seconds: of these, from the beginning of the failover.
    :ivar disk_seconds: of these, for making the secondary's disks this checkpoint.
    :ivar reported_later: the ledger's last record that the survivor reported.
    """

    measured: list[Measured] = field(default_factory=list)
    missed: int = 0
    disk_bytes_sent: int = 0
    samples: list[Sample] = field(default_factory=list)
    before: Vitals | None = None
    after: Vitals | None = None
    at_end: Vitals | None = None
    reported: int = 0
    heard: Account = field(default_factory=Account)
    torn: bool = False
    held: int = 0
    heard_later: Account = field(default_factory=Account)
    committed: int = 0
    released: int = 0
    checkpoint: int = 0
    outage: float = math.nan
    failover_seconds: float = math.nan
    disk_seconds: float = math.nan
    reported_later: int = 0
