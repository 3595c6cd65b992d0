"""What goes wrong at the command line and on the link ends in one clear error, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from integration.harness import (
    Controller,
    Disk,
    Machine,
    Process,
    Proxy,
    Style,
    background,
    free_port,
    make_image,
    qemu_remus,
    start_machine,
    start_primary,
    start_process,
    start_proxy,
    start_secondary,
)
from integration.process import open_files

SIZE = 4 << 20
BIG = 48 << 20

#: docs/cli.md
USAGE, REFUSED, UNREACHABLE = 2, 4, 5

#: For a link that stands still as long as we want it to.
PATIENT = ("--heartbeat-timeout", "60")

BANNER = b"QEMU-REMUS/1 replication\r\n"


@dataclass(frozen=True, slots=True)
class Seen:
    """What a QEMU has in its block layer.

    :param attached: device and its node.
    :param bitmaps: how many there are on each device's node.
    """

    nodes: frozenset[str]
    attached: tuple[tuple[str, str], ...]
    exports: int
    bitmaps: tuple[int, ...]


async def look(machine: Machine) -> Seen:
    """What the machine's QEMU has now."""
    entries = [entry for entry in await machine.qmp.execute("query-block") if "inserted" in entry]
    nodes = await machine.qmp.execute("query-named-block-nodes", {"flat": True})
    return Seen(
        frozenset(node["node-name"] for node in nodes),
        tuple((entry.get("qdev", entry["device"]), entry["inserted"]["node-name"]) for entry in entries),
        len(await machine.qmp.execute("query-block-exports")),
        tuple(len(entry["inserted"].get("dirty-bitmaps", ())) for entry in entries),
    )


async def assert_untouched(machine: Machine, before: Seen, *directories: Path, bitmaps: int = 0) -> None:
    """The VM runs as it did, with so many bitmaps on each disk and nothing else of ours, in QEMU or on the host."""
    after = await look(machine)
    assert (after.nodes, after.attached, after.exports) == (before.nodes, before.attached, 0)
    assert after.bitmaps == (bitmaps,) * len(before.bitmaps)
    await machine.running()
    # QEMU has one NBD server at most: where it takes a new one, there is none
    address = {"type": "unix", "data": {"path": str(machine.directory / "free")}}
    await machine.qmp.execute("nbd-server-start", {"addr": address})
    await machine.qmp.execute("nbd-server-stop")
    assert [name for name in open_files(machine.pid) if "fleece" in name] == []
    for directory in directories:
        assert left_in(directory) == []


def left_in(directory: Path) -> list[Path]:
    """Sockets and fleece files in a controller's directory."""
    return [path for path in directory.rglob("*") if path.is_socket() or path.suffix == ".fleece"]


def assert_one_error(status: int, text: str, expected: int, *words: str) -> None:
    """A command that failed as documented, and said so once."""
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, text
    assert "Traceback" not in text
    assert "defect" not in text
    assert status == expected, text
    for word in words:
        assert word in errors[0]


async def assert_fails(controller: Controller, expected: int, *words: str, timeout: float = 30.0) -> None:
    """A controller ends by itself, as documented."""
    status = await controller.process.wait(timeout)
    assert_one_error(status, controller.log, expected, *words)


@asynccontextmanager
async def one_disk(scratch: Path, *, size: int = SIZE, data: bytes = b"", name: str = "vm") -> AsyncIterator[Machine]:
    """A machine with one disk, which begins with ``data``."""
    image = make_image(scratch / f"{name}-image", size)
    with image.open("r+b") as file:
        file.write(data)
    async with start_machine(scratch, [Disk("disk0", image)], name=name, accelerator="tcg") as machine:
        yield machine


@asynccontextmanager
async def tcp_server(say: bytes) -> AsyncIterator[str]:
    """A server that says something to whoever connects, and then listens; its address."""

    async def talk(stream: trio.SocketStream) -> None:
        try:
            await stream.send_all(say)
            while await stream.receive_some(65536):
                pass
        except trio.BrokenResourceError:
            pass

    async with background() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, talk, listeners)
        yield f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"


@asynccontextmanager
async def unix_server(path: Path, serve: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[None]:
    """The same at a Unix socket, with what it does given."""
    with trio.socket.socket(trio.socket.AF_UNIX) as listener:
        await listener.bind(str(path))
        listener.listen()
        async with background() as nursery:
            nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])
            yield


async def wait_for_text(controller: Controller, *texts: str) -> None:
    """Wait until the controller has logged all of these."""
    with trio.fail_after(30):
        while missing := [text for text in texts if text not in controller.log]:
            assert controller.process.running, controller.process.tail()
            await trio.sleep(0.05)
    assert not missing


# --- QEMU and its disks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["primary", "probe", "detach"])
async def test_no_such_socket_is_said(scratch: Path, command: str) -> None:
    done = await qemu_remus(*qmp_command(command, scratch / "none", scratch), scratch=scratch)
    assert_one_error(done.status, done.err, UNREACHABLE, str(scratch / "none"))
    assert left_in(scratch) == []


@pytest.mark.parametrize("command", ["primary", "probe", "detach"])
async def test_a_socket_that_talks_something_else_is_said(scratch: Path, command: str) -> None:
    async def mail_server(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(b"220 mail.example.org ESMTP\r\n")
            await stream.receive_some(65536)

    async with unix_server(scratch / "socket", mail_server):
        done = await qemu_remus(*qmp_command(command, scratch / "socket", scratch), scratch=scratch)
    assert_one_error(done.status, done.err, UNREACHABLE, str(scratch / "socket"), "QMP")


async def test_a_qemu_that_lacks_something_is_refused_by_what_it_lacks(scratch: Path) -> None:
    # no such QEMU is at hand: this one offers no command at all
    version = {"qemu": {"major": 5, "minor": 2, "micro": 0}, "package": ""}
    greeting = {"QMP": {"version": version, "capabilities": ["oob"]}}

    async def old_qemu(stream: trio.SocketStream) -> None:
        await stream.send_all(json.dumps(greeting).encode() + b"\r\n")
        buffer = b""
        while data := await stream.receive_some(65536):
            *requests, buffer = (buffer + data).split(b"\n")
            for request in map(json.loads, filter(bytes.strip, requests)):
                value: object = [] if request["execute"] == "query-qmp-schema" else {}
                await stream.send_all(json.dumps({"return": value, "id": request.get("id")}).encode() + b"\r\n")

    async with unix_server(scratch / "socket", old_qemu):
        done = await qemu_remus(*qmp_command("primary", scratch / "socket", scratch), scratch=scratch)
    assert_one_error(done.status, done.err, USAGE, "5.2.0", "snapshot-access")
    assert left_in(scratch / "s") == []


def qmp_command(command: str, qmp: Path, scratch: Path) -> list[str]:
    """The command line of one of the commands that talk to a QEMU."""
    arguments = [command, "--qmp", str(qmp)]
    if command == "primary":
        arguments += ["--peer", "127.0.0.1:9", "--state-dir", str(scratch / "s"), "--control", str(scratch / "c")]
    return arguments


async def test_disks_that_cannot_be_protected_are_refused_by_name(scratch: Path) -> None:
    images = [make_image(scratch / name, SIZE) for name in ("good", "fixed", "cd")]
    disks = [Disk("good", images[0]), Disk("fixed", images[1], style=Style.DRIVE, read_only=True)]
    cd = ["-drive", f"if=none,id=cd,media=cdrom,format=raw,file={images[2]}", "-device", "ide-cd,drive=cd,id=cd"]
    async with start_machine(scratch, disks, accelerator="tcg", extra=cd) as machine:
        before = await look(machine)
        wrong = {
            "no-such-node": ("no-such-node",),
            await machine.node("fixed"): ("disk0", "read-only"),
            await machine.node("cd"): ("disk0", "CD-ROM"),
        }
        for node, words in wrong.items():
            command = qmp_command("primary", machine.qmp_path, scratch)
            done = await qemu_remus(*command, "--disk", f"disk0={node}", scratch=scratch)
            assert_one_error(done.status, done.err, USAGE, *words)
            await assert_untouched(machine, before, scratch / "s")


# --- targets ---------------------------------------------------------------------------------------------------------


def smaller(path: Path) -> str:
    make_image(path, SIZE - 512)
    return str(SIZE - 512)


def larger(path: Path) -> str:
    make_image(path, SIZE + 512)
    return "--overwrite"


def holding_data(path: Path) -> str:
    make_image(path, SIZE)
    with path.open("r+b") as file:
        file.seek(SIZE - 1)
        file.write(b"\x01")
    return "holds data"


@pytest.mark.parametrize("make", [smaller, larger, holding_data])
async def test_unfit_target_is_refused_and_not_changed(scratch: Path, make: Callable[[Path], str]) -> None:
    target = scratch / "copy"
    word = make(target)
    before = target.read_bytes()
    await assert_target_refused(scratch, target, str(target), word)
    assert target.read_bytes() == before


async def test_target_in_use_is_refused_with_its_user(scratch: Path) -> None:
    target = make_image(scratch / "copy", SIZE)
    async with held_by_qemu_io(target, scratch) as holder:
        await assert_target_refused(scratch, target, str(target), f"process {holder.pid} uses")


@asynccontextmanager
async def held_by_qemu_io(path: Path, scratch: Path) -> AsyncIterator[Process]:
    """A process of QEMU's tools with the image open, and thus locked."""
    commands = ["qemu-io", "-f", "raw", "-c", "length", "-c", "sleep 100000", str(path)]
    async with start_process(["stdbuf", "-oL", *commands], out=scratch / "qemu-io") as process:
        with trio.fail_after(20):
            # it answers only when it has the image open
            while "MiB" not in process.out.read_text():
                assert process.running, process.tail()
                await trio.sleep(0.02)
        yield process


async def test_target_on_a_full_file_system_is_refused_and_not_left(scratch: Path) -> None:
    with small_file_system(scratch / "full") as directory:
        await assert_target_refused(scratch, directory / "copy", str(directory / "copy"), "space")
        assert list(directory.iterdir()) == []


@contextmanager
def small_file_system(path: Path) -> Iterator[Path]:
    """A file system that holds less than the disk."""
    if os.geteuid() != 0:
        pytest.skip("a small file system needs root")
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(path)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True, timeout=20)


async def assert_target_refused(scratch: Path, target: Path, *words: str) -> None:
    """The primary ends with the secondary's words; the secondary logs them and serves on."""
    async with one_disk(scratch) as machine, start_secondary(scratch, {"disk0": target}) as secondary:
        before = await look(machine)
        async with start_primary(scratch, machine.qmp_path, secondary.address, wait=False) as primary:
            await assert_fails(primary, REFUSED, *words)
        await assert_untouched(machine, before, scratch / "primary")
        assert secondary.process.running
        assert "Traceback" not in secondary.log
        assert (await secondary.status())["disk"] == "inconsistent"
        assert await secondary.stop() == 0


# --- the link --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "expected", "words"),
    [
        (b"QEMU-REMUS/9 replication\r\n", REFUSED, ("version", "9")),
        (b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n", UNREACHABLE, ("--peer", "SSH-2.0")),
        (BANNER + b"\xff" * 4096, UNREACHABLE, ()),
    ],
    ids=["other-version", "other-protocol", "garbage-after-the-banner"],
)
async def test_a_peer_that_is_no_secondary_ends_the_primary(
    scratch: Path, said: bytes, expected: int, words: tuple[str, ...]
) -> None:
    async with one_disk(scratch) as machine, tcp_server(said) as address:
        before = await look(machine)
        async with start_primary(scratch, machine.qmp_path, address, wait=False) as primary:
            await assert_fails(primary, expected, *words)
        await assert_untouched(machine, before, scratch / "primary")


async def test_garbage_on_its_port_does_not_disturb_a_secondary(scratch: Path) -> None:
    garbage = [b"", b"QEMU-RE", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(100_000), BANNER + b"\xa5" * 100_000]
    async with one_disk(scratch) as machine, start_secondary(scratch, {"disk0": scratch / "copy"}) as secondary:
        host, _, port = secondary.address.rpartition(":")
        for said in garbage:
            stream = await trio.open_tcp_stream(host, int(port))
            async with stream:
                try:
                    await stream.send_all(said)
                    await stream.send_eof()
                    with trio.fail_after(60):
                        while await stream.receive_some(65536):
                            pass
                except trio.BrokenResourceError:
                    pass
        await wait_for_text(secondary, "does not speak the replication protocol", "GET / HTTP/1.1")
        assert "Traceback" not in secondary.log
        async with start_primary(scratch, machine.qmp_path, secondary.address) as primary:
            await primary.protected()
            assert await primary.stop() == 0
        assert await secondary.stop() == 0


async def test_a_second_primary_is_refused_and_the_first_goes_on(scratch: Path) -> None:
    other = scratch / "other"
    other.mkdir()
    async with (
        one_disk(scratch) as machine,
        one_disk(scratch, name="vm2") as machine2,
        start_secondary(scratch, {"disk0": scratch / "copy"}, options=PATIENT) as secondary,
        start_primary(scratch, machine.qmp_path, secondary.address, options=PATIENT) as first,
    ):
        await first.protected()
        before = await look(machine2)
        # one with a state of its own, and one that shares the first one's
        async with start_primary(other, machine2.qmp_path, secondary.address, wait=False) as second:
            await assert_fails(second, REFUSED, "primary")
        await assert_untouched(machine2, before, other)
        state = ["--state-dir", str(first.directory / "state")]
        async with start_primary(other, machine2.qmp_path, secondary.address, wait=False, options=state) as third:
            status = await third.process.wait()
            # the log is that of both
            text = third.log.split("error:", 1)[1].split("\n", 1)[1]
            assert_one_error(status, text, USAGE, str(first.directory / "state"))
        await assert_untouched(machine2, before, other)
        await machine.qemu_io("disk0", "write -P 0x5a 64k 64k")
        status_after = await first.progress()
        assert status_after["epochs"]["lost"] == 0
        assert status_after["replication"] == "protected"


# --- failover --------------------------------------------------------------------------------------------------------


async def test_failover_of_an_inconsistent_secondary_is_refused(scratch: Path) -> None:
    async with start_secondary(scratch, {"disk0": scratch / "copy"}) as secondary:
        done = await qemu_remus("failover", "--control", str(secondary.control), scratch=scratch)
        assert_one_error(done.status, done.err, REFUSED, "checkpoint")
        assert (await secondary.status())["disk"] == "inconsistent"
        assert await secondary.stop() == 0


async def test_failover_under_a_connected_primary_needs_force(scratch: Path) -> None:
    async with one_disk(scratch) as machine, start_secondary(scratch, {"disk0": scratch / "copy"}) as secondary:
        before = await look(machine)
        await machine.qemu_io("disk0", "write -P 0x5a 64k 64k")
        failover = ["failover", "--control", str(secondary.control), "--json"]
        async with start_primary(scratch, machine.qmp_path, secondary.address) as primary:
            await primary.protected()
            done = await qemu_remus(*failover, scratch=scratch)
            assert_one_error(done.status, done.err, REFUSED, "--force")
            await primary.progress()
            done = (await qemu_remus(*failover, "--force", scratch=scratch)).check()
            assert json.loads(done.out)["checkpoint"] >= 1
            copy = await trio.Path(scratch / "copy").read_bytes()
            assert copy[: 192 << 10] == bytes(64 << 10) + b"\x5a" * (64 << 10) + bytes(64 << 10)
            # its checkpoints would go nowhere from now on
            await assert_fails(primary, REFUSED, "failed over")
        await assert_untouched(machine, before, scratch / "primary", bitmaps=1)


# --- signals ---------------------------------------------------------------------------------------------------------


async def assert_stops_cleanly(
    primary: Controller, number: signal.Signals, machine: Machine, before: Seen, bitmaps: int = 1
) -> None:
    """A signal ends the controller as documented, and the VM goes on by itself."""
    primary.process.signal(number)
    assert await primary.process.wait(30) == 0, primary.process.tail()
    assert "Traceback" not in primary.log
    assert not [line for line in primary.log.splitlines() if line.startswith("error:")]
    if bitmaps:
        assert "one tracking bitmap per disk stays in QEMU" in primary.log
    else:
        assert "nothing of ours is left in QEMU" in primary.log
    await assert_untouched(machine, before, primary.directory, bitmaps=bitmaps)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_signal_while_connecting_leaves_nothing(scratch: Path, number: signal.Signals) -> None:
    async with one_disk(scratch) as machine:
        before = await look(machine)
        address = f"127.0.0.1:{free_port()}"
        async with start_primary(scratch, machine.qmp_path, address) as primary:
            await wait_for_text(primary, "no link to the secondary")
            # nothing was ever sent: there is no difference to send later
            await assert_stops_cleanly(primary, number, machine, before, bitmaps=0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_signal_during_the_initial_sync_leaves_one_bitmap(scratch: Path, number: signal.Signals) -> None:
    async with (
        one_disk(scratch, size=BIG, data=b"\x5a" * BIG) as machine,
        start_secondary(scratch, {"disk0": scratch / "copy"}) as secondary,
        start_proxy(secondary.address) as proxy,
    ):
        proxy.bytes_per_second = 2 << 20
        before = await look(machine)
        async with start_primary(scratch, machine.qmp_path, proxy.address) as primary:
            await primary.wait_until(lambda status: bool(status.get("sync") and status["sync"]["done-bytes"]))
            await assert_stops_cleanly(primary, number, machine, before)
        done = await qemu_remus("failover", "--control", str(secondary.control), "--force", scratch=scratch)
        assert_one_error(done.status, done.err, REFUSED)


async def test_signal_in_epochs_leaves_one_bitmap_and_a_restart_sends_the_difference(scratch: Path) -> None:
    async with (
        one_disk(scratch, size=BIG, data=b"\x5a" * BIG) as machine,
        start_secondary(scratch, {"disk0": scratch / "copy"}) as secondary,
        start_proxy(secondary.address) as proxy,
    ):
        before = await look(machine)
        async with start_primary(scratch, machine.qmp_path, proxy.address, interval_ms=100) as primary:
            await primary.protected()
            await machine.qemu_io("disk0", "write -P 0x11 0 8M")
            await assert_stops_cleanly(primary, signal.SIGINT, machine, before)
        await machine.qemu_io("disk0", "write -P 0x22 1M 1M")
        async with start_primary(scratch, machine.qmp_path, proxy.address) as primary:
            status = await primary.protected()
            assert status["bytes-sent"] < BIG // 2
            await in_transfer(machine, primary, proxy)
            await assert_stops_cleanly(primary, signal.SIGTERM, machine, before)
        let_go(proxy)
        # the peer away, and with it the link
        async with start_primary(scratch, machine.qmp_path, proxy.address) as primary:
            await primary.protected()
            proxy.cut()
            await primary.wait_until(lambda status: status["connection"] != "connected")
            await assert_stops_cleanly(primary, signal.SIGTERM, machine, before)


async def in_transfer(machine: Machine, primary: Controller, proxy: Proxy) -> None:
    """Have an epoch of the whole disk under way, its filter and export in place, and stuck there."""
    # slow and not yet frozen, so that it is not an epoch of nothing that gets stuck
    proxy.bytes_per_second = 1 << 20
    await machine.qemu_io("disk0", f"write -P 0x33 0 {BIG}")
    with trio.fail_after(30):
        while not (await look(machine)).exports:
            assert primary.process.running, primary.process.tail()
            await trio.sleep(0.02)
    proxy.freeze()
    status = await primary.status()
    assert status["checkpoint"]["captured"] > status["checkpoint"]["committed"]


def let_go(proxy: Proxy) -> None:
    """Undo what :func:`in_transfer` did to the link."""
    proxy.bytes_per_second = math.inf
    proxy.mend()


async def test_a_stopped_controller_does_not_hang_qemu(scratch: Path) -> None:
    async with (
        one_disk(scratch, size=BIG) as machine,
        start_secondary(scratch, {"disk0": scratch / "copy"}, options=PATIENT) as secondary,
        start_proxy(secondary.address) as proxy,
        # stopped for as long as this takes; what ends it otherwise is integration/test_watchdog.py's
        start_primary(scratch, machine.qmp_path, proxy.address, options=("--watchdog", "600", *PATIENT)) as primary,
    ):
        await primary.protected()
        await in_transfer(machine, primary, proxy)
        primary.process.signal(signal.SIGSTOP)
        # drains every disk, and so waits for what the export has under way
        await machine.qmp.execute("stop")
        await machine.qmp.execute("cont")
        await machine.qemu_io("disk0", "write -P 0x44 0 64k")
        let_go(proxy)
        primary.process.signal(signal.SIGCONT)
        await primary.progress()
        assert await primary.stop() == 0
        await machine.running()


async def test_detach_after_sigkill_leaves_nothing(scratch: Path) -> None:
    async with (
        one_disk(scratch, size=BIG) as machine,
        start_secondary(scratch, {"disk0": scratch / "copy"}, options=PATIENT) as secondary,
        start_proxy(secondary.address) as proxy,
    ):
        before = await look(machine)
        async with start_primary(scratch, machine.qmp_path, proxy.address, options=PATIENT) as primary:
            await primary.protected()
            await in_transfer(machine, primary, proxy)
            # which would take out nearly all; stopped, the controller does not replace it
            primary.process.signal(signal.SIGSTOP)
            os.kill(primary.guardian, signal.SIGKILL)
            await primary.kill()
        # as the controller left it: in the middle of the epoch, with the VM not paused
        left = await look(machine)
        assert left.exports == 1
        assert left.attached != before.attached
        await machine.running()
        done = (await qemu_remus("detach", "--qmp", str(machine.qmp_path), scratch=scratch)).check()
        assert "bitmap" in done.out
        # a socket of the killed controller's own is not QEMU's
        primary.control.unlink(missing_ok=True)
        await assert_untouched(machine, before, primary.directory)
        again = (await qemu_remus("detach", "--qmp", str(machine.qmp_path), scratch=scratch)).check()
        assert "nothing of ours" in again.out
