"""A VM with disks a and b on a fake QEMU of each age, and where its files go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.fake_qemu import VIRTIO, FakeQemu
from tests.qmp_validation import OLD_AND_NEW


@pytest.fixture(params=OLD_AND_NEW)
def qemu(request: pytest.FixtureRequest) -> Any:
    with FakeQemu(request.param) as fake:
        for name in "ab":
            fake.add_disk(f"{name}-node", VIRTIO.format(name))
        yield fake


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("r")


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the mock clock, which takes a wait for a thread for one that nobody ends, and jumps over it."""

    async def run_here(act: Callable[..., Any], *arguments: Any, **_: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return act(*arguments)

    monkeypatch.setattr(trio.to_thread, "run_sync", run_here)
