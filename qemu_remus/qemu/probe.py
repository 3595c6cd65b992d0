"""What a QEMU and its disks allow, line by line, each lack with what to do about it.

:func:`probe` only asks; what the answers mean is decided in :func:`evaluate`, which is pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from qemu_remus.core.errors import CommandFailed
from qemu_remus.core.model import DiskName, NodeName, QdevPath
from qemu_remus.qemu import commands
from qemu_remus.qemu.capabilities import (
    FAULTS,
    NEEDED,
    OPTIONAL,
    Capabilities,
    Fault,
    Feature,
    query_capabilities,
    version_text,
)
from qemu_remus.qemu.client import QmpClient
from qemu_remus.qemu.commands import Command
from qemu_remus.qemu.discover import discover
from qemu_remus.qemu.disks import VmDisk, obstacle
from qemu_remus.qemu.nbd_server import foreign_exports
from qemu_remus.qemu.nodes import is_ours

_WITHOUT: Mapping[Feature, str] = {
    Feature.CBW_TIMEOUT: "a fleece directory that stalls can then hold up a guest's write for longer",
    Feature.NODE_CHILDREN: "the experimental x-debug-query-block-graph serves instead",
    Feature.BLOCK_GRAPH: "the children in query-named-block-nodes serve instead",
}


class Level(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    WARN = "warn"
    NO = "no"
    """The VM cannot be protected as it is."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    :param subject: what it is about.
    :param hint: what to do; empty where there is nothing to do.
    """

    level: Level
    subject: str
    text: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class ProbedDisk:
    """One disk of the VM.

    :param size: bytes.
    :param why: why it cannot be protected; empty where it can.
    """

    name: DiskName
    node: NodeName
    qdev: QdevPath
    size: int
    protectable: bool
    why: str
    hint: str


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What a QEMU and its disks allow.

    :param ok: ``qemu-remus primary`` without ``--disk`` would start.
    :param version: QEMU's.
    :param machine: QEMU's machine type; empty where it does not say.
    """

    ok: bool
    version: str
    machine: str
    findings: tuple[Finding, ...]
    disks: tuple[ProbedDisk, ...]

    def lines(self) -> list[str]:
        """The report for a person."""
        lines = []
        for finding in self.findings:
            lines.append(f"{finding.level:<4} {finding.subject}: {finding.text}")
            if finding.hint:
                lines.append(f"     -> {finding.hint}")
        return lines


@dataclass(frozen=True, slots=True)
class Observations:
    """The answers that a report is made of; what QEMU would not tell is empty."""

    capabilities: Capabilities
    package: str = ""
    machine: str = ""
    status: str = ""
    kvm: bool | None = None
    disks: Sequence[VmDisk] = ()
    nodes: Sequence[Mapping[str, Any]] = ()
    exports: Sequence[Mapping[str, Any]] = ()
    jobs: Sequence[Mapping[str, Any]] = ()


async def probe(client: QmpClient) -> ProbeReport:
    """Ask a QEMU what it is and what its disks allow; nothing is changed.

    :raise QemuUnreachable: when it does not answer.
    """
    capabilities = await query_capabilities(client)

    async def ask(command: Command, default: Any) -> Any:
        try:
            return await client.execute(command)
        except CommandFailed:
            # An older QEMU lacks the command: the report must come all the same.
            return default

    try:
        disks = await discover(client, capabilities)
    except CommandFailed:
        disks = ()
    return evaluate(
        Observations(
            capabilities=capabilities,
            package=client.package,
            machine=await ask(commands.qom_get("/machine", "type"), ""),
            status=(await ask(commands.query_status(), {})).get("status", ""),
            kvm=(await ask(commands.query_kvm(), {})).get("enabled"),
            disks=disks,
            nodes=await ask(commands.query_named_block_nodes(), []),
            exports=await ask(commands.query_block_exports(), []),
            jobs=await ask(commands.query_jobs(), []),
        )
    )


def evaluate(seen: Observations) -> ProbeReport:
    """Turn what was seen into a report."""
    findings = [*_about_qemu(seen), *_about_features(seen.capabilities)]
    disks = tuple(_probed(disk, seen.capabilities) for disk in seen.disks)
    findings += _about_disks(seen, disks)
    findings += _about_others(seen)
    findings += _about_us(seen)
    return ProbeReport(
        ok=all(finding.level is not Level.NO for finding in findings),
        version=version_text(seen.capabilities.version),
        machine=seen.machine.removesuffix("-machine"),
        findings=tuple(findings),
        disks=disks,
    )


def _about_qemu(seen: Observations) -> Iterator[Finding]:
    version = version_text(seen.capabilities.version)
    yield Finding(Level.OK, "QEMU", f"{version} ({seen.package})" if seen.package else version)
    if seen.machine:
        accelerator = "" if seen.kvm is None else " under KVM" if seen.kvm else " without KVM"
        yield Finding(Level.OK, "machine", seen.machine.removesuffix("-machine") + accelerator)
    if seen.status == "running":
        yield Finding(Level.OK, "VM", "running")
    elif seen.status:
        yield Finding(
            Level.WARN,
            "VM",
            f"not running ({seen.status})",
            "checkpoints by interval are taken of a running VM only, and a VM that we did not stop we never resume",
        )


def _about_features(capabilities: Capabilities) -> Iterator[Finding]:
    for feature in NEEDED:
        if feature in capabilities:
            yield Finding(Level.OK, "needed", f"{feature.purpose}: {feature.path}")
        else:
            yield Finding(
                Level.NO,
                "needed",
                f"{feature.purpose}: QEMU lacks {feature.path}",
                "move the VM to QEMU 7.1 or later",
            )
    for feature in sorted(OPTIONAL, key=lambda feature: feature.path):
        if feature in capabilities:
            yield Finding(Level.OK, "optional", f"{feature.purpose}: {feature.path}")
        else:
            yield Finding(Level.OK, "optional", f"{feature.purpose}: absent; {_WITHOUT[feature]}")
    if Feature.NODE_CHILDREN not in capabilities and Feature.BLOCK_GRAPH not in capabilities:
        yield Finding(
            Level.WARN,
            "optional",
            "this QEMU does not show what is below a filter",
            "after a crash of the controller, detach may need help with qom-set",
        )


def _probed(disk: VmDisk, capabilities: Capabilities) -> ProbedDisk:
    problem = obstacle(disk, capabilities)
    return ProbedDisk(
        disk.name,
        disk.node,
        disk.qdev,
        disk.size,
        protectable=problem is None,
        why="" if problem is None else problem.what,
        hint="" if problem is None else problem.hint,
    )


def _about_disks(seen: Observations, probed: Sequence[ProbedDisk]) -> Iterator[Finding]:
    for disk, result in zip(seen.disks, probed, strict=True):
        text = f"node {disk.node or 'none'}, device {disk.qdev or 'none'}, {_size(disk.size)}, {disk.driver or 'empty'}"
        problem = obstacle(disk, seen.capabilities)
        if problem is None:
            yield Finding(Level.OK, f"disk {disk.name}", f"can be protected ({text})")
        else:
            level = Level.WARN if problem.quiet else Level.NO
            yield Finding(level, f"disk {disk.name}", f"cannot be protected: {result.why} ({text})", result.hint)
    if not any(result.protectable for result in probed):
        yield Finding(Level.NO, "disks", "none of them can be protected", "give the VM a writable disk")
    good = [disk for disk, result in zip(seen.disks, probed, strict=True) if result.protectable]
    for index, disk in enumerate(good):
        twin = next((other for other in good[:index] if other.filename and other.filename == disk.filename), None)
        if twin is not None:
            yield Finding(
                Level.WARN,
                f"disk {disk.name}",
                f"is on the same image as {twin.name} ({disk.filename}), and neither sees the other's writes",
                "name with --disk the one that the guest uses",
            )
    if seen.kvm is False and seen.capabilities.has_fault(Fault.IOTHREAD_STOP_TCG):
        for disk in good:
            if disk.iothread:
                (what,) = (row.what for row in FAULTS if row.fault is Fault.IOTHREAD_STOP_TCG)
                yield Finding(Level.WARN, f"disk {disk.name}", what, "use KVM, or no iothread= for this disk")


def _size(size: int) -> str:
    value, unit = float(size), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.4g} {unit}"


def _about_others(seen: Observations) -> Iterator[Finding]:
    others = foreign_exports(seen.exports)
    if others:
        yield Finding(
            Level.NO,
            "NBD server",
            f"in use by somebody else (exports {', '.join(others)}), and a QEMU process has only one",
            "let its user end first: query-block-exports shows the exports, nbd-server-stop stops it",
        )
    else:
        yield Finding(Level.OK, "NBD server", "no export of anybody else's")
    for job in seen.jobs:
        if not is_ours(job["id"]):
            yield Finding(
                Level.WARN,
                f"job {job['id']}",
                f"somebody else's {job['type']} job is {job['status']}",
                "it may hold a disk's node: if the controller is refused, let the job end first",
            )


def _about_us(seen: Observations) -> Iterator[Finding]:
    nodes = {node.get("node-name", "") for node in seen.nodes}
    bitmaps = {bitmap.get("name", "") for node in seen.nodes for bitmap in node.get("dirty-bitmaps", ())}
    things = sorted(name for name in nodes | {entry["id"] for entry in seen.exports} if is_ours(name))
    if things:
        yield Finding(
            Level.WARN,
            "qemu-remus",
            f"is in this QEMU already: {', '.join(things)}",
            "a controller is at work on another QMP socket, or has crashed: a restart cleans up, and so does"
            " qemu-remus detach",
        )
    ours = sorted(name for name in bitmaps if is_ours(name))
    if ours:
        yield Finding(
            Level.OK, "qemu-remus", f"tracks changes for a restart: {', '.join(ours)}", "qemu-remus detach ends that"
        )
