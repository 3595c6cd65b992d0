"""A VM with its two controllers, any of which may be killed and started again; its disks at a checkpoint, and the copy.

Owns the controllers' lives and the comparison of images. Faults are :mod:`integration.faults`'.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from integration.controller import (
    Controller,
    Status,
    committed,
    free_port,
    qemu_remus,
    start_primary,
    start_secondary,
)
from integration.faults import Link
from integration.guest.build import GuestImage
from integration.images import first_difference, make_image
from integration.machine import Disk, Machine, start_machine
from integration.proxy import Proxy, start_proxy

KIB = 1 << 10
MIB = 1 << 20


class Pair:
    """A VM with both of its controllers, any of which may be killed and started again. Made by :func:`pair_of`.

    :ivar targets: the copy's image of each disk.
    :ivar proxy: what the primary connects to; None where there is a link of namespaces, or where nobody asked for it.
    """

    def __init__(
        self,
        scratch: Path,
        machine: Machine,
        *,
        interval_ms: int,
        link: Link | None,
        heartbeat: float | None,
        primary_options: Sequence[str],
        secondary_options: Sequence[str],
        targets: Path | None,
    ) -> None:
        self.scratch = scratch
        self.machine = machine
        self.targets = {disk.name: (targets or scratch) / f"{disk.name}.copy" for disk in machine.disks}
        self.primary: Controller
        self.secondary: Controller
        self.proxy: Proxy | None = None
        self._interval_ms = interval_ms
        self._link = link
        self._host = link.secondary.address if link else "127.0.0.1"
        self._port = free_port()
        silence = () if heartbeat is None else ("--heartbeat-timeout", f"{heartbeat:g}")
        self._primary_options = (*silence, *primary_options)
        self._secondary_options = (*silence, *secondary_options)
        self._stack = AsyncExitStack()

    async def start_secondary(self) -> None:
        """Start it, or start it again on its store."""
        self.secondary = await self._stack.enter_async_context(
            start_secondary(
                self.scratch,
                self.targets,
                host=self._host,
                port=self._port,
                options=self._secondary_options,
                within=self._link.secondary.within if self._link else (),
            )
        )

    async def start_proxy(self) -> None:
        """Let the primary reach the secondary through a proxy; before either is started."""
        self.proxy = await self._stack.enter_async_context(start_proxy(f"{self._host}:{self._port}"))

    async def start_primary(self, *, wait: bool = True) -> None:
        """Start it, or start it again on its state."""
        self.primary = await self._stack.enter_async_context(
            start_primary(
                self.scratch,
                self.machine.qmp_path,
                self.proxy.address if self.proxy else self.secondary.address,
                interval_ms=self._interval_ms,
                options=self._primary_options,
                within=self._link.primary.within if self._link else (),
                wait=wait,
            )
        )

    async def go_on(self, controller: Controller) -> None:
        """Send SIGCONT to a controller that was stopped, and start it again if it has been ended meanwhile."""
        controller.process.signal(signal.SIGCONT)
        try:
            # one that answers has shown its guardian as well that it lives, and is not killed for its silence any more
            await controller.wait_until(lambda _: True)
        except AssertionError:
            if controller.process.running:
                raise
        else:
            return
        if controller is self.primary:
            await self.start_primary()
        else:
            await self.start_secondary()

    async def captured_from_now(self, *, timeout: float = 60.0) -> int:
        """Wait for the commit of a checkpoint whose capture began after the call; its number, or a later one's."""
        status = await self.primary.status()
        # the next one may be under way already
        least = int(status["checkpoint"]["captured"] or 0) + 2
        return committed(await self.primary.wait_until(lambda now: committed(now) >= least, timeout=timeout))

    async def put_aside(self) -> dict[str, Path]:
        """Pause the VM; copies of its disks, which every checkpoint holds from now on."""
        # A stop that comes inside the primary's own pause cannot be seen by it (QEMU has no event for it), and it
        # resumes the VM, before the next checkpoint; one that comes at any other time holds.
        for _ in range(20):
            await self.machine.pause()
            least = await self.captured_from_now()
            if await self.machine.stays_paused():
                break
        else:
            raise AssertionError("each pause came inside one of the primary's")
        images = await self.copies()
        assert await self.machine.stays_paused()
        assert committed(await self.primary.status()) >= least
        return images

    async def copies(self) -> dict[str, Path]:
        """Copy the disks as they are now, which nobody writes to."""
        for disk in self.machine.disks:
            await disk.copy_to(self.aside(disk))
        return {disk.name: self.aside(disk) for disk in self.machine.disks}

    def aside(self, disk: Disk) -> Path:
        """Where :meth:`put_aside` puts the disk's copy."""
        return self.scratch / f"{disk.name}.aside"

    async def crash(self) -> int:
        """SIGKILL to QEMU and the primary at once, as when their host dies; the last checkpoint known as committed."""
        last = committed(await self.secondary.status())
        self.machine.process.kill()
        self.primary.process.kill()
        await self.machine.process.wait()
        await self.primary.process.wait()
        await self.secondary.wait_until(lambda status: status["connection"] != "connected")
        return last

    async def fail_over(self) -> dict[str, Any]:
        """Run the command; its answer."""
        done = await qemu_remus("failover", "--control", str(self.secondary.control), "--json", scratch=self.scratch)
        answer: dict[str, Any] = json.loads(done.check().out)
        assert {disk["name"]: Path(disk["target"]) for disk in answer["disks"]} == self.targets
        return answer

    async def see_equal(self, images: dict[str, Path]) -> None:
        """Compare the secondary's images with others, whole, lengths and all."""
        differences = {name: await first_difference(path, self.targets[name]) for name, path in images.items()}
        assert differences == dict.fromkeys(images)

    async def see_exact_after_crash(self) -> None:
        """Pause, put the disks aside, crash, fail over, compare."""
        images = await self.put_aside()
        last = await self.crash()
        assert (await self.fail_over())["checkpoint"] >= last
        await self.see_equal(images)

    async def tracked(self) -> int:
        """Bytes that are dirty in the bitmaps which record now, at their granularity, as QEMU counts them."""
        nodes = await self.machine.qmp.execute("query-named-block-nodes", {"flat": True})
        bitmaps = [bitmap for node in nodes for bitmap in node.get("dirty-bitmaps", ()) if bitmap["recording"]]
        assert bitmaps
        assert all(bitmap["name"].startswith("qemu-remus.") for bitmap in bitmaps)
        return sum(bitmap["count"] for bitmap in bitmaps)

    async def begin_transfer(self, disk: str, size: int) -> None:
        """Have an epoch under way, and stuck, with so many bytes at the disk's start; filter and export are in place.

        Needs the proxy.
        """
        assert self.proxy
        # slow and not yet silent, so that it is not an epoch of nothing that gets stuck
        self.proxy.bytes_per_second = MIB
        with trio.fail_after(60):
            while True:
                await self.machine.qemu_io(disk, f"write -P 0x33 0 {size}")
                # what the sockets' buffers take at once may be all of an epoch, which is then not seen
                with trio.move_on_after(1):
                    await self.transferring()
                    break
        self.proxy.freeze()

    async def transferring(self) -> None:
        """Wait until an epoch is being read out of QEMU."""
        with trio.fail_after(30):
            while not await self.machine.qmp.execute("query-block-exports"):
                assert self.primary.process.running, self.primary.process.tail()
                await trio.sleep(0.02)

    async def left_alone(self, *, timeout: float = 30.0) -> None:
        """Wait until nothing of ours stands between the guest and its disks, and one bitmap per disk is left."""
        seen: object = None
        with trio.move_on_after(timeout):
            while True:
                nodes = await self.machine.qmp.execute("query-named-block-nodes", {"flat": True})
                seen = [
                    *(
                        entry["node-name"]
                        for entry in nodes
                        if entry["drv"] in {"copy-before-write", "snapshot-access"}
                    ),
                    *(entry["id"] for entry in await self.machine.qmp.execute("query-block-exports")),
                    *(bitmap["name"] for entry in nodes for bitmap in entry.get("dirty-bitmaps", ())),
                ]
                if len(seen) == len(self.machine.disks):
                    return
                await trio.sleep(0.02)
        raise AssertionError(f"not within {timeout:g} s; there is still {seen}\n{self.primary.process.tail()}")

    def end_transfer(self) -> None:
        """Undo what :meth:`begin_transfer` did to the proxy."""
        assert self.proxy
        self.proxy.bytes_per_second = math.inf
        self.proxy.mend()

    async def lost(self, *, timeout: float = 60.0) -> Status:
        """Wait until the primary says that the VM is not protected any more, and why."""
        # On its way there it may be seen to begin a resync.
        status = await self.primary.wait_until(lambda now: now["replication"] == "degraded", timeout=timeout)
        assert status["reason"]
        return status

    async def aclose(self) -> None:
        """End the controllers."""
        await self._stack.aclose()


@asynccontextmanager
async def pair_of(
    scratch: Path,
    disks: Sequence[Disk],
    *,
    interval_ms: int = 100,
    guest: GuestImage | None = None,
    link: Link | None = None,
    proxied: bool = False,
    heartbeat: float | None = None,
    primary_options: Sequence[str] = (),
    secondary_options: Sequence[str] = (),
    targets: Path | None = None,
    extra: Sequence[str] = (),
) -> AsyncIterator[Pair]:
    """Run the VM and its controllers, the primary not yet.

    :param link: hosts for them: the VM and the primary's controller run on the one, the secondary's on the other.
    :param proxied: let the primary connect through a :class:`integration.proxy.Proxy`.
    :param heartbeat: seconds, for both.
    :param targets: directory of the copy's images, by default ``scratch``.
    :param extra: more of QEMU's arguments.
    """
    within = link.primary.within if link else ()
    memory_mb = 192 if guest else 32
    async with start_machine(scratch, disks, guest=guest, memory_mb=memory_mb, extra=extra, within=within) as machine:
        pair = Pair(
            scratch,
            machine,
            interval_ms=interval_ms,
            link=link,
            heartbeat=heartbeat,
            primary_options=primary_options,
            secondary_options=secondary_options,
            targets=targets,
        )
        try:
            if proxied:
                await pair.start_proxy()
            await pair.start_secondary()
            yield pair
        finally:
            # not in a scope of its own: the proxy's nursery is older than that would be, and processes end shielded
            await pair.aclose()


def image(directory: Path, name: str, size: int, **options: Any) -> Disk:
    return Disk(name, make_image(directory / f"{name}.img", size), **options)


async def fill(machine: Machine) -> None:
    """The start, the middle and the end of every disk; the ends not in whole clusters."""
    for index, disk in enumerate(machine.disks):
        size = disk.size
        for command in (
            f"write -P {0x11 + index} 0 64k",
            f"write -P {0x22 + index} 1M 3M",
            f"write -P {0x33 + index} {size - 64 * KIB} 64k",
        ):
            await machine.qemu_io(disk.name, command)


async def scribble(machine: Machine, seed: int) -> None:
    """Whole and partial overwrites on either side and next to each other, zeroes and discards, on every disk."""
    for index, disk in enumerate(machine.disks):
        size = disk.size
        base = (seed * 7 + index * 3) % 40 * 128 * KIB
        for command in (
            f"write -P {seed % 255 + 1} {base} 64k",
            f"write -P {seed % 251 + 2} {base} 512",
            f"write -P {seed % 241 + 3} {base + 64 * KIB - 1536} 1536",
            f"write -P {seed % 239 + 4} {base + 64 * KIB} 4k",
            f"write -P {seed % 233 + 5} {base + 20 * KIB + 512} 1k",
            f"write -z {base + 8 * KIB} 12k",
            f"discard {(base + 3 * MIB) % (6 * MIB)} 128k",
            f"write -z {size - 512 * (seed % 90 + 2)} 512",
            f"write -P {seed % 229 + 6} {size - 512} 512",
        ):
            await machine.qemu_io(disk.name, command)


class Scribbler:
    """Scribbles in the background, through captures and transfers, until it is told to end; an error ends the test.

    :ivar rounds: begun so far.
    :ivar longest: seconds of the longest round of some ten writes, as the host sees it.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._ending = False
        self._ended = trio.Event()
        self._turned = trio.Event()
        self.rounds = 0
        self.longest = 0.0

    async def run(self) -> None:
        """To be started in a nursery."""
        while not self._ending:
            began = trio.current_time()
            self.rounds += 1
            await scribble(self._machine, self.rounds)
            self.longest = max(self.longest, trio.current_time() - began)
            self._turned.set()
            self._turned = trio.Event()
        self._ended.set()

    async def go_on(self, rounds: int = 3, *, timeout: float = 60.0) -> None:
        """Wait until so many more rounds were begun and ended: its writes are served."""
        with trio.fail_after(timeout):
            for _ in range(rounds + 1):
                await self._turned.wait()

    async def end(self) -> None:
        """Returns when its last write is done."""
        self._ending = True
        await self._ended.wait()
        assert self.rounds > 3


__all__ = [
    "KIB",
    "MIB",
    "Pair",
    "Scribbler",
    "fill",
    "image",
    "pair_of",
    "scribble",
]
