"""What the guest itself notices of a fault: errors of its disks, for its programs and its kernel, and their stalls.

What the pulse does and says is in ``integration/guest/pulse.c``.
"""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise

import trio

from integration.agent import GuestError, Job
from integration.ledger import SLOTS_SIZE, Ledger, mount, start_file_load, start_ledger, stop_loads
from integration.machine import Machine
from integration.process import background

_LINE = re.compile(r"P (\d+) (\d+) (\d+)", re.ASCII)

#: What a kernel says of a disk that fails or hangs.
_COMPLAINTS = "I/O error|EXT4-fs (error|warning)|JBD2|blocked for more than|timed out|aborted"

#: Bytes behind the ledger's slots on the second disk in which the pulse writes.
PULSE_SIZE = 8 << 20


@dataclass(frozen=True, slots=True)
class Beat:
    """What the pulse has said in one line, and when that came.

    :param longest: of its operations since the line before, seconds of the guest's clock.
    :param at: trio's clock.
    """

    writes: int
    errors: int
    longest: float
    at: float


@dataclass(frozen=True, slots=True)
class Stalls:
    """How long the guest's I/O stood still at most, in seconds.

    :param guest: one operation, by the guest's clock, which stands still with the VM.
    :param host: between two lines of the pulse, 16 writes, by the host's.
    """

    guest: float
    host: float

    def __str__(self) -> str:
        return f"longest operation {self.guest * 1000:.0f} ms, longest gap {self.host * 1000:.0f} ms"


class Guest:
    """A guest that writes to both of its disks. Made by :func:`start_guest_load`.

    :ivar ledger: its ledger; it ends at the first error.
    :ivar beats: all that the pulse has said.
    """

    def __init__(self, machine: Machine, ledger: Ledger, files: Job, pulse: Job) -> None:
        self._machine = machine
        self._files = files
        self._pulse = pulse
        self.ledger = ledger
        self.beats: list[Beat] = []
        self._heard = ""
        self._beaten = trio.Event()

    async def _follow(self) -> None:
        with suppress(GuestError):  # its end, which is somebody else's to judge
            while True:
                await self._pulse.wait_until(self._has_more, timeout=math.inf)
                match = _LINE.fullmatch(self._pulse.lines[-1])
                assert match, self._pulse.output
                writes, errors, longest = map(int, match.groups())
                self._heard = match[0]
                self.beats.append(Beat(writes, errors, longest / 1e6, trio.current_time()))
                self._beaten.set()
                self._beaten = trio.Event()

    def _has_more(self, job: Job) -> bool:
        return bool(job.lines) and job.lines[-1] != self._heard

    async def go_on(self, records: int = 10, *, timeout: float = 60.0) -> None:
        """Wait until so many more records are in the ledger, and the pulse has gone on as well."""
        await self.ledger.grow(records, timeout=timeout)
        with trio.fail_after(timeout):
            for _ in range(2):
                await self._beaten.wait()

    def stalls(self, since: float = 0.0) -> Stalls:
        """The longest ones since a time of trio's clock."""
        beats = [beat for beat in self.beats if beat.at >= since]
        gaps = [later.at - earlier.at for earlier, later in pairwise(beats)]
        return Stalls(max((beat.longest for beat in beats), default=0.0), max(gaps, default=0.0))

    async def see_no_errors(self) -> None:
        """See that no program had an error, and that the guest's kernel has nothing to say about its disks."""
        assert self.beats
        assert self.beats[-1].errors == 0
        for job in (self._files, self._pulse):
            assert not job.ended, f"{job.command!r} ended with {job.status}:\n{job.output}"
        said = await self._machine.guest.run(f"dmesg | grep -E '{_COMPLAINTS}' | grep -v Journal", check=False)
        assert said == ""

    async def stop(self) -> None:
        """End everything that writes."""
        await stop_loads(self._machine)


@asynccontextmanager
async def start_guest_load(machine: Machine, *, first: str = "a", second: str = "b") -> AsyncIterator[Guest]:
    """Let the guest write to both disks for the length of the block: ledger, files, pulse.

    :param first: disk with an ext4.
    :param second: raw disk, of at least :data:`~integration.ledger.SLOTS_SIZE` + :data:`PULSE_SIZE`.
    """
    await mount(machine, first)
    ledger = await start_ledger(machine, first=first, second=second, rate=50)
    files = await start_file_load(machine, rate=30)
    device = machine.device_in_guest(second)
    pulse = await machine.guest.start(f"pulse {device} {SLOTS_SIZE} {PULSE_SIZE} 200 7")
    async with background() as nursery:
        guest = Guest(machine, ledger, files, pulse)
        nursery.start_soon(guest._follow)
        await guest.go_on()
        yield guest


__all__ = ["Beat", "Guest", "Stalls", "start_guest_load"]
