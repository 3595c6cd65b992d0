"""The witness in a guest: a process that itself sees whether its memory and both disks are of one checkpoint.

What it does, and what each of its lines means, is in ``integration/guest/witness.c``.
"""

from __future__ import annotations

import re
import socket
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import trio

from integration.agent import GuestError, Job
from integration.machine import Machine

#: Bytes at the start of each disk that are the witness's: 64 slots of 4 KiB. A load on that disk keeps behind them.
RING_SIZE = 256 << 10

#: Path in the guest of the port that stands for the network.
OUTPUT = "/dev/virtio-ports/output"

#: Pages of its table by default (4 MiB), and how many of them it looks at with every record, besides the newest ones.
PAGES = 1024
IN_TURN = 16

#: Records after which it has looked at all of its table and has written every slot anew.
FULL_TURN = PAGES // IN_TURN

_RECORD = 4096
_LINE = re.compile(
    r"S (?P<boot>[0-9a-f-]{36}) (?P<run>[0-9a-f]{16})|W (?P<number>\d+) (?P<crc>[0-9a-f]{8})|FAULT (?P<fault>.+)",
    re.ASCII,
)


@dataclass(slots=True)
class Account:
    """What a witness has said, as far as it was heard, from wherever on.

    :ivar boot: boot id of its kernel; None where its first line was not heard.
    :ivar run: its own number, 0 where its first line was not heard.
    :ivar records: number and CRC of each record; a number has one CRC, on whichever host the witness prints it.
    """

    boot: UUID | None = None
    run: int = 0
    records: dict[int, str] = field(default_factory=dict)
    _wrong: list[str] = field(default_factory=list)

    @property
    def first(self) -> int:
        """The oldest record that was heard, 0 for none."""
        return min(self.records, default=0)

    @property
    def last(self) -> int:
        """The newest record, 0 for none."""
        return max(self.records, default=0)

    @property
    def faults(self) -> tuple[str, ...]:
        """What the witness found wrong, and what is wrong with its lines: strange ones, gaps, one number twice."""
        gap = () if self.last - self.first < len(self.records) or not self.records else ("records are missing",)
        return (*self._wrong, *gap)

    def enter(self, line: str) -> None:
        """Enter one line."""
        match = _LINE.fullmatch(line)
        if match is None:
            self._wrong.append(f"no line of a witness: {line}")
        elif match["boot"]:
            self.boot, self.run = UUID(match["boot"]), int(match["run"], 16)
        elif match["fault"]:
            self._wrong.append(match["fault"])
        elif self.records.setdefault(int(match["number"]), match["crc"]) != match["crc"]:
            self._wrong.append(f"two records of one number: {line}")

    def agrees_with(self, other: Account) -> bool:
        """Whether both give every record that both have heard the same CRC: they are of one run."""
        return all(self.records[number] == other.records[number] for number in self.records.keys() & other.records)


def hear(lines: Iterable[str]) -> Account:
    """What these lines say."""
    said = Account()
    for line in lines:
        said.enter(line)
    return said


class Witness:
    """A witness whose lines come over the guest's agent. Made by :func:`start_witness`."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def said(self) -> Account:
        """All that it has said; of a long run, the last :data:`integration.agent.KEPT_LINES` lines."""
        return hear(self._job.lines)

    async def grow(self, records: int, *, timeout: float = 60.0) -> None:
        """Wait for so many more records.

        :raise GuestError: when it ends before, as it does when it finds a fault.
        :raise TimeoutError: after ``timeout`` seconds.
        """
        wanted = self.said().last + records
        await self._job.wait_until(lambda job: _number(job) >= wanted, timeout=timeout)

    async def find_fault(self, *, timeout: float = 60.0) -> str:
        """Wait until it finds a fault; its text.

        :raise AssertionError: when it ends without one.
        :raise TimeoutError: after ``timeout`` seconds.
        """
        await self._job.wait_until(lambda job: job.ended, timeout=timeout)
        for line in self._job.lines:
            if line.startswith("FAULT "):
                return line.removeprefix("FAULT ")
        raise AssertionError(f"the witness ended with {self._job.status} and no fault:\n{self._job.output}")


def _number(job: Job) -> int:
    match = _LINE.fullmatch(job.lines[-1]) if job.lines else None
    return int(match["number"]) if match and match["number"] else 0


def newest_record(image: Path, disk: int) -> int:
    """The newest record in a disk's ring, 0 for none.

    :param disk: 0 for the first of the witness's disks, 1 for the second.
    :raise AssertionError: when the ring is not what it was right after that record.
    """
    with image.open("rb") as file:
        ring = file.read(RING_SIZE)
    numbers = [_record_in(ring[at : at + _RECORD], disk) for at in range(0, RING_SIZE, _RECORD)]
    newest = max(numbers)
    slots = len(numbers)
    for slot, number in enumerate(numbers):
        due = max(0, newest - (newest - 1 - slot) % slots)
        assert number == due, f"{image.name}: slot {slot} has record {number} and must have {due}, of {newest}"
    return newest


def _record_in(slot: bytes, disk: int) -> int:
    magic, number, _, on_disk = struct.unpack_from("<8sQQQ", slot)
    if not any(slot):
        return 0
    [checksum] = struct.unpack_from("<Q", slot, _RECORD - 8)
    good = magic == b"WITNESS1" and on_disk == disk and checksum == zlib.crc32(slot[:-8])
    assert good, f"a damaged record {number}"
    return int(number)


class Listener:
    """Hears a witness over the guest's output port, :attr:`integration.machine.Machine.output`.

    :ivar account: what was heard so far.
    """

    def __init__(self, output: socket.socket) -> None:
        self.account = Account()
        self._output = output
        self._buffer = b""

    async def hear(self, condition: Callable[[Account], bool], *, timeout: float = 60.0) -> Account:
        """Listen until the condition holds; it is tried after every line.

        :raise GuestError: when the VM ends first.
        :raise TimeoutError: after ``timeout`` seconds.
        """
        with trio.move_on_after(timeout):
            while not condition(self.account):
                line, end, rest = self._buffer.partition(b"\n")
                if end:
                    self._buffer = rest
                    self.account.enter(line.decode(errors="replace"))
                    continue
                await trio.lowlevel.wait_readable(self._output)
                try:
                    data = self._output.recv(65536)
                except ConnectionResetError:
                    data = b""
                if not data:
                    raise GuestError(f"the VM ended; its witness had said {self.account}")
                self._buffer += data
            return self.account
        raise TimeoutError(f"not within {timeout:g} s; the witness had said {self.account}")


def command(machine: Machine, *, first: str, second: str, output: str = "-", rate: float = 100.0) -> str:
    """The guest's command line of a witness on two disks.

    :param output: path in the guest of what takes its lines; by default, standard output.
    :param rate: records a second at most; 0: as fast as it goes.
    """
    return f"witness {machine.device_in_guest(first)} {machine.device_in_guest(second)} {output} {rate:g}"


async def start_witness(machine: Machine, *, first: str, second: str, rate: float = 100.0) -> Witness:
    """Start a witness whose lines come over the agent; both disks' first :data:`RING_SIZE` bytes are its own.

    :raise GuestError: when it cannot start.
    """
    job = await machine.guest.start(command(machine, first=first, second=second, rate=rate))
    await job.wait_until(lambda job: len(job.lines) > 0)
    if hear(job.lines).boot is None:
        raise GuestError(f"the witness does not start:\n{job.output}")
    return Witness(job)
