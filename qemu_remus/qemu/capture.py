"""The capture of one checkpoint: sends what :mod:`qemu_remus.qemu.epoch` decides, and leaves nothing half done.

Owned here: the pause. A VM that we stopped runs again when :meth:`Capturer.capture` returns or raises, also when it is
cancelled, when QEMU refuses a command anywhere, and when the connection is lost; a VM that we did not stop is never
resumed by us. Filters that were put in are taken out again when the capture fails. Bitmaps are not: after a failure the
old one, the new one or both are there, and whoever called asks which, and merges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from qemu_remus.core.errors import (
    CheckpointVoid,
    CommandInDoubt,
    EpochLost,
    FleeceTooSmall,
    GraphChanged,
    QemuError,
    QemuRemusError,
    QemuUnreachable,
)
from qemu_remus.core.model import BitmapName, NodeName, PairName
from qemu_remus.qemu import commands, epoch
from qemu_remus.qemu.client import Done, EventStream, Failed, InDoubt, Outcome, QmpClient, QmpEvent
from qemu_remus.qemu.commands import Command
from qemu_remus.qemu.disks import VmDisk
from qemu_remus.qemu.epoch import BitmapLook, Capture, CapturedDisk
from qemu_remus.qemu.exports import drop_export
from qemu_remus.qemu.guardian_client import DEFAULT_PAUSE_LIMIT, Guardian
from qemu_remus.qemu.nodes import BitmapIdentity, access_node, filter_node

_REPLY_LIMIT: Final = 5.0
"""Seconds that QEMU may take over one write of ours in the pause. ``stop`` waits for the host's disks."""

_RESUME_LIMIT: Final = 120.0
"""Seconds for which a VM of which it is not known that it runs is told to; the guardian takes over then."""

_UNDO_LIMIT: Final = 30.0
"""Seconds that taking out our filters may take after a failure."""

_RUNNING: Final = frozenset({"running", "suspended"})
"""States in which the guest's disks may still change: a suspended guest wakes up without an event RESUME."""

_KEPT: Final = "the VM runs and its changes stay recorded"


@dataclass(slots=True)
class _Pause:
    """What became of the part that had to find the VM paused.

    :param ours: we were to make it.
    :param inserted: indices of the disks for which a filter was sent.
    :param late: those of them that were clean just before the pause.
    :param problem: the first thing that went wrong; the checkpoint cannot be used then.
    """

    ours: bool
    inserted: list[int]
    late: list[int] = field(default_factory=list)
    seconds: float = 0.0
    problem: QemuRemusError | None = None


@dataclass(frozen=True, slots=True)
class _NotSent:
    """The connection was gone before the command was sent."""

    error: QemuUnreachable


_Result = Outcome | _NotSent


@dataclass(frozen=True, slots=True)
class _Look:
    """The VM just before the pause, or in somebody else's."""

    status: str
    dirty: dict[int, BitmapLook]
    clean: list[int]
    order: int


class Capturer:
    """Captures checkpoints of one VM's disks; one at a time.

    :param free_space: bytes that the fleeces may still take; blocks, is called in a thread.
    :param cbw_timeout: whole seconds after which a filter gives up the snapshot for the guest's sake; None where QEMU
        does not have it.
    :param guardian: resumes the VM should this process end inside its own pause; None: nobody does.
    """

    def __init__(
        self,
        client: QmpClient,
        pair: PairName,
        disks: Sequence[VmDisk],
        *,
        free_space: Callable[[], int],
        cbw_timeout: int | None,
        guardian: Guardian | None,
        pause_limit: float = DEFAULT_PAUSE_LIMIT,
    ) -> None:
        self._client = client
        self._pair = pair
        self._disks = disks
        self._free_space = free_space
        self._cbw_timeout = cbw_timeout
        self._guardian = guardian
        self._pause_limit = pause_limit

    async def capture(self, finished: BitmapIdentity, following: BitmapIdentity, *, pause: bool) -> Capture:
        """Make checkpoint ``finished.epoch`` readable.

        :param finished: the bitmap that has recorded the epoch, on every disk.
        :param following: the bitmap that records from now on; added here.
        :param pause: stop and resume the VM for it. Where the VM is found paused already, by somebody else, that pause
            is used and left alone. False: the VM is paused by the caller.
        :raise CheckpointVoid: when the VM was not paused throughout.
        :raise FleeceTooSmall: when the fleeces could not hold what the guest might overwrite.
        :raise EpochLost: when QEMU refused a step.
        :raise GraphChanged: when a disk is not attached as it was, or has lost its bitmap; nothing was changed.
        :raise CommandFailed: when QEMU refused to begin the new bitmap; nothing was changed.
        :raise CommandInDoubt: when the connection was lost, or QEMU does not answer.
        :raise QemuUnreachable: when it was lost before anything was changed.
        """
        with self._client.subscribe("STOP", "RESUME") as events:
            if pause:
                look = await self._look(finished, epoch.rotation(self._disks, None, following))
                if look.status == "running":
                    await self._check_fleece(finished, look.dirty)
                    shot = await self._in_own_pause(finished, look, events)
                else:
                    shot = await self._in_their_pause(finished, None, events)
            else:
                shot = await self._in_their_pause(finished, following, events)
        try:
            return await self._confirm(finished, following, shot)
        except BaseException as error:
            with trio.move_on_after(_UNDO_LIMIT) as scope:
                scope.shield = True
                await self._undo(error)
            raise

    async def take_out(self) -> Sequence[str]:
        """Take out whatever filters, access nodes and exports of the pair are in, of any epoch, from what QEMU shows.

        :return: the names of those that are still there: somebody holds on to them, or does something with the graph.
        :raise QemuError: when QEMU does not answer.
        """
        await self._drop_exports()
        outcomes = await self._client.execute_many(epoch.removal(self._pair, self._disks, *await self._graph()))
        if all(isinstance(outcome, Done) for outcome in outcomes):
            return []
        _, nodes = await self._graph()
        return epoch.inserted_nodes(self._pair, nodes)

    async def _graph(self) -> tuple[epoch.Devices, list[NodeName]]:
        blocks, named = await self._client.execute_many([commands.query_block(), commands.query_named_block_nodes()])
        return epoch.look_at_devices(_value(blocks)), list(epoch.bitmaps_by_node(_value(named)))

    async def _drop_exports(self) -> None:
        exports = await self._client.execute(commands.query_block_exports())
        for export in epoch.our_exports(self._pair, exports):
            await drop_export(self._client, export)

    # --- before

    async def _look(self, finished: BitmapIdentity, actions: Sequence[commands.Action]) -> _Look:
        """Rotate, and read what there is, in one write."""
        rotated, status, blocks = await self._client.execute_many(
            [epoch.all_or_none(actions), commands.query_status(), commands.query_block()]
        )
        # A changed graph explains a refused rotation better than QEMU's own words.
        devices = epoch.look_at_devices(_value(blocks))
        epoch.check_graph(self._disks, devices)
        dirty, clean = epoch.dirty_disks(self._disks, devices, finished)
        _value(rotated)
        running = _done(status)
        return _Look(str(running.value["status"]), dirty, clean, running.order)

    async def _check_fleece(self, finished: BitmapIdentity, dirty: Mapping[int, BitmapLook]) -> None:
        """See that the fleeces can hold every cluster that the guest might overwrite.

        :raise FleeceTooSmall: when they cannot.
        """
        if not dirty:
            return
        free = await trio.to_thread.run_sync(self._free_space)
        bound = sum(
            epoch.fleece_bound(self._disks[index].size, bitmap.count, bitmap.granularity)
            for index, bitmap in dirty.items()
        )
        if bound <= free:
            return
        needed = await self._count_clusters(finished, list(dirty))
        if needed > free:
            raise FleeceTooSmall(
                f"the epoch may need {needed} bytes of fleece, and {free} are free",
                safe=_KEPT,
                hint="free some space in the fleece directory, or name another one (--fleece-dir)",
            )

    async def _count_clusters(self, finished: BitmapIdentity, indices: Sequence[int]) -> int:
        """Bytes in clusters that hold a dirty block, counted by QEMU."""
        name = epoch.exact_count_name(finished).name
        disks = [self._disks[index] for index in indices]
        count = commands.transaction(
            [
                action
                for disk in disks
                for action in (
                    commands.bitmap_add_action(disk.node, name, granularity=epoch.CLUSTER, disabled=True),
                    commands.bitmap_merge_action(disk.node, name, [finished.name]),
                )
            ]
        )
        remove = commands.transaction([commands.bitmap_remove_action(disk.node, name) for disk in disks])
        counted, nodes, removed = await self._client.execute_many([count, commands.query_named_block_nodes(), remove])
        _value(counted)
        _value(removed)
        bitmaps = epoch.bitmaps_by_node(_value(nodes))
        return sum(bitmaps[disk.node][name].count for disk in disks)

    # --- our own pause

    async def _in_own_pause(self, finished: BitmapIdentity, look: _Look, events: EventStream) -> _Pause:
        if self._guardian is not None:
            await self._guardian.arm(self._pause_limit)
        with trio.CancelScope(shield=True):
            pause = await self._pause(finished, look, events)
            if self._guardian is not None:
                self._guardian.disarm()
        return pause

    async def _pause(self, finished: BitmapIdentity, look: _Look, events: EventStream) -> _Pause:
        """Stop, insert, resume. Never raises; runs shielded."""
        pause = _Pause(ours=True, inserted=list(look.dirty))
        steps: list[Command] = [
            commands.stop(),
            epoch.all_or_none(epoch.rotation(self._disks, finished, None)),
            *self._insertions(finished, look.dirty),
        ]
        if look.clean:
            steps.append(commands.query_block())
        seen: list[QmpEvent] = []
        resumed: list[_Result] = []
        started = trio.current_time()

        async def resume_when_stopped() -> None:
            # QEMU executes it after all that was sent before it, so nothing is lost by sending it at once, and a round
            # trip is won.
            async for event in events:
                seen.append(event)
                if event.name == "STOP":
                    resumed.extend(await self._send([commands.cont()]))
                    return

        async with trio.open_nursery() as nursery:
            if not look.clean:
                nursery.start_soon(resume_when_stopped)
            outcomes = await self._send(steps)
            nursery.cancel_scope.cancel()  # a cont that was sent is waited for all the same
        seen += events.drain()

        stopped = outcomes[0]
        ours = isinstance(stopped, Done) and any(
            event.name == "STOP" and look.order < event.order < stopped.order for event in seen
        )
        if ours and not resumed:
            if look.clean:
                outcomes = self._see_newly_dirty(finished, look, outcomes, pause)
            *late, cont = await self._send([*self._insertions(finished, pause.late), commands.cont()])
            outcomes += late
            resumed.append(cont)
            seen += events.drain()
        pause.seconds = trio.current_time() - started
        pause.problem = pause.problem or self._judge(outcomes, seen, ours=ours)
        if not (resumed and isinstance(resumed[0], Done)) and (ours or isinstance(stopped, InDoubt)):
            try:
                await self._make_it_run()
            except QemuError as error:
                pause.problem = error
        return pause

    def _see_newly_dirty(
        self, finished: BitmapIdentity, look: _Look, outcomes: list[_Result], pause: _Pause
    ) -> list[_Result]:
        """Find the disks that were clean before the pause and are not now.

        :param pause: gets them as ``late``.
        :return: the outcomes without that of the look at the disks.
        """
        *others, blocks = outcomes
        if not isinstance(blocks, Done) or not all(isinstance(outcome, Done) for outcome in others):
            return outcomes
        devices = epoch.look_at_devices(blocks.value)
        clean = [self._disks[index] for index in look.clean]
        try:
            epoch.check_graph(clean, devices)
            dirty, _ = epoch.dirty_disks(clean, devices, finished)
        except GraphChanged as error:
            pause.problem = error
        else:
            pause.late = [look.clean[position] for position in dirty]
            pause.inserted = sorted([*pause.inserted, *pause.late])
        return others

    def _judge(self, outcomes: Sequence[_Result], seen: Sequence[QmpEvent], *, ours: bool) -> QemuRemusError | None:
        """Whether everything that had to happen in our pause did."""
        stopped = outcomes[0]
        if isinstance(stopped, Failed):
            return CheckpointVoid(f"the VM cannot be paused: {stopped.error.what}", safe=_KEPT)
        if isinstance(stopped, Done) and not ours:
            return CheckpointVoid(
                "somebody else paused the VM at the same moment", safe="it was left paused, as they want it"
            )
        return _first_problem(outcomes, seen, after=stopped.order if isinstance(stopped, Done) else 0)

    async def _make_it_run(self) -> None:
        """See to it that a VM that we stopped, or may have stopped, runs.

        :raise QemuError: when that cannot be known.
        """
        with trio.move_on_after(_RESUME_LIMIT):
            while not self._client.closed.is_set():
                if self._guardian is not None:
                    # QEMU is slow, and we are here to see it: no reason to be killed.
                    await self._guardian.arm(self._pause_limit)
                (outcome,) = await self._send([commands.cont()])
                if isinstance(outcome, Done):
                    return
                if isinstance(outcome, Failed):
                    raise outcome.error
        if self._guardian is None:
            raise CommandInDoubt(
                "cont", "the connection was lost inside the pause", hint="look at the VM's status, and resume it (cont)"
            )
        await self._guardian.resume_now()

    # --- somebody else's pause

    async def _in_their_pause(
        self, finished: BitmapIdentity, following: BitmapIdentity | None, events: EventStream
    ) -> _Pause:
        started = trio.current_time()
        look = await self._look(finished, epoch.rotation(self._disks, finished, following))
        pause = _Pause(ours=False, inserted=list(look.dirty))
        if look.status in _RUNNING:
            pause.problem = CheckpointVoid(
                f"the VM is {look.status}, where it should have been paused",
                safe=_KEPT,
                hint="pause the VM first, or let the controller do it",
            )
            return pause
        await self._check_fleece(finished, look.dirty)
        outcomes = await self._send(
            [*self._insertions(finished, look.dirty, with_access=True), commands.query_status()]
        )
        pause.seconds = trio.current_time() - started
        pause.problem = _first_problem(outcomes, events.drain(), after=look.order)
        return pause

    # --- after

    async def _confirm(self, finished: BitmapIdentity, following: BitmapIdentity, pause: _Pause) -> Capture:
        """Make the checkpoint readable, see that every filter is where it should be, and read the final counts."""
        if pause.problem is not None:
            raise pause.problem
        if not pause.inserted:
            return Capture(finished, following, (), pause.seconds)
        late = [
            epoch.access_command(self._pair, self._disks[index], finished)
            for index in pause.inserted
            if pause.ours and not _access_in_pause(self._disks[index])
        ]
        *added, named, blocks = await self._client.execute_many(
            [*late, commands.query_named_block_nodes(), commands.query_block()]
        )
        problem = _first_problem(added, (), after=0)
        if problem is not None:
            raise problem
        devices, nodes = epoch.look_at_devices(_value(blocks)), epoch.bitmaps_by_node(_value(named))
        captured = tuple(self._captured(index, finished, devices, nodes) for index in pause.inserted)
        if pause.ours:
            # In the pause there was no time for it, and the guest has written a little since the look before it.
            await self._check_fleece(finished, {disk.index: nodes[disk.disk.node][finished.name] for disk in captured})
        return Capture(finished, following, captured, pause.seconds)

    def _captured(
        self,
        index: int,
        finished: BitmapIdentity,
        devices: epoch.Devices,
        nodes: Mapping[NodeName, Mapping[BitmapName, BitmapLook]],
    ) -> CapturedDisk:
        disk = self._disks[index]
        filter_name = filter_node(self._pair, disk.name, finished.epoch)
        access = access_node(self._pair, disk.name, finished.epoch)
        device = devices.get(commands.qom_path(disk.qdev))
        bitmap = nodes.get(disk.node, {}).get(finished.name)
        if device is None or device.node != filter_name or access not in nodes or bitmap is None:
            raise GraphChanged(
                f"disk {disk.name}: the replication filter is not where it was put",
                safe=_KEPT,
                hint="another tool changed the block graph at the same moment",
            )
        return CapturedDisk(index, disk, bitmap.count, bitmap.granularity, filter_name, access)

    def _insertions(
        self, finished: BitmapIdentity, indices: Iterable[int], *, with_access: bool = False
    ) -> list[Command]:
        return [
            command
            for index in indices
            for command in epoch.insertion(
                self._pair,
                self._disks[index],
                finished,
                cbw_timeout=self._cbw_timeout,
                with_access=with_access or _access_in_pause(self._disks[index]),
            )
        ]

    async def _send(self, steps: Sequence[Command]) -> list[_Result]:
        """As ``execute_many``, with an outcome for commands that were not sent, too."""
        try:
            return [*await self._client.execute_many(steps, timeout=_REPLY_LIMIT)]
        except QemuUnreachable as error:
            return [_NotSent(error)] * len(steps)

    async def _undo(self, error: BaseException) -> None:
        """Take out what a failed capture put in, and say in the error what could not be."""
        try:
            left = await self.take_out()
        except QemuError as failure:
            note = f"what was put into QEMU is still there, and is taken out at the next start ({failure.what})"
        else:
            note = f"still in QEMU, and taken out before the next checkpoint: {', '.join(left)}" if left else ""
        if note and isinstance(error, QemuRemusError):
            error.safe = "; ".join(part for part in (error.safe, note) if part)
        elif note:
            error.add_note(note)


def _access_in_pause(disk: VmDisk) -> bool:
    """QEMU 7.2 aborts when a node is added over one that lives in an iothread of a running guest."""
    return disk.iothread is not False


def _done(outcome: Outcome) -> Done:
    """The reply; raises what a lone command would have raised."""
    if isinstance(outcome, Done):
        return outcome
    raise outcome.error


def _value(outcome: Outcome) -> Any:
    """The reply's value."""
    return _done(outcome).value


def _first_problem(outcomes: Sequence[_Result], seen: Iterable[QmpEvent], *, after: int) -> QemuRemusError | None:
    """The first thing that keeps a checkpoint from being one.

    :param after: order of the message that showed the VM paused.
    """
    last = after
    for outcome in outcomes:
        match outcome:
            case Done(order=order):
                last = max(last, order)
            case Failed(error=refused):
                problem = EpochLost(f"the checkpoint could not be captured: {refused.what}", safe=_KEPT)
                problem.__cause__ = refused
                return problem
            case InDoubt(error=error) | _NotSent(error=error):
                return error
    if any(event.name == "RESUME" and after < event.order < last for event in seen):
        return CheckpointVoid("somebody resumed the VM while the checkpoint was being captured", safe=_KEPT)
    return None
