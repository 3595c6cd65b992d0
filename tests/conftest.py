"""What all tests share. Rules: no QEMU, no network beyond loopback, no sleep as synchronisation, no file outside
``tmp_path``; time is the mock clock's."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

# What fails in a helper is shown with its values, as what fails in a test is.
pytest.register_assert_rewrite(
    *("tests.core_connection.pair", "tests.epoch.rig", "tests.guardian.rig", "tests.link.peers"),
    *("tests.primary_machine.states", "tests.secondary_machine.states", "tests.storage_recovery.journals"),
    *("tests.fake_block", "tests.fake_push", "tests.fake_qemu", "tests.simulation"),
)

# One machine runs everything: time limits per example would fail for the neighbours' load.
settings.register_profile("quick", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("long", settings.get_profile("quick"), max_examples=1000)
settings.load_profile(os.environ.get("QEMU_REMUS_HYPOTHESIS", "quick"))


@pytest.fixture(autouse=True, scope="session")
def _signals() -> None:
    """What is ignored here would be ignored by every process of a test: under nohup, or in a shell's background."""
    for number, action in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, action)
