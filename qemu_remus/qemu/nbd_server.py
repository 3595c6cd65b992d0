"""QEMU's one NBD server: whose it is, and where it listens.

A QEMU process has a single NBD server, no query tells whether it runs, and anybody may have started it. What can be
known for certain is this: a Unix socket on which our QEMU's own process listens, under a name that only we give, is
QEMU's NBD server, started by one of our controllers. Names are read from ``/proc/net/unix`` and the listener's process
from ``SO_PEERCRED`` of a connection to it, so that it works after a crash, without root, and without knowing which
directory the crashed controller used.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import struct
from hashlib import sha256
from pathlib import Path
from typing import Final

import trio

from qemu_remus.core.errors import CommandFailed, ConfigError
from qemu_remus.core.model import PairName
from qemu_remus.qemu import commands
from qemu_remus.qemu.client import PeerCredentials, QmpClient
from qemu_remus.qemu.nodes import foreign_exports

_NAME: Final = re.compile(r"qemu-remus-nbd-[0-9a-f]{8}-([0-9]+)\.sock\Z")
_PATH_LIMIT: Final = 107
"""Bytes of a Unix socket's path, by unix(7)."""

_LISTENING: Final = 0x10000
"""``__SO_ACCEPTCON`` in the flags column of /proc/net/unix, by proc(5)."""

_PEERCRED: Final = struct.Struct("3i")


def socket_path(runtime_dir: Path, pair: PairName, qemu: PeerCredentials) -> Path:
    """Where our NBD server for a pair listens.

    :raise ConfigError: when the directory's name is too long for a Unix socket.
    """
    path = runtime_dir / f"{_prefix(pair)}{qemu.pid}.sock"
    if len(os.fsencode(path)) > _PATH_LIMIT:
        raise ConfigError(
            f"{path} is too long for a Unix socket, which may have {_PATH_LIMIT} bytes",
            hint="name a shorter --state-dir",
        )
    return path


def _prefix(pair: PairName) -> str:
    return f"qemu-remus-nbd-{sha256(pair.encode()).hexdigest()[:8]}-"


def listening_paths(proc_net_unix: str) -> list[Path]:
    """The sockets in ``/proc/net/unix`` (proc(5)) that listen and have a name that we give to NBD servers."""
    paths = []
    for line in proc_net_unix.splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and int(fields[3], 16) & _LISTENING and _NAME.match(fields[7].rpartition("/")[2]):
            paths.append(Path(fields[7]))
    return paths


def _listener(path: Path) -> int | None:
    """Process id of whoever listens on a Unix socket; None where nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except OSError:
            return None
        pid, _, _ = _PEERCRED.unpack(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
        return int(pid)


def remove_dead(runtime_dir: Path, pair: PairName) -> None:
    """Remove the sockets on which QEMUs of this pair have listened that were killed, and so have not removed them."""
    for path in runtime_dir.glob(f"{_prefix(pair)}*.sock"):
        named = _NAME.match(path.name)
        # One that lives may have made its socket, and be about to listen on it.
        if named and path.is_socket() and not Path("/proc", named[1]).exists() and _refuses(path):
            path.unlink(missing_ok=True)


def _refuses(path: Path) -> bool:
    """Whether nobody listens on a Unix socket; a server that is only busy is another error."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(str(path)) == errno.ECONNREFUSED


def find_our_server(qemu: PeerCredentials) -> Path | None:
    """The socket of the NBD server that a controller of ours started in this QEMU; None where there is none.

    Blocks for some file reads; a socket that was unlinked behind our back is not found.
    """
    try:
        listing = Path("/proc/net/unix").read_text(errors="surrogateescape")
    except OSError:
        return None
    # The name says which QEMU it was for: asking the others would make each of them log a client that hung up.
    candidates = [path for path in listening_paths(listing) if path.name.endswith(f"-{qemu.pid}.sock")]
    return next((path for path in candidates if _listener(path) == qemu.pid), None)


async def start_server(client: QmpClient, qemu: PeerCredentials, runtime_dir: Path, pair: PairName) -> Path | None:
    """Start QEMU's NBD server on a socket of ours, or take over the one that a crashed controller left.

    :param qemu: from :func:`qemu_remus.qemu.process.qemu_process`.
    :return: where it listens; None where somebody else has started it, and it was left as it is.
    :raise ConfigError: when the directory's name is too long.
    """
    left = await trio.to_thread.run_sync(find_our_server, qemu)
    if left is not None:
        return left
    path = socket_path(runtime_dir, pair, qemu)
    # What cannot be removed is in nobody's way.
    with contextlib.suppress(OSError):
        await trio.to_thread.run_sync(remove_dead, runtime_dir, pair)
    try:
        await client.execute(commands.nbd_server_start(str(path)))
    except CommandFailed as error:
        if "already running" not in error.desc:
            raise
        return None
    return path


async def stop_server(client: QmpClient) -> bool:
    """Stop the server that :func:`start_server` gave, unless somebody else has put an export into it meanwhile.

    :return: whether it was stopped.
    """
    if foreign_exports(await client.execute(commands.query_block_exports())):
        return False
    await client.execute(commands.nbd_server_stop())
    return True
