"""Disk images on the host: making them, comparing them, and what fsck says."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import trio

_STEP = 1 << 20


def make_image(path: Path, size: int) -> Path:
    """A sparse raw image of ``size`` bytes."""
    with path.open("xb") as file:
        file.truncate(size)
    return path


async def make_ext4(path: Path, size: int, *, contents: Path | None = None) -> Path:
    """A raw image of ``size`` bytes with an ext4 of 4 KiB blocks, which the ledger counts on.

    :param contents: directory to copy into it; None: it stays empty.
    """
    make_image(path, size)
    # everything is initialised here, so that the guest does not write in the background unasked
    lazy = "lazy_itable_init=0,lazy_journal_init=0,nodiscard"
    filled = () if contents is None else ("-d", str(contents))
    await _tool("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-E", lazy, *filled, str(path))
    return path


async def fsck(path: Path) -> str:
    """Empty where the image's file system is clean and needs nothing, else what e2fsck has to say. Changes nothing."""
    status, text = await _tool("e2fsck", "-f", "-n", str(path), check=False)
    return "" if status == 0 else text


async def copy_image(source: Path, target: Path) -> Path:
    """Copy an image as it is at this moment, holes kept; of a running VM only while it is stopped."""
    await _tool("cp", "--sparse=always", str(source), str(target))
    return target


async def first_difference(one: Path, other: Path, *, length: int | None = None) -> int | None:
    """Offset of the first byte that differs, None where all are equal; files of two lengths differ where one ends.

    :param length: compare this many bytes only, as where a target is a larger block device.
    """
    return await trio.to_thread.run_sync(_first_difference, one, other, length)


def _first_difference(one: Path, other: Path, length: int | None) -> int | None:
    with one.open("rb") as left, other.open("rb") as right:
        at = 0
        while length is None or at < length:
            step = _STEP if length is None else min(_STEP, length - at)
            a, b = left.read(step), right.read(step)
            if a != b:
                return at + next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            if not a:
                return None
            at += len(a)
        return None


async def _tool(*command: str, check: bool = True) -> tuple[int, str]:
    # Debian keeps these tools out of ordinary users' PATH
    environment = os.environ | {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin", "LC_ALL": "C"}
    done = await trio.run_process(
        list(command), capture_stdout=True, stderr=subprocess.STDOUT, check=False, env=environment
    )
    text = done.stdout.decode(errors="replace")
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{text}")
    return done.returncode, text
