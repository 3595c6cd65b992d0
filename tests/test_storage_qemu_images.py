"""Making images, as far as no qemu-img is needed for it; the rest is integration/test_daemon_targets.py."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from qemu_remus.core.errors import TargetUnsuitable
from qemu_remus.storage import qemu_images


@pytest.mark.parametrize(("said", "tries"), [("Unable to get accurate CPU usage", 3), ("No such option", 1)])
def test_making_an_image_is_tried_again_only_where_the_host_was_too_busy_to_be_timed(
    monkeypatch: pytest.MonkeyPatch, said: str, tries: int
) -> None:
    commands: list[Sequence[str]] = []

    def run(command: Sequence[str], **_: object) -> str:
        commands.append(command)
        if len(commands) < 3:
            raise TargetUnsuitable(f"qemu-img refused: a: {said}")
        return ""

    monkeypatch.setattr(qemu_images, "run_program", run)
    if tries == 1:
        with pytest.raises(TargetUnsuitable, match=said):
            qemu_images._run_create(["qemu-img", "create"])
    else:
        qemu_images._run_create(["qemu-img", "create"])
    assert len(commands) == tries
