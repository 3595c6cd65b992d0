"""The toolstack's interface on a real pair: the commands in and out of order, lost links, crashes, doubt and failover.

No memory here, that is ``test_toolstack_reference.py``'s and the kill matrix's: the VM has no guest, its disk is
written between the checkpoints, and every checkpoint's image is kept while the VM stands still.
"""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from integration.controller import PROGRAM
from integration.frames import FrameProxy, Moment, Passing, start_frame_proxy
from integration.harness import (
    Controller,
    Disk,
    Machine,
    copy_image,
    first_difference,
    make_image,
    qemu_remus,
    run,
    start_machine,
    start_primary,
    start_secondary,
)
from qemu_remus.core.errors import CommitInDoubt, EpochLost, NotProtected, OutOfOrder, Refused, TimedOut
from qemu_remus.toolstack import Backup, Checkpoint, Toolstack, open_backup, open_toolstack

SIZE = 32 << 20
DOCS = Path(__file__).parent.parent / "docs"


@dataclass
class Rig:
    """A pair that a toolstack drives, and what the disk held at each checkpoint.

    :ivar cut_before: name of the message before which the link is cut, once.
    """

    scratch: Path
    machine: Machine
    primary: Controller
    secondary: Controller
    proxy: FrameProxy
    toolstack: Toolstack
    backup: Backup
    images: dict[int, Path] = field(default_factory=dict)
    cut_before: str = ""
    was_cut: trio.Event = field(default_factory=trio.Event)
    seen: list[str] = field(default_factory=list)

    async def hook(self, passing: Passing) -> None:
        if passing.moment is not Moment.BEFORE:
            return
        self.seen.append(passing.message)
        if passing.message == self.cut_before:
            self.cut_before = ""
            self.proxy.cut()
            self.was_cut.set()

    async def link_lost(self) -> None:
        """Wait until the link has been cut, and both sides know it."""
        with trio.fail_after(60):
            await self.was_cut.wait()
        for controller in (self.primary, self.secondary):
            await controller.wait_until(lambda status: status["connection"] != "connected")

    async def ready(self) -> None:
        """Wait until a checkpoint can be taken."""
        with trio.fail_after(60):
            while True:
                try:
                    await self.toolstack.prepare()
                except NotProtected:
                    await trio.sleep(0.05)
                else:
                    return

    async def start(self, pattern: int) -> Checkpoint:
        """Write, pause the VM, start an epoch, keep the image, let the VM run on."""
        await self.machine.qemu_io("disk0", f"write -P {pattern} {pattern * 64}k 64k")
        await self.ready()
        await self.machine.pause()
        try:
            checkpoint = await self.toolstack.start()
            image = self.scratch / f"at-{checkpoint.epoch}"
            self.images[checkpoint.epoch] = await copy_image(self.scratch / "disk0", image)
        finally:
            await self.machine.resume()
        # after the checkpoint, so that an image that is ahead shows
        await self.machine.qemu_io("disk0", f"write -P {pattern + 100} 8M 64k")
        return checkpoint

    async def committed(self, pattern: int) -> Checkpoint:
        checkpoint = await self.start(pattern)
        await checkpoint.finish()
        await checkpoint.commit()
        return checkpoint

    async def fail_over(self, checkpoints: Sequence[int]) -> int:
        """The primary's host dies; fail over, and compare the copy with the image kept."""
        await self.machine.kill()
        await self.primary.kill()
        await self.secondary.wait_until(lambda status: status["connection"] != "connected")
        answer = await self.backup.failover(checkpoints)
        assert await first_difference(self.scratch / "copy", self.images[answer.checkpoint]) is None
        return answer.checkpoint


@asynccontextmanager
async def a_pair(scratch: Path, *options: str) -> AsyncIterator[Rig]:
    """A pair, both of whose controllers get the options."""
    image = make_image(scratch / "disk0", SIZE)
    async with AsyncExitStack() as stack:
        targets = {"disk0": scratch / "copy"}
        secondary = await stack.enter_async_context(start_secondary(scratch, targets, options=options))
        rig: Rig | None = None

        async def hook(passing: Passing) -> None:
            if rig is not None:
                await rig.hook(passing)

        proxy = await stack.enter_async_context(start_frame_proxy(secondary.address, hook))
        machine = await stack.enter_async_context(start_machine(scratch, [Disk("disk0", image)]))
        primary = await stack.enter_async_context(
            start_primary(scratch, machine.qmp_path, proxy.address, interval_ms=None, options=options)
        )
        toolstack = await stack.enter_async_context(open_toolstack(primary.control))
        backup = await stack.enter_async_context(open_backup(secondary.control))
        rig = Rig(scratch, machine, primary, secondary, proxy, toolstack, backup)
        yield rig


async def test_what_is_out_of_order_or_repeated_is_answered_precisely_and_changes_nothing(scratch: Path) -> None:
    async with a_pair(scratch) as rig:
        await rig.ready()
        with pytest.raises(OutOfOrder, match="VM runs"):
            await rig.toolstack.start()
        for act in (rig.toolstack.finish, rig.toolstack.commit, rig.toolstack.abort):
            with pytest.raises(OutOfOrder, match="has not been started"):
                await act(77)
        first = await rig.start(1)
        await rig.machine.pause()
        with pytest.raises(OutOfOrder, match=f"epoch {first.epoch} is not committed yet"):
            await rig.toolstack.start()
        await rig.machine.resume()
        await first.finish()
        await first.finish()
        await first.commit()
        await rig.toolstack.commit(first.epoch)
        await rig.toolstack.finish(first.epoch)
        with pytest.raises(OutOfOrder, match="is committed"):
            await rig.toolstack.abort(first.epoch)
        second = await rig.start(2)
        await second.finish()
        await second.abort()
        await rig.toolstack.abort(second.epoch)
        with pytest.raises(OutOfOrder, match="was aborted"):
            await rig.toolstack.commit(second.epoch)
        assert (await rig.backup.status()).checkpoint.committed == first.epoch
        third = await rig.committed(3)
        assert await rig.machine.status() == "running"
        assert (await rig.primary.status())["replication"] == "protected"
        assert await rig.fail_over([third.epoch, first.epoch]) == third.epoch
        # asked again, it is answered as done; for another one it is refused
        assert (await rig.backup.failover([third.epoch])).checkpoint == third.epoch
        with pytest.raises(Refused, match="was decided already"):
            await rig.backup.failover([first.epoch])


async def test_a_commit_is_one_message_each_way(scratch: Path) -> None:
    async with a_pair(scratch) as rig:
        checkpoint = await rig.start(1)
        await checkpoint.finish()
        rig.seen.clear()
        await checkpoint.commit()
        assert [name for name in rig.seen if name != "Heartbeat"] == ["CommitEpoch", "Committed"]
        # and one sync of the journal: tests/test_storage_journal.py


@pytest.mark.parametrize("message", ["CommitEpoch", "Committed"])
async def test_a_commit_whose_answer_is_lost_is_in_doubt_until_the_secondary_was_asked(
    scratch: Path, message: str
) -> None:
    async with a_pair(scratch) as rig:
        await rig.committed(1)
        checkpoint = await rig.start(2)
        await checkpoint.finish()
        rig.cut_before = message
        with pytest.raises(CommitInDoubt, match="Repeat commit-epoch"):
            await rig.toolstack.commit(checkpoint.epoch, timeout=1)
        await rig.link_lost()
        with pytest.raises(CommitInDoubt, match="cannot be aborted"):
            await rig.toolstack.abort(checkpoint.epoch)
        rig.proxy.mend()
        await rig.toolstack.commit(checkpoint.epoch)
        assert (await rig.backup.status()).checkpoint.committed == checkpoint.epoch
        last = await rig.committed(3)
        assert await rig.fail_over([last.epoch]) == last.epoch


async def test_in_doubt_the_failover_takes_the_newest_whose_memory_there_is(scratch: Path) -> None:
    async with a_pair(scratch) as rig:
        first = await rig.committed(1)
        second = await rig.start(2)
        await second.finish()
        rig.cut_before = "CommitEpoch"
        with pytest.raises(CommitInDoubt):
            await rig.toolstack.commit(second.epoch, timeout=1)
        await rig.link_lost()
        await rig.machine.kill()
        with pytest.raises(Refused, match="none of the checkpoints") as refusal:
            await rig.backup.failover([second.epoch + 7])
        assert f"{first.epoch} (committed), {second.epoch} (staged)" in str(refusal.value)
        with pytest.raises(CommitInDoubt):
            await rig.backup.failover([])
        assert await rig.fail_over([second.epoch + 7, second.epoch, first.epoch]) == second.epoch


async def test_a_later_checkpoint_than_the_memory_is_given_up(scratch: Path) -> None:
    async with a_pair(scratch) as rig:
        first = await rig.committed(1)
        second = await rig.start(2)
        await second.finish()
        assert await rig.fail_over([first.epoch]) == first.epoch


async def test_a_staged_epoch_outlives_a_crash_of_the_secondary(scratch: Path) -> None:
    async with a_pair(scratch) as rig:
        first = await rig.committed(1)
        second = await rig.start(2)
        await second.finish()
        await rig.secondary.kill()
        port = int(rig.secondary.address.rpartition(":")[2])
        async with (
            start_secondary(scratch, {"disk0": scratch / "copy"}, port=port) as rig.secondary,
            open_backup(rig.secondary.control) as rig.backup,
        ):
            # memory 2 is complete: what was in doubt is committed now
            await rig.toolstack.commit(second.epoch)
            third = await rig.start(3)
            await third.finish()
            assert await rig.fail_over([third.epoch, second.epoch, first.epoch]) == third.epoch


async def test_the_first_epoch_can_be_failed_over_to_by_name_before_its_commit(scratch: Path) -> None:
    async with a_pair(scratch) as rig:
        first = await rig.start(1)
        await first.finish()
        assert await rig.fail_over([first.epoch]) == first.epoch


async def test_memory_that_arrives_commits_its_epoch_whatever_comes_first(scratch: Path) -> None:
    async with a_pair(scratch) as rig:
        await rig.committed(1)
        second = await rig.start(2)
        await second.finish()
        assert await rig.backup.memory_received(second.epoch)
        assert await rig.backup.memory_received(second.epoch)
        await second.commit()
        with pytest.raises(OutOfOrder, match="is committed"):
            await rig.toolstack.abort(second.epoch)
        # memory first, disks afterwards
        assert not await rig.backup.memory_received(second.epoch + 1)
        third = await rig.start(3)
        assert third.epoch == second.epoch + 1
        await rig.secondary.wait_until(lambda status: status["checkpoint"]["committed"] == third.epoch)
        await third.finish()
        await third.commit()
        assert await rig.fail_over([third.epoch]) == third.epoch


async def test_a_link_lost_on_the_way_loses_the_epoch_and_says_so(scratch: Path) -> None:
    async with a_pair(scratch) as rig:
        first = await rig.committed(1)
        rig.cut_before = "EpochEnd"
        second = await rig.start(2)
        await rig.link_lost()
        with pytest.raises(CommitInDoubt):
            # it may have arrived, as far as the primary can know
            await rig.toolstack.finish(second.epoch, timeout=1)
        with pytest.raises(OutOfOrder, match="not staged"):
            await rig.toolstack.commit(second.epoch)
        with pytest.raises(NotProtected):
            await rig.toolstack.prepare()
        assert await rig.machine.status() == "running"
        rig.proxy.mend()
        with pytest.raises(EpochLost, match=f"Drop the memory of checkpoint {second.epoch}"):
            await second.finish()
        with pytest.raises(EpochLost):
            await rig.toolstack.commit(second.epoch)
        third = await rig.committed(3)
        assert await rig.fail_over([third.epoch, first.epoch]) == third.epoch


async def test_a_time_out_changes_nothing_and_the_command_can_be_repeated(scratch: Path) -> None:
    # the secondary's silence is not to be taken for a lost link before the command is given
    async with a_pair(scratch, "--heartbeat-timeout", "60") as rig:
        await rig.committed(1)
        rig.secondary.process.signal(signal.SIGSTOP)
        second = await rig.start(2)
        with pytest.raises(TimedOut):
            await rig.toolstack.finish(second.epoch, timeout=0.3)
        assert await rig.machine.status() == "running"
        rig.secondary.process.signal(signal.SIGCONT)
        await rig.toolstack.finish(second.epoch)
        await rig.toolstack.commit(second.epoch)


async def test_a_restarted_primary_asks_the_secondary_what_became_of_an_epoch(scratch: Path) -> None:
    async with a_pair(scratch) as rig:
        await rig.committed(1)
        second = await rig.start(2)
        await second.finish()
        await rig.primary.kill()
        async with (
            start_primary(scratch, rig.machine.qmp_path, rig.proxy.address, interval_ms=None) as rig.primary,
            open_toolstack(rig.primary.control) as rig.toolstack,
        ):
            await rig.toolstack.commit(second.epoch)
            third = await rig.committed(3)
            assert await rig.fail_over([third.epoch]) == third.epoch


async def test_the_docs_shell_script_takes_a_checkpoint_with_qmp_shell(scratch: Path) -> None:
    shell = shutil.which("qmp-shell", path=str(Path(PROGRAM).parent))
    assert shell is not None
    text = (DOCS / "control.md").read_text(encoding="utf-8")
    scripts = [script for script in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if "qmp-shell" in script]
    assert len(scripts) == 1
    async with a_pair(scratch) as rig:
        await rig.ready()
        before = (await rig.backup.status()).checkpoint.committed or 0
        done = await run(
            ["sh", "-euc", scripts[0], "sh", str(rig.primary.control)],
            scratch=scratch,
            environment={"PATH": f"{Path(shell).parent}:/usr/bin:/bin"},
        )
        assert done.status == 0, done.err
        assert ((await rig.backup.status()).checkpoint.committed or 0) > before


async def test_a_shell_hook_drives_a_checkpoint_with_qemu_remus_epoch(scratch: Path) -> None:
    async with a_pair(scratch) as rig:
        await rig.ready()
        script = f"""
            control={rig.primary.control}
            {PROGRAM} epoch prepare --control $control
            n=$({PROGRAM} epoch start --pause --control $control)
            {PROGRAM} epoch finish $n --control $control
            {PROGRAM} epoch commit $n --control $control
            echo $n
        """
        done = await run(["sh", "-euc", script], scratch=scratch)
        assert done.status == 0, done.err
        number = int(done.out.split()[-1])
        assert (await rig.backup.status()).checkpoint.committed == number
        late = ["epoch", "abort", str(number), "--control", str(rig.primary.control)]
        assert (await qemu_remus(*late, scratch=scratch)).status == 4
