"""What the host around a QEMU means for protecting its VM: findings, each lack with the next step.  Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from qemu_remus.core.text import size
from qemu_remus.qemu.disks import VmDisk, obstacle
from qemu_remus.qemu.probe_model import (
    Confinement,
    DirectoryLook,
    Finding,
    HostLook,
    Level,
    Observations,
    WriteRate,
)

_CLUSTER: Final = 64 << 10
"""What the filter copies at least for one write of the guest."""
_FLEECE_LEAST: Final = 256 << 20
_FLEECE_SECONDS: Final = 10.0
"""So long a transfer should be able to take before the fleece is full."""


def about_host(seen: Observations, host: HostLook) -> Iterator[Finding]:
    within = f", confined by {host.confinement.module} ({host.confinement.label})" if host.confinement else ""
    yield Finding(Level.OK, "process", f"{host.qemu.pid}, user {host.user}{within}")
    if host.our_uid not in (0, host.qemu.uid) and host.qemu.uid != 0:
        yield Finding(
            Level.NO,
            "user",
            f"QEMU runs as {host.user}, and could not open the fleece files that this user makes for itself alone",
            f"run qemu-remus as root, or as {host.user}",
        )
    if host.fleece is not None:
        yield from _about_directory("fleece", "--fleece-dir", host, host.fleece)
        yield _fleece_room(seen, host.fleece, host.memory)
    if host.runtime is not None:
        yield from _about_directory("socket", "--control", host, host.runtime)
    if host.confinement is not None and host.fleece is not None:
        yield _confined(host.confinement, host.fleece.path)


def _about_directory(subject: str, option: str, host: HostLook, look: DirectoryLook) -> Iterator[Finding]:
    use = "the fleece files are there" if option == "--fleece-dir" else "QEMU makes its NBD server's socket there"
    if not look.writable:
        yield Finding(
            Level.NO,
            subject,
            f"this user may not write to {look.nearest}; {use}",
            f"run qemu-remus as root, or name another directory with {option}",
        )
    if look.blocked is not None:
        missing = look.blocked == look.path and look.nearest != look.path
        what = (
            f"{look.path} would be made for this user alone, and QEMU runs as {host.user}; {use}"
            if missing
            else f"QEMU's user {host.user} cannot use {look.blocked}; {use}"
        )
        make = f"make a directory for both: install -d -o {host.user} -m 0700 DIR"
        yield Finding(Level.NO, subject, what, f"{make}, and name {_in_it(option)}")
    elif look.elsewhere:
        yield Finding(
            Level.NO,
            subject,
            f"QEMU runs in a container or a chroot and sees another {look.nearest} than we; {use}",
            f"name a directory that both see under one path with {option}",
        )


def _in_it(option: str) -> str:
    return "it with --fleece-dir" if option == "--fleece-dir" else "a socket in it with --control"


def advised_fleece(disks: Sequence[VmDisk], writes: WriteRate | None) -> int:
    """Bytes of fleece that should be free: ten seconds of the guest's writes, in the filter's clusters.

    At least 256 MiB, and never more than the disks hold: then nothing can fill it.
    """
    rate = 0.0 if writes is None else writes.operations * _CLUSTER + writes.bytes
    return min(sum(disk.size + _CLUSTER for disk in disks), max(_FLEECE_LEAST, int(rate * _FLEECE_SECONDS)))


def _fleece_room(seen: Observations, look: DirectoryLook, memory: int) -> Finding:
    protected = [disk for disk in seen.disks if obstacle(disk, seen.capabilities) is None]
    advised = advised_fleece(protected, seen.writes)
    rate = ""
    if seen.writes is not None and seen.writes.operations:
        rate = f"; the guest makes {seen.writes.operations:.0f} writes a second now"
    first = f"{size(memory)} of memory, then " if memory else ""
    text = f"{first}{size(look.free)} are free in {look.path}, {size(advised)} advised{rate}"
    # Memory is used where there is twice of what an epoch may need.
    if look.free >= advised or memory >= 2 * advised:
        return Finding(Level.OK, "fleece", text)
    return Finding(
        Level.WARN,
        "fleece",
        text,
        "free some space, or name another directory with --fleece-dir: while it is full, epochs are lost and the VM is"
        " not protected; the guest does not notice",
    )


def _confined(confinement: Confinement, directory: Path) -> Finding:
    if confinement.module == "AppArmor":
        profile = confinement.label.rpartition(" (")[0]
        hint = (
            f"if the primary says that QEMU cannot open the fleece file: let profile {profile} have"
            f" '{directory}/** rwk,' (libvirt: in /etc/apparmor.d/local/abstractions/libvirt-qemu, then restart the"
            " VM); dmesg shows denials"
        )
    else:
        level = ":".join(confinement.label.split(":")[3:]) or "s0"
        hint = (
            f"if the primary says that QEMU cannot open the fleece file: chcon -t svirt_image_t -l {level} {directory}"
            " (and the control socket's directory); 'ausearch -m avc' shows denials"
        )
    return Finding(
        Level.WARN, confinement.module, f"confines QEMU to {confinement.label}, and may keep it from {directory}", hint
    )
