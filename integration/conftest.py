"""Fixtures of the integration tests. Without QEMU they are skipped, saying so; under CI=true they fail instead."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from integration.guest.build import GuestImage, guest_image
from integration.machine import QEMU

_HERE = Path(__file__).parent

#: Files of a failed test's scratch directory whose ends are shown with its report.
_LOGS = ("log", "out", "console")
_LOG_LINES = 60


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test in this directory needs a real QEMU."""
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker("qemu")


@pytest.fixture(autouse=True, scope="session")
def _qemu() -> None:
    if shutil.which(QEMU) is None:
        text = f"{QEMU} is not installed; `make check` installs it, and so does integration/setup.sh qemu"
        if os.environ.get("CI") == "true":
            pytest.fail(text)
        pytest.skip(text)


@pytest.fixture(scope="session")
def guest() -> GuestImage:
    """The guest to boot."""
    return guest_image()


@pytest.fixture
def scratch() -> Iterator[Path]:
    """An empty directory with a path short enough for sockets, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="qr-") as path:
        yield Path(path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the logs of what a failed test had started."""
    report = yield
    scratch = getattr(item, "funcargs", {}).get("scratch")
    if report.failed and call.when == "call" and isinstance(scratch, Path):
        for path in sorted(scratch.rglob("*")):
            if path.name in _LOGS and path.is_file() and (lines := path.read_text(errors="replace").splitlines()):
                report.sections.append((str(path.relative_to(scratch)), "\n".join(lines[-_LOG_LINES:])))
    return report
