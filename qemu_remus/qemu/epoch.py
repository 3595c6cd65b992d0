"""One checkpoint's capture, as data and decisions: what is to be sent to QEMU when, and what its answers mean.

Pure: no trio, no sockets, no files, no clock. :mod:`qemu_remus.qemu.capture` sends what is decided here.

QEMU 7.2 to 10 read a QMP socket byte by byte, at 4 µs or so each, and that is what a pause of ours consists of: a
command's length costs more than what it does. Hence the order of things where the pause is our own (*before*, *pause*,
*after*); where the toolstack's pause is used, everything happens inside it, in the same order.

====== =================================================== ==========================================================
when   command                                             why there
====== =================================================== ==========================================================
before ``transaction``: add bitmap N+1 on every disk       It records from here on. What the guest writes until the
                                                           pause is in both bitmaps: sent twice, never zero times.
before ``query-status``, ``query-block``                   Is the VM running (else the pause is somebody else's), has
                                                           every device the node that we know, what is dirty already?
pause  ``stop``
pause  ``transaction``: disable bitmap N on every disk     Checkpoint N's map is complete.
pause  filter and ``qom-set`` for each disk with dirty     A bitmap that was not empty before the pause is not empty
       blocks                                              now, so this is sent with ``stop`` in one write.
pause  ``query-block``, only where a disk was clean before An idle disk needs no filter; one whose first write came
                                                           just before the pause does, and gets it in a second write.
pause  ``cont``                                            Sent as soon as STOP is seen, whatever becomes of the rest.
after  ``snapshot-access`` over each filter                Only a reader. In the pause where the disk lives in an
                                                           iothread, since QEMU 7.2 aborts on it afterwards.
after  ``query-block``                                     Is every filter in? Was the fleece large enough?
====== =================================================== ==========================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from qemu_remus.core.errors import GraphChanged
from qemu_remus.core.model import BitmapName, EpochNumber, Generation, NodeName, PairName
from qemu_remus.qemu import commands
from qemu_remus.qemu.commands import Action, Command
from qemu_remus.qemu.disks import VmDisk
from qemu_remus.qemu.nodes import (
    WINDOW,
    BitmapIdentity,
    Kind,
    access_node,
    filter_node,
    fleece_node,
    is_ours,
    kind_of,
    scratch_bitmap,
)

CLUSTER: Final = 65536
"""Bytes that the replication filter copies at a time; QEMU's least, for a fleece that is a plain file."""

_FINEST: Final = 4096
"""Bytes: finer than this, a bitmap only grows."""

_MOST_BITS: Final = 1 << 25
"""Bits in one bitmap: 4 MiB of memory once they are touched, and some 5 ms to merge; 128 GiB at the finest."""


def granularity_for(size: int) -> int:
    """Bytes that one bit of a disk's bitmaps stands for: 4 KiB up to 128 GiB, then doubling with the disk's size.

    :param size: the disk's, in bytes.
    :return: a power of two, at least 4,096.
    """
    granularity = _FINEST
    while size > granularity * _MOST_BITS:
        granularity *= 2
    return granularity


def fleece_bound(size: int, dirty_bytes: int, granularity: int) -> int:
    """Most bytes that a disk's fleece can come to hold: every cluster with a dirty block in it.

    An upper bound that needs no look at the bitmap; scattered blocks reach it, neighbours stay far below.

    :param size: the disk's, in bytes.
    :param dirty_bytes: as the bitmap counts them, a multiple of ``granularity`` except at the disk's end.
    """
    blocks = -(-dirty_bytes // granularity)
    whole = -(-size // CLUSTER) * CLUSTER
    return min(whole, blocks * max(CLUSTER, granularity))


@dataclass(frozen=True, slots=True)
class BitmapLook:
    """One dirty bitmap, as QEMU shows it.

    :param count: dirty bytes.
    :param granularity: bytes per bit.
    :param inconsistent: it was loaded from an image that was not closed in order: it may only be removed.
    """

    name: BitmapName
    count: int
    granularity: int
    recording: bool
    busy: bool
    inconsistent: bool = False


@dataclass(frozen=True, slots=True)
class Tracked:
    """One of our bitmaps on a disk.

    :param recording: it records what the guest writes; else it is complete.
    """

    identity: BitmapIdentity
    recording: bool


@dataclass(frozen=True, slots=True)
class CapturedDisk:
    """A disk that changed in the epoch, and how its contents at the checkpoint are reached.

    :param index: into the attachment's disks, and so into the pair's.
    :param dirty_bytes: as its bitmap counts them.
    :param granularity: bytes per bit of that bitmap.
    :param filter: the replication filter, attached to the guest's device.
    :param access: the ``snapshot-access`` node to read from.
    """

    index: int
    disk: VmDisk
    dirty_bytes: int
    granularity: int
    filter: NodeName
    access: NodeName


@dataclass(frozen=True, slots=True)
class Capture:
    """Checkpoint N, readable until it is released.

    :param finished: the bitmap that covers epoch N; it does not record any more.
    :param following: the bitmap that records epoch N+1.
    :param disks: those with dirty blocks, in the attachment's order; empty for an epoch of nothing.
    :param pause_seconds: from the sending of our first command that had to find the VM paused to the reply to the last
        one: with our own pause, from ``stop`` to ``cont``.
    :param confirmed: QEMU was asked whether everything is where it was put. While somebody waits with a paused VM there
        is no time for it: then it is asked before the first read.
    """

    finished: BitmapIdentity
    following: BitmapIdentity
    disks: tuple[CapturedDisk, ...]
    pause_seconds: float
    confirmed: bool = True

    @property
    def epoch(self) -> EpochNumber:
        """N."""
        return self.finished.epoch

    @property
    def dirty_bytes(self) -> int:
        """Of all disks together."""
        return sum(disk.dirty_bytes for disk in self.disks)


@dataclass(frozen=True, slots=True)
class DeviceLook:
    """What a guest's device is attached to, and the bitmaps of that node.

    :param node: None where there is no medium.
    :param size: bytes; 0 where that is not known.
    """

    node: NodeName | None
    bitmaps: Mapping[BitmapName, BitmapLook]
    size: int = 0


def _bitmaps(entries: Iterable[Mapping[str, Any]]) -> dict[BitmapName, BitmapLook]:
    return {
        BitmapName(entry["name"]): BitmapLook(
            BitmapName(entry["name"]),
            entry["count"],
            entry["granularity"],
            entry["recording"],
            entry["busy"],
            # QEMU shows it only where it is so.
            bool(entry.get("inconsistent", False)),
        )
        for entry in entries
        if "name" in entry  # the filter's own have none
    }


Devices = Mapping[str, DeviceLook]
"""By the devices' absolute QOM paths."""


def look_at_devices(query_block: Iterable[Mapping[str, Any]]) -> dict[str, DeviceLook]:
    """Read ``query-block``'s answer; whatever has no guest device is left out."""
    looks = {}
    for entry in query_block:
        if "qdev" in entry:
            inserted = entry.get("inserted")
            looks[commands.qom_path(entry["qdev"])] = (
                DeviceLook(None, {})
                if inserted is None
                else DeviceLook(
                    NodeName(inserted["node-name"]),
                    _bitmaps(inserted.get("dirty-bitmaps", ())),
                    inserted.get("image", {}).get("virtual-size", 0),
                )
            )
    return looks


def bitmaps_by_node(named_nodes: Iterable[Mapping[str, Any]]) -> dict[NodeName, dict[BitmapName, BitmapLook]]:
    """Read ``query-named-block-nodes``' answer (with ``flat``), the only one that shows a disk's bitmaps while our
    filter is in."""
    return {NodeName(entry["node-name"]): _bitmaps(entry.get("dirty-bitmaps", ())) for entry in named_nodes}


def check_graph(disks: Sequence[VmDisk], devices: Devices) -> None:
    """See that every device still has the node that we know, before anything is swapped under it.

    ``qom-set drive`` would silently bypass a node that another tool put in between, and swapping a node for itself
    aborts QEMU.

    :raise GraphChanged: naming the first disk that has not.
    """
    for disk in disks:
        look = devices.get(commands.qom_path(disk.qdev))
        if look is None or look.node is None:
            raise GraphChanged(
                f"disk {disk.name} is gone: the VM has no device {disk.qdev} with a medium any more",
                safe="the VM was left as it is, and the other disks' changes stay recorded",
                hint="if it was unplugged, the others go on without it",
            )
        if look.node != disk.node:
            raise GraphChanged(
                f"disk {disk.name}: its device has node {look.node}, where {disk.node} was expected",
                safe="the block graph was left as it is",
                hint="another tool (a snapshot, a throttle, a backup) changed it; the disk is compared with the "
                "secondary's as soon as it can be",
            )
        check_size(disk, look)


def check_size(disk: VmDisk, look: DeviceLook) -> None:
    """See that a disk has the size that we know.

    :raise GraphChanged: when it has not.
    """
    if look.size not in (0, disk.size):
        raise GraphChanged(
            f"disk {disk.name} has {look.size} bytes, where it had {disk.size}",
            safe="the VM was left as it is, and its changes stay recorded",
            hint="where it was made larger, the secondary's copy follows with the next checkpoint",
        )


def dirty_disks(
    disks: Sequence[VmDisk], devices: Devices, finished: BitmapIdentity
) -> tuple[dict[int, BitmapLook], list[int]]:
    """Which disks changed in the epoch.

    :return: the bitmaps with dirty blocks, by the disk's index, and the indices of the disks that are clean.
    :raise GraphChanged: when a disk does not have the epoch's bitmap.
    """
    dirty: dict[int, BitmapLook] = {}
    clean: list[int] = []
    for index, disk in enumerate(disks):
        bitmap = confirmed(disk, devices[commands.qom_path(disk.qdev)].bitmaps, finished)
        if bitmap.count:
            dirty[index] = bitmap
        else:
            clean.append(index)
    return dirty, clean


def confirmed(disk: VmDisk, bitmaps: Mapping[BitmapName, BitmapLook], finished: BitmapIdentity) -> BitmapLook:
    """A disk's bitmap, which has to be there.

    :raise GraphChanged: when it is not, or cannot be trusted.
    """
    bitmap = bitmaps.get(finished.name)
    if bitmap is None or bitmap.inconsistent:
        raise GraphChanged(
            f"disk {disk.name} has lost its dirty bitmap {finished.name}",
            safe="the secondary keeps its last checkpoint",
            hint="somebody removed it; what the guest changed is not known, so that all of the disk is compared with "
            "the secondary's",
        )
    return bitmap


def insertion(
    pair: PairName,
    disk: VmDisk,
    finished: BitmapIdentity,
    *,
    cbw_timeout: int | None,
    with_access: bool,
    in_memory: bool = False,
) -> list[Command]:
    """The commands that put the replication filter between a device and its disk.

    They may be sent without waiting for each reply: after a failed ``blockdev-add`` the others fail too, since the node
    that they name is not there; and the filter is never the node that the device has already, its name being new.

    :param cbw_timeout: whole seconds after which the filter gives up a copy; None where QEMU does not have it.
    :param with_access: the ``snapshot-access`` node too.
    :param in_memory: what the guest overwrites goes into the fleece in memory; else into the one in a file.
    """
    filter_name = filter_node(pair, disk.name, finished.epoch)
    steps = [
        commands.blockdev_add_filter(
            filter_name,
            disk=disk.node,
            target=fleece_node(pair, disk.name, in_memory=in_memory),
            bitmap=finished.name,
            cbw_timeout=cbw_timeout,
        ),
        commands.qom_set_drive(disk.qdev, filter_name),
    ]
    if with_access:
        steps.append(access_command(pair, disk, finished))
    return steps


def access_command(pair: PairName, disk: VmDisk, finished: BitmapIdentity) -> Command:
    """The command that makes the checkpoint readable through the filter."""
    return commands.blockdev_add_snapshot_access(
        access_node(pair, disk.name, finished.epoch), filter_node=filter_node(pair, disk.name, finished.epoch)
    )


def removal(
    pair: PairName,
    disks: Sequence[VmDisk],
    devices: Devices,
    nodes: Mapping[NodeName, Mapping[BitmapName, BitmapLook]],
) -> list[Command]:
    """The commands that take out every filter and access node of the pair, of whichever epoch, from what is there now;
    and what a push that was cut short left of its bitmaps.

    A device gets its disk node back only if it has a filter of ours at this moment: anything else was put there by
    somebody else, and a device that has its disk node already must not get it again.
    """
    ours = [node for node in nodes if is_ours(node, pair)]
    steps = [commands.blockdev_del(node) for node in ours if kind_of(node) in (Kind.ACCESS, Kind.MAP)]
    for disk in disks:
        look = devices.get(commands.qom_path(disk.qdev))
        if look is not None and look.node is not None and is_ours(look.node, pair):
            steps.append(commands.qom_set_drive(disk.qdev, disk.node))
    steps += [commands.blockdev_del(node) for node in ours if kind_of(node) is Kind.FILTER]
    window = scratch_bitmap(pair, WINDOW).name
    steps += [commands.bitmap_remove(disk.node, window) for disk in disks if window in nodes.get(disk.node, {})]
    return steps


def inserted_nodes(pair: PairName, nodes: Iterable[NodeName]) -> list[NodeName]:
    """Those of the nodes that a checkpoint of the pair has put in, or its reading."""
    kinds = (Kind.ACCESS, Kind.FILTER, Kind.MAP)
    return sorted(node for node in nodes if is_ours(node, pair) and kind_of(node) in kinds)


def our_exports(pair: PairName, query_block_exports: Iterable[Mapping[str, Any]]) -> list[str]:
    """Ids of the pair's exports in ``query-block-exports``' answer, those that are being shut down among them."""
    return [entry["id"] for entry in query_block_exports if is_ours(entry["id"], pair)]


def look_name(recording: BitmapIdentity) -> BitmapIdentity:
    """The bitmap into which one that records is merged to be looked at, as QEMU exports none that records.

    Like a scratch bitmap it has no generation; the base makes it another one.
    """
    return BitmapIdentity(recording.pair, Generation(UUID(int=0)), recording.epoch, recording.epoch)


def rotation(
    disks: Sequence[VmDisk], finished: BitmapIdentity | None, following: BitmapIdentity | None
) -> list[Action]:
    """The actions that end one bitmap and begin the next, for all disks: per disk *add*, then *disable*.

    In this order a write between the two is recorded twice, never zero times.

    :param finished: the one to end; None: only begin.
    :param following: the one to begin; None: only end.
    """
    actions = []
    for disk in disks:
        if following is not None:
            granularity = granularity_for(disk.size)
            actions.append(commands.bitmap_add_action(disk.node, following.name, granularity=granularity))
        if finished is not None:
            actions.append(commands.bitmap_disable_action(disk.node, finished.name))
    return actions


def all_or_none(actions: Sequence[Action]) -> Command:
    """One command for all of the actions; a lone one needs no transaction around it, which is 60 bytes shorter."""
    return actions[0].as_command() if len(actions) == 1 else commands.transaction(actions)


def merging(
    disks: Sequence[VmDisk],
    nodes: Mapping[NodeName, Mapping[BitmapName, BitmapLook]],
    old: Sequence[BitmapIdentity],
    into: BitmapIdentity,
) -> list[Action]:
    """The actions that fold bitmaps into one, which records from then on: for each disk add, merge, remove.

    A disk that lacks some of the old ones takes what it has; one that has ``into`` already keeps it.
    """
    actions = []
    for disk in disks:
        if disk.node not in nodes:
            # It was taken out of the VM; nothing of it can be lost.
            continue
        there = nodes[disk.node]
        found = [identity.name for identity in old if identity.name in there and identity != into]
        whole = [name for name in found if not there[name].inconsistent]
        if into.name not in there:
            granularity = granularity_for(disk.size)
            actions.append(commands.bitmap_add_action(disk.node, into.name, granularity=granularity))
        if whole:
            actions.append(commands.bitmap_merge_action(disk.node, into.name, whole))
        if found:
            actions += [commands.bitmap_remove_action(disk.node, name) for name in found]
    return actions


def tracked(pair: PairName, bitmaps: Mapping[BitmapName, BitmapLook]) -> tuple[Tracked, ...]:
    """The pair's bitmaps among those of one node that can be trusted, oldest epoch first."""
    return tuple(
        Tracked(identity, bitmaps[identity.name].recording)
        for identity in identities(pair, bitmaps)
        if not bitmaps[identity.name].inconsistent
    )


def identities(pair: PairName, bitmaps: Iterable[BitmapName]) -> tuple[BitmapIdentity, ...]:
    """The pair's bitmaps among those of one node, oldest epoch first; never one that only counted clusters."""
    found = (BitmapIdentity.parse(name) for name in bitmaps)
    return tuple(
        sorted(
            (one for one in found if one is not None and one.pair == pair and one.generation.int),
            key=lambda one: (one.generation, one.epoch),
        )
    )
