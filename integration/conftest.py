"""Fixtures of the integration tests. Without QEMU they are skipped, saying so; under CI=true they fail instead.

They run with the installed QEMU, or with what ``--qemu`` names. A test that is marked ``every_qemu`` runs with each of
:data:`integration.qemus.RELEASES` instead; where one of those cannot be had it is skipped, also under CI.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from integration.guest.build import GuestImage, guest_image
from integration.matrix import SEED, SEED_VARIABLE
from integration.qemus import INSTALLED, RELEASES, Qemu, QemuUnavailable, find, use

_HERE = Path(__file__).parent

#: Files of a failed test's scratch directory whose ends are shown with its report.
_LOGS = ("log", "out", "console")
_LOG_LINES = 60


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--qemu``."""
    parser.addoption(
        "--qemu",
        default=INSTALLED,
        metavar="NAME",
        help=f"run with this QEMU: {', '.join(RELEASES)}, or the path of a qemu-system-x86_64; by default the installed"
        " one, and the tests that are marked every_qemu with each of these",
    )


def pytest_report_header() -> str:
    """What repeats this run's random choice of cells of the kill matrix."""
    return f"kill matrix: {SEED_VARIABLE}={SEED}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what is marked ``every_qemu`` with each QEMU, or with the one that ``--qemu`` names.

    The mark's argument ``slow`` names those with which it is left to ``make check-all``; ``others`` stands for all but
    the installed one's.
    """
    marker = metafunc.definition.get_closest_marker("every_qemu")
    if marker is None or metafunc.config.getoption("--qemu") != INSTALLED:
        return
    slow = marker.kwargs.get("slow", ())
    names = [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in RELEASES]
    metafunc.parametrize("qemu", names, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test in this directory needs a real QEMU."""
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker("qemu")


@pytest.fixture(autouse=True)
def qemu(request: pytest.FixtureRequest) -> Iterator[Qemu]:
    """The QEMU that every machine of the test is started with."""
    asked: str | None = getattr(request, "param", None)
    name = asked or request.config.getoption("--qemu")
    try:
        find(name)
    except QemuUnavailable as error:
        if os.environ.get("CI") == "true" and asked is None:
            pytest.fail(str(error))
        pytest.skip(str(error))
    with use(name) as found:
        yield found


@pytest.fixture(autouse=True, scope="session")
def _signals() -> None:
    """What is ignored here would be ignored by every controller: under nohup, or in a shell's background."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


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
