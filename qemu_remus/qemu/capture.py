"""The capture of one checkpoint: sends what :mod:`qemu_remus.qemu.epoch` decides, and leaves nothing half done.

Owned here: the pause. A VM that we stopped runs again when :meth:`Capturer.capture` returns or raises, also when it is
cancelled, when QEMU refuses a command anywhere, and when the connection is lost; a VM that we did not stop is never
resumed by us. Filters that were put in are taken out again when the capture fails. Bitmaps are not: after a failure the
old one, the new one or both are there, and whoever called asks which, and merges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Final

import trio

from qemu_remus.core.errors import (
    CheckpointVoid,
    CommandInDoubt,
    GraphChanged,
    QemuError,
    QemuRemusError,
    QemuUnreachable,
)
from qemu_remus.core.model import BitmapName, NodeName, PairName
from qemu_remus.qemu import commands, epoch
from qemu_remus.qemu.client import Done, Failed, InDoubt, QmpClient
from qemu_remus.qemu.commands import Command
from qemu_remus.qemu.disks import VmDisk
from qemu_remus.qemu.epoch import BitmapLook, Capture, CapturedDisk
from qemu_remus.qemu.events import EventStream, QmpEvent
from qemu_remus.qemu.exports import drop_export
from qemu_remus.qemu.fleece_room import FleeceRoom
from qemu_remus.qemu.guardian_client import DEFAULT_PAUSE_LIMIT, Guardian
from qemu_remus.qemu.jobs import end_jobs
from qemu_remus.qemu.nodes import BitmapIdentity, access_node, filter_node, is_ours
from qemu_remus.qemu.pauses import KEPT, Look, NotSent, Pause, Result, done, first_problem, stopped_by_others, value

_REPLY_LIMIT: Final = 5.0
"""Seconds that QEMU may take over one write of ours in the pause. ``stop`` waits for the host's disks."""

_RESUME_LIMIT: Final = 120.0
"""Seconds for which a VM of which it is not known that it runs is told to; the guardian takes over then."""

_THEIR_PAUSE: Final = 1.0
"""Seconds that somebody else's pause must have lasted before it is used, where it matters that it does not end."""

_UNDO_LIMIT: Final = 30.0
"""Seconds that taking out our filters may take after a failure."""

_RUNNING: Final = frozenset({"running", "suspended"})
"""States in which the guest's disks may still change: a suspended guest wakes up without an event RESUME."""


class Capturer:
    """Captures checkpoints of one VM's disks; one at a time.

    :param free_space: bytes that the fleeces in files may still take; blocks, is called in a thread.
    :param memory: the same of the fleeces in memory; None: there are none.
    :param cbw_timeout: whole seconds after which a filter gives up the snapshot for the guest's sake; None where QEMU
        does not have it.
    :param guardian: resumes the VM should this process end inside its own pause; None: nobody does.
    :param fragile: whether a node that is added over a disk while the guest runs ends QEMU
        (:attr:`~qemu_remus.qemu.faults.Fault.IOTHREAD_GRAPH`).
    """

    def __init__(
        self,
        client: QmpClient,
        pair: PairName,
        disks: Sequence[VmDisk],
        *,
        free_space: Callable[[], int],
        memory: Callable[[], int] | None = None,
        cbw_timeout: int | None,
        guardian: Guardian | None,
        pause_limit: float = DEFAULT_PAUSE_LIMIT,
        fragile: Callable[[VmDisk], bool] = lambda _: False,
    ) -> None:
        self._client = client
        self._pair = pair
        self._disks = disks
        self._fleece_room = FleeceRoom(client, disks, free_space, memory)
        self._cbw_timeout = cbw_timeout
        self._guardian = guardian
        self._pause_limit = pause_limit
        self._fragile = fragile

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
                if look.status != "running" and self._careful:
                    await self._let_pass(events)
                    look = await self._look(finished, [])
                if look.status == "running":
                    await self._fleece_room.choose(finished, look.dirty, count=True)
                    shot = await self._in_own_pause(finished, look, events)
                else:
                    shot = await self._in_their_pause(finished, None, events)
            else:
                shot = await self._in_their_pause(finished, following, events)
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            return await self._confirm(finished, following, shot) if pause else self._as_put(finished, following, shot)
        except BaseException as error:
            with trio.move_on_after(_UNDO_LIMIT) as scope:
                scope.shield = True
                await self._undo(error)
            raise

    def follow(self, disks: Sequence[VmDisk], *, in_memory: bool) -> None:
        """Capture these disks from now on; each of them may have a fleece in memory."""
        self._disks = disks
        self._fleece_room.follow(disks, in_memory=in_memory)

    @property
    def _careful(self) -> bool:
        return any(self._fragile(disk) for disk in self._disks)

    @property
    def fleeces_in_memory(self) -> bool:
        """Where what the guest overwrites goes in the present epoch; else into files."""
        return self._fleece_room.in_memory

    async def vm_is_paused(self) -> bool:
        """Whether the guest stands still, so that its disks cannot change.

        :raise QemuError: when QEMU does not answer.
        """
        status = await self._client.execute(commands.query_status())
        return str(status["status"]) not in _RUNNING

    async def take_out(self) -> Sequence[str]:
        """Take out whatever filters, access nodes and exports of the pair are in, of any epoch, from what QEMU shows.

        :return: the names of those that are still there: somebody holds on to them, or does something with the graph.
        :raise QemuError: when QEMU does not answer.
        """
        await self._end_readers()
        await self._fleece_room.measure()
        outcomes = await self._client.execute_many(epoch.removal(self._pair, self._disks, *await self._graph()))
        gone = all(isinstance(outcome, Done) for outcome in outcomes)
        return [] if gone else epoch.inserted_nodes(self._pair, (await self._graph())[1])

    async def _graph(self) -> tuple[epoch.Devices, Mapping[NodeName, Mapping[BitmapName, BitmapLook]]]:
        blocks, named = await self._client.execute_many([commands.query_block(), commands.query_named_block_nodes()])
        return epoch.look_at_devices(value(blocks)), epoch.bitmaps_by_node(value(named))

    async def _end_readers(self) -> None:
        """Our jobs and exports."""
        jobs, exports = await self._client.execute_many([commands.query_jobs(), commands.query_block_exports()])
        if any(is_ours(entry["id"], self._pair) for entry in value(jobs)):
            await end_jobs(self._client, partial(is_ours, pair=self._pair))
        for export in epoch.our_exports(self._pair, value(exports)):
            await drop_export(self._client, export)

    # --- before

    async def _look(self, finished: BitmapIdentity, actions: Sequence[commands.Action]) -> Look:
        """Rotate, and read what there is, in one write."""
        rotation = [epoch.all_or_none(actions)] if actions else []
        *rotated, status, blocks = await self._client.execute_many(
            [*rotation, commands.query_status(), commands.query_block()]
        )
        # A changed graph explains a refused rotation better than QEMU's own words.
        devices = epoch.look_at_devices(value(blocks))
        epoch.check_graph(self._disks, devices)
        dirty, clean = epoch.dirty_disks(self._disks, devices, finished)
        for outcome in rotated:
            value(outcome)
        running = done(status)
        return Look(str(running.value["status"]), dirty, clean, running.order)

    @staticmethod
    async def _let_pass(events: EventStream) -> None:
        """Wait for the end of somebody else's pause, unless it is a long one. What is put in while it ends would meet a
        guest that runs."""
        with trio.move_on_after(_THEIR_PAUSE):
            async for event in events:
                if event.name == "RESUME":
                    break
        events.drain()

    # --- our own pause

    async def _in_own_pause(self, finished: BitmapIdentity, look: Look, events: EventStream) -> Pause:
        if self._guardian is not None:
            await self._guardian.arm(self._pause_limit)
        with trio.CancelScope(shield=True):
            # What somebody else has paused since we looked is not ours to resume.
            theirs = [event.name for event in events.drain()][-1:] == ["STOP"]
            pause = None if theirs else await self._pause(finished, look, events)
            if self._guardian is not None:
                self._guardian.disarm()
        if pause is None and (self._careful or look.window):
            # It has only begun, and may be a short one.
            return Pause(ours=False, inserted=[], problem=stopped_by_others())
        return pause or await self._in_their_pause(finished, None, events)

    async def _pause(self, finished: BitmapIdentity, look: Look, events: EventStream) -> Pause:
        """Stop, insert, resume. Never raises; runs shielded."""
        pause = Pause(ours=True, inserted=list(look.dirty))
        rotation = [] if look.window else [epoch.all_or_none(epoch.rotation(self._disks, finished, None))]
        insertions = self._insertions(finished, look.dirty, with_access=look.window)
        # The sooner they are in, the less time somebody else has to resume the VM before; else QEMU's order is free.
        steps = [commands.stop(), *(insertions + rotation if self._careful else rotation + insertions)]
        if look.clean:
            steps.append(commands.query_block())
        seen: list[QmpEvent] = []
        started = trio.current_time()
        outcomes, resumed = await self._stop_and_insert(steps, look, events, seen)
        stopped = outcomes[0]
        ours = look.stopped_by_us(stopped, seen)
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

    async def _stop_and_insert(
        self, steps: Sequence[Command], look: Look, events: EventStream, seen: list[QmpEvent]
    ) -> tuple[list[Result], list[Result]]:
        """The steps, the first of which is ``stop``, and, where all of them are known, ``cont`` at once.

        :param seen: gets the events.
        :return: the outcomes of the steps that were sent, and that of ``cont``.
        """
        resumed: list[Result] = []

        async def resume_when_stopped() -> None:
            # QEMU executes it after all that was sent before it, so nothing is lost by sending it at once, and a round
            # trip is won.
            async for event in events:
                seen.append(event)
                if event.name == "STOP":
                    resumed.extend(await self._send([commands.cont()]))
                    return

        if self._careful:
            # Nothing may go in unless it is known that the VM stands still, and by whom.
            outcomes = await self._send(steps[:1])
            seen += events.drain()
            if look.stopped_by_us(outcomes[0], seen):
                outcomes += await self._send(steps[1:])
        else:
            async with trio.open_nursery() as nursery:
                if not look.clean:
                    nursery.start_soon(resume_when_stopped)
                outcomes = await self._send(steps)
                nursery.cancel_scope.cancel()  # a cont that was sent is waited for all the same
        seen += events.drain()
        return outcomes, resumed

    def _see_newly_dirty(
        self, finished: BitmapIdentity, look: Look, outcomes: list[Result], pause: Pause
    ) -> list[Result]:
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

    def _judge(self, outcomes: Sequence[Result], seen: Sequence[QmpEvent], *, ours: bool) -> QemuRemusError | None:
        """Whether everything that had to happen in our pause did."""
        stopped = outcomes[0]
        if isinstance(stopped, Failed):
            return CheckpointVoid(f"the VM cannot be paused: {stopped.error.what}", safe=KEPT)
        if isinstance(stopped, Done) and not ours:
            return stopped_by_others()
        return first_problem(outcomes, seen, after=stopped.order if isinstance(stopped, Done) else 0)

    async def _make_it_run(self) -> None:
        """See to it that a VM that we stopped, or may have stopped, runs.

        :raise QemuError: when that cannot be known.
        """
        with trio.move_on_after(_RESUME_LIMIT):
            while not self._client.closed.is_set():
                if self._guardian is not None:
                    # QEMU is slow, and we are here to see it: no reason to be killed.
                    await self._guardian.arm(self._pause_limit)
                (outcome,) = await self._send([commands.cont()], insist=True)
                if isinstance(outcome, Done):
                    return
                if isinstance(outcome, Failed):
                    if (await self._client.execute(commands.query_status()))["status"] == "shutdown":
                        # Its guest has powered off inside the pause: there is nothing to resume.
                        return
                    raise outcome.error
        if self._guardian is None:
            raise CommandInDoubt(
                "cont", "the connection was lost inside the pause", hint="look at the VM's status, and resume it (cont)"
            )
        await self._guardian.resume_now()

    # --- somebody else's pause

    async def _in_their_pause(
        self, finished: BitmapIdentity, following: BitmapIdentity | None, events: EventStream
    ) -> Pause:
        started = trio.current_time()
        look = await self._look(finished, epoch.rotation(self._disks, finished, following))
        pause = Pause(ours=False, inserted=list(look.dirty), dirty=look.dirty)
        if look.status in _RUNNING:
            pause.problem = CheckpointVoid(
                f"the VM is {look.status}, where it should have been paused",
                safe=KEPT,
                hint="pause the VM first, or let the controller do it",
            )
            return pause
        if not look.dirty:
            # Paused when the bitmaps had been rotated, and nothing to put in: no RESUME can come too early.
            pause.seconds = trio.current_time() - started
            return pause
        await self._fleece_room.choose(finished, look.dirty)
        outcomes = await self._send(
            [*self._insertions(finished, look.dirty, with_access=True), commands.query_status()]
        )
        pause.seconds = trio.current_time() - started
        pause.problem = first_problem(outcomes, events.drain(), after=look.order)
        return pause

    # --- after

    def _as_put(self, finished: BitmapIdentity, following: BitmapIdentity, pause: Pause) -> Capture:
        """The checkpoint as QEMU's replies have it: the VM stands still, and its bitmaps' counts are final."""
        if pause.problem is not None:
            raise pause.problem
        disks = tuple(self._put(index, finished, bitmap) for index, bitmap in pause.dirty.items())
        return Capture(finished, following, disks, pause.seconds, confirmed=False)

    def _put(self, index: int, finished: BitmapIdentity, bitmap: BitmapLook) -> CapturedDisk:
        disk = self._disks[index]
        return CapturedDisk(
            index,
            disk,
            bitmap.count,
            bitmap.granularity,
            filter_node(self._pair, disk.name, finished.epoch),
            access_node(self._pair, disk.name, finished.epoch),
        )

    async def confirm(self, capture: Capture) -> None:
        """See that everything is where :meth:`capture` put it.

        :raise GraphChanged: when it is not.
        :raise QemuError: when QEMU does not answer.
        """
        if capture.confirmed or not capture.disks:
            return
        named, blocks = await self._client.execute_many([commands.query_named_block_nodes(), commands.query_block()])
        devices, nodes = epoch.look_at_devices(value(blocks)), epoch.bitmaps_by_node(value(named))
        for disk in capture.disks:
            self._captured(disk.index, capture.finished, devices, nodes)

    async def _confirm(self, finished: BitmapIdentity, following: BitmapIdentity, pause: Pause) -> Capture:
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
        problem = first_problem(added, (), after=0)
        if problem is not None:
            raise problem
        devices, nodes = epoch.look_at_devices(value(blocks)), epoch.bitmaps_by_node(value(named))
        captured = tuple(self._captured(index, finished, devices, nodes) for index in pause.inserted)
        if pause.ours:
            # In the pause there was no time for it, and the guest has written a little since the look before it.
            await self._fleece_room.check(
                finished, {disk.index: nodes[disk.disk.node][finished.name] for disk in captured}
            )
        return Capture(finished, following, captured, pause.seconds)

    def _captured(
        self,
        index: int,
        finished: BitmapIdentity,
        devices: epoch.Devices,
        nodes: Mapping[NodeName, Mapping[BitmapName, BitmapLook]],
    ) -> CapturedDisk:
        disk = self._disks[index]
        device = devices.get(commands.qom_path(disk.qdev))
        bitmap = nodes.get(disk.node, {}).get(finished.name)
        put = None if bitmap is None else self._put(index, finished, bitmap)
        if put is None or device is None or device.node != put.filter or put.access not in nodes:
            raise GraphChanged(
                f"disk {disk.name}: the replication filter is not where it was put",
                safe=KEPT,
                hint="another tool changed the block graph at the same moment",
            )
        epoch.check_size(disk, device)
        return put

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
                in_memory=self._fleece_room.in_memory,
            )
        ]

    async def _send(self, steps: Sequence[Command], *, insist: bool = False) -> list[Result]:
        """As ``execute_many``, with an outcome for commands that were not sent, too."""
        try:
            return [*await self._client.execute_many(steps, timeout=_REPLY_LIMIT, insist=insist)]
        except QemuUnreachable as error:
            return [NotSent(error)] * len(steps)

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
