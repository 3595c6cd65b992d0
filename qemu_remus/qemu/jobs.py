"""Jobs of ours in QEMU: run to their end, and gone when that has come, whatever it was.

A job of ours reads a snapshot and writes a file, and waits for nobody but the host's storage: not for us.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

import trio

from qemu_remus.core.errors import CommandFailed, EpochLost, QemuError, QemuUnreachable
from qemu_remus.qemu import commands
from qemu_remus.qemu.client import Done, QmpClient
from qemu_remus.qemu.commands import Command
from qemu_remus.qemu.events import EventStream

_CONCLUDED: Final = "concluded"

_GONE_LIMIT: Final = 10.0
"""Seconds until a job that was told to end must be gone; it waits for what the host's storage has in hand."""


async def run_job(client: QmpClient, job: str, steps: Sequence[Command], *, limit: float) -> str | None:
    """Run a job to its end.

    :param job: its id; not there yet.
    :param steps: the commands that start it, sent in one write; the last one is the job's.
    :param limit: seconds that it may take.
    :return: what went wrong in it, in QEMU's words; None where nothing did.
    :raise CommandFailed: when QEMU refuses one of the steps.
    :raise EpochLost: when it takes longer, or somebody else has taken it away.
    :raise QemuError: when QEMU does not answer, or does not let go of it.
    """
    gone = False
    with client.subscribe("JOB_STATUS_CHANGE") as events:
        try:
            with trio.move_on_after(limit):
                for outcome in await client.execute_many(steps):
                    if not isinstance(outcome, Done):
                        raise outcome.error
                error = await _concluded(client, job, events)
                await client.execute(commands.job_dismiss(job))
                gone = True
                return error
        finally:
            if not gone and not client.closed.is_set():
                with trio.move_on_after(2 * _GONE_LIMIT) as scope:
                    scope.shield = True
                    await end_jobs(client, lambda name: name == job)
    raise EpochLost(
        f"QEMU has not copied a part of the checkpoint within {limit:g} s",
        safe="the guest is not affected, and its changes stay recorded for the next epoch",
        hint="see that the storage of the fleece directory is fast enough",
    )


async def _concluded(client: QmpClient, job: str, events: EventStream) -> str | None:
    while True:
        entry = next((entry for entry in await client.execute(commands.query_jobs()) if entry["id"] == job), None)
        if entry is None:
            raise EpochLost(
                f"job {job} is gone from QEMU", safe="the VM goes on", hint="another QMP client has dismissed it"
            )
        if entry["status"] == _CONCLUDED:
            error: str | None = entry.get("error")
            return error
        await _next_end(events, job)


async def _next_end(events: EventStream, job: str) -> None:
    """Wait for an event that says that the job has ended, or may have."""
    while not events.overflowed:
        try:
            event = await anext(events)
        except StopAsyncIteration:
            raise QemuUnreachable("the connection to QEMU was lost while a job of ours ran") from None
        if event.data.get("id") == job and event.data.get("status") in (_CONCLUDED, "null"):
            return
    await trio.sleep(0.05)


async def end_jobs(client: QmpClient, ours: Callable[[str], bool]) -> None:
    """End jobs, whatever they are doing, and take them away; none is fine.

    :param ours: whether one is to go, by its id.
    :raise QemuError: when one is still there after some seconds, or QEMU does not answer.
    """
    with client.subscribe("JOB_STATUS_CHANGE") as events:
        asked: set[str] = set()
        left: list[dict[str, Any]] = []
        with trio.move_on_after(_GONE_LIMIT):
            while left := [entry for entry in await client.execute(commands.query_jobs()) if ours(entry["id"])]:
                for entry in left:
                    await _end(client, entry, asked)
                if all(entry["status"] != _CONCLUDED for entry in left):
                    await _next_end(events, left[0]["id"])
            return
    names = ", ".join(entry["id"] for entry in left)
    raise QemuError(f"QEMU does not let go of job {names}", safe="the VM goes on", hint="look at it with query-jobs")


async def _end(client: QmpClient, entry: dict[str, Any], asked: set[str]) -> None:
    """Dismiss a job that has ended; tell one that has not to end, once."""
    # Refused: it has gone on meanwhile; the next look tells.
    with suppress(CommandFailed):
        if entry["status"] == _CONCLUDED:
            await client.execute(commands.job_dismiss(entry["id"]))
        elif entry["id"] not in asked:
            asked.add(entry["id"])
            await client.execute(commands.job_cancel(entry["id"]))
