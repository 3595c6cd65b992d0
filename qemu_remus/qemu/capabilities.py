"""What one QEMU can do, read from its schema; and the few faults that no schema shows, in one table.

Pure but for :func:`query_capabilities`, which asks for the schema.  Behaviour follows what the schema says, never the
version; the version is looked at only in :data:`FAULTS`.  A path into the schema reads like this::

    blockdev-add/arg-type/+copy-before-write/on-cbw-error

a command, its ``arg-type`` or ``ret-type``, then members by name; ``+NAME`` goes to the variant of that case, ``^NAME``
is a value of an enum; arrays and alternates are looked through.  The schema's format: QEMU's ``qapi/introspect.json``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, Any, Final

from qemu_remus.core.errors import CapabilityMissing
from qemu_remus.qemu import commands

if TYPE_CHECKING:
    from qemu_remus.qemu.client import QmpClient

Version = tuple[int, int, int]


class Feature(Enum):
    """A feature of QEMU that we use: its schema path, and what it is for."""

    BITMAP_ADD = "transaction/arg-type/actions/+block-dirty-bitmap-add", "dirty bitmaps, begun in a transaction"
    BITMAP_DISABLE = "transaction/arg-type/actions/+block-dirty-bitmap-disable", "ending a dirty bitmap at a checkpoint"
    BITMAP_MERGE = "transaction/arg-type/actions/+block-dirty-bitmap-merge", "keeping the changes of a failed epoch"
    BITMAP_REMOVE = "transaction/arg-type/actions/+block-dirty-bitmap-remove", "taking a dirty bitmap away"
    FILTER_BITMAP = "blockdev-add/arg-type/+copy-before-write/bitmap", "the replication filter (QEMU 7.0)"
    ON_CBW_ERROR = "blockdev-add/arg-type/+copy-before-write/on-cbw-error", "sparing the guest our errors (QEMU 7.1)"
    SNAPSHOT_ACCESS = "blockdev-add/arg-type/+snapshot-access", "reading a checkpoint (QEMU 7.0)"
    QOM_SET = "qom-set/arg-type/property", "putting the filter under a running device"
    FLAT_NODES = "query-named-block-nodes/arg-type/flat", "finding our own nodes and bitmaps"
    NBD_SERVER = "nbd-server-start/arg-type/addr/+unix", "reading over a Unix socket"
    EXPORT_BITMAP = "block-export-add/arg-type/+nbd/bitmaps/node", "exporting a disk's dirty bitmap (QEMU 7.1)"
    CBW_TIMEOUT = "blockdev-add/arg-type/+copy-before-write/cbw-timeout", "a limit to the filter's stalls (QEMU 7.1)"
    NODE_CHILDREN = "query-named-block-nodes/ret-type/children", "seeing what is below a filter (QEMU 10.1)"
    BLOCK_GRAPH = "x-debug-query-block-graph", "seeing what is below a filter (experimental)"

    def __init__(self, path: str, purpose: str) -> None:
        self.path = path
        self.purpose = purpose


OPTIONAL: Final = frozenset({Feature.CBW_TIMEOUT, Feature.NODE_CHILDREN, Feature.BLOCK_GRAPH})
NEEDED: Final = tuple(feature for feature in Feature if feature not in OPTIONAL)


class Fault(StrEnum):
    """A defect of some QEMU versions that we must keep clear of."""

    IOTHREAD_GRAPH = "iothread-graph"
    """Exports of, and changes to, a node in an iothread abort QEMU."""
    IOTHREAD_STOP_TCG = "iothread-stop-tcg"
    """``stop`` and ``cont`` hang a guest's I/O in an iothread, under TCG."""
    SNAPSHOT_STATUS_RACE = "snapshot-status-race"
    """Block status and reads at the same time on a ``snapshot-access`` export."""


@dataclass(frozen=True, slots=True)
class KnownFault:
    """One row of :data:`FAULTS`.

    :param first: the first version that has it.
    :param fixed: the first that has it no more; None where none is known.
    :param what: what happens.
    :param evidence: how we know.
    """

    fault: Fault
    first: Version
    fixed: Version | None
    what: str
    evidence: str

    def applies(self, version: Version) -> bool:
        """Whether a QEMU of this version has it."""
        return self.first <= version and (self.fixed is None or version < self.fixed)


FAULTS: Final = (
    KnownFault(
        Fault.IOTHREAD_GRAPH,
        (0, 0, 0),
        (10, 0, 0),
        "QEMU aborts when an NBD client leaves an export of a disk in an iothread, or a filter goes in or out there",
        "seen on 7.2.22 (nbd_blockdev_client_closed, qemu_mutex_unlock_impl); not seen on 10.0.13; between, untried",
    ),
    KnownFault(
        Fault.IOTHREAD_STOP_TCG,
        (10, 0, 0),
        None,
        "without KVM, repeated stop and cont hang the guest's I/O on a disk in an iothread",
        "seen on 10.0.13 and 11.1.3, after 7 to 51 stop/cont cycles, with nothing of ours present; not seen on 7.2.22",
    ),
    KnownFault(
        Fault.SNAPSHOT_STATUS_RACE,
        (7, 0, 0),
        (9, 2, 0),
        "reads and block status at the same time on a snapshot-access export may hit an assertion",
        "QEMU's change log for 9.2; backported to some stable branches",
    ),
)


class Schema:
    """An index over the answer to ``query-qmp-schema``."""

    def __init__(self, entries: Iterable[Mapping[str, Any]]) -> None:
        self._entries = {entry["name"]: entry for entry in entries}

    def has(self, path: str) -> bool:
        """Whether a path (see the module's docstring) leads somewhere."""
        name, *steps = path.split("/")
        found = [self._entries[name]] if name in self._entries else []
        for step in steps:
            if step.startswith("^"):
                return any(step[1:] in self._values(entry) for entry in found)
            found = [target for entry in found for target in self._step(entry, step)]
        return bool(found)

    def _step(self, entry: Mapping[str, Any], step: str) -> Iterator[Mapping[str, Any]]:
        if step in ("arg-type", "ret-type") and entry["meta-type"] == "command":
            yield from self._resolve(entry[step])
        elif step.startswith("+"):
            for variant in entry.get("variants", ()):
                if variant["case"] == step[1:]:
                    yield from self._resolve(variant["type"])
        else:
            for member in entry.get("members", ()):
                if member.get("name") == step:
                    yield from self._resolve(member["type"])

    def _resolve(self, name: str) -> Iterator[Mapping[str, Any]]:
        entry = self._entries[name]
        if entry["meta-type"] == "array":
            yield from self._resolve(entry["element-type"])
        elif entry["meta-type"] == "alternate":
            for member in entry["members"]:
                yield from self._resolve(member["type"])
        else:
            yield entry

    @staticmethod
    def _values(entry: Mapping[str, Any]) -> Iterator[str]:
        if entry["meta-type"] == "enum":
            # "members" since 6.2; "values" is the old spelling, still there.
            yield from (member["name"] for member in entry.get("members", ()))
            yield from entry.get("values", ())


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
        return any(row.fault is fault and row.applies(self.version) for row in FAULTS)

    @property
    def pull_safe_in_iothread(self) -> bool:
        """Whether disks in an iothread can be protected by pull."""
        return not self.has_fault(Fault.IOTHREAD_GRAPH)

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
