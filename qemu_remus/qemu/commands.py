"""The QMP commands that we use, one builder for each: the only place where QMP argument names are spelled.

Pure: values in, :class:`Command` or :class:`Action` out.  What order they are sent in, and what is done when one fails,
is decided elsewhere.  The tests validate every builder's output against the captured schemas in ``qmp_schemas/``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from qemu_remus.core.model import BitmapName, NodeName, QdevPath

BITMAP_GRANULARITIES: Final = tuple(1 << shift for shift in range(9, 32))
"""What QEMU accepts for a dirty bitmap, in bytes: powers of two from 512 up to 2 GiB."""


@dataclass(frozen=True, slots=True)
class Command:
    """One QMP command, ready to be sent.

    :param name: its QMP name.
    :param arguments: JSON values by QMP argument name.
    :param changes_state: False for queries: if their reply is lost they can simply be asked again.
    """

    name: str
    arguments: Mapping[str, Any]
    changes_state: bool


@dataclass(frozen=True, slots=True)
class Action:
    """One step of a ``transaction``.

    :param type: the action's QMP name.
    :param data: its arguments.
    """

    type: str
    data: Mapping[str, Any]

    def as_command(self) -> Command:
        """The same step as a command of its own; QMP spells the two alike."""
        return Command(self.type, self.data, changes_state=True)


class OnCbwError(StrEnum):
    """What a ``copy-before-write`` filter gives up when its target fails: the guest's write, or its own snapshot."""

    BREAK_GUEST_WRITE = "break-guest-write"
    BREAK_SNAPSHOT = "break-snapshot"


class ShutdownAction(StrEnum):
    """What QEMU does when its guest has powered off."""

    POWEROFF = "poweroff"
    PAUSE = "pause"


class ExportDelMode(StrEnum):
    """``block-export-del``: refuse while a client is connected, or cut it off."""

    SAFE = "safe"
    HARD = "hard"


def _query(name: str, **arguments: Any) -> Command:
    return Command(name, arguments, changes_state=False)


def _change(name: str, arguments: Mapping[str, Any]) -> Command:
    return Command(name, arguments, changes_state=True)


# --- the session and the VM


def qmp_capabilities() -> Command:
    """Leave negotiation mode; no out-of-band execution."""
    return _change("qmp_capabilities", {})


def query_version() -> Command:
    return _query("query-version")


def query_qmp_schema() -> Command:
    return _query("query-qmp-schema")


def query_status() -> Command:
    return _query("query-status")


def query_kvm() -> Command:
    """Whether KVM is at work; deprecated from QEMU 11.0 on, see :func:`query_accelerators`."""
    return _query("query-kvm")


def query_accelerators() -> Command:
    """What runs the vCPUs, and what could; only where the schema has it."""
    return _query("query-accelerators")


def query_cpus_fast() -> Command:
    """The vCPUs, with the ids of their threads on the host."""
    return _query("query-cpus-fast")


def stop() -> Command:
    """Pause the VM; QEMU flushes its images before it answers."""
    return _change("stop", {})


def cont() -> Command:
    """Resume the VM."""
    return _change("cont", {})


def set_power_off(action: ShutdownAction) -> Command:
    """What QEMU is to do when its guest powers off, whatever its command line says."""
    return _change("set-action", {"shutdown": action.value})


def quit_qemu() -> Command:
    """End QEMU; it may be gone before it has answered."""
    return _change("quit", {})


# --- the device tree


def qom_get(path: str, prop: str) -> Command:
    return _query("qom-get", path=path, property=prop)


def qom_list(path: str) -> Command:
    return _query("qom-list", path=path)


def qom_set_drive(qdev: QdevPath, node: NodeName) -> Command:
    """Put ``node`` under a device while it lives.

    Never with the node that the device has already: that aborts QEMU (an assertion in every version up to 10.2).

    :param qdev: as ``query-block`` names it, an absolute path; a bare id is taken to be below ``/machine/peripheral``.
    """
    return _change("qom-set", {"path": qom_path(qdev), "property": "drive", "value": node})


def qom_path(qdev: str) -> str:
    """The absolute QOM path of a ``qdev`` of ``query-block``, which may be a bare id of ``-device``."""
    return qdev if qdev.startswith("/") else f"/machine/peripheral/{qdev}"


def query_name() -> Command:
    return _query("query-name")


def query_chardev() -> Command:
    """QEMU's character devices, the monitors and serial ports among them, with the sockets that they listen on."""
    return _query("query-chardev")


def query_vnc() -> Command:
    """Where QEMU's VNC server listens; not every build has one."""
    return _query("query-vnc")


def query_spice() -> Command:
    """Where QEMU's SPICE server listens; not every build has one."""
    return _query("query-spice")


# --- the block graph


def query_block() -> Command:
    return _query("query-block")


def query_named_block_nodes() -> Command:
    """All nodes with their bitmaps, without the trees below them (``flat``)."""
    return _query("query-named-block-nodes", flat=True)


def query_block_graph() -> Command:
    """Every node and who uses it; experimental in QEMU, and before 10.1 the only way to see what is below a filter."""
    return _query("x-debug-query-block-graph")


def query_blockstats() -> Command:
    """What each device has read and written since QEMU started."""
    return _query("query-blockstats")


def query_block_jobs() -> Command:
    return _query("query-block-jobs")


def query_jobs() -> Command:
    return _query("query-jobs")


def job_cancel(job: str) -> Command:
    """Ask for a job's end; it is gone when ``query-jobs`` does not show it any more."""
    return _change("job-cancel", {"id": job})


def job_dismiss(job: str) -> Command:
    """Take away a job that has ended, and with it the knowledge of how."""
    return _change("job-dismiss", {"id": job})


def blockdev_backup(job: str, source: NodeName, target: NodeName, bitmap: BitmapName, *, chunk: int) -> Command:
    """A job that copies what a bitmap of ``source`` marks; it stays, when it has ended, until it is dismissed.

    :param target: of the same size as ``source``.
    :param bitmap: left as it is.
    :param chunk: most bytes in one request, also where the source's allocation is asked for. QEMU refuses less than the
        clusters that it copies in, which are of 64 KiB for a plain file.
    """
    return _change(
        "blockdev-backup",
        {
            "job-id": job,
            "device": source,
            "target": target,
            "sync": "bitmap",
            "bitmap": bitmap,
            "bitmap-mode": "never",
            "auto-dismiss": False,
            "x-perf": {"use-copy-range": False, "max-workers": 16, "max-chunk": chunk},
        },
    )


def blockdev_add_file(node: NodeName, filename: str) -> Command:
    """A fleece: scratch space in a file, so neither flushed nor kept from shrinking.

    :param filename: absolute, on the machine where QEMU runs; the file must be there and have its full size.
    """
    return _change(
        "blockdev-add",
        {
            "driver": "file",
            "node-name": node,
            "filename": filename,
            "discard": "unmap",
            "cache": {"no-flush": True},
            # Ours alone and soon unlinked; a lock would only make QEMU refuse where OFD locks do not work.
            "locking": "off",
        },
    )


def add_fd() -> Command:
    """Hand an open file to QEMU, with :meth:`QmpClient.execute_with`; the answer names its ``fdset-id``."""
    return _change("add-fd", {"opaque": "qemu-remus"})


def remove_fd(fdset: int) -> Command:
    """Let QEMU forget a file that was handed to it; a node that has it open keeps it."""
    return _change("remove-fd", {"fdset-id": fdset})


def blockdev_add_qcow2(node: NodeName, *, file: NodeName, read_only: bool = False) -> Command:
    """An image in a file of ours, to carry a bitmap (:mod:`qemu_remus.qemu.bitmap_file`)."""
    return _change(
        "blockdev-add",
        {
            "driver": "qcow2",
            "node-name": node,
            "file": file,
            "read-only": read_only,
            "cache": {"no-flush": True},
        },
    )


def blockdev_add_filter(
    node: NodeName,
    *,
    disk: NodeName,
    target: NodeName,
    bitmap: BitmapName | None,
    on_cbw_error: OnCbwError = OnCbwError.BREAK_SNAPSHOT,
    cbw_timeout: int | None = None,
) -> Command:
    """A replication filter over ``disk``.

    :param disk: the node that the guest's device has.
    :param target: the fleece, at least as long as the disk.
    :param bitmap: of ``disk``; only what it marks is copied, and only that can be read from the snapshot.
    :param cbw_timeout: whole seconds after which a copy counts as failed; None where the schema lacks it.
    """
    arguments: dict[str, Any] = {
        "driver": "copy-before-write",
        "node-name": node,
        "file": disk,
        "target": target,
        "on-cbw-error": on_cbw_error.value,
        # Without it the filter swallows the guest's discards.
        "discard": "unmap",
    }
    if bitmap is not None:
        arguments["bitmap"] = {"node": disk, "name": bitmap}
    if cbw_timeout is not None:
        arguments["cbw-timeout"] = cbw_timeout
    return _change("blockdev-add", arguments)


def blockdev_add_snapshot_access(node: NodeName, *, filter_node: NodeName) -> Command:
    """The filter's view of the checkpoint, as a node that can be exported."""
    return _change("blockdev-add", {"driver": "snapshot-access", "node-name": node, "file": filter_node})


def block_resize(node: NodeName, size: int) -> Command:
    """Give a node, and the guest's device over it, another size.

    :param size: in bytes, a multiple of 512.
    """
    return _change("block_resize", {"node-name": node, "size": size})


def blockdev_del(node: NodeName) -> Command:
    return _change("blockdev-del", {"node-name": node})


# --- dirty bitmaps


def transaction(actions: Sequence[Action]) -> Command:
    """All of the actions or none; one after the other after a single drain."""
    return _change("transaction", {"actions": [{"type": action.type, "data": dict(action.data)} for action in actions]})


def bitmap_add_action(
    node: NodeName,
    bitmap: BitmapName,
    *,
    granularity: int | None = None,
    disabled: bool = False,
    persistent: bool = False,
) -> Action:
    """A new bitmap.

    :param granularity: bytes, one of :data:`BITMAP_GRANULARITIES`; None for QEMU's own choice.
    :param disabled: it does not record (for merging into).
    :param persistent: stored in the image when its node is closed; never for the bitmaps of a guest's disk.
    """
    data: dict[str, Any] = {"node": node, "name": bitmap}
    if granularity is not None:
        data["granularity"] = granularity
    if disabled:
        data["disabled"] = True
    if persistent:
        data["persistent"] = True
    return Action("block-dirty-bitmap-add", data)


def bitmap_disable_action(node: NodeName, bitmap: BitmapName) -> Action:
    return Action("block-dirty-bitmap-disable", {"node": node, "name": bitmap})


def bitmap_clear_action(node: NodeName, bitmap: BitmapName) -> Action:
    return Action("block-dirty-bitmap-clear", {"node": node, "name": bitmap})


def bitmap_merge_action(node: NodeName, target: BitmapName, sources: Sequence[BitmapName]) -> Action:
    """Add everything in ``sources``, all on the same node, to ``target``."""
    return Action("block-dirty-bitmap-merge", {"node": node, "target": target, "bitmaps": list(sources)})


def bitmap_copy_action(node: NodeName, target: BitmapName, source: tuple[NodeName, BitmapName]) -> Action:
    """Add everything in a bitmap of another node, of the same size, to ``target``."""
    data = {"node": node, "target": target, "bitmaps": [{"node": source[0], "name": source[1]}]}
    return Action("block-dirty-bitmap-merge", data)


def bitmap_remove_action(node: NodeName, bitmap: BitmapName) -> Action:
    return Action("block-dirty-bitmap-remove", {"node": node, "name": bitmap})


def bitmap_add(
    node: NodeName,
    bitmap: BitmapName,
    *,
    granularity: int | None = None,
    disabled: bool = False,
    persistent: bool = False,
) -> Command:
    """:func:`bitmap_add_action` as a command."""
    return bitmap_add_action(
        node, bitmap, granularity=granularity, disabled=disabled, persistent=persistent
    ).as_command()


def bitmap_disable(node: NodeName, bitmap: BitmapName) -> Command:
    """:func:`bitmap_disable_action` as a command."""
    return bitmap_disable_action(node, bitmap).as_command()


def bitmap_merge(node: NodeName, target: BitmapName, sources: Sequence[BitmapName]) -> Command:
    """:func:`bitmap_merge_action` as a command."""
    return bitmap_merge_action(node, target, sources).as_command()


def bitmap_copy(node: NodeName, target: BitmapName, source: tuple[NodeName, BitmapName]) -> Command:
    """:func:`bitmap_copy_action` as a command."""
    return bitmap_copy_action(node, target, source).as_command()


def bitmap_remove(node: NodeName, bitmap: BitmapName) -> Command:
    """:func:`bitmap_remove_action` as a command."""
    return bitmap_remove_action(node, bitmap).as_command()


# --- NBD


def nbd_server_start(path: str) -> Command:
    """QEMU's NBD server, of which a process has one, on a Unix socket.

    :param path: absolute; QEMU makes the socket.
    """
    return _change("nbd-server-start", {"addr": {"type": "unix", "data": {"path": path}}})


def nbd_server_stop() -> Command:
    """Stop QEMU's NBD server, whoever started it, with every export that it has."""
    return _change("nbd-server-stop", {})


def query_block_exports() -> Command:
    return _query("query-block-exports")


def block_export_add_nbd(
    export: str, node: NodeName, name: str, *, bitmaps: Sequence[tuple[NodeName, BitmapName]] = ()
) -> Command:
    """A read-only NBD export.

    :param export: its id in QEMU.
    :param name: what NBD clients call it, at most 255 bytes.
    :param bitmaps: offered as metadata contexts ``qemu:dirty-bitmap:BITMAP``; they are busy while the export exists.
    """
    arguments: dict[str, Any] = {"type": "nbd", "id": export, "node-name": node, "name": name, "writable": False}
    if bitmaps:
        arguments["bitmaps"] = [{"node": owner, "name": bitmap} for owner, bitmap in bitmaps]
    return _change("block-export-add", arguments)


def block_export_del(export: str, mode: ExportDelMode = ExportDelMode.SAFE) -> Command:
    """Ask for an export's end; it is gone when event ``BLOCK_EXPORT_DELETED`` says so, not when this returns."""
    return _change("block-export-del", {"id": export, "mode": mode.value})
