"""The QEMUs that the tests run: the installed one, and those of other Debian releases, each run from a directory.

Owns which QEMU a machine is started with (:func:`selected`) and how its programs are run. ``integration/setup.sh
qemu-root`` fetches them, once; ``python -m integration.qemus`` gets all of :data:`RELEASES` and says what there is.

A QEMU of another release needs its own C library. It is run by that release's own loader, without root and in our own
file system, so that images, sockets and process ids are what they are everywhere else.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
CACHE: Final = ROOT / ".cache" / "qemu"

INSTALLED: Final = "installed"
RELEASES: Final[Mapping[str, str]] = {"7.2": "bookworm", "10.0": "trixie", "11.1": "sid"}
"""The Debian release that has each QEMU. Debian unstable moves on; the tests then run what it has, under this name."""

OTHERS: Final = tuple(RELEASES)[1:]
"""Those that most tests are run with in ``make check-all`` only."""


class QemuUnavailable(Exception):
    """This QEMU cannot be had here; the text says why."""


@dataclass(frozen=True, slots=True)
class Qemu:
    """A QEMU that can be run. Each program is a command to which its arguments are added; it does not fork.

    :param name: as it was asked for.
    :param version: major, minor, micro.
    :param package: the distribution's name for it; empty where there is none.
    """

    name: str
    version: tuple[int, int, int]
    package: str
    system: tuple[str, ...]
    img: tuple[str, ...]
    io: tuple[str, ...]
    nbd: tuple[str, ...]
    storage_daemon: tuple[str, ...]

    def __str__(self) -> str:
        return ".".join(map(str, self.version))


@cache
def find(name: str) -> Qemu:
    """A QEMU by name: ``installed``, a key of :data:`RELEASES`, or the path of a ``qemu-system-x86_64``.

    Fetches it where it is not there yet. ``QEMU_REMUS_QEMU`` is the path of what counts as installed.

    :raise QemuUnavailable: when it cannot be had.
    """
    found = _find(name)
    if isinstance(found, str):
        raise QemuUnavailable(found)
    return found


@cache
def _find(name: str) -> Qemu | str:
    # what cannot be had is not tried again, hence the reason as a value
    try:
        if name in RELEASES:
            return _of_release(name)
        default = os.environ.get("QEMU_REMUS_QEMU", "qemu-system-x86_64")
        return _at(name, default if name == INSTALLED else name)
    except QemuUnavailable as error:
        return str(error)


def _at(name: str, program: str) -> Qemu:
    path = shutil.which(program)
    if path is None:
        raise QemuUnavailable(
            f"{program} is not installed; `make check` installs it, and so does integration/setup.sh qemu"
        )
    # its tools are those beside it, or whatever is installed
    beside = {tool: str(Path(path).with_name(tool)) for tool in ("qemu-img", "qemu-io", "qemu-nbd")}
    tools = {tool: (full if Path(full).exists() else tool,) for tool, full in beside.items()}
    daemon = str(Path(path).with_name("qemu-storage-daemon"))
    return _made(name, (path,), tools["qemu-img"], tools["qemu-io"], tools["qemu-nbd"], (daemon,))


def _of_release(name: str) -> Qemu:
    installed = _find(INSTALLED)
    if isinstance(installed, Qemu) and str(installed).startswith(f"{name}."):
        return replace(installed, name=name)
    suite = RELEASES[name]
    root = CACHE / suite
    if not root.exists():
        _fetch(suite)
    if platform.machine() != "x86_64":
        raise QemuUnavailable(f"QEMU of Debian {suite} is run on x86-64 only")
    libraries = ":".join(str(root / directory) for directory in ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"))

    def program(tool: str, *arguments: str) -> tuple[str, ...]:
        modules = f"QEMU_MODULE_DIR={root / 'usr/lib/x86_64-linux-gnu/qemu'}"
        loader = str(root / "lib64/ld-linux-x86-64.so.2")
        return ("env", modules, loader, "--library-path", libraries, str(root / "usr/bin" / tool), *arguments)

    firmware = [("-L", str(root / "usr/share" / directory)) for directory in ("qemu", "seabios")]
    return _made(
        name,
        program("qemu-system-x86_64", *firmware[0], *firmware[1]),
        program("qemu-img"),
        program("qemu-io"),
        program("qemu-nbd"),
        program("qemu-storage-daemon"),
    )


def _made(name: str, system: tuple[str, ...], *tools: tuple[str, ...]) -> Qemu:
    try:
        told = subprocess.run([*system, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise QemuUnavailable(f"{system[-1]} does not run: {error}") from error
    match = re.search(r"version (\d+)\.(\d+)\.(\d+)(?: \(([^)]*)\))?", told)
    if match is None:
        raise QemuUnavailable(f"{system[-1]} does not tell its version: {told!r}")
    version = (int(match[1]), int(match[2]), int(match[3]))
    return Qemu(name, version, match[4] or "", system, *tools)


def _fetch(suite: str) -> None:
    command = [str(ROOT / "integration" / "setup.sh"), "qemu-root", suite]
    # what it says goes to the terminal as well as into the reason, for it may take a while
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        told = []
        for line in process.stderr:
            sys.stderr.write(line)
            told.append(line.strip())
    if process.returncode:
        raise QemuUnavailable(f"QEMU of Debian {suite} cannot be fetched: {told[-1] if told else process.returncode}")


_selected: list[str] = [INSTALLED]


def selected() -> Qemu:
    """The QEMU that machines are started with where nothing else is said: the innermost of :func:`use`.

    :raise QemuUnavailable: when it cannot be had.
    """
    return find(_selected[-1])


@contextmanager
def use(name: str) -> Iterator[Qemu]:
    """Start machines with this QEMU during the block."""
    _selected.append(name)
    try:
        yield find(name)
    finally:
        _selected.pop()


def main() -> None:
    """Get all of them; what cannot be had is said, and is no failure: its tests are skipped."""
    for name in RELEASES:
        found = _find(name)
        if isinstance(found, str):
            print(f"QEMU {name}: not here, its tests will be skipped: {found}")
        else:
            print(f"QEMU {name}: {found} {found.package}".rstrip())


if __name__ == "__main__":
    main()
