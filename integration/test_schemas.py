"""Each QEMU's own schema is the captured one, and every command that we can build is one that it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.harness import qemu_remus, start_machine
from integration.qemus import Qemu
from qemu_remus.qemu.capabilities import Capabilities
from qemu_remus.qemu.schema import parse
from tests.qmp_validation import SCHEMAS, Validator, captured
from tests.test_qemu_commands import COMMANDS, SENT_WHERE

pytestmark = pytest.mark.every_qemu


async def test_probe_captures_the_schema_that_is_kept_here(scratch: Path, qemu: Qemu) -> None:
    async with start_machine(scratch, [], accelerator="tcg", memory_mb=32) as machine:
        file = scratch / "schema"
        done = await qemu_remus("probe", "--qmp", str(machine.qmp_path), "--capture", str(file), scratch=scratch)
    assert str(qemu) in done.check().out
    found = parse(file.read_text())
    assert found.version == qemu.version
    assert found.machine.startswith("pc-i440fx-")

    capabilities = Capabilities.from_schema(found.entries, found.version)
    capabilities.require()
    validator = Validator(found)
    for command in COMMANDS:
        if command.name not in SENT_WHERE or SENT_WHERE[command.name](capabilities):
            validator.command(command.name, dict(command.arguments))

    kept = SCHEMAS / "qemu-{}.{}.json".format(*qemu.version)
    if not kept.exists():
        pytest.skip(f"QEMU {qemu} takes all our commands; its schema is not captured yet: qmp_schemas/README.md")
    if captured(kept).package == found.package:
        assert captured(kept).entries == found.entries
