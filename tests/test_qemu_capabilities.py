"""What a QEMU can do is read from its schema; what it does wrong from the table of faults."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from qemu_remus.core.errors import CapabilityMissing
from qemu_remus.qemu.capabilities import NEEDED, OPTIONAL, PUSH, Capabilities, Feature, query_capabilities, query_schema
from qemu_remus.qemu.faults import FAULTS, Fault, has_fault, row_of
from qemu_remus.qemu.schema import Schema
from tests.fake_qemu import FakeQemu
from tests.qmp_validation import QEMU_SCHEMAS, captured, load

SCHEMA_7_2 = load(QEMU_SCHEMAS[0])

OPTIONAL_IN = {
    "qemu-7.2": {Feature.CBW_TIMEOUT, Feature.BLOCK_GRAPH},
    "qemu-10.0": {Feature.CBW_TIMEOUT, Feature.BLOCK_GRAPH},
    "qemu-11.1": {Feature.CBW_TIMEOUT, Feature.BLOCK_GRAPH, Feature.NODE_CHILDREN, Feature.ACCELERATORS},
}
"""What of that which we use if it is there each captured QEMU has."""


def without_member(owner_path: tuple[str, str, str], member: str) -> list[dict[str, Any]]:
    """The schema without a member of one variant of a command's argument."""
    command, tag_case, _ = owner_path
    entries = copy.deepcopy(SCHEMA_7_2)
    by_name = {entry["name"]: entry for entry in entries}
    variants = by_name[by_name[command]["arg-type"]]["variants"]
    target = by_name[next(variant["type"] for variant in variants if variant["case"] == tag_case)]
    assert member in [entry["name"] for entry in target["members"]]
    target["members"] = [entry for entry in target["members"] if entry["name"] != member]
    return entries


@pytest.mark.parametrize(
    ("path", "there"),
    [
        ("blockdev-add", True),
        ("blockdev-ad", False),
        ("blockdev-add/arg-type/node-name", True),
        ("blockdev-add/arg-type/discard/^unmap", True),
        ("blockdev-add/arg-type/discard/^sometimes", False),
        ("blockdev-add/arg-type/+copy-before-write", True),
        ("blockdev-add/arg-type/+copy-before-write/on-cbw-error/^break-snapshot", True),
        ("blockdev-add/arg-type/+copy-before-write/min-cluster-size", False),
        ("blockdev-add/arg-type/+copy-after-write", False),
        ("block-export-add/arg-type/+nbd/bitmaps/node", True),
        ("block-export-add/arg-type/+nbd/bitmaps/owner", False),
        ("query-named-block-nodes/ret-type/dirty-bitmaps/recording", True),
        ("query-named-block-nodes/ret-type/children", False),
        ("transaction/arg-type/actions/+block-dirty-bitmap-merge/data/target", True),
        ("STOP/arg-type", True),
        ("STOP/ret-type", False),
    ],
)
def test_a_path_leads_where_the_schema_goes(path: str, there: bool) -> None:
    assert Schema(SCHEMA_7_2).has(path) is there


@pytest.mark.parametrize(
    ("path", "there"),
    [
        ("query-kvm/$deprecated", True),
        ("query-block/$deprecated", False),
        ("block-job-cancel/arg-type/device/$deprecated", False),
        ("blockdev-snapshot-internal-sync/arg-type/$deprecated", False),
        ("eject/arg-type/device/$deprecated", True),
        ("eject/arg-type/id/$deprecated", False),
        ("x-debug-query-block-graph/$unstable", True),
        ("BLOCK_EXPORT_DELETED/arg-type/id", True),
    ],
)
def test_a_path_tells_the_features_of_what_it_leads_to(path: str, there: bool) -> None:
    assert Schema(load(QEMU_SCHEMAS[-1])).has(path) is there


@pytest.mark.parametrize("path", QEMU_SCHEMAS, ids=lambda path: path.stem)
def test_every_captured_qemu_has_all_that_is_needed(path: Path) -> None:
    schema = captured(path)
    capabilities = Capabilities.from_schema(schema.entries, schema.version)
    capabilities.require()
    assert {feature for feature in OPTIONAL if feature in capabilities} == OPTIONAL_IN[path.stem] | PUSH
    assert capabilities.cbw_timeout
    assert path.stem == "qemu-{}.{}".format(*schema.version)


def test_no_captured_qemu_older_than_a_feature_has_it() -> None:
    for path in QEMU_SCHEMAS:
        schema = captured(path)
        for feature in Feature:
            since = tuple(int(part) for part in feature.since.split("."))
            assert Schema(schema.entries).has(feature.path) is (schema.version[:2] >= since), feature


def test_a_missing_feature_is_named_with_what_it_is_for() -> None:
    schema = without_member(("blockdev-add", "copy-before-write", ""), "on-cbw-error")
    capabilities = Capabilities.from_schema(schema, (7, 0, 0))
    with pytest.raises(CapabilityMissing) as caught:
        capabilities.require()
    text = str(caught.value)
    assert "QEMU 7.0.0 lacks blockdev-add/arg-type/+copy-before-write/on-cbw-error" in text
    assert "7.1 or later" in text
    assert Feature.FILTER_BITMAP.path not in text


def test_an_optional_feature_may_be_missing() -> None:
    schema = without_member(("blockdev-add", "copy-before-write", ""), "cbw-timeout")
    capabilities = Capabilities.from_schema(schema, (7, 1, 0))
    capabilities.require()
    assert not capabilities.cbw_timeout
    with pytest.raises(CapabilityMissing, match="cbw-timeout"):
        capabilities.require(Feature.CBW_TIMEOUT)


def test_features_are_decided_by_the_schema_and_not_by_the_version() -> None:
    assert Capabilities.from_schema(SCHEMA_7_2, (2, 0, 0)).features == Capabilities.from_schema(
        SCHEMA_7_2, (99, 0, 0)
    ).features  # fmt: skip
    with pytest.raises(CapabilityMissing):
        Capabilities.from_schema([], (99, 0, 0)).require()


@pytest.mark.parametrize(
    ("version", "safe"), [((7, 2, 22), False), ((9, 2, 4), False), ((10, 0, 0), True), ((11, 1, 3), True)]
)
def test_pulling_from_an_iothread_is_safe_from_10_0_on(version: tuple[int, int, int], safe: bool) -> None:
    capabilities = Capabilities.from_schema(SCHEMA_7_2, version)
    assert capabilities.pull_safe_in_iothread is safe
    assert capabilities.has_fault(Fault.IOTHREAD_STOP_TCG) is safe


def test_every_fault_has_its_evidence_and_every_feature_a_purpose() -> None:
    assert [row.fault for row in FAULTS] == list(Fault)
    assert all(row.evidence and row.what and row.instead for row in FAULTS)
    assert row_of(Fault.SAME_DRIVE) in FAULTS
    assert set(NEEDED) | OPTIONAL == set(Feature)
    assert all(feature.purpose and feature.since for feature in Feature)
    assert all(feature.without for feature in OPTIONAL)


@pytest.mark.parametrize(
    ("version", "there"), [((7, 1, 0), True), ((7, 2, 22), True), ((8, 0, 0), False), ((10, 0, 13), False)]
)
def test_a_fault_has_a_first_version_and_one_that_has_it_no_more(version: tuple[int, int, int], there: bool) -> None:
    assert has_fault(version, Fault.SNAPSHOT_CLUSTERS) is there
    assert has_fault(version, Fault.SAME_DRIVE)


def test_a_qemu_without_jobs_in_clusters_has_no_push() -> None:
    capabilities = Capabilities.from_schema(SCHEMA_7_2, (7, 2, 22))
    assert capabilities.push
    capabilities.require()
    less = Capabilities((7, 2, 22), capabilities.features - {Feature.BACKUP_CHUNK})
    assert not less.push
    less.require()


async def test_capabilities_are_asked_of_the_qemu_that_runs() -> None:
    with FakeQemu() as fake:
        async with fake.connect() as client:
            capabilities = await query_capabilities(client)
    assert capabilities.version == (7, 2, 22)
    capabilities.require()


async def test_the_schema_of_the_qemu_that_runs_can_be_kept() -> None:
    with FakeQemu() as fake:
        async with fake.connect() as client:
            kept = await query_schema(client)
    assert kept.entries == captured(QEMU_SCHEMAS[0]).entries
    assert (kept.version, kept.package, kept.machine) == ((7, 2, 22), "fake", "pc-q35-7.2")
