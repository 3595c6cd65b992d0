"""What the guest overwrites in one cluster after a checkpoint must not show in it, whatever its neighbours are.

The replication filter copies clusters of 64 KiB. QEMU before 8.0 (and Debian's 7.2.22) takes a part of a request for
not copied where a copied cluster and one that is not copied follow each other in it: it then reads what the guest has
written since, without an error. So a request of ours must stay within one cluster, for data and for status alike, and a
job's requests too. The same in an iothread: test_push.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.test_epoch_real import aside, attached, identity, image, put, same

KIB = 1 << 10
CLUSTER = 64 * KIB


@pytest.mark.parametrize("way", ["pull", "push"])
@pytest.mark.parametrize("overwrite", ["write -P 0x22", "write -z", "discard"])
@pytest.mark.parametrize("start", [0, 4 * KIB, 20 * KIB])
async def test_cluster_overwritten_before_it_is_read_is_as_at_the_checkpoint(
    scratch: Path, overwrite: str, start: int, way: str
) -> None:
    disk = image(scratch, "a", 4 << 20)
    async with attached(scratch, [disk], way) as rig:
        machine, attachment = rig.machine, rig.attachment
        await attachment.start_tracking(identity(1))
        # whole runs, so that reads cross clusters wherever they may, and zeroes, which are asked for before
        await machine.qemu_io("a", f"write -P 0x11 {start} 1M")
        await machine.qemu_io("a", f"write -z {start + 512 * KIB} 100k")
        await machine.qemu_io("a", f"write -P 0x33 {3 << 20} 12k")
        [now] = aside([disk], scratch, "now")
        [copy] = aside([disk], scratch, "copy")
        copy.write_bytes(b"\xaa" * (4 << 20))
        capture = await attachment.capture(identity(1), identity(2), pause=True)
        # every other cluster
        for at in range(0, 1 << 20, 2 * CLUSTER):
            await machine.qemu_io("a", f"{overwrite} {at} {CLUSTER}")
        async with attachment.read(capture) as batches:
            async for batch in batches:
                put([copy], batch)
        await attachment.release(capture)
    for path in (now, copy):
        # what was not written in the epoch is not in it
        with path.open("r+b") as file:
            file.write(bytes(start))
            file.seek(start + (1 << 20))
            file.write(bytes((3 << 20) - start - (1 << 20)))
            file.seek((3 << 20) + 12 * KIB)
            file.write(bytes((1 << 20) - 12 * KIB))
    assert same(now, copy)
