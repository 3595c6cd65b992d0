"""Faults of QEMU that no schema shows, in one table: which versions have them, how we know, what we do instead.

Pure. Whatever is decided by QEMU's version is decided by a row of :data:`FAULTS`; everything else by what its schema
says (:mod:`qemu_remus.qemu.capabilities`). A row whose remedy costs nothing is kept clear of in every version: nothing
asks for it then, and it is here to say why the code is as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

Version = tuple[int, int, int]
"""Major, minor, micro."""


class Fault(StrEnum):
    """A defect of some QEMU versions that we must keep clear of."""

    IOTHREAD_EXPORT = "iothread-export"
    """An NBD client that leaves an export of a node in an iothread aborts QEMU."""
    IOTHREAD_GRAPH = "iothread-graph"
    """A node that is added over one in an iothread of a running guest aborts QEMU."""
    IOTHREAD_STOP_TCG = "iothread-stop-tcg"
    """``stop`` and ``cont`` hang a guest's I/O in an iothread, under TCG."""
    SNAPSHOT_STATUS_RACE = "snapshot-status-race"
    """Block status and reads at the same time on a ``snapshot-access`` node."""
    SNAPSHOT_CLUSTERS = "snapshot-clusters"
    """A request on a ``snapshot-access`` node that goes from one cluster into the next is answered wrong."""
    SAME_DRIVE = "same-drive"
    """``qom-set drive`` to the node that the device has already aborts QEMU."""
    BACKUP_FAILS_GUEST = "backup-fails-guest"
    """A backup job of the guest's own node gives the guest the job's errors, or aborts QEMU."""
    QED_ALLOCATION = "qed-allocation"
    """Writes at the same time that allocate in an image of the format qed abort QEMU."""


@dataclass(frozen=True, slots=True)
class KnownFault:
    """One row of :data:`FAULTS`.

    :param first: the first version that has it.
    :param fixed: the first that has it no more; None where none is known.
    :param what: what happens.
    :param evidence: how we know.
    :param instead: what we do.
    """

    fault: Fault
    first: Version
    fixed: Version | None
    what: str
    evidence: str
    instead: str

    def applies(self, version: Version) -> bool:
        """Whether a QEMU of this version has it."""
        return self.first <= version and (self.fixed is None or version < self.fixed)


FAULTS: Final = (
    KnownFault(
        Fault.IOTHREAD_EXPORT,
        (0, 0, 0),
        (10, 0, 0),
        "QEMU aborts when an NBD client leaves an export of a disk in an iothread",
        "seen on 7.2.22 (nbd_blockdev_client_closed); not seen on 10.0.13; between, untried",
        "such a disk is read by push: a job copies from the snapshot into a file, and nothing of it is exported",
    ),
    KnownFault(
        Fault.IOTHREAD_GRAPH,
        (0, 0, 0),
        (10, 0, 0),
        "QEMU aborts when a filter goes in over a disk in an iothread while the guest runs",
        "seen on 7.2.22 (qemu_mutex_unlock_impl, at blockdev-add of the filter or of the snapshot over it); not seen on"
        " 10.0.13; between, untried",
        "all that goes over such a disk goes in while the VM is paused, in every version; also to read it live. In"
        " these versions nothing goes in before it is known that the pause is ours, or that another's is a long one;"
        " against a cont of somebody else's in our own pause nothing can be done, and probe warns of it",
    ),
    KnownFault(
        Fault.IOTHREAD_STOP_TCG,
        (10, 0, 0),
        None,
        "without KVM, repeated stop and cont hang the guest's I/O on a disk in an iothread",
        "seen on 10.0.13 and 11.1.3, after 7 to 51 stop/cont cycles, with nothing of ours present; not seen on 7.2.22",
        "probe warns of it",
    ),
    KnownFault(
        Fault.SNAPSHOT_STATUS_RACE,
        (7, 0, 0),
        (9, 2, 0),
        "reads and block status at the same time on a snapshot-access export may hit an assertion",
        "QEMU's change log for 9.2; backported to some stable branches",
        "never both at once, in every version; a push's job asks and reads cluster by cluster",
    ),
    KnownFault(
        Fault.SNAPSHOT_CLUSTERS,
        (7, 0, 0),
        (8, 0, 0),
        "a read or block status of a snapshot that goes from a cluster that the filter has saved into one that it has"
        " not is answered from the wrong one, without an error",
        "seen on 7.2.22 (hbitmap_status is wrong about the first bit that it looks at; mended in 8.0): an export read"
        " over several clusters, and a backup job with its usual requests of 1 MiB",
        "in every version: reads within one cluster, no block status of a snapshot over NBD, and jobs with a max-chunk"
        " of one cluster, which bounds their block status too",
    ),
    KnownFault(
        Fault.SAME_DRIVE,
        (6, 2, 0),
        None,
        "qom-set drive to the node that the device has already aborts QEMU",
        "seen on 7.2.22, 10.0.13 and 11.1.3 with virtio-blk, scsi-hd and ide-hd (an assertion)",
        "in every version: query-block is looked at before, and a device gets its disk back only from a filter of ours",
    ),
    KnownFault(
        Fault.BACKUP_FAILS_GUEST,
        (0, 0, 0),
        (10, 1, 0),
        "the filter of a backup job of the guest's own node fails the guest's write when the job's target fails",
        "by QEMU's source; on-cbw-error for jobs came in 10.1. Seen on 7.2.22 besides: such a job of a disk in an"
        " iothread, begun in a pause, aborts QEMU at cont",
        "in every version: jobs read the snapshot's node, never the guest's own",
    ),
    KnownFault(
        Fault.QED_ALLOCATION,
        (0, 0, 0),
        None,
        "writes at the same time that need new clusters of a qed image, of data and of zeroes, abort QEMU",
        "seen on 7.2.22, 10.0.13 and 11.1.3 with nothing of ours present (an assertion in qed_aio_write_alloc; qemu-io"
        " with aio_write and aio_write -z)",
        "probe warns of a guest's disk in that format; a secondary's target of it gets one write at a time",
    ),
)


def has_fault(version: Version, fault: Fault) -> bool:
    """Whether a version is known to have a fault."""
    return any(row.fault is fault and row.applies(version) for row in FAULTS)


def row_of(fault: Fault) -> KnownFault:
    """The table's row about a fault."""
    return next(row for row in FAULTS if row.fault is fault)
