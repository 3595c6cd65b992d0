"""What is ours in a QEMU is known again by its name, and nothing else is taken for ours."""

from __future__ import annotations

import re
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_remus.core.model import DiskName, EpochNumber, Generation, PairName
from qemu_remus.qemu.nodes import (
    NODE_NAME_LIMIT,
    BitmapIdentity,
    Kind,
    access_node,
    clashing,
    export_id,
    filter_node,
    fleece_node,
    is_ours,
    kind_of,
    live_export_id,
)

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", fullmatch=True)
pairs = names.map(PairName)
disks = names.map(DiskName)
epochs = st.integers(1, 10**18 - 1).map(EpochNumber)
identities = st.builds(
    BitmapIdentity, pairs, st.uuids().map(Generation), st.none() | epochs, epochs
)  # fmt: skip


@given(identities)
def test_a_bitmaps_name_says_its_whole_identity(identity: BitmapIdentity) -> None:
    assert BitmapIdentity.parse(identity.name) == identity
    assert is_ours(identity.name)
    assert is_ours(identity.name, identity.pair)
    # QEMU's limit is 1,023 bytes.
    assert len(identity.name) < 200


@given(identities, identities)
def test_different_bitmaps_have_different_names(one: BitmapIdentity, other: BitmapIdentity) -> None:
    assert (one.name == other.name) == (one == other)


def test_a_bitmaps_name_looks_as_documented() -> None:
    generation = Generation(UUID(int=0xABC))
    first = BitmapIdentity(PairName("web-1"), generation, None, EpochNumber(1))
    later = BitmapIdentity(PairName("web-1"), generation, EpochNumber(7), EpochNumber(12))
    assert first.name == "qemu-remus.web-1.00000000000000000000000000000abc.none.1"
    assert later.name == "qemu-remus.web-1.00000000000000000000000000000abc.7.12"


@given(pairs, disks, epochs)
def test_node_names_fit_qemu_are_distinct_and_known_again(pair: PairName, disk: DiskName, epoch: EpochNumber) -> None:
    made = {
        filter_node(pair, disk, epoch): Kind.FILTER,
        access_node(pair, disk, epoch): Kind.ACCESS,
        fleece_node(pair, disk): Kind.FLEECE,
        export_id(pair, disk, epoch): Kind.EXPORT,
        live_export_id(pair, disk): Kind.EXPORT,
    }
    assert len(made) >= 4
    for name, kind in made.items():
        assert len(name) <= NODE_NAME_LIMIT
        # What QEMU calls a well-formed id.
        assert re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]*", name)
        assert kind_of(name) is kind
        assert is_ours(name)
        assert is_ours(name, pair)


@given(pairs, pairs, disks, epochs)
def test_another_pairs_things_are_not_this_pairs(
    pair: PairName, other: PairName, disk: DiskName, epoch: EpochNumber
) -> None:
    if pair != other:
        assert not is_ours(filter_node(pair, disk, epoch), other)
        identity = BitmapIdentity(pair, Generation(UUID(int=1)), None, epoch)
        assert not is_ours(identity.name, other)


@given(pairs, disks, st.integers(1, 2**24))
def test_filters_of_neighbouring_epochs_never_share_a_name(pair: PairName, disk: DiskName, epoch: int) -> None:
    assert filter_node(pair, disk, EpochNumber(epoch)) != filter_node(pair, disk, EpochNumber(epoch + 1))


@given(st.text(max_size=80))
def test_any_text_is_parsed_or_not_ours(text: str) -> None:
    identity = BitmapIdentity.parse(text)
    assert identity is None or identity.name == text


@pytest.mark.parametrize(
    "name",
    [
        "",
        "qemu-remus",
        "qemu-remus-",
        "qemu-remus-backup",
        "qemu-remus-0123456789abcdef",
        "qemu-remus-01234567-x0123012345",
        "qemu-remus-01234567-f0123012345\n",
        "qemu-remus-01234567-f01230123456",
        "QEMU-remus-01234567-f0123012345",
        "libvirt-1-format",
        "#block123",
        "qemu-remus.p.00000000000000000000000000000abc.none.0",
        "qemu-remus.p.00000000000000000000000000000abc.0.1",
        "qemu-remus.p.00000000000000000000000000000ABC.none.1",
        "qemu-remus.p.abc.none.1",
        "qemu-remus.p.00000000000000000000000000000abc.none.01",
        "qemu-remus.p.00000000000000000000000000000abc.none.1 ",
        "qemu-remus..00000000000000000000000000000abc.none.1",
        "qemu-remus.a.b.00000000000000000000000000000abc.none.1",
    ],
)
def test_lookalikes_are_not_ours(name: str) -> None:
    assert not is_ours(name)
    assert kind_of(name) is None


def test_disks_whose_nodes_would_have_one_name_are_found() -> None:
    many = [DiskName(f"disk{number}") for number in range(2000)]
    clash = clashing(many)
    assert clash is not None
    one, other = clash
    assert one != other
    assert fleece_node(PairName("p"), one) == fleece_node(PairName("p"), other)
    assert clashing(many[:3]) is None
