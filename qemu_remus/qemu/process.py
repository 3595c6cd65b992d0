"""Which process our QEMU is, and as whom it runs.

``SO_PEERCRED`` of the QMP connection names whoever made the socket listen. Where a manager opened it and handed it to
QEMU, as libvirt does, that is the manager. QEMU itself tells the ids of its vCPUs' threads, and Linux whose threads
these are.
"""

from __future__ import annotations

from pathlib import Path

import trio

from qemu_remus.core.errors import CommandFailed
from qemu_remus.qemu import commands
from qemu_remus.qemu.client import PeerCredentials, QmpClient


def owner_of(thread: int, proc: Path = Path("/proc")) -> PeerCredentials | None:
    """The process that a thread belongs to, and its effective ids, by ``/proc/TID/status`` (proc(5)).

    :return: None where there is no such thread here: it has ended, or lives in another PID namespace.
    """
    try:
        lines = (proc / str(thread) / "status").read_text(errors="replace").splitlines()
    except OSError:
        return None
    fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    try:
        return PeerCredentials(int(fields["Tgid"][0]), int(fields["Uid"][1]), int(fields["Gid"][1]))
    except (KeyError, IndexError, ValueError):
        return None


async def own_process(client: QmpClient) -> PeerCredentials | None:
    """QEMU's own process id and effective ids, as its threads have them here; None where they cannot be learned.

    :raise QemuUnreachable: when QEMU does not answer.
    """
    try:
        cpus = await client.execute(commands.query_cpus_fast())
    except CommandFailed:
        return None
    return await trio.to_thread.run_sync(owner_of, cpus[0]["thread-id"]) if cpus else None


async def qemu_process(client: QmpClient) -> PeerCredentials:
    """QEMU's own process id and effective ids; the listener's where QEMU's own cannot be learned.

    :raise QemuUnreachable: when QEMU does not answer.
    """
    return await own_process(client) or client.peer
