"""What the observations of a QEMU mean: findings, each lack with the next step.  Pure.

Which disks would be protected is not decided here: :func:`qemu_remus.qemu.disks.choose_disks` says, as for the primary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from qemu_remus.core.errors import QemuRemusError
from qemu_remus.core.model import DiskName, QdevPath
from qemu_remus.qemu.block_tree import TreeNode
from qemu_remus.qemu.capabilities import (
    NEEDED,
    OPTIONAL,
    Capabilities,
    Feature,
    version_text,
)
from qemu_remus.qemu.disks import VmDisk, adding_needs_pause, choose_disks, needs_push, obstacle
from qemu_remus.qemu.faults import Fault, row_of
from qemu_remus.qemu.nodes import foreign_exports, is_ours
from qemu_remus.qemu.probe_host_checks import about_host
from qemu_remus.qemu.probe_model import (
    Finding,
    Level,
    Observations,
    ProbedDisk,
    ProbeReport,
    Way,
)

_XEN_DISK: Final = "xen-disk"
_ELSEWHERE: Final = re.compile(
    r"(vhost-user-blk|vhost-scsi|vhost-user-scsi|virtio-pmem|nvdimm|vhost-user-fs|virtio-9p)(-|\Z)"
)
"""Types of devices that hold a guest's files and are none of the block layer's."""
_JOB_NODES: Final = frozenset({"mirror_top", "commit_top"})


def evaluate(seen: Observations) -> ProbeReport:
    """Turn what was seen into a report."""
    chosen, refusal = _choose(seen)
    disks = tuple(_probed(disk, seen, chosen) for disk in seen.disks)
    findings = [
        *_about_qemu(seen),
        *_about_features(seen.capabilities),
        *_about_disks(seen, disks),
        *_about_elsewhere(seen),
        *_about_graphs(seen, disks),
        *_about_xen(seen, disks),
        *_about_others(seen),
        *_about_us(seen),
    ]
    if seen.host is not None:
        findings += about_host(seen, seen.host)
    if refusal is not None and all(finding.level is not Level.NO for finding in findings):
        findings.append(Finding(Level.NO, "disks", refusal.what, refusal.hint))
    return ProbeReport(
        ok=all(finding.level is not Level.NO for finding in findings),
        name=seen.name,
        version=version_text(seen.capabilities.version),
        package=seen.package,
        machine=seen.machine.removesuffix("-machine"),
        kvm=seen.kvm,
        status=seen.status,
        findings=tuple(findings),
        disks=disks,
    )


# --- what the primary would do


def _choose(seen: Observations) -> tuple[Mapping[QdevPath, Way], QemuRemusError | None]:
    """The disks that the primary would protect, by their device, and how; or why it would not start."""
    try:
        chosen = choose_disks(seen.disks, seen.intent.disks, seen.capabilities)
    except QemuRemusError as error:
        return {}, error
    return {disk.qdev: _way(disk, seen) for disk in chosen}, None


def _way(disk: VmDisk, seen: Observations) -> Way:
    """How a disk that was chosen is read, as far as can be seen: nobody tells whether the NBD server runs."""
    return Way.PUSH if needs_push(disk, seen.capabilities) or foreign_exports(seen.exports) else Way.PULL


def _probed(disk: VmDisk, seen: Observations, chosen: Mapping[QdevPath, Way]) -> ProbedDisk:
    problem = obstacle(disk, seen.capabilities)
    return ProbedDisk(
        name=disk.name,
        node=disk.node,
        qdev=disk.qdev,
        device=seen.devices.get(disk.name, ""),
        size=disk.size,
        iothread=disk.iothread,
        protectable=problem is None,
        way=chosen.get(disk.qdev),
        why="" if problem is None else problem.what,
        hint="" if problem is None else problem.hint,
        graph=seen.trees.get(disk.name),
    )


# --- QEMU


def _about_qemu(seen: Observations) -> Iterator[Finding]:
    version = version_text(seen.capabilities.version)
    yield Finding(Level.OK, "QEMU", f"{version} ({seen.package})" if seen.package else version)
    if seen.machine:
        accelerator = "" if seen.kvm is None else " under KVM" if seen.kvm else " without KVM"
        yield Finding(Level.OK, "machine", seen.machine.removesuffix("-machine") + accelerator)
    if seen.status == "running":
        yield Finding(Level.OK, "VM", "running")
    elif seen.status in ("inmigrate", "postmigrate", "finish-migrate"):
        yield Finding(
            Level.WARN,
            "VM",
            f"is being migrated ({seen.status})",
            "let the migration end first: a filter on a disk makes it fail, and afterwards this QEMU has no disks",
        )
    elif seen.status in ("io-error", "internal-error", "guest-panicked", "shutdown"):
        yield Finding(
            Level.WARN,
            "VM",
            f"not running ({seen.status})",
            "see to that first: what the guest holds in its memory is not on its disks",
        )
    elif seen.status:
        yield Finding(
            Level.WARN,
            "VM",
            f"not running ({seen.status})",
            "resume it (cont): checkpoints by interval are taken of a running VM only, and a VM that we did not stop we"
            " never resume",
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
            yield Finding(Level.OK, "optional", f"{feature.purpose}: absent; {feature.without}")
    if Feature.NODE_CHILDREN not in capabilities and Feature.BLOCK_GRAPH not in capabilities:
        yield Finding(
            Level.WARN,
            "optional",
            "this QEMU does not show what is below a filter",
            "after a crash of the controller, detach may need help with qom-set",
        )


# --- disks


def _about_disks(seen: Observations, probed: Sequence[ProbedDisk]) -> Iterator[Finding]:
    for disk, result in zip(seen.disks, probed, strict=True):
        problem = obstacle(disk, seen.capabilities)
        if problem is None:
            text = f"will be protected, by {result.way}" if result.way else "can be protected, and is not asked for"
            if seen.intent.disks is None and result.way is None:
                text = "can be protected"
            yield Finding(Level.OK, f"disk {disk.name}", text)
        else:
            # Of the disks that were named, choose_disks speaks.
            level = Level.NO if not problem.quiet and seen.intent.disks is None else Level.WARN
            hint = f"{result.hint}; or name the other disks with --disk" if level is Level.NO else result.hint
            yield Finding(level, f"disk {disk.name}", f"cannot be protected: {result.why}", hint)
        status = seen.io_status.get(disk.name, "ok")
        if status != "ok":
            why = "no space is left where it is stored" if status == "nospace" else "its storage has failed"
            yield Finding(
                Level.WARN,
                f"disk {disk.name}",
                f"the guest has an I/O error on it: {why} ({status})",
                "mend the storage, then resume the VM (cont)",
            )
    if not any(result.protectable for result in probed):
        yield Finding(Level.NO, "disks", "none of them can be protected", "give the VM a writable disk")
    good = [disk for disk, result in zip(seen.disks, probed, strict=True) if result.protectable]
    if seen.kvm is False and seen.capabilities.has_fault(Fault.IOTHREAD_STOP_TCG):
        for disk in good:
            if disk.iothread:
                what = row_of(Fault.IOTHREAD_STOP_TCG).what
                yield Finding(Level.WARN, f"disk {disk.name}", what, "use KVM, or no iothread= for this disk")
    for disk in good:
        if adding_needs_pause(disk, seen.capabilities):
            yield Finding(
                Level.WARN,
                f"disk {disk.name}",
                f"in an iothread of QEMU {version_text(seen.capabilities.version)}: if another tool resumes the VM"
                " within one of our pauses, QEMU ends",
                "let nobody else stop and resume this VM while it is protected, or use QEMU 10.0 or later",
            )
    yield from _doubles(seen, good)


def _about_elsewhere(seen: Observations) -> Iterator[Finding]:
    """What a guest keeps outside of QEMU's disks, and so is neither seen nor replicated."""
    for name, model in seen.peripherals.items():
        if _ELSEWHERE.match(model):
            yield Finding(
                Level.WARN,
                f"device {name}",
                f"what the guest keeps on it is not replicated: QEMU's block layer does not see a {model}",
                "put what must survive a failover on a disk of QEMU's own, such as virtio-blk",
            )


def _doubles(seen: Observations, good: Sequence[VmDisk]) -> Iterator[Finding]:
    """Two chains on one image, as with Xen's emulated IDE disk and the PV disk of the same file."""
    files = {disk.name: _files(disk, seen.trees.get(disk.name)) for disk in good}
    for index, disk in enumerate(good):
        twin = next((other for other in good[:index] if files[other.name] & files[disk.name]), None)
        if twin is None:
            continue
        shared = sorted(files[twin.name] & files[disk.name])[0]
        pv = [one.name for one in (disk, twin) if seen.devices.get(one.name, "") == _XEN_DISK]
        hint = "name with --disk the one that the guest uses"
        if len(pv) == 1:
            hint = f"{hint}: {pv[0]} once its PV driver runs, which then unplugs the other"
        yield Finding(
            Level.WARN,
            f"disk {disk.name}",
            f"is on the same image as {twin.name} ({shared}), and the bitmap of neither sees the other's writes",
            hint,
        )


def _files(disk: VmDisk, tree: TreeNode | None) -> frozenset[str]:
    names = () if tree is None else tree.files()
    return frozenset(name for name in names or (disk.filename,) if name)


def _about_graphs(seen: Observations, probed: Sequence[ProbedDisk]) -> Iterator[Finding]:
    for disk in probed:
        if disk.graph is not None:
            yield from _about_nodes(disk, disk.graph)
            if seen.capabilities.has_fault(Fault.QED_ALLOCATION):
                yield from _about_qed(disk, disk.graph)
            yield from _about_bitmaps(disk.name, disk.graph)


def _about_nodes(disk: ProbedDisk, graph: TreeNode) -> Iterator[Finding]:
    subject = f"disk {disk.name}"
    for node in graph.walk():
        others = [user for user in node.writers if not is_ours(user) and not user.startswith("job ")]
        if node.node == disk.node and disk.protectable and others:
            yield Finding(
                Level.NO,
                subject,
                f"{', '.join(others)} may write to its node {node.node}, too, past the replication filter",
                "let that end, or give it a disk of its own",
            )
        if node.driver in _JOB_NODES:
            yield Finding(
                Level.WARN,
                subject,
                f"a job is at work on it (node {node.node}, {node.driver})",
                "let the job end first: its nodes come and go in the disk's graph",
            )
        if node.corrupt:
            yield Finding(
                Level.WARN,
                subject,
                f"QEMU has marked {node.filename or node.node} as corrupt",
                "shut the VM down and repair the image (qemu-img check -r all), or restore it, before it is copied",
            )


def _about_qed(disk: ProbedDisk, graph: TreeNode) -> Iterator[Finding]:
    for node in graph.walk():
        if node.driver == "qed" and not node.read_only:
            yield Finding(
                Level.WARN,
                f"disk {disk.name}",
                f"{node.filename or node.node} is of the format qed: {row_of(Fault.QED_ALLOCATION).what}, with us or"
                " without",
                "shut the VM down and convert the image to qcow2 (qemu-img convert)",
            )


def _about_bitmaps(name: DiskName, graph: TreeNode) -> Iterator[Finding]:
    for node in graph.walk():
        for bitmap in node.bitmaps:
            if bitmap.ours:
                continue
            if bitmap.inconsistent:
                yield Finding(
                    Level.WARN,
                    f"disk {name}",
                    f"bitmap {bitmap.name} on {node.node} is inconsistent, since QEMU was once not closed cleanly;"
                    " whoever made it has lost track. It does not matter to us",
                    f"remove it (block-dirty-bitmap-remove, node {node.node}); its tool then begins with a full backup",
                )
            elif bitmap.persistent:
                yield Finding(
                    Level.OK,
                    f"disk {name}",
                    f"bitmap {bitmap.name} of somebody else's is persistent: it stays in this image, is not copied, and"
                    " after a failover its tool begins with a full backup",
                )
            else:
                yield Finding(Level.OK, f"disk {name}", f"bitmap {bitmap.name} of somebody else's is left alone")


def _about_xen(seen: Observations, probed: Sequence[ProbedDisk]) -> Iterator[Finding]:
    pv = [disk.name for disk in probed if disk.device == _XEN_DISK]
    kernel = () if seen.host is None else seen.host.kernel_disks
    for name in kernel:
        yield Finding(
            Level.NO,
            f"Xen disk {name}",
            "is served by the kernel (backendtype=phy): QEMU does not see what the guest writes to it",
            "say backendtype=qdisk in the disk's line of the domain's configuration, and start the domain anew",
        )
    domain = None if seen.host is None else seen.host.xen_domain
    if not (pv or kernel) and (domain is not None or seen.machine.startswith("xen")):
        yield Finding(
            Level.WARN,
            "Xen",
            "QEMU has no PV disk (xen-disk) of this domain: it sees what the guest writes only as long as the guest"
            " uses the emulated disks",
            "say backendtype=qdisk in each disk's line of the domain's configuration; look again when the guest is up",
        )


# --- others in this QEMU


def _about_others(seen: Observations) -> Iterator[Finding]:
    others = foreign_exports(seen.exports)
    listeners = () if seen.host is None else seen.host.listeners or ()
    odd = [name for name in listeners if not _explained(name, seen.sockets)]
    push = seen.capabilities.push
    if others:
        yield Finding(
            Level.WARN if push else Level.NO,
            "NBD server",
            f"in use by somebody else (exports {', '.join(others)}), and a QEMU process has only one"
            + ("; all disks are read by push, which copies more" if push else ""),
            "let its user end first: query-block-exports shows the exports, nbd-server-stop stops it",
        )
    elif odd:
        yield Finding(
            Level.WARN,
            "NBD server",
            f"may be running: QEMU listens on {', '.join(odd)}, which none of its monitors and displays explains",
            f"if somebody has started it, {'all disks are read by push' if push else 'the controller is refused'}: let"
            " them end; nbd-server-stop stops it",
        )
    else:
        yield Finding(Level.OK, "NBD server", "no export of anybody else's")
    for entry in seen.exports:
        if entry["type"] != "nbd" and not is_ours(entry["id"]):
            yield Finding(
                Level.OK, f"export {entry['id']}", f"of type {entry['type']}, somebody else's: it is left alone"
            )
    for job in seen.jobs:
        if not is_ours(job["id"]):
            yield Finding(
                Level.WARN,
                f"job {job['id']}",
                f"somebody else's {job['type']} job is {job['status']}",
                "it may hold a disk's node: if the controller is refused, let the job end first",
            )


def _explained(listener: str, sockets: str) -> bool:
    """Whether QEMU itself says what it listens there for; or the socket is our NBD server's."""
    name = listener.rpartition("/")[2]
    if name.startswith("qemu-remus-nbd-"):
        return True
    return listener.removeprefix("TCP port ") in sockets


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
