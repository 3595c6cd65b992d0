"""A guest that powers off, and QEMU's end after it: held off until what the guest wrote last is committed.

QEMU ends with its guest, and takes with it what was written after the last checkpoint.  ``set-action`` lets it pause
instead.  Owned here: that this is done only to a QEMU which would end by itself, and is always undone; so that a QEMU
that nobody protects any more ends with its guest as before, and one whose guest has ended meanwhile ends now.

**Whose QEMU.** There is no query for the action, so QEMU's own command line decides (``/proc/PID/cmdline``).  Managers
such as libvirt use ``-no-shutdown`` and end QEMU themselves: theirs is left alone, and so is any QEMU of which it is
not certain that the command line is its own (another PID namespace, a socket that a manager has opened).  As a mark
that it is we who have set the action serve our fleece nodes, which are in QEMU exactly as long as a controller is
attached.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import structlog
import trio

from qemu_remus.core.errors import CommandInDoubt, QemuError, QemuUnreachable
from qemu_remus.core.model import PairName
from qemu_remus.qemu import commands
from qemu_remus.qemu.client import QmpClient
from qemu_remus.qemu.commands import ShutdownAction
from qemu_remus.qemu.events import EventStream
from qemu_remus.qemu.nodes import Kind, is_ours, kind_of
from qemu_remus.qemu.process import own_process

_SHUT_DOWN: Final = "shutdown"
"""The VM's status where its guest has powered off and QEMU goes on."""

_END_LIMIT: Final = 10.0
"""Seconds that QEMU may take to end."""

_log = structlog.get_logger(__name__)


def ends_with_its_guest(arguments: Sequence[str]) -> bool:
    """Whether a QEMU with this command line ends when its guest powers off; False also where that is not certain.

    :param arguments: without the program's name.
    """
    for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
        name = option.removeprefix("-")
        if name in ("-no-shutdown", "-readconfig") or (name == "-set" and value.startswith("action.")):
            return False
        if name == "-action" and "shutdown=poweroff" not in value.split(",") and "shutdown=" in value:
            return False
    return True


async def may_be_held(client: QmpClient) -> bool:
    """Whether it is certain that this QEMU, left alone, ends with its guest.

    :raise QemuUnreachable: when QEMU does not answer.
    """
    process = await own_process(client)
    if process is None or process.pid != client.peer.pid:
        return False
    try:
        line = await trio.to_thread.run_sync(Path(f"/proc/{process.pid}/cmdline").read_bytes)
    except OSError:
        return False
    arguments = [part.decode(errors="replace") for part in line.split(b"\0")]
    return len(arguments) > 1 and ends_with_its_guest(_normal(arguments[1:]))


def _normal(arguments: Sequence[str]) -> list[str]:
    """QEMU takes ``--option`` as well as ``-option``."""
    return [f"-{one}" if one.startswith("-") and not one.startswith("--") else one for one in arguments]


async def is_attached(client: QmpClient, pair: PairName | None) -> bool:
    """Whether a controller is attached, or has left QEMU without taking leave.

    :raise QemuError: when QEMU does not answer.
    """
    entries = await client.execute(commands.query_named_block_nodes())
    names = (entry.get("node-name", "") for entry in entries)
    return any(is_ours(name, pair) and kind_of(name) is Kind.FLEECE for name in names)


async def was_held(client: QmpClient, pair: PairName | None) -> bool:
    """Whether a controller that is gone may have left QEMU held.

    :raise QemuError: when QEMU does not answer.
    """
    return await is_attached(client, pair) and await may_be_held(client)


async def let_end(client: QmpClient) -> bool:
    """Let QEMU end with its guest again; where the guest has ended already, it ends now.

    Only for a QEMU that was held.

    :return: whether it ends now.
    :raise QemuError: when QEMU does not answer.
    """
    await client.execute(commands.set_power_off(ShutdownAction.POWEROFF))
    # In this order: a guest that powers off in between ends QEMU by itself.
    if not await has_shut_down(client):
        return False
    try:
        await client.execute(commands.quit_qemu())
    except (CommandInDoubt, QemuUnreachable):
        # It was quicker than its answer.
        if not client.closed.is_set():
            raise
    return True


async def has_shut_down(client: QmpClient) -> bool:
    """Whether the guest has powered off, and QEMU is held.

    :raise QemuError: when QEMU does not answer.
    """
    return bool((await client.execute(commands.query_status()))["status"] == _SHUT_DOWN)


class Ending:
    """The end of a guest whose QEMU is held; made by :func:`hold_end`.

    :ivar came: the guest has powered off.
    """

    def __init__(self, client: QmpClient) -> None:
        self.came = trio.Event()
        self._client = client

    async def watch(self, events: EventStream) -> None:
        """Task: wait for it."""
        async for _ in events:
            try:
                if await has_shut_down(self._client):
                    self.came.set()
            except QemuError:
                # QEMU is gone: others see that.
                return


@asynccontextmanager
async def hold_end(client: QmpClient, *, wanted: bool, left: bool) -> AsyncIterator[Ending | None]:
    """Hold QEMU's end for as long as the context lasts; at its end a QEMU whose guest has powered off is ended.

    :param wanted: else nothing is done.
    :param left: an earlier controller was attached and has not taken leave, so that what it has done is ours to undo.
    :return: None where this QEMU is not ours to hold.
    :raise QemuError: when QEMU does not answer.
    """
    ours = wanted and await may_be_held(client) and (left or not await has_shut_down(client))
    if not ours:
        yield None
        return
    ending = Ending(client)
    with client.subscribe("SHUTDOWN") as events:
        await client.execute(commands.set_power_off(ShutdownAction.PAUSE))
        if await has_shut_down(client):
            ending.came.set()
        # Cancelled with the body it would end as that, and what the body has to say would be lost for it.
        watching = trio.CancelScope(shield=True)

        async def watch() -> None:
            with watching:
                await ending.watch(events)

        failure: BaseException | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            try:
                yield ending
            except BaseException as error:  # carried out of the nursery by hand, which would wrap it in a group
                failure = error
            finally:
                with trio.move_on_after(_END_LIMIT) as limit:
                    limit.shield = True
                    await _release(client)
                watching.cancel()
        if failure is not None:
            raise failure


async def _release(client: QmpClient) -> None:
    if client.closed.is_set():
        return
    try:
        if await let_end(client):
            _log.info("the guest has powered off: QEMU ends")
            await client.closed.wait()
    except QemuError as error:
        _log.warning("QEMU may not end with its guest; run qemu-remus detach later", error=str(error))
