"""What one QEMU can do, read from its schema.

Pure but for :func:`query_capabilities` and :func:`query_schema`, which ask for the schema.  Behaviour follows what the
schema says, never the version; that counts only for :mod:`qemu_remus.qemu.faults`, which no schema shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from qemu_remus.core.errors import CapabilityMissing
from qemu_remus.qemu import commands, faults
from qemu_remus.qemu.faults import Fault, Version
from qemu_remus.qemu.schema import Captured, Schema, capture

if TYPE_CHECKING:
    from qemu_remus.qemu.client import QmpClient


class Feature(Enum):
    """All that we use of a QEMU and that some QEMU lacks, in one table.

    :ivar path: where its schema shows it; see :mod:`qemu_remus.qemu.schema`.
    :ivar purpose: what we use it for.
    :ivar since: the QEMU that had it first. For people; nothing is decided by it.
    :ivar without: what we do where it is absent; empty where we cannot do without it.
    """

    BITMAP_ADD = "transaction/arg-type/actions/+block-dirty-bitmap-add", "dirty bitmaps, begun in a transaction", "2.5"
    BITMAP_DISABLE = (
        "transaction/arg-type/actions/+block-dirty-bitmap-disable",
        "ending a dirty bitmap at a checkpoint",
        "4.0",
    )
    BITMAP_MERGE = (
        "transaction/arg-type/actions/+block-dirty-bitmap-merge",
        "keeping the changes of a failed epoch",
        "4.0",
    )
    BITMAP_REMOVE = "transaction/arg-type/actions/+block-dirty-bitmap-remove", "taking a dirty bitmap away", "4.2"
    FILTER_BITMAP = "blockdev-add/arg-type/+copy-before-write/bitmap", "the replication filter", "7.0"
    ON_CBW_ERROR = "blockdev-add/arg-type/+copy-before-write/on-cbw-error", "sparing the guest our errors", "7.1"
    SNAPSHOT_ACCESS = "blockdev-add/arg-type/+snapshot-access", "reading a checkpoint", "7.0"
    QOM_SET = "qom-set/arg-type/property", "putting the filter under a running device", "6.2"
    FLAT_NODES = "query-named-block-nodes/arg-type/flat", "finding our own nodes and bitmaps", "5.0"
    NBD_SERVER = "nbd-server-start/arg-type/addr/+unix", "reading over a Unix socket", "1.3"
    EXPORT_BITMAP = "block-export-add/arg-type/+nbd/bitmaps/node", "exporting a disk's dirty bitmap", "7.1"
    CBW_TIMEOUT = (
        "blockdev-add/arg-type/+copy-before-write/cbw-timeout",
        "a limit to the filter's stalls",
        "7.1",
        "a fleece directory that stalls can then hold up a guest's write for longer",
    )
    NODE_CHILDREN = (
        "query-named-block-nodes/ret-type/children",
        "seeing what is below a filter",
        "10.1",
        "the experimental x-debug-query-block-graph serves instead",
    )
    BLOCK_GRAPH = (
        "x-debug-query-block-graph",
        "seeing what is below a filter, by an experimental command",
        "4.0",
        "the children in query-named-block-nodes serve instead",
    )
    ACCELERATORS = (
        "query-accelerators",
        "knowing whether KVM is at work",
        "10.2",
        "query-kvm serves instead, which newer QEMUs deprecate",
    )
    BACKUP_CHUNK = (
        "blockdev-backup/arg-type/x-perf/max-chunk",
        "copying a checkpoint into a file, cluster by cluster",
        "6.0",
        "disks that may not be exported cannot be protected",
    )
    BITMAP_FILE = (
        "blockdev-add/arg-type/+qcow2",
        "reading a dirty bitmap out of a file",
        "2.9",
        "disks that may not be exported cannot be protected",
    )

    def __init__(self, path: str, purpose: str, since: str, without: str = "") -> None:
        self.path = path
        self.purpose = purpose
        self.since = since
        self.without = without


NEEDED: Final = tuple(feature for feature in Feature if not feature.without)
OPTIONAL: Final = frozenset(Feature) - frozenset(NEEDED)

PUSH: Final = frozenset({Feature.BACKUP_CHUNK, Feature.BITMAP_FILE})
"""What push takes: the way out for disks that must not be exported."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What one QEMU can do.

    :param version: major, minor, micro.
    """

    version: Version
    features: frozenset[Feature]

    @classmethod
    def from_schema(cls, schema: Iterable[Mapping[str, Any]], version: Version) -> Capabilities:
        """Read the answer to ``query-qmp-schema``."""
        index = Schema(schema)
        return cls(version, frozenset(feature for feature in Feature if index.has(feature.path)))

    def __contains__(self, feature: Feature) -> bool:
        return feature in self.features

    def require(self, *features: Feature) -> None:
        """See that all of them are there; without arguments, everything that protecting a VM needs.

        :raise CapabilityMissing: naming those that are not.
        """
        missing = [feature for feature in features or NEEDED if feature not in self.features]
        if missing:
            names = ", ".join(f"{feature.path} ({feature.purpose})" for feature in missing)
            raise CapabilityMissing(
                f"QEMU {version_text(self.version)} lacks {names}",
                safe="nothing was changed in it",
                hint="qemu-remus needs QEMU 7.1 or later: migrate the VM to one",
            )

    def has_fault(self, fault: Fault) -> bool:
        """Whether this version is known to have a defect."""
        return faults.has_fault(self.version, fault)

    @property
    def pull_safe_in_iothread(self) -> bool:
        """Whether disks in an iothread can be exported."""
        return not self.has_fault(Fault.IOTHREAD_EXPORT)

    @property
    def push(self) -> bool:
        """Whether disks can be read without exporting them."""
        return self.features >= PUSH

    @property
    def cbw_timeout(self) -> bool:
        """Whether the filter can be told how long it may hold up a guest's write."""
        return Feature.CBW_TIMEOUT in self.features


def version_text(version: Version) -> str:
    """``7.2.22``."""
    return ".".join(str(part) for part in version)


async def query_capabilities(client: QmpClient) -> Capabilities:
    """Ask a QEMU for its schema and read it; about 30 ms. Requires nothing: see :meth:`Capabilities.require`.

    :raise QemuUnreachable: when it does not answer.
    """
    schema = await client.execute(commands.query_qmp_schema())
    return Capabilities.from_schema(schema, client.version)


async def query_schema(client: QmpClient) -> Captured:
    """A QEMU's schema in the form of ``qmp_schemas/``.

    :raise QemuUnreachable: when it does not answer.
    """
    entries = await client.execute(commands.query_qmp_schema())
    machine = await client.execute(commands.qom_get("/machine", "type"))
    return capture(entries, client.version, client.package, str(machine).removesuffix("-machine"))
