"""The doctor before real QEMUs with everything in them at once, and before sockets that are no QEMU's; it only asks.

No guest: nothing here needs one.
"""

from __future__ import annotations

import json
import os
import pwd
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from integration.controller import free_port, qemu_remus, start_primary, start_secondary
from integration.machine import Disk, Interface, Machine, Style, start_machine
from integration.process import Finished, background, run
from qemu_remus.qemu.capabilities import query_capabilities
from qemu_remus.qemu.client import open_qmp

MIB = 1 << 20
YES, NO, UNREACHABLE = 0, 3, 5
"""docs/cli.md"""

Json = dict[str, Any]


def image(directory: Path, name: str) -> Path:
    path = directory / f"{name}.img"
    with path.open("wb") as file:
        file.truncate(4 * MIB)
    return path


async def zoo(scratch: Path) -> tuple[list[Disk], list[str]]:
    """Disks of many kinds and the arguments for what :class:`Disk` does not describe."""
    overlay = scratch / "overlay.qcow2"
    base = str(image(scratch, "base"))
    for command in (
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", str(overlay)],
        ["qemu-img", "bitmap", "--add", str(overlay), "nightly"],
    ):
        (await run(command, scratch=scratch)).check()
    disks = [
        Disk("ide0", image(scratch, "ide0"), Interface.IDE, Style.IMPLICIT),
        Disk("vd0", image(scratch, "vd0")),
        Disk("sd0", image(scratch, "sd0"), Interface.SCSI),
        Disk("nv0", image(scratch, "nv0"), Interface.NVME, Style.DRIVE),
        Disk("ov0", overlay, format="qcow2"),
        Disk("ro0", image(scratch, "ro0"), read_only=True),
    ]
    file = {"driver": "file", "filename": str(image(scratch, "slow")), "node-name": "slow-file"}
    raw = {"driver": "raw", "node-name": "slow-raw", "file": file}
    throttle = {"driver": "throttle", "node-name": "slow", "throttle-group": "limits", "file": raw}
    return disks, [
        *("-drive", "if=none,id=cd0,media=cdrom", "-device", "ide-cd,drive=cd0,id=cdrom0,bus=ide.1"),
        *("-object", "throttle-group,id=limits,x-iops-total=1000"),
        *("-blockdev", json.dumps(throttle), "-device", "virtio-blk-pci,drive=slow,id=slow0"),
    ]


@asynccontextmanager
async def machine_with(scratch: Path, disks: list[Disk], *extra: str) -> AsyncIterator[Machine]:
    async with start_machine(scratch, disks, accelerator="tcg", memory_mb=64, extra=extra) as machine:
        yield machine


async def ask(scratch: Path, qmp: Path, *options: str) -> tuple[int, Json]:
    """The doctor's answer as JSON, with its exit code."""
    places = ("--state-dir", str(scratch / "state"), "--control", str(scratch / "control"))
    done = await qemu_remus("probe", "--qmp", str(qmp), "--json", *places, *options, scratch=scratch)
    assert done.err == ""
    return done.status, json.loads(done.out)


async def tell(scratch: Path, qmp: Path, *options: str) -> Finished:
    return await qemu_remus("probe", "--qmp", str(qmp), *options, scratch=scratch)


def about(report: Json, subject: str) -> list[tuple[str, str]]:
    return [(one["level"], one["text"]) for one in report["findings"] if one["subject"] == subject]


def nodes(graph: Json | None) -> list[str]:
    if graph is None:
        return []
    return [graph["node"], *(name for child in graph["children"] for name in nodes(child))]


@asynccontextmanager
async def recording(scratch: Path, qmp: Path) -> AsyncIterator[tuple[Path, list[Json]]]:
    """A way to a QMP socket that records the commands that pass."""
    path, seen = scratch / "recorded", list[Json]()

    async def pass_on(source: trio.SocketStream, sink: trio.SocketStream, *, record: bool) -> None:
        pending = b""
        # whoever closes may leave an event unread
        with suppress(trio.BrokenResourceError):
            async for data in source:
                if record:
                    *lines, pending = (pending + data).split(b"\n")
                    seen.extend(json.loads(line) for line in lines)
                await sink.send_all(data)
            await sink.send_eof()

    async def serve(client: trio.SocketStream) -> None:
        async with client, await trio.open_unix_socket(str(qmp)) as server, trio.open_nursery() as nursery:
            nursery.start_soon(lambda: pass_on(server, client, record=False))
            await pass_on(client, server, record=True)
            nursery.cancel_scope.cancel()

    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        await listener.bind(str(path))
        listener.listen(4)
        async with background() as nursery:
            nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])
            yield path, seen


async def everything(machine: Machine) -> Json:
    """All of the block layer."""
    names = ("query-block", "query-block-exports", "query-jobs")
    found: Json = {name: await machine.qmp.execute(name) for name in names}
    found["nodes"] = await machine.qmp.execute("query-named-block-nodes", {"flat": True})
    for node in [*found["nodes"], *(entry.get("inserted", {}) for entry in found["query-block"])]:
        node.pop("cache", None)  # the firmware turns a virtio disk's write cache on while it boots
    return found


async def test_the_whole_zoo_is_shown_with_its_graphs_and_nothing_but_queries_is_sent(scratch: Path) -> None:
    disks, extra = await zoo(scratch)
    async with machine_with(scratch, disks, *extra) as machine:
        await machine.qmp.execute("block-dirty-bitmap-add", {"node": "vd0-node", "name": "libvirt-backup"})
        before = await everything(machine)
        async with recording(scratch, machine.qmp_path) as (path, sent):
            code, report = await ask(scratch, path)
        assert await everything(machine) == before
        text = (await tell(scratch, machine.qmp_path)).out
    assert code == YES
    assert report["ok"] is True

    found = {disk["name"]: disk for disk in report["disks"]}
    assert {name for name, disk in found.items() if disk["way"] is not None} == {
        *("ide0", "vd0", "sd0", "nv0", "ov0", "slow0")
    }
    assert nodes(found["ov0"]["graph"])[:2] == ["ov0-node", "ov0-file"]
    assert len(nodes(found["ov0"]["graph"])) == 4
    assert nodes(found["slow0"]["graph"]) == ["slow", "slow-raw", "slow-file"]
    assert found["slow0"]["graph"]["filter"] is True
    assert nodes(found["cdrom0"]["graph"]) == []
    (bitmap,) = found["vd0"]["graph"]["bitmaps"]
    assert (bitmap["name"], bitmap["ours"], bitmap["recording"]) == ("libvirt-backup", False, True)
    assert found["ov0"]["graph"]["bitmaps"][0]["persistent"] is True
    assert {disk["device"] for disk in report["disks"]} == {"ide-hd", "ide-cd", "virtio-blk-device", "scsi-hd", "nvme"}
    # No device is shown as another user of its own disk.
    assert not [user for disk in report["disks"] if disk["graph"] for user in disk["graph"]["users"]]

    for word in ("└─ vd0-file", "├─ bitmap libvirt-backup", "throttle, filter", "CD-ROM", "read-only", "backing: "):
        assert word in text
    assert text.startswith("YES: vm can be protected, with 6 disks")
    assert not [line for line in text.splitlines() if len(line) > 100 + len(str(scratch))]

    names = {command["execute"] for command in sent}
    assert len(names) > 10
    assert not [name for name in names if not name.startswith(("query-", "x-debug-query-", "qom-get", "qom-list"))
                and name != "qmp_capabilities"]  # fmt: skip
    assert not (scratch / "state").exists()


async def test_what_stops_the_primary_is_a_no_and_names_the_disk(scratch: Path) -> None:
    disks = [Disk("vd0", image(scratch, "vd0")), Disk("io0", image(scratch, "io0"), iothread=True)]
    async with machine_with(scratch, disks) as machine:
        async with open_qmp(machine.qmp_path) as client:
            old = not (await query_capabilities(client)).pull_safe_in_iothread
        code, report = await ask(scratch, machine.qmp_path)
        chosen = await ask(scratch, machine.qmp_path, "--disk", "data=vd0-node")
        absent = await ask(scratch, machine.qmp_path, "--disk", "data=gone")
        # It must say what the primary then does.
        async with start_primary(
            scratch, machine.qmp_path, f"127.0.0.1:{free_port()}", nodes={"data": "gone"}, wait=False
        ) as primary:
            refused = await primary.process.wait()
    if not report["ok"]:
        # Pull is the only way, and not safe there.
        assert old
        assert about(report, "disk io0")[0][0] == "no"
    assert code == (YES if report["ok"] else NO)
    assert chosen[0] == YES
    assert [disk["way"] is not None for disk in chosen[1]["disks"]] == [True, False]
    assert absent[0] == NO
    assert refused != 0
    assert "gone" in about(absent[1], "disks")[0][1]


async def test_a_second_writer_on_a_disks_node_is_a_no(scratch: Path) -> None:
    device = "virtio-blk-pci,drive=both,share-rw=on,id="
    file = {"driver": "file", "filename": str(image(scratch, "both"))}
    extra = ["-blockdev", json.dumps({"driver": "raw", "node-name": "both", "file": file})]
    extra += ["-device", device + "one", "-device", device + "two"]
    async with machine_with(scratch, [], *extra) as machine:
        code, report = await ask(scratch, machine.qmp_path)
    assert code == NO
    for name in ("one", "two"):
        assert [level for level, text in about(report, f"disk {name}") if "may write" in text] == ["no"]


async def test_two_chains_on_one_image_are_found_like_xens_doubles(scratch: Path) -> None:
    path = image(scratch, "one")
    extra = []
    for number in (1, 2):
        file = {"driver": "file", "filename": str(path), "locking": "off"}
        node = {"driver": "raw", "node-name": f"n{number}", "file": file}
        extra += ["-blockdev", json.dumps(node), "-device", f"virtio-blk-pci,drive=n{number},id=d{number},share-rw=on"]
    async with machine_with(scratch, [], *extra) as machine:
        _, report = await ask(scratch, machine.qmp_path)
    assert [level for level, text in about(report, "disk d2") if "same image as d1" in text] == ["warn"]


async def test_a_disk_in_a_format_that_may_end_qemu_is_warned_of(scratch: Path) -> None:
    path = scratch / "d.qed"
    (await run(["qemu-img", "create", "-q", "-f", "qed", str(path), "4M"], scratch=scratch)).check()
    async with machine_with(scratch, [Disk("old", path, format="qed"), Disk("vd0", image(scratch, "vd0"))]) as machine:
        code, report = await ask(scratch, machine.qmp_path)
    assert code == YES
    assert [
        text for level, text in about(report, "disk old") if level == "warn" and f"{path} is of the format qed" in text
    ]
    assert not [text for level, text in about(report, "disk vd0") if level == "warn"]


async def test_storage_that_is_not_of_qemus_block_layer_is_said_to_be_left_out(scratch: Path) -> None:
    backend = f"memory-backend-file,id=memory,mem-path={image(scratch, 'memory')},size=4M,share=on"
    extra = ["-m", "64M,slots=1,maxmem=1G", "-object", backend, "-device", "virtio-pmem-pci,memdev=memory,id=fast"]
    extra += ["-fsdev", f"local,id=files,path={scratch},security_model=none"]
    extra += ["-device", "virtio-9p-pci,fsdev=files,mount_tag=files"]
    async with machine_with(scratch, [Disk("vd0", image(scratch, "vd0"))], *extra) as machine:
        code, report = await ask(scratch, machine.qmp_path)
    assert code == YES
    warned = [one["text"] for one in report["findings"] if one["level"] == "warn" and "not replicated" in one["text"]]
    assert [text.rpartition(" ")[2] for text in warned] == ["virtio-pmem-pci", "virtio-9p-pci"]
    assert "-pmem-" in about(report, "device fast")[0][1]


async def test_somebody_elses_nbd_server_is_seen_with_exports_and_without(scratch: Path) -> None:
    address = {"type": "unix", "data": {"path": str(scratch / "theirs")}}
    async with machine_with(scratch, [Disk("vd0", image(scratch, "vd0"))]) as machine:
        _, quiet = await ask(scratch, machine.qmp_path)
        await machine.qmp.execute("nbd-server-start", {"addr": address})
        _, started = await ask(scratch, machine.qmp_path)
        await machine.qmp.execute("block-export-add", {"type": "nbd", "id": "theirs", "node-name": "vd0-node"})
        _, exporting = await ask(scratch, machine.qmp_path)
    assert about(quiet, "NBD server") == [("ok", "no export of anybody else's")]
    ((level, text),) = about(started, "NBD server")
    assert level == "warn"
    assert str(scratch / "theirs") in text
    assert "theirs" in about(exporting, "NBD server")[0][1]


def directory_of(scratch: Path, user: str) -> Path:
    """A directory of that user's alone, in one that everybody may pass through."""
    found = pwd.getpwnam(user)
    scratch.chmod(0o711)
    path = scratch / "shared"
    path.mkdir(mode=0o700)
    os.chown(path, found.pw_uid, found.pw_gid)
    return path


async def run_as(scratch: Path, user: str) -> tuple[str, str]:
    """QEMU's option for it, which 10.0 has under another name than 7.2."""
    async with start_machine(scratch, [], name="look", accelerator="tcg", memory_mb=64) as machine:
        new = machine.qmp.greeting["version"]["qemu"]["major"] >= 10
    return ("-run-with", f"user={user}") if new else ("-runas", user)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a QEMU that gives its rights up")
async def test_what_it_says_of_a_qemu_of_another_user_is_what_the_primary_meets(scratch: Path) -> None:
    shared = directory_of(scratch, "nobody")
    disk = Disk("vd0", image(scratch, "vd0"))
    good = ("--fleece-dir", str(shared), "--control", str(shared / "control"))
    async with (
        machine_with(scratch, [disk], *await run_as(scratch, "nobody")) as machine,
        start_secondary(scratch, {"vd0": scratch / "copy"}) as secondary,
    ):
        code, report = await ask(scratch, machine.qmp_path)
        assert code == NO
        assert {one["subject"] for one in report["findings"] if one["level"] == "no"} == {"fleece", "socket"}
        assert all("install -d -o nobody" in one["hint"] for one in report["findings"] if one["level"] == "no")
        async with start_primary(scratch, machine.qmp_path, secondary.address, wait=False) as primary:
            assert await primary.process.wait() != 0
        code, report = await ask(scratch, machine.qmp_path, *good)
        assert code == YES, report["findings"]
        async with start_primary(scratch, machine.qmp_path, secondary.address, options=good, wait=False) as primary:
            primary.control = shared / "control"
            await primary.protected()


async def test_a_secondary_that_answers_is_told_from_what_does_not(scratch: Path) -> None:
    async with (
        machine_with(scratch, [Disk("vd0", image(scratch, "vd0"))]) as machine,
        start_secondary(scratch, {"vd0": scratch / "copy"}) as secondary,
    ):
        code, report = await ask(scratch, machine.qmp_path, "--secondary", secondary.address)
        dead, refused = await ask(scratch, machine.qmp_path, "--secondary", f"127.0.0.1:{free_port()}")
        assert secondary.process.running
    assert code == YES
    assert about(report, "secondary") == [("ok", f"{secondary.address} answers as a secondary of this version")]
    assert dead == NO
    assert about(refused, "secondary")[0][0] == "no"


async def test_a_vm_that_is_being_protected_is_shown_with_what_is_ours(scratch: Path) -> None:
    async with (
        machine_with(scratch, [Disk("vd0", image(scratch, "vd0"))]) as machine,
        start_secondary(scratch, {"vd0": scratch / "copy"}) as secondary,
        start_primary(scratch, machine.qmp_path, secondary.address) as primary,
    ):
        await primary.protected()
        code, report = await ask(scratch, machine.spare_qmp_path)
        await primary.progress()
    assert code == YES
    assert "is in this QEMU already" in about(report, "qemu-remus")[0][1]
    assert about(report, "NBD server") == [("ok", "no export of anybody else's")]


# --- sockets that are no use


async def test_a_socket_that_is_not_there_or_dead_is_one_clear_error(scratch: Path) -> None:
    missing = await tell(scratch, scratch / "nothing")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(scratch / "dead"))
    dead = await tell(scratch, scratch / "dead")
    for done, text in ((missing, "check the path"), (dead, "check that QEMU runs")):
        assert done.status == UNREACHABLE
        assert done.out == ""
        assert text in done.err.lower() or text in done.err
        assert done.err.count("\n") == 1


@pytest.mark.parametrize("words", [b"SSH-2.0-OpenSSH_9.2\r\n", b'{"hello": 1}\r\n', b"(qemu) \r\n"])
async def test_a_socket_that_speaks_no_qmp_is_one_clear_error(scratch: Path, words: bytes) -> None:
    async def greet(stream: trio.SocketStream) -> None:
        await stream.send_all(words)
        async for _ in stream:
            pass

    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        await listener.bind(str(scratch / "odd"))
        listener.listen(4)
        async with background() as nursery:
            nursery.start_soon(trio.serve_listeners, greet, [trio.SocketListener(listener)])
            done = await tell(scratch, scratch / "odd")
    assert done.status == UNREACHABLE
    assert "does not speak QMP" in done.err
    assert done.err.count("\n") == 1


async def test_a_socket_that_somebody_holds_is_said_to_be_held_and_by_whom(scratch: Path) -> None:
    async with (
        machine_with(scratch, [Disk("vd0", image(scratch, "vd0"))]) as machine,
        start_secondary(scratch, {"vd0": scratch / "copy"}) as secondary,
        start_primary(scratch, machine.qmp_path, secondary.address) as primary,
    ):
        await primary.protected()
        done = await tell(scratch, machine.qmp_path)
        holder = primary.process.pid
        await primary.progress()
    assert done.status == UNREACHABLE
    assert done.out == ""
    assert f"process {holder} (" in done.err
    assert "another -qmp unix:PATH,server=on,wait=off" in done.err
