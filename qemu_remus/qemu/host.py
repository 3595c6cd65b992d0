"""What the host around a QEMU allows: whose process it is, which directories it can reach, what confines it.

Only looks, and only at files: /proc, /sys and the directories themselves; nothing is made or connected to.  What may
not be read is unknown, which is no complaint.  Formats: proc(5), attr(5), Linux's
``Documentation/ABI/testing/sysfs-bus-xen-backend``.  Blocking: the caller runs :func:`look_at_host` in a thread.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qemu_remus.qemu.client import PeerCredentials
from qemu_remus.qemu.memory_room import memory_room
from qemu_remus.qemu.probe_model import Confinement, DirectoryLook, HostLook

_SOCKET: Final = re.compile(r"socket:\[(\d+)\]\Z")
_LISTENING: Final = 0x10000
_TCP_LISTEN: Final = "0A"
_VBD: Final = re.compile(r"vbd-(\d+)-(\d+)\Z")


def look_at_host(
    qemu: PeerCredentials,
    fleece_dir: Path | None,
    runtime_dir: Path | None,
    root: Path = Path("/"),
    *,
    fleece_memory: int | None = None,
) -> HostLook:
    """Look at everything.

    :param fleece_memory: most bytes of memory for the fleeces; None: what is free decides.
    :param root: where ``/proc`` and ``/sys`` are.
    """
    proc = root / "proc" / str(qemu.pid)
    user = _User.of(qemu, proc)
    domain = _xen_domain(proc)
    return HostLook(
        qemu=qemu,
        user=_name(qemu.uid),
        our_uid=os.geteuid(),
        confinement=_confinement(proc, root / "sys"),
        fleece=None if fleece_dir is None else _directory(fleece_dir, user, proc, os.X_OK),
        runtime=None if runtime_dir is None else _directory(runtime_dir, user, proc, os.X_OK | os.W_OK),
        listeners=_listeners(proc),
        xen_domain=domain,
        kernel_disks=() if domain is None else tuple(_kernel_disks(domain, root / "sys")),
        memory=memory_room(qemu.pid, fleece_memory, proc=root / "proc", cgroups=root / "sys" / "fs" / "cgroup"),
    )


# --- users and directories


@dataclass(frozen=True, slots=True)
class _User:
    uid: int
    groups: frozenset[int]

    @classmethod
    def of(cls, qemu: PeerCredentials, proc: Path) -> _User:
        groups = {qemu.gid}
        for line in _text(proc / "status").splitlines():
            name, _, value = line.partition(":")
            if name == "Groups":
                groups.update(int(word) for word in value.split())
        return cls(qemu.uid, frozenset(groups))

    def may(self, path: Path, wanted: int) -> bool:
        """Whether the mode bits allow it: ``os.X_OK`` and so on; root may do everything, and an ACL is trusted."""
        status = path.stat()
        shift = 6 if status.st_uid == self.uid else 3 if status.st_gid in self.groups else 0
        if self.uid == 0 or (stat.S_IMODE(status.st_mode) >> shift) & wanted == wanted:
            return True
        try:
            return "system.posix_acl_access" in os.listxattr(path)
        except OSError:
            return False


def _directory(path: Path, user: _User, proc: Path, wanted: int) -> DirectoryLook:
    nearest = next(place for place in (path, *path.parents) if place.is_dir())
    free = 0
    with contextlib.suppress(OSError):
        status = os.statvfs(nearest)
        free = status.f_bavail * status.f_frsize
    return DirectoryLook(
        path=path,
        nearest=nearest,
        free=free,
        writable=os.access(nearest, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids),
        blocked=_blocked(path, nearest, user, wanted),
        elsewhere=_elsewhere(nearest, proc),
    )


def _blocked(path: Path, nearest: Path, user: _User, wanted: int) -> Path | None:
    for place in reversed((nearest, *nearest.parents)):
        try:
            if not user.may(place, wanted if place == path else os.X_OK):
                return place
        except OSError:
            return None
    # What is missing is made by us, for us alone.
    return path if nearest != path and user.uid not in (0, os.geteuid()) else None


def _elsewhere(directory: Path, proc: Path) -> bool | None:
    try:
        here, there = directory.stat(), (proc / "root" / directory.relative_to("/")).stat()
    except FileNotFoundError:
        # Either it is not there for QEMU, or QEMU is gone.
        return True if (proc / "status").exists() and os.access(proc / "root", os.X_OK) else None
    except OSError:
        return None
    return (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino)


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


# --- security modules


def _confinement(proc: Path, sys: Path) -> Confinement | None:
    label = (_text(proc / "attr" / "apparmor" / "current") or _text(proc / "attr" / "current")).strip("\0\n ")
    if not label or label.startswith("unconfined") or label.endswith("(complain)"):
        return None
    if label.count(":") >= 2 and not label.endswith(")"):
        # A permissive SELinux logs, and refuses nothing.
        enforcing = _text(sys / "fs" / "selinux" / "enforce").strip() == "1"
        return Confinement("SELinux", label) if enforcing and ":unconfined_t:" not in label else None
    return Confinement("AppArmor", label) if label.endswith(")") else None


# --- sockets


def _listeners(proc: Path) -> tuple[str, ...] | None:
    inodes = set()
    try:
        for entry in (proc / "fd").iterdir():
            with contextlib.suppress(OSError):
                match = _SOCKET.match(str(entry.readlink()))
                if match is not None:
                    inodes.add(match.group(1))
    except OSError:
        return None
    return tuple(sorted({*_unix(proc, inodes), *_tcp(proc, inodes)}))


def _unix(proc: Path, inodes: set[str]) -> Iterator[str]:
    for line in _text(proc / "net" / "unix").splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and int(fields[3], 16) & _LISTENING and fields[6] in inodes:
            yield fields[7]


def _tcp(proc: Path, inodes: set[str]) -> Iterator[str]:
    for name in ("tcp", "tcp6"):
        for line in _text(proc / "net" / name).splitlines()[1:]:
            fields = line.split()
            if len(fields) > 9 and fields[3] == _TCP_LISTEN and fields[9] in inodes:
                yield f"TCP port {int(fields[1].rpartition(':')[2], 16)}"


# --- Xen


def _xen_domain(proc: Path) -> int | None:
    words = _text(proc / "cmdline").split("\0")
    for option, value in itertools.pairwise(words):
        if option == "-xen-domid" and value.isdecimal():
            return int(value)
    return None


def _kernel_disks(domain: int, sys: Path) -> Iterator[str]:
    """Disks that the kernel's blkback serves: it has a device for each."""
    try:
        names = sorted(entry.name for entry in (sys / "bus" / "xen-backend" / "devices").iterdir())
    except OSError:
        return
    for name in names:
        match = _VBD.match(name)
        if match is not None and int(match.group(1)) == domain:
            yield xen_disk_name(int(match.group(2)))


def xen_disk_name(number: int) -> str:
    """The guest's name of a virtual block device (Xen's ``docs/misc/vbd-interface``); its number where it has none."""
    if number >> 28 == 1:
        index, part = number >> 8 & 0xFFFFF, number & 0xFF
    elif number >> 8 == 202:
        index, part = number >> 4 & 0xF, number & 0xF
    else:
        return str(number)
    letters = ""
    index += 1
    while index:
        index, letter = divmod(index - 1, 26)
        letters = chr(ord("a") + letter) + letters
    return f"xvd{letters}{part or ''}"


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
