"""The sockets of QEMU's NBD server: what a killed QEMU has left goes, and nothing else does."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from qemu_remus.core.model import pair_name
from qemu_remus.qemu.client import PeerCredentials
from qemu_remus.qemu.nbd_server import remove_dead, socket_path

NOBODY = 1 << 23
"""No process of Linux has this id or a greater one."""

PAIR, OTHER = pair_name("vm"), pair_name("other")


def listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(0)
    return listener


def leave(path: Path) -> Path:
    listen(path).close()
    return path


def test_only_sockets_of_this_pair_on_which_nobody_listens_are_removed(tmp_path: Path) -> None:
    dead, alive, busy, theirs = (
        socket_path(tmp_path, pair, PeerCredentials(number, 0, 0))
        for number, pair in enumerate((PAIR, PAIR, PAIR, OTHER), NOBODY)
    )
    # made, and not listened on yet
    young = leave(socket_path(tmp_path, PAIR, PeerCredentials(os.getpid(), 0, 0)))
    leave(dead)
    leave(theirs)
    no_socket = socket_path(tmp_path, PAIR, PeerCredentials(NOBODY + 5, 0, 0))
    no_socket.touch()
    strange = leave(tmp_path / (dead.name.removesuffix(".sock") + "x.sock"))
    with listen(alive), listen(busy), socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        for client in (first, second):
            client.setblocking(False)
            # one may wait with a backlog of none, and after that the socket is busy
            client.connect_ex(str(busy))
        remove_dead(tmp_path, PAIR)
        assert set(tmp_path.iterdir()) == {alive, busy, theirs, strange, no_socket, young}
    remove_dead(tmp_path, PAIR)
    assert set(tmp_path.iterdir()) == {theirs, strange, no_socket, young}
    remove_dead(tmp_path / "none", PAIR)
