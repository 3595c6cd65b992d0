"""Faults on demand: a link of two network namespaces, file systems that fill up, stall or fail, processes that hang.

Owns making a fault and ending it again, whatever the test does. What needs root, or something of the kernel, skips the
test with the reason where that is missing. Nothing about controllers or QEMU may enter.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from integration.images import make_image
from integration.process import start_process, state_of

MIB = 1 << 20

#: Seconds for one command of the system's; they take milliseconds.
_LIMIT = 60.0

_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def need_root(*programs: str) -> None:
    """Skip the test where it cannot have what it needs of the system."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    for program in programs:
        if shutil.which(program, path=_PATH) is None:
            pytest.skip(f"{program} is not installed")


def _system(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    # These take milliseconds, and a trio task that is being cancelled can still run them.
    environment = os.environ | {"PATH": _PATH, "LC_ALL": "C"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=_LIMIT, env=environment, stdin=subprocess.DEVNULL
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return done


# --- the link --------------------------------------------------------------------------------------------------------

_HOSTS = ("10.253.77.1", "10.253.77.2")
_DEVICE = "link"


@dataclass(frozen=True, slots=True)
class Namespace:
    """A network namespace, which stands for a host.

    :param address: its IPv4 address on the link.
    """

    pid: int
    address: str

    @property
    def within(self) -> tuple[str, ...]:
        """The command that runs another one in it, without forking."""
        return ("nsenter", f"--net=/proc/{self.pid}/ns/net", "--")

    def run(self, *command: str) -> str:
        """Run a command of the system's in it, and return what it says."""
        return _system(*self.within, *command).stdout


class Link:
    """A cable between two hosts. Made by :func:`start_link`.

    A TCP connection over it ends by no FIN and no RST, whatever is done here: packets get lost or come late.
    """

    def __init__(self, primary: Namespace, secondary: Namespace) -> None:
        self.primary = primary
        self.secondary = secondary

    @property
    def sent(self) -> int:
        """Bytes that the primary's host has sent over it so far, with all headers and everything sent again."""
        [device] = json.loads(self.primary.run("ip", "-json", "-statistics", "link", "show", "dev", _DEVICE))
        sent: int = device["stats64"]["tx"]["bytes"]
        return sent

    def cut(self) -> None:
        """Take the secondary's interface down, as when the cable is pulled; the primary's loses its carrier."""
        self.secondary.run("ip", "link", "set", "dev", _DEVICE, "down")

    def swallow(self) -> None:
        """Lose every packet of both directions, as a switch does in between: both interfaces stay as they are."""
        for host in (self.primary, self.secondary):
            host.run("tc", "qdisc", "replace", "dev", _DEVICE, "root", "bfifo", "limit", "1")

    def slow(self, bytes_per_second: int) -> None:
        """Pass on no more than this from the primary's host, with a queue of 100 ms before packets are dropped."""
        self.fast()
        rate = ("rate", f"{bytes_per_second * 8}bit", "burst", "32k", "latency", "100ms")
        self.primary.run("tc", "qdisc", "replace", "dev", _DEVICE, "root", "tbf", *rate)

    def fast(self) -> None:
        """Undo :meth:`slow` and :meth:`swallow`."""
        for host in (self.primary, self.secondary):
            _system(*host.within, "tc", "qdisc", "delete", "dev", _DEVICE, "root", check=False)

    def mend(self) -> None:
        """Undo everything."""
        self.fast()
        self.secondary.run("ip", "link", "set", "dev", _DEVICE, "up")


@asynccontextmanager
async def start_link(scratch: Path) -> AsyncIterator[Link]:
    """Two namespaces and a link between them, for the length of the block; nothing is left, whatever ends us.

    Skips the test where there is no root, or no veth.
    """
    need_root("ip", "tc", "nsenter", "unshare")
    async with _namespace(scratch, 0) as primary, _namespace(scratch, 1) as secondary:
        far = ("peer", "name", _DEVICE, "netns", str(secondary.pid))
        made = _system(*(*primary.within, "ip", "link", "add", "name", _DEVICE, "type", "veth", *far), check=False)
        if made.returncode:
            pytest.skip(f"no pair of network interfaces can be made here: {made.stderr.strip()}")
        for host in (primary, secondary):
            host.run("ip", "address", "add", f"{host.address}/24", "dev", _DEVICE)
            for device in ("lo", _DEVICE):
                host.run("ip", "link", "set", "dev", device, "up")
        yield Link(primary, secondary)


@asynccontextmanager
async def _namespace(scratch: Path, index: int) -> AsyncIterator[Namespace]:
    # A namespace lives as long as a process in it: this one, and it dies with us.
    ours = _network(os.getpid())
    async with start_process(["unshare", "--net", "sleep", "infinity"], out=scratch / f"host-{index}") as holder:
        with trio.fail_after(_LIMIT):
            while _network(holder.pid) == ours:
                if not holder.running:
                    pytest.skip(f"no network namespace can be made here: {holder.tail()}")
                await trio.sleep(0.005)
        yield Namespace(holder.pid, _HOSTS[index])


def _network(pid: int) -> Path:
    return Path(f"/proc/{pid}/ns/net").readlink()


# --- file systems ----------------------------------------------------------------------------------------------------


class FileSystem:
    """A small ext4 of a test's own. Made by :func:`small_file_system`.

    :ivar path: where it is mounted.
    """

    def __init__(self, path: Path, device: Path, beneath: Path | None) -> None:
        self.path = path
        self._device = device
        self._beneath = beneath

    def _mount(self) -> None:
        _mount(self.path, "-o", "loop,errors=continue", str(self._device))

    @contextmanager
    def _open(self) -> Iterator[int]:
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @property
    def free(self) -> int:
        """Bytes that are left for anybody."""
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize

    def fill(self, leave: int = 0) -> None:
        """Take all of its space but so many bytes, of which the file system may use some for itself.

        :param leave: rounded to 64 KiB.
        """
        _take(self.path / _FILLER, leave)

    def empty(self) -> None:
        """Give that space back."""
        (self.path / _FILLER).unlink(missing_ok=True)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Let every write to it hang, in the kernel, for the length of the block: what writes cannot even be killed."""
        _system("fsfreeze", "--freeze", str(self.path))
        try:
            yield
        finally:
            _system("fsfreeze", "--unfreeze", str(self.path))

    def die(self) -> None:
        """Let everything that is asked of it fail with EIO from now on, until :meth:`mount_again`."""
        with self._open() as descriptor:
            fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("=I", _WITHOUT_FLUSH))

    def mount_again(self) -> None:
        """Undo :meth:`die`; nobody may have a file open on it."""
        _system("umount", str(self.path))
        self._mount()

    def fail(self) -> None:
        """Let the device beneath take no new block: what is written to one is lost when it is flushed, with ENOSPC.

        As thin-provisioned storage that has run out. Only with ``thin``.
        """
        assert self._beneath
        _take(self._beneath / _FILLER, 0)

    def heal(self) -> None:
        """Undo :meth:`fail`."""
        assert self._beneath
        (self._beneath / _FILLER).unlink(missing_ok=True)


_FILLER = "filler"

#: ``EXT4_IOC_SHUTDOWN`` and ``EXT4_GOING_FLAGS_NOLOGFLUSH`` of Linux' ``linux/ext4.h``.
_SHUTDOWN = 0x8004587D
_WITHOUT_FLUSH = 2


def _take(path: Path, leave: int) -> None:
    """Write a file that takes all space but ``leave`` bytes."""
    step = 64 << 10
    with path.open("xb", buffering=0) as file:
        try:
            while True:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), MIB)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        try:
            while file.write(bytes(step)) == step:
                pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        file.truncate(max(0, file.tell() - leave))
        os.fsync(file.fileno())


@contextmanager
def small_file_system(path: Path, size: int, *, thin: bool = False) -> Iterator[FileSystem]:
    """An ext4 for the length of the block, on a loop device.

    Skips the test where there is no root, or no loop device.

    :param path: does not exist; it is mounted there.
    :param size: bytes of the device; some MiB are the file system's.
    :param thin: let it be one that can :meth:`FileSystem.fail`.
    """
    need_root("mount", "umount", "mke2fs", "losetup", "fsfreeze")
    path.mkdir()
    with ExitStack() as stack:
        beneath: Path | None = None
        if thin:
            beneath = path.with_name(f"{path.name}.beneath")
            beneath.mkdir()
            _mount(beneath, "-t", "tmpfs", "-o", f"size={size + MIB}", "tmpfs")
            stack.callback(_unmount, beneath)
        device = make_image((beneath or path.parent) / f"{path.name}.device", size)
        # Without a journal a failing device makes no file system read-only, and no space goes to it.
        plain = ("-O", "^has_journal", "-m", "0", "-E", "lazy_itable_init=0,nodiscard")
        _system("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", *plain, str(device))
        made = FileSystem(path, device, beneath)
        made._mount()
        try:
            (path / "lost+found").rmdir()
            yield made
        finally:
            if beneath:
                made.heal()
            _unmount(path)


def _mount(path: Path, *what: str) -> None:
    mounted = _system("mount", *what, str(path), check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")


def _unmount(path: Path) -> None:
    # lazily: a process that is being killed may still have a file there
    _system("umount", "--lazy", str(path))


# --- processes -------------------------------------------------------------------------------------------------------


@contextmanager
def largest_file(pid: int, size: int) -> Iterator[None]:
    """Let a process' writes behind this offset of any file fail (EFBIG), for the length of the block. Needs no root."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def _wait_until_stopped(pid: int) -> None:
    """Wait until every thread stands still, or has ended: the signal reaches one, and that one stops the others."""
    deadline = time.monotonic() + _LIMIT
    while not {state_of(thread) for thread in Path(f"/proc/{pid}/task").iterdir()} <= {"", "T", "X", "Z"}:
        assert time.monotonic() < deadline, f"process {pid} does not stop"
        time.sleep(0.001)


@contextmanager
def hung(pid: int) -> Iterator[None]:
    """Stop a process by SIGSTOP for the length of the block; returns when it stands still. It may have ended since."""
    descriptor = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGSTOP)
        try:
            _wait_until_stopped(pid)
            yield
        finally:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGCONT)
    finally:
        os.close(descriptor)


__all__ = [
    "FileSystem",
    "Link",
    "MIB",
    "Namespace",
    "hung",
    "largest_file",
    "need_root",
    "small_file_system",
    "start_link",
]
