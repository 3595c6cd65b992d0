"""``make demo``, ``qemu-remus demo``: protect a VM under load, kill it, fail over, boot the copy and judge it.

Owns the story, its order and its verdict; machines and controllers are the harness's. It uses the controllers only as
an operator can: by their commands and their control sockets.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from integration.agent import GuestError
from integration.controller import Controller, Status, committed, qemu_remus, start_primary, start_secondary
from integration.guest.build import ROOT, GuestImage, GuestUnavailable, guest_image
from integration.images import make_ext4, make_image
from integration.ledger import (
    SLOTS_SIZE,
    Ledger,
    Verdict,
    check_disks,
    mount,
    start_block_load,
    start_file_load,
    start_ledger,
)
from integration.machine import Disk, Machine, best_accelerator, start_machine

MIB = 1 << 20
FIRST_SIZE = 512 * MIB
SECOND_SIZE = 256 * MIB
#: Bytes that either disk holds before anything starts, so that there is something to copy.
PREFILLED = 96 * MIB
#: What the demonstration needs in the temporary directory, in bytes: two disks twice, a fleece and a journal.
ROOM = 4 * (FIRST_SIZE + SECOND_SIZE)
#: Seconds within which processes that end by themselves (a guardian) must have ended.
LEFTOVER_TIMEOUT = 30.0


class Failed(Exception):
    """Something that the demonstration promises did not hold."""


@dataclass(slots=True)
class Story:
    """What happened, for the table and the verdict.

    :param samples: (newest checkpoint captured, newest record reported *before* that was asked), once a second: every
        later checkpoint must hold that record.
    """

    last_status: Status = field(default_factory=dict)
    samples: list[tuple[int, int]] = field(default_factory=list)
    reported: int = 0
    checkpoint: int = 0
    failover_seconds: float = math.nan
    verdict: Verdict | None = None


class Screen:
    """The demonstration's output: numbered steps, and one line that is drawn over where there is a terminal."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._step = 0
        self._terminal = sys.stdout.isatty()
        self._open = False
        self._quarter = -1

    def step(self, text: str) -> None:
        """Begin the next step."""
        self._step += 1
        self.line(f"\n{self._bold(f'[{self._step}/{self._steps}]')} {self._bold(text)}")

    def line(self, text: str) -> None:
        """Print a line."""
        if self._open:
            print(flush=True)
            self._open = False
        print(text, flush=True)

    def progress(self, share: float, text: str) -> None:
        """Show progress: a bar that grows on a terminal, else a line each quarter."""
        if self._terminal:
            full = int(share * 30)
            print(f"\r      [{'#' * full}{'.' * (30 - full)}] {share:4.0%}  {text}\x1b[K", end="", flush=True)
            self._open = True
        elif int(share * 4) > self._quarter:
            self._quarter = int(share * 4)
            self.line(f"      {share:4.0%}  {text}")

    def _bold(self, text: str) -> str:
        return f"\x1b[1m{text}\x1b[0m" if self._terminal and not os.environ.get("NO_COLOR") else text


def size(count: float) -> str:
    """Bytes for a person."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def milliseconds(value: float | None) -> str:
    """A pause for a person."""
    return "-" if value is None else f"{value:.1f} ms"


async def demonstrate(screen: Screen, scratch: Path, seconds: float) -> Story:
    """The whole story; its machines and controllers have ended when it returns."""
    story = Story()
    screen.step("A virtual machine under load")
    guest = await trio.to_thread.run_sync(guest_image)
    accelerator = await best_accelerator()
    first = await _make_first(scratch)
    second = await trio.to_thread.run_sync(_make_second, scratch)
    disks = [Disk("disk0", first), Disk("disk1", second)]
    emulated = "" if accelerator == "kvm" else " (emulated: KVM is not usable here)"
    screen.line(
        f"      disk0 {size(FIRST_SIZE)}, ext4; disk1 {size(SECOND_SIZE)}, raw; {accelerator.upper()}{emulated}"
    )
    targets = {"disk0": scratch / "copy-of-disk0", "disk1": scratch / "copy-of-disk1"}

    async with start_secondary(scratch, targets) as secondary:
        before = time.monotonic()
        async with start_machine(scratch, disks, name="primary-vm", guest=guest) as machine:
            screen.line(f"      it is up after {time.monotonic() - before:.1f} s")
            ledger = await _start_load(screen, machine)
            screen.step("Two controllers beside it")
            async with start_primary(scratch, machine.qmp_path, secondary.address) as primary:
                for controller in (secondary, primary):
                    screen.line(_shown(controller, scratch))
                screen.step("The first copy of the disks, while the VM runs")
                await _watch_sync(screen, primary)
                screen.step(f"Protected: a checkpoint every 200 ms. {seconds:.0f} seconds of them")
                await _watch_epochs(screen, primary, ledger, story, seconds)
                screen.step("SIGKILL to the VM's QEMU and to the primary controller")
                machine.process.kill()
                primary.process.kill()
                await machine.process.wait()
                await primary.process.wait()
                with trio.move_on_after(5):
                    await machine.guest.gone.wait()
                story.reported = ledger.last
                screen.line(f"      the last record that the guest reported is {story.reported}")

        screen.step("Failover: the secondary makes its disks one checkpoint")
        released = await _fail_over(screen, secondary, scratch, story)
        if await secondary.stop() != 0:
            raise Failed(f"the secondary did not end cleanly:\n{secondary.process.tail()}")

    screen.step("A second VM boots from the copy, and it is checked")
    await _judge(screen, scratch, guest, released, story)
    return story


async def _make_first(scratch: Path) -> Path:
    contents = scratch / "contents"
    await trio.to_thread.run_sync(_fill, contents / "some-data")
    path = await make_ext4(scratch / "disk0", FIRST_SIZE, contents=contents)
    await trio.to_thread.run_sync(shutil.rmtree, contents)
    return path


def _fill(path: Path) -> None:
    path.parent.mkdir()
    with path.open("wb") as file:
        for _ in range(PREFILLED // MIB):
            file.write(os.urandom(MIB))


def _make_second(scratch: Path) -> Path:
    path = make_image(scratch / "disk1", SECOND_SIZE)
    with path.open("r+b") as file:
        file.seek(SECOND_SIZE - PREFILLED)
        for _ in range(PREFILLED // MIB):
            file.write(os.urandom(MIB))
    return path


async def _start_load(screen: Screen, machine: Machine) -> Ledger:
    await mount(machine, "disk0")
    ledger = await start_ledger(machine, first="disk0", second="disk1", rate=50)
    await start_file_load(machine, rate=40)
    await start_block_load(machine, "disk1", start=SLOTS_SIZE, size=64 * MIB, rate=60)
    await ledger.reach(10)
    screen.line(
        "      the ledger: 50 numbered, checksummed records a second, each with fsync to a file on disk0 and then"
    )
    screen.line("      to a slot of disk1; beside it files come and go, and random writes, zeroes and discards")
    return ledger


def _shown(controller: Controller, scratch: Path) -> str:
    command = " ".join(["qemu-remus", *controller.process.command[1:]]).replace(f"{scratch}/", "")
    return textwrap.fill(
        command, 116, initial_indent=" " * 6, subsequent_indent=" " * 10, break_on_hyphens=False, break_long_words=False
    )


async def _watch_sync(screen: Screen, primary: Controller) -> None:
    before = time.monotonic()

    def show(status: Status) -> bool:
        if sync := status.get("sync"):
            left = sync.get("seconds-left")
            text = f"{size(sync['done-bytes'])} of {size(sync['total-bytes'])}, {size(sync['bytes-per-second'])}/s"
            text += "" if left is None else f", {left:.0f} s left"
            screen.progress(sync["done-bytes"] / max(1, sync["total-bytes"]), text)
        return bool(status["replication"] == "protected" and committed(status) > 0)

    status = await primary.wait_until(show, timeout=300)
    screen.line(
        f"      done after {time.monotonic() - before:.1f} s: {size(status['bytes-sent'])} sent, "
        f"checkpoint {committed(status)} is committed"
    )


async def _watch_epochs(screen: Screen, primary: Controller, ledger: Ledger, story: Story, seconds: float) -> None:
    screen.line("      captured  committed      age     pause  dirty, waiting         sent    ledger")
    end = trio.current_time() + seconds
    protected = committed(await primary.status())
    while trio.current_time() < end:
        record = ledger.last
        status = story.last_status = await primary.status()
        checkpoint = status["checkpoint"]
        story.samples.append((int(checkpoint.get("captured") or 0), record))
        age = checkpoint.get("committed-age-seconds")
        screen.line(
            f"      {checkpoint.get('captured') or '-':>8}  {checkpoint.get('committed') or '-':>9}"
            f"  {'-' if age is None else f'{age:.2f} s':>7}  {milliseconds(status['pause'].get('last-ms')):>8}"
            f"  {size(status.get('dirty-bytes') or 0):>14}  {size(status['bytes-sent']):>11}  {record:>8}"
        )
        if status["replication"] != "protected":
            raise Failed(f"the VM is not protected: {status.get('reason')}\n{primary.process.tail()}")
        await trio.sleep(min(1.0, max(0.0, end - trio.current_time())))
    if committed(await primary.status()) <= protected:
        raise Failed(f"no checkpoint was committed in {seconds:.0f} s")


async def _fail_over(screen: Screen, secondary: Controller, scratch: Path, story: Story) -> dict[str, Path]:
    await secondary.wait_until(lambda status: status["connection"] != "connected", timeout=30)
    before = time.monotonic()
    done = await qemu_remus("failover", "--control", str(secondary.control), "--json", scratch=scratch, timeout=300)
    story.failover_seconds = time.monotonic() - before
    if done.status:
        raise Failed(f"failover ended with {done.status}: {done.out}{done.err}\n{secondary.process.tail()}")
    answer: dict[str, Any] = json.loads(done.out)
    story.checkpoint = answer["checkpoint"]
    screen.line(f"      checkpoint {story.checkpoint}, after {story.failover_seconds:.2f} s")
    return {disk["name"]: Path(disk["target"]) for disk in answer["disks"]}


async def _judge(screen: Screen, scratch: Path, guest: GuestImage, disks: dict[str, Path], story: Story) -> None:
    verdict = story.verdict = await check_disks(scratch, guest, disks["disk0"], disks["disk1"], name="second-vm")
    if verdict.faults:
        raise Failed("the copy is not what it must be:\n" + "\n".join(verdict.faults))
    acknowledged = committed(story.last_status)
    if story.checkpoint < acknowledged:
        raise Failed(f"failover gave checkpoint {story.checkpoint}, but {acknowledged} had been committed")
    owed = max((record for captured, record in story.samples if captured < story.checkpoint), default=0)
    if verdict.in_slots < owed:
        raise Failed(f"checkpoint {story.checkpoint} must hold record {owed}, but the copy ends at {verdict.in_slots}")
    for text in (
        "the file system is clean (e2fsck after the journal's replay)",
        f"the file on disk0 holds records 1 to {verdict.in_file} without a gap or a torn one",
        f"the slots of disk1 end at record {verdict.in_slots}: both disks are of the same instant",
        f"checkpoint {story.checkpoint} is no older than the last one seen committed, {acknowledged}",
        f"it holds every record that had been reported when it was captured: {owed} at least",
    ):
        screen.line(f"      ok  {text}")


def table(story: Story) -> str:
    """The story in numbers."""
    assert story.verdict is not None
    pause = story.last_status["pause"]
    kept = story.verdict.in_slots
    rows = {
        "checkpoint": str(story.checkpoint),
        "records kept": str(kept),
        "records after the last commit": f"{max(0, story.reported - kept)} (of {story.reported} reported)",
        "failover": f"{story.failover_seconds:.2f} s",
        "pause, median": f"{milliseconds(pause.get('median-ms'))} (p99 {milliseconds(pause.get('p99-ms'))})",
        "bytes replicated": size(story.last_status["bytes-sent"]),
    }
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}   {value}" for name, value in rows.items())


def leftovers(scratch: Path) -> dict[int, str]:
    """Command lines, by pid, of processes that were started for the demonstration: they have its directory in them."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if f"{scratch}/" in line:
                found[int(entry.name)] = line
    return found


def _end_leftovers(scratch: Path) -> dict[int, str]:
    """Wait for what ends by itself; kill the rest and return it."""
    deadline = time.monotonic() + LEFTOVER_TIMEOUT
    while (left := leftovers(scratch)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return left


@asynccontextmanager
async def _until_signalled() -> AsyncIterator[list[int]]:
    """Cancel the block on the first Ctrl-C, SIGTERM or SIGHUP; the list then holds its number."""
    received: list[int] = []
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:

            async def listen() -> None:
                async for number in signals:
                    received.append(number)
                    nursery.cancel_scope.cancel()

            nursery.start_soon(listen)
            yield received
            nursery.cancel_scope.cancel()


async def _run(screen: Screen, scratch: Path, seconds: float) -> tuple[Story | None, list[int]]:
    story = None
    async with _until_signalled() as received:
        story = await demonstrate(screen, scratch, seconds)
    return story, received


def main(argv: Sequence[str] = ()) -> int:
    """Run the demonstration.

    :return: 0 only if everything held that it shows; 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to watch (default %(default)g)")
    options = parser.parse_args(list(argv))
    if subprocess.run(
        [str(ROOT / "integration" / "setup.sh"), "qemu"], check=False, stdin=subprocess.DEVNULL
    ).returncode:
        return 1
    if shutil.disk_usage(tempfile.gettempdir()).free < ROOM:
        print(f"the demonstration needs {size(ROOM)} in {tempfile.gettempdir()}; set TMPDIR to a place that has them")
        return 1

    screen = Screen(steps=7)
    with tempfile.TemporaryDirectory(prefix="qr-") as directory:
        scratch = Path(directory)
        failure = ""
        story: Story | None = None
        received: list[int] = []
        try:
            story, received = trio.run(_run, screen, scratch, options.seconds)
        except* (
            Failed,
            AssertionError,
            GuestError,
            GuestUnavailable,
            OSError,
            EOFError,
            RuntimeError,
            ValueError,
        ) as group:
            failure = "\n".join(map(str, _leaves(group)))
        if left := _end_leftovers(scratch):
            failure += f"\nstill running at the end, and killed: {left}"
    if received:
        screen.line("\ninterrupted; everything that was started has ended")
        return 128 + received[0]
    if failure or story is None:
        screen.line(f"\nFAILED: {failure.strip()}")
        return 1
    screen.line(f"\n{table(story)}\n\nAll of it held; nothing is left running.")
    return 0


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    return [
        leaf
        for error in group.exceptions
        for leaf in (_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
