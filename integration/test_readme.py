"""The README's tour, command by command, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

from integration.controller import PROGRAM, free_port
from integration.images import first_difference
from integration.process import run

README = Path(__file__).parent.parent / "README.md"

SCRIPT = """
set -eu
PATH={bin}:$PATH
{start}
vm=$!
started=$vm
trap 'kill -9 $vm 2>/dev/null || true; kill $started 2>/dev/null || true; wait' EXIT
until [ -S /tmp/vm-remus.qmp ]; do kill -0 $vm; sleep 0.05; done
{probe}
{secondary} &
started="$started $!"
{primary} &
started="$started $!"
tries=0
until {status} >/dev/null 2>&1; do tries=$((tries + 1)); [ $tries -lt 100 ]; done
kill -9 $vm
until {failover}; do tries=$((tries + 1)); [ $tries -lt 200 ]; done
"""


def tour() -> list[str]:
    """The commands of the tour's code blocks."""
    section = README.read_text().split("## Five minutes with two terminals")[1].split("\n## ")[0]
    return re.findall(r"```sh\n(.*?)```", section, re.DOTALL)


async def test_the_tour_of_the_readme_protects_a_vm_and_fails_over(scratch: Path) -> None:
    start, probe, secondary, primary, rest = (block.strip() for block in tour())
    status, kill, failover = rest.splitlines()
    assert "kill -9" in kill
    assert start.startswith("make && . .venv/bin/activate\n")
    script = SCRIPT.format(
        bin="@BIN@",
        start=start.removeprefix("make && . .venv/bin/activate\n"),
        probe=probe,
        secondary=secondary,
        primary=primary,
        status=status.removesuffix(" --watch"),
        failover=failover,
    )
    script = script.replace("/tmp/", f"{scratch}/").replace("7789", str(free_port()))
    script = script.replace("@BIN@", str(Path(PROGRAM).parent))
    done = await run(["bash", "-c", script], scratch=scratch, timeout=120)
    done.check()
    assert await first_difference(scratch / "vm.img", scratch / "copy.img") is None
