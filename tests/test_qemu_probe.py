"""Probe: each lack is said with what to do about it, and only what stops the VM's protection makes it say no."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qemu_remus.core.model import DiskName, NodeName, QdevPath
from qemu_remus.core.qapi import to_qmp
from qemu_remus.qemu.capabilities import NEEDED, OPTIONAL, Capabilities, Feature
from qemu_remus.qemu.disks import VmDisk
from qemu_remus.qemu.probe import Finding, Level, Observations, ProbeReport, evaluate, probe
from tests.fake_qemu import VIRTIO, Device, FakeQemu

ALL = frozenset(Feature)
DISK = VmDisk(
    DiskName("vda"), "", QdevPath("vda"), NodeName("n"), 10 * 2**30, False, False, "raw", "/img/n", iothread=False
)
GOOD = Observations(
    Capabilities((7, 2, 22), ALL), machine="pc-q35-7.2-machine", status="running", kvm=True, disks=(DISK,)
)


def findings(report: ProbeReport, level: Level) -> list[Finding]:
    return [finding for finding in report.findings if finding.level is level]


@pytest.fixture
def fake() -> Iterator[FakeQemu]:
    with FakeQemu() as qemu:
        yield qemu


def test_a_good_vm_is_said_to_be_good() -> None:
    report = evaluate(GOOD)
    assert report.ok
    assert (report.version, report.machine) == ("7.2.22", "pc-q35-7.2")
    assert not findings(report, Level.WARN)
    text = "\n".join(report.lines())
    assert "disk vda: can be protected (node n, device vda, 10 GiB, raw)" in text
    assert "machine: pc-q35-7.2 under KVM" in text
    for feature in Feature:
        assert feature.path in text


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
        (replace(DISK, iothread=True), False, "iothread"),
        (replace(DISK, iothread=None), False, "iothread"),
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
    assert f"     -> {report.disks[1].hint}" in report.lines()


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
    assert not report.ok
    assert [finding.subject for finding in findings(report, Level.NO)] == ["NBD server"]
    assert [finding.subject for finding in findings(report, Level.WARN)] == ["VM", "job libvirt-mirror"]


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


@pytest.mark.parametrize(("size", "text"), [(512, "512 bytes"), (1 << 20, "1 MiB"), (3 << 39, "1.5 TiB")])
def test_sizes_are_shown_for_people(size: int, text: str) -> None:
    assert any(text in line for line in evaluate(replace(GOOD, disks=(replace(DISK, size=size),))).lines())


async def test_probing_a_qemu_asks_and_changes_nothing(fake: FakeQemu) -> None:
    fake.add_disk("disk1", VIRTIO.format("vda"))
    fake.devices["cd"] = Device("cd", "ide1-cd0", None, removable=True, tray=True)
    async with fake.connect() as client:
        report = await probe(client)
    assert report.ok
    assert [(disk.name, disk.protectable) for disk in report.disks] == [("vda", True), ("cd", False)]
    assert fake.commands() == ["qmp_capabilities"]


@pytest.mark.parametrize("query", ["qom-get", "query-kvm", "query-jobs", "query-block-exports", "qom-list"])
async def test_a_query_that_qemu_refuses_does_not_spoil_the_report(fake: FakeQemu, query: str) -> None:
    fake.add_disk("disk1", VIRTIO.format("vda"))
    fake.refuse(query, "no such thing", times=100)
    async with fake.connect() as client:
        report = await probe(client)
    assert report.version == "7.2.22"
    assert len(report.disks) == 1


async def test_a_foreign_export_is_seen(fake: FakeQemu, tmp_path: Path) -> None:
    fake.add_disk("disk1", VIRTIO.format("vda"))
    fake.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}})
    fake.execute("block-export-add", {"type": "nbd", "id": "theirs", "node-name": "disk1"})
    async with fake.connect() as client:
        report = await probe(client)
    assert not report.ok
    assert "theirs" in "\n".join(report.lines())


def test_the_report_is_json() -> None:
    report = to_qmp(evaluate(GOOD))
    assert report["ok"] is True
    assert report["disks"][0]["protectable"] is True
    assert {finding["level"] for finding in report["findings"]} == {"ok"}
