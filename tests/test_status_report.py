"""The report as data: its JSON contract, and the statistics in it."""

import json
import re
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_remus.core.model import Connection, DiskName, DiskState, EpochNumber, Generation, PairName, Replication, Role
from qemu_remus.core.report import (
    Checkpoints,
    DiskRange,
    DiskReport,
    EpochCounts,
    FailoverReport,
    Pause,
    PauseStatistics,
    Report,
    SyncMeter,
    SyncProgress,
    VerifyReport,
    VerifyState,
)

DOCUMENT = Path(__file__).parent.parent / "docs" / "status.md"

FULL = Report(
    pair=PairName("vm"),
    role=Role.SECONDARY,
    connection=Connection.STANDALONE,
    disk=DiskState.CONSISTENT,
    replication=Replication.DEGRADED,
    reason="the link was lost",
    generation=Generation(UUID(int=5)),
    peer="10.0.0.2:7400",
    checkpoint=Checkpoints(EpochNumber(9), EpochNumber(8), EpochNumber(7), EpochNumber(6), 1.5, EpochNumber(8)),
    dirty_bytes=1,
    backlog_bytes=2,
    pause=Pause(1.0, 2.0, 3.0, 4),
    epochs=EpochCounts(9, 7, 1),
    bytes_sent=3,
    bytes_received=4,
    sync=SyncProgress(1, 2, 3.0, 4.0),
    verify=VerifyReport(
        1,
        VerifyState.FAILED,
        True,
        (DiskName("disk0"),),
        512,
        1024,
        differing_ranges=1,
        differing_bytes=512,
        ranges=(DiskRange(DiskName("disk0"), 0, 512),),
        reason="the disk cannot be read",
        ended_age_seconds=4.5,
    ),
    disks=(DiskReport(DiskName("disk0"), 512, "node0", "/srv/disk0"),),
    failover=FailoverReport(EpochNumber(7), False),
    version="1.2.3",
)


def keys(value: Any, prefix: str = "") -> set[str]:
    if isinstance(value, list):
        return {key for item in value for key in keys(item, prefix)}
    if not isinstance(value, dict):
        return set()
    return {prefix + key for key in value} | {
        key for name, item in value.items() for key in keys(item, f"{prefix}{name}.")
    }


def test_a_report_survives_its_json() -> None:
    assert Report.from_json(json.loads(json.dumps(FULL.to_json()))) == FULL


def test_members_of_a_later_version_are_ignored_and_missing_ones_have_defaults() -> None:
    value = {**FULL.to_json(), "a-later-one": {"x": 1}}
    value["checkpoint"] = {**value["checkpoint"], "verified": 3}
    del value["epochs"]
    report = Report.from_json(value)
    assert report.checkpoint == FULL.checkpoint
    assert report.epochs == EpochCounts()


def test_what_is_no_report_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        Report.from_json({"pair": "vm"})


def test_nothing_known_is_null_and_never_missing() -> None:
    bare = Report(
        PairName("vm"), Role.PRIMARY, Connection.CONNECTING, DiskState.INCONSISTENT, Replication.OFF
    ).to_json()
    assert keys(bare) == {
        key for key in keys(FULL.to_json()) if not key.startswith(("sync.", "verify.", "disks.", "failover."))
    }
    assert bare["checkpoint"]["committed"] is None
    assert bare["pause"]["last-ms"] is None
    assert bare["sync"] is None


def test_every_key_is_documented_and_every_documented_key_exists() -> None:
    members = DOCUMENT.read_text().split("## Members")[1]
    documented = set(re.findall(r"^\| `([a-z0-9.-]+)` \|", members, re.MULTILINE))
    assert documented == keys(FULL.to_json())


def test_the_documents_example_is_a_report() -> None:
    (example,) = re.findall(r"```json\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    value = json.loads(example)
    assert Report.from_json(value).to_json() == value


def test_every_state_is_documented() -> None:
    text = DOCUMENT.read_text()
    for enum in (Role, Connection, DiskState, Replication):
        for member in enum:
            assert f"`{member}`" in text


@pytest.mark.parametrize(
    ("replication", "protected"),
    [(each, each in (Replication.PROTECTED, Replication.VERIFYING)) for each in Replication],
)
def test_only_protected_and_verifying_count_as_protected(replication: Replication, protected: bool) -> None:
    report = Report(PairName("vm"), Role.PRIMARY, Connection.CONNECTED, DiskState.UP_TO_DATE, replication)
    assert report.protected is protected


def test_no_pause_has_no_statistics() -> None:
    assert PauseStatistics().report() == Pause(None, None, None, 0)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=60), st.integers(1, 20))
def test_pause_statistics_are_of_the_newest_window_and_the_count_is_of_all(seconds: list[float], window: int) -> None:
    statistics = PauseStatistics(window)
    for each in seconds:
        statistics.add(each)
    newest = sorted(seconds[-window:])
    report = statistics.report()
    assert report.count == len(seconds)
    assert report.last_ms == round(seconds[-1] * 1000, 3)
    assert report.median_ms is not None
    assert report.p99_ms is not None
    below = sum(each <= report.median_ms / 1000 + 1e-6 for each in newest)
    assert below * 2 >= len(newest)
    assert report.median_ms <= report.p99_ms <= round(newest[-1] * 1000, 3)


def test_the_p99_is_not_the_worst_of_many() -> None:
    statistics = PauseStatistics()
    for milliseconds in range(1, 201):
        statistics.add(milliseconds / 1000)
    assert statistics.report() == Pause(last_ms=200.0, median_ms=100.0, p99_ms=198.0, count=200)


def test_a_sync_at_a_steady_rate_says_when_it_will_be_done() -> None:
    meter = SyncMeter(1000)
    assert meter.update(0.0, 0) == SyncProgress(0, 1000, 0.0, None)
    assert meter.update(2.0, 100) == SyncProgress(100, 1000, 50.0, 18.0)


def test_the_rate_of_a_sync_forgets_what_was_long_ago() -> None:
    meter = SyncMeter(10_000, window=10.0)
    for second in range(30):
        progress = meter.update(float(second), 100 * min(second, 10))
    assert progress.bytes_per_second == 0.0
    assert progress.seconds_left is None


def test_a_sync_that_is_done_has_no_time_left() -> None:
    meter = SyncMeter(100)
    meter.update(0.0, 0)
    assert meter.update(1.0, 100).seconds_left == 0.0
    assert SyncMeter(0).update(0.0, 0).seconds_left == 0.0


def test_a_meter_asked_ten_thousand_times_a_second_stays_small() -> None:
    meter = SyncMeter(10**9)
    for tick in range(200_000):
        meter.update(tick / 10_000, tick)
    assert len(meter._samples) < 60
