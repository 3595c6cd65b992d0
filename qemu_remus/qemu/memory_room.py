"""How much memory the fleeces may take: on this machine, and in the control group that QEMU lives in.

What the filter copies into a file in memory is charged to QEMU's control group. A limit that is met there would cost
the VM its life, so only a part of what is free counts. Reads /proc and /sys/fs/cgroup; blocking calls.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

SHARE: Final = 4
"""One part in so many of the free memory may be used."""

_UNLIMITED: Final = 1 << 60


def memory_room(pid: int, limit: int | None, *, proc: Path = Path("/proc"), cgroups: Path | None = None) -> int:
    """Bytes that fleeces in memory may take now.

    :param pid: QEMU's.
    :param limit: most that was asked for; None: only what is free decides.
    """
    free = min(_available(proc), _group_room(pid, proc, cgroups or Path("/sys/fs/cgroup")))
    room = free // SHARE
    return room if limit is None else min(limit, room)


def _available(proc: Path) -> int:
    """MemAvailable of proc(5): what can be had without swapping; 0 where that is not known."""
    try:
        for line in (proc / "meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0


def _group_room(pid: int, proc: Path, cgroups: Path) -> int:
    """What the limits of QEMU's control group, and of those above it, leave; of either version of control groups."""
    try:
        lines = (proc / str(pid) / "cgroup").read_text().splitlines()
    except OSError:
        return _UNLIMITED
    rooms = [_UNLIMITED]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            home, names = cgroups, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            home, names = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = home / path.lstrip("/")
        while group != home.parent:
            rooms.append(_room(group, *names))
            group = group.parent
    return min(rooms)


def _room(group: Path, limit_name: str, usage_name: str) -> int:
    try:
        limit = int((group / limit_name).read_text())
        usage = int((group / usage_name).read_text())
    except (OSError, ValueError):
        # No limit ("max"), or no such file: the root has none.
        return _UNLIMITED
    return max(0, limit - usage + _reclaimable(group))


def _reclaimable(group: Path) -> int:
    """File contents that nobody has touched for a while; they count as used, and go when they must."""
    try:
        stat = dict(line.split(" ", 1) for line in (group / "memory.stat").read_text().splitlines())
        return int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return 0
