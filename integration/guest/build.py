"""Builds the guest: Debian's cloud kernel, and an initramfs of busybox, the needed modules, our programs and ``init``.

Owns ``.cache/guest``. All that comes from apt is fetched by ``integration/setup.sh guest`` and kept, so that building
again needs no network. Nothing about QEMU may enter.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import re
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = Path(__file__).resolve().parent
CACHE = ROOT / ".cache" / "guest"

#: The drivers for every kind of disk that the harness offers, and for the agent's port; what they need comes too.
#: What a kernel has built in is not there as a file and is passed over.
DRIVERS = (
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "sd_mod",
    "virtio_scsi",
    "ata_piix",
    "nvme",
)
PROGRAMS = ("ledger", "load", "pulse", "witness")


class GuestUnavailable(Exception):
    """The guest cannot be built here; the text says what is missing."""


@dataclass(frozen=True, slots=True)
class GuestImage:
    """What QEMU's ``-kernel`` and ``-initrd`` get."""

    kernel: Path
    initrd: Path


def guest_image() -> GuestImage:
    """The guest, built if it is not there yet: some seconds, or a minute where packages must be fetched first.

    :raise GuestUnavailable: when a package or a tool is missing and cannot be had.
    """
    kernels = _packages("linux-image-*-cloud-*.deb")
    busyboxes = _packages("busybox-static_*.deb")
    if not kernels or not busyboxes:
        _run(str(ROOT / "integration" / "setup.sh"), "guest")
        kernels = _packages("linux-image-*-cloud-*.deb")
        busyboxes = _packages("busybox-static_*.deb")
    kernel, busybox = kernels[-1], busyboxes[-1]

    key = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        if source.is_file():
            key.update(source.read_bytes())
    key.update(f"{kernel.name} {busybox.name}".encode())
    directory = CACHE / f"built-{key.hexdigest()[:16]}"
    image = GuestImage(directory / "vmlinuz", directory / "initrd")
    if not directory.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            _build(Path(scratch), kernel, busybox)
            try:
                (Path(scratch) / "built").rename(directory)
            except OSError:
                # somebody else built the same thing meanwhile
                if not directory.exists():
                    raise
    return image


def _packages(pattern: str) -> list[Path]:
    return sorted(CACHE.glob(pattern), key=lambda path: path.stat().st_mtime)


def _build(scratch: Path, kernel: Path, busybox: Path) -> None:
    unpacked, built = scratch / "unpacked", scratch / "built"
    built.mkdir()
    for package in (kernel, busybox):
        _run("dpkg", "-x", str(package), str(unpacked))
    archive = Cpio()
    for directory in ("bin", "dev", "lib", "lib/modules", "mnt", "proc", "sys", "tmp"):
        archive.add(directory, stat.S_IFDIR | 0o755)
    # the kernel opens it for the first process before anything is mounted
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive.add("init", stat.S_IFREG | 0o755, (SOURCES / "init").read_bytes())
    [busybox_program] = [path for path in unpacked.rglob("bin/busybox") if path.is_file() and not path.is_symlink()]
    archive.add("bin/busybox", stat.S_IFREG | 0o755, busybox_program.read_bytes())
    for program in PROGRAMS:
        out = scratch / program
        source = str(SOURCES / f"{program}.c")
        _run("gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-s", "-o", str(out), source)
        archive.add(f"bin/{program}", stat.S_IFREG | 0o755, out.read_bytes())
    for index, (name, module) in enumerate(_modules(unpacked)):
        archive.add(f"lib/modules/{index:03}-{name}.ko", stat.S_IFREG | 0o644, module)
    # not compressed: QEMU copies it at once, while an emulated guest would unpack it slowly
    (built / "initrd").write_bytes(archive.finish())
    [vmlinuz] = unpacked.glob("boot/vmlinuz-*")
    (built / "vmlinuz").write_bytes(vmlinuz.read_bytes())


def _modules(unpacked: Path) -> Iterator[tuple[str, bytes]]:
    """The modules for :data:`DRIVERS` in the order of insertion, as the ``depends`` of each one's ``.modinfo`` says."""
    files = {
        path.name.partition(".")[0].replace("-", "_"): path
        for path in unpacked.rglob("*.ko*")
        if re.search(r"\.ko(\.xz)?\Z", path.name)
    }
    done: set[str] = set()

    def insert(name: str) -> Iterator[tuple[str, bytes]]:
        if name in done or name not in files:
            return
        done.add(name)
        module = files[name].read_bytes()
        if files[name].suffix == ".xz":
            module = lzma.decompress(module)
        match = re.search(rb"\0depends=([^\0]*)\0", module)
        for needed in match[1].decode().split(",") if match and match[1] else ():
            yield from insert(needed.replace("-", "_"))
        yield name, module

    for driver in DRIVERS:
        yield from insert(driver)


class Cpio:
    """An archive in the "new ASCII" form, which the kernel unpacks (the kernel's "initramfs buffer format").

    Written here, since making a device node in an archive this way needs no root and no cpio.
    """

    def __init__(self) -> None:
        self._out = io.BytesIO()
        self._inode = 0

    def add(self, name: str, mode: int, data: bytes = b"", *, device: tuple[int, int] = (0, 0)) -> None:
        """Add one entry; ``mode`` with its file type, ``device`` as major and minor number."""
        self._inode += 1
        encoded = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device of the file (2), device number (2), length of name, checksum
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
        self._out.write(b"070701" + b"".join(b"%08X" % field for field in fields) + encoded)
        self._pad()
        self._out.write(data)
        self._pad()

    def finish(self) -> bytes:
        """The whole archive."""
        self.add("TRAILER!!!", 0)
        return self._out.getvalue()

    def _pad(self) -> None:
        self._out.write(b"\0" * (-self._out.tell() % 4))


def _run(*command: str) -> None:
    environment = os.environ | {"LC_ALL": "C"}
    try:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, env=environment, timeout=600)
    except FileNotFoundError as error:
        raise GuestUnavailable(
            f"{command[0]} is not installed. `make check` and integration/setup.sh qemu see to it"
        ) from error
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise GuestUnavailable(f"the guest could not be built: {error}") from error


if __name__ == "__main__":
    print(guest_image().initrd)
