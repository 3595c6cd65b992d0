"""Probe: each lack is said with what to do about it, and only what stops the VM's protection makes it say no."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from qemu_remus.core.model import DiskName, NodeName, QdevPath
from qemu_remus.core.qapi import to_qmp
from qemu_remus.qemu.block_tree import TreeBitmap, TreeNode
from qemu_remus.qemu.capabilities import NEEDED, OPTIONAL, Capabilities, Feature, version_text
from qemu_remus.qemu.client import PeerCredentials
from qemu_remus.qemu.disks import VmDisk, choose_disks
from qemu_remus.qemu.probe import probe
from qemu_remus.qemu.probe_checks import evaluate
from qemu_remus.qemu.probe_host_checks import advised_fleece
from qemu_remus.qemu.probe_model import (
    Confinement,
    DirectoryLook,
    Finding,
    HostLook,
    Intent,
    Level,
    Observations,
    ProbedDisk,
    ProbeReport,
    Way,
    WriteRate,
)
from qemu_remus.qemu.probe_text import plain, render
from tests.fake_qemu import VIRTIO, Device, FakeQemu
from tests.qmp_validation import OLD_AND_NEW

ALL = frozenset(Feature)
DISK = VmDisk(
    DiskName("vda"), "", QdevPath("vda"), NodeName("n"), 10 * 2**30, False, False, "raw", "/img/n", iothread=False
)
GOOD = Observations(
    Capabilities((7, 2, 22), ALL), machine="pc-q35-7.2-machine", status="running", kvm=True, disks=(DISK,)
)


def findings(report: ProbeReport, level: Level) -> list[Finding]:
    return [finding for finding in report.findings if finding.level is level]


@pytest.fixture(params=OLD_AND_NEW)
def fake(request: pytest.FixtureRequest) -> Iterator[FakeQemu]:
    with FakeQemu(request.param) as qemu:
        yield qemu


def test_a_good_vm_is_said_to_be_good() -> None:
    report = evaluate(GOOD)
    assert report.ok
    assert (report.version, report.machine) == ("7.2.22", "pc-q35-7.2")
    assert not findings(report, Level.WARN)
    lines = render(report)
    assert lines[0] == "YES: this VM can be protected, with 1 disk"
    assert "  machine      pc-q35-7.2 under KVM" in lines
    assert "  disk vda: 10.0 GiB, at vda" in lines
    assert "    will be protected, by pull" in lines
    for feature in Feature:
        assert any(feature.path in finding.text for finding in report.findings)


@pytest.mark.parametrize("feature", NEEDED)
def test_every_needed_feature_that_is_missing_is_named(feature: Feature) -> None:
    report = evaluate(replace(GOOD, capabilities=Capabilities((7, 0, 0), ALL - {feature})))
    assert not report.ok
    (finding,) = findings(report, Level.NO)
    assert feature.path in finding.text
    assert "7.1 or later" in finding.hint


@pytest.mark.parametrize("feature", sorted(OPTIONAL, key=str))
def test_a_missing_optional_feature_stops_nothing(feature: Feature) -> None:
    report = evaluate(replace(GOOD, capabilities=Capabilities((7, 1, 0), ALL - {feature})))
    assert report.ok
    assert any("absent" in finding.text for finding in report.findings)


def test_a_qemu_that_hides_what_is_below_a_filter_is_warned_of() -> None:
    capabilities = Capabilities((7, 1, 0), ALL - {Feature.BLOCK_GRAPH, Feature.NODE_CHILDREN})
    (finding,) = findings(evaluate(replace(GOOD, capabilities=capabilities)), Level.WARN)
    assert "below a filter" in finding.text


@pytest.mark.parametrize(
    ("disk", "ok", "what"),
    [
        (replace(DISK, removable=True, cdrom=True), True, "CD-ROM"),
        (replace(DISK, read_only=True), True, "read-only"),
        (replace(DISK, node=NodeName(""), size=0), True, "no medium"),
        (replace(DISK, node=NodeName("")), False, "no name"),
    ],
)
def test_a_disk_that_cannot_be_protected_says_why_and_what_to_do(disk: VmDisk, ok: bool, what: str) -> None:
    report = evaluate(replace(GOOD, disks=(DISK, replace(disk, name=DiskName("x")))))
    assert report.ok is ok
    assert [entry.protectable for entry in report.disks] == [True, False]
    assert what in report.disks[1].why
    assert report.disks[1].hint
    (finding,) = [finding for finding in report.findings if finding.subject == "disk x"]
    assert finding.level is (Level.WARN if ok else Level.NO)
    assert finding.hint.startswith(report.disks[1].hint)
    assert any(line.strip().startswith("-> ") for line in render(report))


@pytest.mark.parametrize("iothread", [True, None])
def test_a_disk_that_may_not_be_exported_is_read_by_push_where_there_is_one(iothread: bool | None) -> None:
    seen = replace(GOOD, disks=(replace(DISK, iothread=iothread),))
    report = evaluate(seen)
    assert report.ok
    assert any("will be protected, by push" in finding.text for finding in report.findings)
    assert report.disks[0].way is Way.PUSH
    without = Capabilities(seen.capabilities.version, ALL - {Feature.BITMAP_FILE})
    report = evaluate(replace(seen, capabilities=without))
    assert not report.ok
    assert "iothread" in report.disks[0].why


def test_no_disk_to_protect_is_a_no() -> None:
    report = evaluate(replace(GOOD, disks=(replace(DISK, read_only=True),)))
    assert not report.ok
    assert [finding.subject for finding in findings(report, Level.NO)] == ["disks"]


def test_an_iothread_under_tcg_is_warned_of_where_stop_and_cont_hang_it() -> None:
    seen = replace(GOOD, capabilities=Capabilities((10, 0, 0), ALL), disks=(replace(DISK, iothread=True),))
    assert not findings(evaluate(seen), Level.WARN)
    (finding,) = findings(evaluate(replace(seen, kvm=False)), Level.WARN)
    assert "hang" in finding.text


def test_two_disks_on_one_image_are_warned_of() -> None:
    twin = replace(DISK, name=DiskName("xvda"), node=NodeName("other"))
    (finding,) = findings(evaluate(replace(GOOD, disks=(DISK, twin))), Level.WARN)
    assert "same image as vda" in finding.text


def test_others_at_work_are_shown() -> None:
    seen = replace(
        GOOD,
        exports=[{"id": "libvirt-export", "type": "nbd", "node-name": "n"}],
        jobs=[{"id": "libvirt-mirror", "type": "mirror", "status": "running"}],
        status="paused",
    )
    report = evaluate(seen)
    assert report.ok
    assert [finding.subject for finding in findings(report, Level.WARN)] == ["VM", "NBD server", "job libvirt-mirror"]
    without = replace(seen, capabilities=Capabilities(seen.capabilities.version, ALL - {Feature.BACKUP_CHUNK}))
    assert [finding.subject for finding in findings(evaluate(without), Level.NO)] == ["NBD server"]


def test_our_own_left_overs_are_shown_with_the_way_to_be_rid_of_them() -> None:
    bitmap = "qemu-remus.p.00000000000000000000000000000abc.none.1"
    seen = replace(
        GOOD, nodes=[{"node-name": "qemu-remus-01234567-f0123000001"}, {"dirty-bitmaps": [{"name": bitmap}]}]
    )
    report = evaluate(seen)
    assert report.ok
    (finding,) = findings(report, Level.WARN)
    assert "qemu-remus-01234567-f0123000001" in finding.text
    assert "detach" in finding.hint
    assert any(bitmap in finding.text for finding in findings(report, Level.OK))


async def test_probing_a_qemu_asks_and_changes_nothing(fake: FakeQemu) -> None:
    fake.add_disk("disk1", VIRTIO.format("vda"))
    fake.devices["cd"] = Device("cd", "ide1-cd0", None, removable=True, tray=True)
    async with fake.connect() as client:
        report = await probe(client, sample=0)
    assert report.ok
    assert [(disk.name, disk.protectable) for disk in report.disks] == [("vda", True), ("cd", False)]
    assert fake.commands() == ["qmp_capabilities"]


@pytest.mark.parametrize(
    "query", ["qom-get", "query-kvm", "query-accelerators", "query-jobs", "query-block-exports", "qom-list"]
)
async def test_a_query_that_qemu_refuses_does_not_spoil_the_report(fake: FakeQemu, query: str) -> None:
    fake.add_disk("disk1", VIRTIO.format("vda"))
    fake.refuse(query, "no such thing", times=100)
    async with fake.connect() as client:
        report = await probe(client, sample=0)
    assert report.version == version_text(fake.version)
    assert len(report.disks) == 1


async def test_a_foreign_export_is_seen(fake: FakeQemu, tmp_path: Path) -> None:
    fake.add_disk("disk1", VIRTIO.format("vda"))
    fake.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}})
    fake.execute("block-export-add", {"type": "nbd", "id": "theirs", "node-name": "disk1"})
    async with fake.connect() as client:
        report = await probe(client, sample=0)
    (finding,) = [finding for finding in report.findings if finding.subject == "NBD server"]
    assert "theirs), and a QEMU process has only one" in finding.text
    push = fake.has(Feature.BACKUP_CHUNK.path)
    assert report.ok is push
    assert ("all disks are read by push" in finding.text) is push
    assert finding.level is (Level.WARN if push else Level.NO)
    assert report.disks[0].way is (Way.PUSH if push else None) or not push


def test_the_report_is_json() -> None:
    report = to_qmp(evaluate(GOOD))
    assert report["ok"] is True
    assert report["disks"][0]["protectable"] is True
    assert {finding["level"] for finding in report["findings"]} == {"ok"}


# --- what primary would do


def test_the_report_says_what_primary_would_do_because_it_asks_the_same_function() -> None:
    other = replace(DISK, name=DiskName("vdb"), node=NodeName("b"), qdev=QdevPath("vdb"), filename="/img/b")
    seen = replace(GOOD, disks=(DISK, other), intent=Intent({DiskName("data"): NodeName("b")}))
    report = evaluate(seen)
    assert report.ok
    assert [disk.way for disk in report.disks] == [None, Way.PULL]
    assert "not asked for" in report.about(report.disks[0])[0].text
    assert len(choose_disks(seen.disks, seen.intent.disks, seen.capabilities)) == 1


def test_a_disk_that_is_asked_for_and_is_not_there_is_a_no() -> None:
    report = evaluate(replace(GOOD, intent=Intent({DiskName("data"): NodeName("gone")})))
    assert not report.ok
    (finding,) = findings(report, Level.NO)
    assert "gone" in finding.text
    assert render(report)[0].startswith("NO: this VM cannot be protected as it is, for one reason")


def test_a_disk_that_nobody_asked_for_is_in_nobodys_way() -> None:
    bad = replace(DISK, name=DiskName("x"), node=NodeName(""), qdev=QdevPath("x"), filename="/img/x")
    seen = replace(GOOD, disks=(DISK, bad))
    assert not evaluate(seen).ok
    report = evaluate(replace(seen, intent=Intent({DiskName("data"): NodeName("n")})))
    assert report.ok
    assert not report.disks[1].protectable


# --- the block graph


def tree(**changes: Any) -> TreeNode:
    good = TreeNode("", NodeName("n"), "raw", "/img/n", 10 * 2**30, None, False, False, False, False, (), (), (), ())
    return replace(good, **changes)


def graph_report(graph: TreeNode, **changes: Any) -> ProbeReport:
    return evaluate(replace(GOOD, trees={DISK.name: graph}, **changes))


def test_somebody_else_who_writes_to_the_disk_is_in_the_way_and_a_reader_is_not() -> None:
    assert graph_report(tree(users=("export-7",))).ok
    report = graph_report(tree(users=("vdb",), writers=("vdb",)))
    assert "vdb may write" in findings(report, Level.NO)[0].text


def test_a_controller_at_work_is_not_taken_for_somebody_else() -> None:
    ours = "qemu-remus-01234567-f0123000001"
    assert graph_report(tree(users=(ours,), writers=(ours,))).ok


@pytest.mark.parametrize(
    ("graph", "what"),
    [
        (tree(driver="mirror_top", filter=True), "a job is at work"),
        (tree(corrupt=True), "corrupt"),
        (tree(driver="qed"), "format qed"),
        (tree(driver="throttle", filter=True, children=(tree(edge="file", driver="qed"),)), "format qed"),
        (tree(bitmaps=(TreeBitmap("nightly", 65536, 0, False, persistent=True, inconsistent=True),)), "inconsistent"),
    ],
)
def test_what_should_be_known_about_a_graph_is_told_with_the_next_step(graph: TreeNode, what: str) -> None:
    report = graph_report(graph)
    assert report.ok
    (finding,) = findings(report, Level.WARN)
    assert what in finding.text
    assert finding.hint


def test_what_a_guest_keeps_outside_of_qemus_disks_is_told() -> None:
    peripherals = {
        "vda": "virtio-blk-pci",
        "hba": "virtio-scsi-pci",
        "net0": "vhost-user-net-pci",
        "fast": "vhost-user-blk-pci",
        "mem": "nvdimm",
        "share": "virtio-9p-pci",
    }
    report = evaluate(replace(GOOD, peripherals=peripherals))
    assert report.ok
    found = findings(report, Level.WARN)
    assert [finding.subject for finding in found] == ["device fast", "device mem", "device share"]
    assert all("not replicated" in finding.text and finding.hint for finding in found)
    assert "vhost-user-blk-pci" in "\n".join(render(report))


def test_a_qed_image_that_is_only_read_is_not_warned_of() -> None:
    base = tree(edge="backing", driver="qed", read_only=True)
    assert not findings(graph_report(tree(driver="qcow2", children=(base,))), Level.WARN)


def test_bitmaps_of_others_are_said_to_be_left_alone_and_ours_are_not_taken_for_theirs() -> None:
    ours = TreeBitmap("qemu-remus.p.00000000000000000000000000000abc.none.1", 4096, 0, True)
    kept = TreeBitmap("kept", 4096, 0, False, persistent=True)
    report = graph_report(tree(bitmaps=(ours, kept, TreeBitmap("theirs", 4096, 0, False))))
    texts = [finding.text for finding in report.about(report.disks[0])][1:]
    assert [text.split()[1] for text in texts] == ["kept", "theirs"]
    assert "after a failover" in texts[0]
    assert not findings(report, Level.WARN)


@pytest.mark.parametrize("status", ["nospace", "failed"])
def test_an_io_error_of_the_guests_is_told(status: str) -> None:
    (finding,) = findings(evaluate(replace(GOOD, io_status={DISK.name: status})), Level.WARN)
    assert status in finding.text


@pytest.mark.parametrize(
    ("status", "word"), [("paused", "resume"), ("inmigrate", "migration"), ("io-error", "see to that")]
)
def test_a_vm_that_does_not_run_is_told_with_what_helps(status: str, word: str) -> None:
    (finding,) = findings(evaluate(replace(GOOD, status=status)), Level.WARN)
    assert word in finding.hint


# --- Xen

IDE = replace(DISK, name=DiskName("ide0-hd0"), node=NodeName("ide"), qdev=QdevPath("/machine/unattached/device[9]"))
PV = replace(DISK, name=DiskName("xvda"), node=NodeName("xvda-raw"), qdev=QdevPath("/machine/unattached/device[30]"))
XEN = replace(GOOD, capabilities=Capabilities((10, 0, 0), ALL), machine="xenfv-4.2-machine")


def test_the_emulated_double_of_a_xen_disk_is_warned_of_and_the_right_one_named() -> None:
    devices = {IDE.name: "ide-hd", PV.name: "xen-disk"}
    (finding,) = findings(evaluate(replace(XEN, disks=(IDE, PV), devices=devices)), Level.WARN)
    assert "same image as ide0-hd0" in finding.text
    assert "xvda once its PV driver runs" in finding.hint


def test_doubles_are_found_by_the_file_at_the_bottom_also_through_different_chains() -> None:
    raw = tree(children=(tree(edge="file", driver="file", filename="/img/one"),))
    trees = {IDE.name: raw, PV.name: tree(driver="throttle", filename="", children=(raw,))}
    disks = (replace(IDE, filename="json:{}"), replace(PV, filename="x"))
    assert "(/img/one)" in findings(evaluate(replace(GOOD, disks=disks, trees=trees)), Level.WARN)[0].text


def test_a_xen_domain_without_a_pv_disk_in_qemu_is_warned_of() -> None:
    (finding,) = findings(evaluate(replace(XEN, disks=(IDE,), devices={IDE.name: "ide-hd"})), Level.WARN)
    assert finding.subject == "Xen"
    assert "qdisk" in finding.hint


def test_a_disk_that_the_kernel_serves_is_a_no() -> None:
    seen = replace(XEN, disks=(IDE,), host=replace(HOST, xen_domain=3, kernel_disks=("xvdb",)))
    (finding,) = findings(evaluate(seen), Level.NO)
    assert finding.subject == "Xen disk xvdb"
    assert "phy" in finding.text


# --- the host

ROOT, LIBVIRT = PeerCredentials(7, 0, 0), PeerCredentials(7, 64055, 108)
FLEECE = DirectoryLook(Path("/var/lib/x/fleece"), Path("/var/lib"), 100 << 30)
HOST = HostLook(ROOT, "root", 0, fleece=FLEECE, runtime=replace(FLEECE, path=Path("/run/x")), listeners=())


def host_report(host: HostLook, **changes: Any) -> ProbeReport:
    return evaluate(replace(GOOD, host=host, **changes))


def test_a_good_host_is_said_to_be_good() -> None:
    report = host_report(HOST)
    assert not [finding for finding in report.findings if finding.level is not Level.OK]
    assert any("100 GiB are free in /var/lib/x/fleece" in line for line in render(report))


@pytest.mark.parametrize(
    ("host", "subject", "text", "hint"),
    [
        (replace(HOST, qemu=LIBVIRT, user="libvirt-qemu", our_uid=1000), "user", "runs as libvirt-qemu", "as root"),
        (replace(HOST, fleece=replace(FLEECE, writable=False)), "fleece", "may not write", "--fleece-dir"),
        (replace(HOST, fleece=replace(FLEECE, blocked=FLEECE.path)), "fleece", "for this user alone", "install -d -o"),
        (replace(HOST, fleece=replace(FLEECE, blocked=Path("/var"))), "fleece", "cannot use /var;", "--fleece-dir"),
        (replace(HOST, fleece=replace(FLEECE, elsewhere=True)), "fleece", "container", "--fleece-dir"),
        (replace(HOST, runtime=replace(FLEECE, blocked=Path("/run"))), "socket", "NBD server's socket", "--control"),
    ],
)
def test_what_keeps_qemu_from_our_directories_is_a_no_with_what_helps(
    host: HostLook, subject: str, text: str, hint: str
) -> None:
    report = host_report(host)
    (finding,) = findings(report, Level.NO)
    assert finding.subject == subject
    assert text in finding.text
    assert hint in finding.hint
    assert any(line.startswith("X ") for line in render(report))


def test_too_small_a_fleece_is_warned_of_with_what_is_advised() -> None:
    report = host_report(replace(HOST, fleece=replace(FLEECE, free=1 << 20)), writes=WriteRate(2000.0, 2000 * 4096.0))
    (finding,) = findings(report, Level.WARN)
    assert finding.subject == "fleece"
    assert "1.0 MiB are free" in finding.text
    assert "1.3 GiB advised; the guest makes 2000 writes a second" in finding.text


def test_memory_that_suffices_for_the_fleece_is_as_good_as_room_in_the_directory() -> None:
    small = replace(HOST, fleece=replace(FLEECE, free=0))
    report = host_report(replace(small, memory=1 << 30))
    assert not findings(report, Level.WARN)
    assert any("1.0 GiB of memory, then 0 B are free in /var/lib/x/fleece" in line for line in render(report))
    assert findings(host_report(replace(small, memory=300 << 20)), Level.WARN)


def test_the_advised_fleece_is_never_more_than_the_disks_and_never_tiny() -> None:
    small = replace(DISK, size=1 << 20)
    assert advised_fleece([small], WriteRate(1e6, 1e9)) == (1 << 20) + (64 << 10)
    assert advised_fleece([DISK], None) == 256 << 20


@pytest.mark.parametrize(
    ("confinement", "hint"),
    [
        (
            Confinement("AppArmor", "libvirt-0af3 (enforce)"),
            "let profile libvirt-0af3 have '/var/lib/x/fleece/** rwk,'",
        ),
        (Confinement("SELinux", "system_u:system_r:svirt_t:s0:c12,c34"), "-l s0:c12,c34 /var/lib/x/fleece"),
    ],
)
def test_a_security_module_is_warned_of_with_the_rule_to_add(confinement: Confinement, hint: str) -> None:
    report = host_report(replace(HOST, confinement=confinement))
    (finding,) = findings(report, Level.WARN)
    assert finding.subject == confinement.module
    assert hint in finding.hint


def test_a_socket_that_nothing_explains_may_be_a_running_nbd_server() -> None:
    sockets = '[{"filename": "unix:/run/qmp.sock,server=on"}, {"service": "5901"}]'
    ours = "/run/qemu-remus/qemu-remus-nbd-01234567-7.sock"
    known = replace(HOST, listeners=("/run/qmp.sock", "TCP port 5901", ours))
    assert not findings(host_report(known, sockets=sockets), Level.WARN)
    (finding,) = findings(host_report(replace(known, listeners=("TCP port 10809",)), sockets=sockets), Level.WARN)
    assert finding.subject == "NBD server"
    assert "10809" in finding.text


# --- text


def everything() -> ProbeReport:
    """A report in which nearly everything is wrong at once."""
    host = replace(
        HOST,
        qemu=LIBVIRT,
        user="libvirt-qemu",
        our_uid=1000,
        confinement=Confinement("AppArmor", "libvirt-0af3 (enforce)"),
        fleece=replace(FLEECE, writable=False, blocked=Path("/var"), free=0),
        kernel_disks=("xvdb",),
    )
    graph = tree(writers=("vdb",), users=("vdb",), corrupt=True)
    disks = (DISK, replace(IDE, iothread=True), replace(PV, removable=True))
    return evaluate(
        replace(XEN, capabilities=Capabilities((7, 0, 0), frozenset()), disks=disks, host=host, status="paused",
                trees={DISK.name: graph}, devices={DISK.name: "virtio-blk-device"}, io_status={IDE.name: "failed"},
                jobs=[{"id": "j", "type": "mirror", "status": "running"}],
                exports=[{"id": "e", "type": "nbd"}, {"id": "f", "type": "fuse"}])
    )  # fmt: skip


def test_whatever_is_not_good_is_in_the_text_once_with_its_mark_and_its_hint() -> None:
    report = everything()
    text = " ".join(" ".join(render(report)).split())
    for finding in report.findings:
        if finding.level is not Level.OK and finding.subject != "needed":
            assert text.count(finding.text) == 1, finding
            assert finding.hint in text
    marks = [line[:1] for line in render(report)]
    assert marks.count("X") >= len([f for f in findings(report, Level.NO) if f.subject != "needed"])
    assert marks.count("!") == len(findings(report, Level.WARN))


def test_sentences_fit_the_width() -> None:
    assert all(len(line) <= 80 for line in render(everything(), width=80))


def test_a_terminal_without_box_characters_gets_none() -> None:
    graph = tree(children=(tree(edge="file"), tree(edge="backing")))
    for line in render(graph_report(graph)):
        assert plain(line).isascii()


async def test_the_guests_writes_are_counted_while_it_runs(
    fake: FakeQemu, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written_meanwhile() -> dict[str, str]:
        fake.written += 500
        return {"name": "web"}

    monkeypatch.setattr(fake, "_do_query_name", written_meanwhile)
    fake.add_disk("disk1", VIRTIO.format("vda"))
    async with fake.connect() as client:
        report = await probe(client, Intent(fleece_dir=Path("/")), sample=5.0)
    assert report.name == "web"
    (finding,) = [finding for finding in report.findings if finding.subject == "fleece"]
    assert "the guest makes 100 writes a second now" in finding.text


# --- the documented form

PAGE = (Path(__file__).parent.parent / "docs" / "probe.md").read_text(encoding="utf-8")


def test_every_member_of_the_json_is_documented_and_no_other() -> None:
    documented = set(re.findall(r"^\| `([a-z-]+(?:\.[a-z-]+)*)` \|", PAGE, re.M))
    members = set()
    for prefix, kind in (("", ProbeReport), ("findings.", Finding), ("disks.", ProbedDisk),
                         ("disks.graph.", TreeNode), ("disks.graph.bitmaps.", TreeBitmap)):  # fmt: skip
        members |= {prefix + field.name.replace("_", "-") for field in fields(kind)}
    assert documented == members


def test_the_report_round_trips_through_json() -> None:
    report = everything()
    assert json.loads(json.dumps(to_qmp(report)))["disks"][0]["graph"]["node"] == "n"
