"""The fake QEMU of the unit tests does what real ones do: random commands to both, their answers and states compared.

What is compared of an answer is whether it is an error, and its class; of the state, what qemu-remus looks at; of an
image that carries a bitmap, what is marked in it once its node is closed. The commands, pull's and push's, go by the
package's own builders. They are chosen so that many of them make sense: what the fake holds at the moment is preferred
to names that are not there. ``QEMU_REMUS_DIFFERENTIAL`` repeats a seed, ``SEED`` or ``SEED:STEPS``.

A job is not looked at before it has ended: the fake's end at once.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from integration.harness import Disk, Machine, QmpError, start_machine
from integration.qemus import Qemu
from qemu_remus.core.errors import EpochLost
from qemu_remus.core.model import BitmapName, NodeName, QdevPath
from qemu_remus.qemu import bitmap_file, commands
from qemu_remus.qemu.commands import Action, Command, ExportDelMode
from qemu_remus.qemu.epoch import CLUSTER
from qemu_remus.qemu.staging import MAP
from tests.fake_qemu import Abort, FakeQemu, Refusal
from tests.qmp_validation import QEMU_SCHEMAS, captured

CHOSEN, _, LENGTH = os.environ.get("QEMU_REMUS_DIFFERENTIAL", "").partition(":")
SEED = int(CHOSEN or random.SystemRandom().randrange(1_000_000))
STEPS = int(LENGTH or 300)

DISKS = {"a": 4 << 20, "b": (4 << 20) + 22_016}
FLEECES = ("fleece-a", "fleece-b")
FILTERS = ("filter-a", "filter-b", "filter-c")
ACCESSES = ("access-a", "access-b")
STAGINGS = ("data-a", "data-b")
MAP_FILES = ("maps-a", "maps-b")
MAPS = ("map-a", "map-b")
"""Over the file of the same letter."""
DISK_NODES = ("a-node", "b-node")
NODES = [NodeName(name) for name in (*DISK_NODES, *FLEECES, *FILTERS, *ACCESSES, *STAGINGS, *MAP_FILES, *MAPS)]
NOWHERE = NodeName("nowhere")
BITMAPS = [BitmapName(f"bitmap-{number}") for number in range(4)]
EXPORTS = ("export-a", "export-b")
JOBS = ("job-a", "job-b")


def qdev(disk: str) -> QdevPath:
    return QdevPath(f"/machine/peripheral/{disk}/virtio-backend")


@dataclass(frozen=True)
class Write:
    """The guest writes to a disk."""

    disk: str
    offset: int
    length: int


@dataclass(frozen=True)
class Open:
    """A file of ours is written anew, and a node put over it, as push does.

    :param ranges: marked in the image, in bytes; None: there is no bitmap in it.
    """

    node: str
    ranges: tuple[tuple[int, int], ...] | None

    @property
    def letter(self) -> str:
        return self.node[-1]

    @property
    def command(self) -> Command:
        file = NodeName(f"maps-{self.letter}")
        return commands.blockdev_add_qcow2(NodeName(self.node), file=file, read_only=self.ranges is not None)

    def write(self, directory: Path) -> None:
        size = DISKS[self.letter]
        if self.ranges is None:
            pieces = bitmap_file.empty_image(size)
        else:
            pieces = bitmap_file.image_with(size, MAP, CLUSTER, self.ranges)
        with (directory / f"maps-{self.letter}.img").open("r+b") as file:
            for offset, data in pieces:
                file.seek(offset)
                file.write(data)


Step = Command | Write | Open


class Chooser:
    """Chooses the next step by what the fake holds."""

    def __init__(self, seed: int, fake: FakeQemu, directory: Path) -> None:
        self.chance = random.Random(seed)
        self.fake = fake
        self.directory = directory
        self.kinds: list[tuple[int, Callable[[], Step | None]]] = [
            (12, self.write),
            (6, self.fleece),
            (14, self.filter),
            (12, self.access),
            (10, self.delete),
            (16, self.swap),
            (14, self.transaction),
            (12, lambda: self.action().as_command()),
            (4, self.server),
            (10, self.export),
            (8, self.end_export),
            (5, lambda: self.chance.choice((commands.stop(), commands.cont()))),
            (2, self.query),
            (6, self.staging),
            (10, self.map),
            (8, self.bitmap_of_map),
            (20, self.copy),
            (14, self.backup),
            (6, self.job),
        ]

    def step(self) -> Step:
        while True:
            ((_, make),) = self.chance.choices(self.kinds, [weight for weight, _ in self.kinds])
            if (step := make()) is not None:
                return step

    def rarely(self) -> bool:
        return self.chance.random() < 0.1

    def node(self, *names: str) -> NodeName:
        """One of these that is there, or, rarely, that may not be."""
        there = [name for name in names if name in self.fake.nodes]
        if not there or self.rarely():
            return NodeName(self.chance.choice([*names, NOWHERE]))
        return NodeName(self.chance.choice(there))

    def bitmap(self, node: NodeName) -> BitmapName:
        held = list(self.fake.nodes[node].bitmaps) if node in self.fake.nodes else []
        return BitmapName(self.chance.choice(held if held and not self.rarely() else BITMAPS))

    def marked(self, node: NodeName) -> BitmapName:
        """One in which something is marked, where there is one."""
        bitmaps = self.fake.nodes[node].bitmaps if node in self.fake.nodes else {}
        held = [name for name, bitmap in bitmaps.items() if bitmap.dirty]
        return BitmapName(self.chance.choice(held)) if held and not self.rarely() else self.bitmap(node)

    def write(self) -> Step:
        disk = self.chance.choice(list(DISKS))
        length = self.chance.choice((512, 4096, 65536, 70_000 // 512 * 512))
        last = (DISKS[disk] - length) // 512
        return Write(disk, self.chance.choice((0, last, self.chance.randrange(last))) * 512, length)

    def fleece(self) -> Step:
        name = self.chance.choice(FLEECES)
        return commands.blockdev_add_file(NodeName(name), str(self.directory / f"{name}.img"))

    def filter(self) -> Step:
        disk = self.node("a-node", "b-node")
        bitmap = self.bitmap(disk) if self.chance.random() < 0.7 else None
        return commands.blockdev_add_filter(
            NodeName(self.chance.choice(FILTERS)), disk=disk, target=self.node(*FLEECES), bitmap=bitmap
        )

    def access(self) -> Step:
        over = self.node(*FILTERS) if not self.rarely() else self.node("a-node", *FLEECES)
        return commands.blockdev_add_snapshot_access(NodeName(self.chance.choice(ACCESSES)), filter_node=over)

    def delete(self) -> Step:
        if self.chance.random() < 0.3 and any(name in self.fake.nodes for name in MAPS):
            return commands.blockdev_del(self.node(*MAPS))
        return commands.blockdev_del(self.node(*ACCESSES, *FILTERS, *FLEECES, *STAGINGS, *MAP_FILES))

    def swap(self) -> Step | None:
        disk = self.chance.choice(list(DISKS))
        node = self.node("a-node", "b-node", *FILTERS) if self.rarely() else self.node(f"{disk}-node", *FILTERS)
        # to have the node again that it has aborts a real one
        return None if self.fake.devices[qdev(disk)].node == node else commands.qom_set_drive(qdev(disk), node)

    def action(self) -> Action:
        of_access = self.chance.random() < 0.4 and any(name in self.fake.nodes for name in ACCESSES)
        node = self.node(*(ACCESSES if of_access else DISK_NODES))
        kind = self.chance.choice(("add", "add", "disable", "clear", "merge", "remove"))
        if kind == "add":
            name = self.chance.choice(BITMAPS)
            granularity = self.chance.choice((None, 512, 4096, 65536, 1 << 20))
            return commands.bitmap_add_action(node, name, granularity=granularity, disabled=self.rarely())
        if kind in ("disable", "clear"):
            make = commands.bitmap_disable_action if kind == "disable" else commands.bitmap_clear_action
            return make(node, self.bitmap(node))
        if kind == "merge":
            target = self.bitmap(node)
            # never nothing: in a transaction that crashes a real one
            sources = {self.bitmap(node), self.bitmap(node)}
            return commands.bitmap_merge_action(node, target, sorted(sources))
        return commands.bitmap_remove_action(node, self.bitmap(node))

    def transaction(self) -> Step:
        return commands.transaction([self.action() for _ in range(self.chance.randrange(1, 5))])

    def server(self) -> Step:
        if self.fake.nbd is None or self.rarely():
            return commands.nbd_server_start(str(self.directory / "nbd"))
        return commands.nbd_server_stop()

    def export(self) -> Step:
        node = self.node(*ACCESSES, "a-node", "b-node")
        disk = self.node("a-node", "b-node")
        bitmaps = [(disk, self.bitmap(disk))] if self.chance.random() < 0.5 else []
        name = self.chance.choice(EXPORTS)
        return commands.block_export_add_nbd(name, node, "name" if self.rarely() else name, bitmaps=bitmaps)

    def end_export(self) -> Step:
        held = list(self.fake.exports)
        name = self.chance.choice(held if held and not self.rarely() else EXPORTS)
        return commands.block_export_del(name, self.chance.choice(list(ExportDelMode)))

    # push

    def staging(self) -> Step:
        name = self.chance.choice((*STAGINGS, *MAP_FILES))
        return commands.blockdev_add_file(NodeName(name), str(self.directory / f"{name}.img"))

    def map(self) -> Step | None:
        node = self.chance.choice(MAPS)
        file = f"maps-{node[-1]}"
        read_only = self.chance.random() < 0.5
        if self.rarely():
            # nothing of the kind is in it
            return commands.blockdev_add_qcow2(NodeName(node), file=self.node(*FLEECES), read_only=read_only)
        if node in self.fake.nodes or file not in self.fake.nodes:
            if not self.rarely():
                return None
            return commands.blockdev_add_qcow2(NodeName(node), file=NodeName(file), read_only=read_only)
        return Open(node, self.ranges(DISKS[node[-1]]) if read_only else None)

    def ranges(self, size: int) -> tuple[tuple[int, int], ...]:
        borders = sorted(self.chance.sample(range(size // 512 + 1), 2 * self.chance.randrange(1, 4)))
        return tuple((start * 512, (end - start) * 512) for start, end in zip(borders[::2], borders[1::2], strict=True))

    def bitmap_of_map(self) -> Step:
        node = self.node(*MAPS)
        held = self.fake.nodes.get(node)
        if self.rarely():
            return self.chance.choice((commands.bitmap_remove, commands.bitmap_disable))(node, MAP)
        return commands.bitmap_add(
            node,
            MAP,
            granularity=self.chance.choice((512, 4096, 4096, 65536, 1 << 20)),
            disabled=not self.rarely(),
            # that of an image that is only read could not be stored
            persistent=not (held and held.read_only) and not self.rarely(),
        )

    def copy(self) -> Step | None:
        if self.rarely():
            into, source = self.node(*DISK_NODES, *ACCESSES, *MAPS), self.node(*DISK_NODES, *MAPS)
        else:
            marked = [name for name in (*DISK_NODES, *ACCESSES, *MAPS) if self.has_bitmaps(name)]
            pairs = [(into, source) for into in marked for source in marked if self.alike(into, source)]
            if not pairs:
                return None
            into, source = map(NodeName, self.chance.choice(pairs))
        return commands.bitmap_copy(into, self.bitmap(into), (source, self.marked(source)))

    def has_bitmaps(self, name: str) -> bool:
        return name in self.fake.nodes and bool(self.fake.nodes[name].bitmaps)

    def alike(self, name: str, other: str) -> bool:
        return name != other and self.fake.nodes[name].size == self.fake.nodes[other].size

    def backup(self) -> Step | None:
        job = self.chance.choice(JOBS)
        if self.rarely():
            source, into = self.node(*ACCESSES), self.node(*STAGINGS, *FLEECES)
        else:
            marked = [name for name in ACCESSES if self.has_bitmaps(name)]
            targets = [name for name in STAGINGS if name in self.fake.nodes]
            pairs = [(source, into) for source in marked for into in targets if self.alike(source, into)]
            if not pairs:
                return None
            source, into = map(NodeName, self.chance.choice(pairs))
        return commands.blockdev_backup(job, source, into, self.marked(source), chunk=CLUSTER)

    def job(self) -> Step:
        held = list(self.fake.jobs)
        name = self.chance.choice(held if held and not self.rarely() else JOBS)
        return commands.job_cancel(name) if self.rarely() else commands.job_dismiss(name)

    def query(self) -> Step:
        return self.chance.choice((commands.query_jobs(), commands.job_cancel("no-such-job")))


def state(answers: dict[str, Any]) -> dict[str, Any]:
    """What of a QEMU's answers is to be the same."""
    nodes = {}
    for node in answers["query-named-block-nodes"]:
        if node["node-name"] in NODES:
            fields = ("name", "granularity", "recording", "busy", "count", "persistent")
            bitmaps = [
                {field: one[field] for field in fields} for one in node.get("dirty-bitmaps", ()) if "name" in one
            ]
            nodes[node["node-name"]] = {
                "driver": node["drv"],
                "read-only": node["ro"],
                "size": node["image"]["virtual-size"],
                "bitmaps": sorted(bitmaps, key=lambda bitmap: str(bitmap["name"])),
                "children": sorted(
                    (child["child"], child["node-name"])
                    for child in node.get("children", ())
                    if child["node-name"] in NODES
                ),
            }
    return {
        "nodes": nodes,
        "devices": {
            entry["qdev"]: (entry["inserted"]["node-name"], entry["inserted"]["ro"])
            for entry in answers["query-block"]
            if "inserted" in entry
        },
        "exports": sorted((entry["id"], entry["node-name"], entry["type"]) for entry in answers["query-block-exports"]),
        "jobs": sorted((job["id"], job["type"], job["status"], "error" in job) for job in answers["query-jobs"]),
        "status": answers["query-status"]["status"],
    }


QUERIES = (
    # first: when these have ended, what they held is free, and all else is as it stays
    commands.query_block_exports(),
    commands.query_jobs(),
    commands.query_named_block_nodes(),
    commands.query_block(),
    commands.query_status(),
)


def fake_state(fake: FakeQemu) -> dict[str, Any]:
    return state({query.name: fake.execute(query.name, dict(query.arguments)) for query in QUERIES})


async def real_state(machine: Machine) -> dict[str, Any]:
    return state({query.name: await machine.qmp.execute(query.name, dict(query.arguments)) for query in QUERIES})


def outcome_of_fake(fake: FakeQemu, step: Step, directory: Path) -> str:
    if isinstance(step, Write):
        fake.guest_write(qdev(step.disk), step.offset, step.length)
        return "done"
    if isinstance(step, Open):
        step.write(directory)
        step = step.command
    try:
        fake.execute(step.name, dict(step.arguments))
    except Refusal as refusal:
        return f"{refusal.qmp_class}: {refusal.desc}"
    return "done"


async def outcome_of_real(machine: Machine, step: Step, directory: Path) -> str:
    if isinstance(step, Write):
        await machine.qemu_io(step.disk, f"write -P 0x5a {step.offset} {step.length}")
        return "done"
    if isinstance(step, Open):
        step.write(directory)
        step = step.command
    try:
        await machine.qmp.execute(step.name, dict(step.arguments))
    except QmpError as error:
        return f"{error.qmp_class}: {error.desc}"
    return "done"


def kind(outcome: str) -> str:
    """An outcome without the words, which may change from one QEMU to another."""
    return outcome.partition(":")[0]


@pytest.mark.every_qemu
@pytest.mark.parametrize("seed", [1, 2, SEED])
async def test_the_fake_answers_and_changes_as_a_real_qemu(scratch: Path, qemu: Qemu, seed: int) -> None:
    schema = next((path for path in QEMU_SCHEMAS if captured(path).version[:2] == qemu.version[:2]), None)
    if schema is None:
        pytest.skip(f"the schema of QEMU {qemu} is not captured")
    disks = []
    ours = scratch / "fake"
    ours.mkdir()
    for name, size in DISKS.items():
        # a fleece that is too small for its disk aborts a real one at the first write beyond its end
        for file, length in ((f"{name}.img", size), (f"fleece-{name}.img", max(DISKS.values()))):
            with (scratch / file).open("wb") as image:
                image.truncate(length)
        disks.append(Disk(name, scratch / f"{name}.img"))
        for directory in (scratch, ours):
            for file, length in ((f"data-{name}.img", size), (f"maps-{name}.img", bitmap_file.file_size(size, 512))):
                with (directory / file).open("wb") as image:
                    image.truncate(length)
    told: list[str] = []
    with FakeQemu(captured(schema)) as fake:
        for name, size in DISKS.items():
            fake.add_disk(f"{name}-node", qdev(name), size=size)
        chooser = Chooser(seed, fake, scratch)
        async with start_machine(scratch, disks, accelerator="tcg", memory_mb=32) as machine:
            assert fake_state(fake) == await real_state(machine)
            done = 0
            for number in range(STEPS):
                step = chooser.step()
                closed = map_closed_by(fake, step)
                expected = outcome_of_fake(fake, moved(step, ours), ours)
                try:
                    real = await outcome_of_real(machine, step, scratch)
                except EOFError:
                    real = f"it died\n{machine.process.tail()}"
                told.append(f"{number}: {step}\n      fake {expected}\n      real {real}")
                history = f"seed {seed}:\n" + "\n".join(told[-12:])
                assert kind(expected) == kind(real), history
                await see_equal(fake, machine, history)
                if closed is not None and real == "done":
                    letter, granularity = closed
                    stored = [stored_in(place, letter, granularity) for place in (ours, scratch)]
                    assert stored[0] == stored[1], f"{history}\nfake {stored[0]}\nreal {stored[1]}"
                done += real == "done"
            assert done > STEPS // 4


def moved(step: Step, directory: Path) -> Step:
    """The same for the fake, which has a socket of its own."""
    if isinstance(step, Command) and step.name == "nbd-server-start":
        return commands.nbd_server_start(str(directory / "nbd"))
    if isinstance(step, Command) and step.arguments.get("node-name") in (*STAGINGS, *MAP_FILES):
        node = step.arguments["node-name"]
        return (
            commands.blockdev_add_file(node, str(directory / f"{node}.img")) if "filename" in step.arguments else step
        )
    return step


def map_closed_by(fake: FakeQemu, step: Step) -> tuple[str, int] | None:
    """The letter of the image that is closed by a step, and the granularity of the bitmap that is stored in it then."""
    if not isinstance(step, Command) or step.name != "blockdev-del":
        return None
    node = fake.nodes.get(step.arguments["node-name"])
    if node is None or node.name not in MAPS or node.read_only:
        return None
    bitmap = node.bitmaps.get(MAP)
    return node.name[-1], bitmap.granularity if bitmap else CLUSTER


def stored_in(directory: Path, letter: str, granularity: int) -> list[tuple[int, int]] | None:
    """What is marked in an image's bitmap; None: it has none."""
    with (directory / f"maps-{letter}.img").open("rb") as file:

        def read(length: int, offset: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        try:
            return list(bitmap_file.read_bitmap(read, DISKS[letter], MAP, granularity).ranges())
        except EpochLost:
            return None


async def see_equal(fake: FakeQemu, machine: Machine, history: str) -> None:
    """An export goes, and a job ends, in the background; all else is as it is."""
    expected = fake_state(fake)
    seen: dict[str, Any] = {}
    with trio.move_on_after(30):
        while True:
            seen = await real_state(machine)
            if all(seen[part] == expected[part] for part in ("exports", "jobs")):
                break
            await trio.sleep(0.005)
    for part in expected:
        assert seen[part] == expected[part], f"{history}\nfake {expected[part]}\nreal {seen[part]}"


INTO = BitmapName("into")
FATAL = {
    "the-node-that-it-has": commands.qom_set_drive(qdev("a"), NodeName("a-node")),
    "nothing-merged": commands.transaction([commands.bitmap_merge_action(NodeName("a-node"), INTO, [])]),
}


@pytest.mark.every_qemu
@pytest.mark.parametrize("name", FATAL)
async def test_what_aborts_the_fake_aborts_a_real_qemu(scratch: Path, name: str) -> None:
    with (scratch / "a.img").open("wb") as image:
        image.truncate(DISKS["a"])
    begin = commands.bitmap_add(NodeName("a-node"), INTO)
    with FakeQemu() as fake:
        fake.add_disk("a-node", qdev("a"), size=DISKS["a"])
        fake.execute(begin.name, dict(begin.arguments))
        with pytest.raises(Abort):
            fake.execute(FATAL[name].name, dict(FATAL[name].arguments))
    async with start_machine(scratch, [Disk("a", scratch / "a.img")], accelerator="tcg", memory_mb=32) as machine:
        await machine.qmp.execute(begin.name, dict(begin.arguments))
        with pytest.raises(EOFError):
            await machine.qmp.execute(FATAL[name].name, dict(FATAL[name].arguments))
        assert await machine.process.wait() < 0
