"""``qemu-remus primary`` and ``qemu-remus secondary``: run a controller until it ends or is told to stop.

Owns signals.  The first one asks the controller to end, which it does by cancellation, cleaning up behind itself;
further ones change nothing, because a clean-up that is cut short is what leaves a filter in somebody's QEMU.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Final

import structlog
import trio

from qemu_remus.cli.exits import ExitCode
from qemu_remus.config import beyond_loopback, places, primary_config, secondary_config
from qemu_remus.logs import LogFormat, set_up

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_log = structlog.get_logger("cli")


def primary(options: argparse.Namespace) -> int:
    """Run a primary controller."""
    config = primary_config(
        places=places(os.environ, os.geteuid()),
        qmp=options.qmp,
        peer=options.peer,
        pair=options.pair,
        disks=options.disks,
        interval_ms=None if options.toolstack else options.interval,
        state_dir=options.state_dir,
        fleece_dir=options.fleece_dir,
        control=options.control,
        heartbeat_timeout_seconds=options.heartbeat_timeout,
        watchdog_seconds=options.watchdog,
        allow_inconsistent_resync=options.allow_inconsistent_resync,
        commit_at_shutdown=options.commit_at_shutdown,
        rate=options.rate,
        fleece_memory=options.fleece_memory,
    )
    set_up(LogFormat(options.log_format), verbose=options.verbose)
    from qemu_remus.primary import run_primary

    return run_controller(partial(run_primary, config))


def secondary(options: argparse.Namespace) -> int:
    """Run a secondary controller."""
    config = secondary_config(
        places=places(os.environ, os.geteuid()),
        listen=options.listen,
        store=options.store,
        disks=options.disks,
        target_options=options.target_options,
        target_secrets=options.target_secrets,
        pair=options.pair,
        control=options.control,
        sparse=options.sparse,
        overwrite=options.overwrite,
        force_discard=options.force_discard,
        disk_dir=options.disk_dir,
        journal_limit=options.journal_limit,
        heartbeat_timeout_seconds=options.heartbeat_timeout,
    )
    set_up(LogFormat(options.log_format), verbose=options.verbose)
    if beyond_loopback(config.listen):
        _log.warning(
            "the replication link is neither encrypted nor authenticated: whoever reaches this port can read and write "
            "the copy; use a network of its own, or a tunnel",
            listen=str(config.listen),
        )
    from qemu_remus.secondary import run_secondary

    return run_controller(partial(run_secondary, config))


def run_controller(controller: Callable[[], Awaitable[None]]) -> int:
    """Run it until it ends or a signal asks it to.

    :return: always the code for "done as asked"; an error of the controller's is raised.
    """
    # What we were started with ignored stays so: nohup means it.
    wanted = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    trio.run(_until_stopped, controller, wanted)
    return ExitCode.OK


async def _until_stopped(controller: Callable[[], Awaitable[None]], wanted: list[signal.Signals]) -> None:
    with trio.open_signal_receiver(*wanted) as signals:
        async with trio.open_nursery() as nursery:
            work = trio.CancelScope()
            nursery.start_soon(_stop_on_signal, signals, work)
            with work:
                await controller()
            nursery.cancel_scope.cancel()


async def _stop_on_signal(signals: AsyncIterator[int], work: trio.CancelScope) -> None:
    async for number in signals:
        name = signal.Signals(number).name
        if work.cancel_called:
            _log.info("already stopping; cleaning up first", signal=name)
        else:
            _log.info("stopping", signal=name)
            work.cancel()
