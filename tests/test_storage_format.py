"""The bytes on disk: golden vectors against the tables in ``storage/format.py``, and what becomes of other bytes.

The vectors are written out by hand from the tables, with a checksum of their own making; a change here is a change of
the format, and wants a new version number.
"""

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_remus.core.errors import FormatError
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import EpochNumber, Generation, PairName
from qemu_remus.storage import format as fmt
from qemu_remus.storage.format import RecordHeader, RecordType, SegmentHeader, Totals

GENERATION = Generation(UUID("00112233-4455-6677-8899-aabbccddeeff"))
PAIR = bytes.fromhex("0123456789abcdef")


def slow_crc32c(data: bytes) -> int:
    """Bit by bit, as RFC 3720 has it."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def le(value: int, size: int) -> bytes:
    return value.to_bytes(size, "little")


def test_checksum_is_crc32c() -> None:
    assert fmt.checksum(b"123456789") == 0xE3069283 == slow_crc32c(b"123456789")
    assert fmt.checksum(b"1234", bytearray(b"567"), memoryview(b"89")) == 0xE3069283


def test_segment_header_keeps_its_bytes() -> None:
    header = SegmentHeader(
        size=64 << 20,
        pair=PAIR,
        generation=GENERATION,
        incarnation=0x0102,
        first_sequence=0x0304,
        oldest=0x0101,
        committed=EpochNumber(7),
        highest_epoch=9,
    )
    head = b"QREMUSSG" + le(1, 4) + le(4096, 4) + le(64 << 20, 8) + PAIR + GENERATION.bytes
    head += le(0x0102, 8) + le(0x0304, 8) + le(0x0101, 8) + le(7, 8) + le(9, 8) + bytes(4)
    golden = head + le(slow_crc32c(head), 4)
    assert len(golden) == 96
    assert fmt.pack_segment_header(header) == golden
    assert fmt.unpack_segment_header(golden + bytes(100)) == header


def test_record_header_keeps_its_bytes() -> None:
    header = RecordHeader(
        type=RecordType.COMMIT,
        length=32,
        checksum=0xDEADBEEF,
        pair=PAIR,
        generation=GENERATION,
        epoch=5,
        incarnation=6,
        sequence=700,
        durable=699,
        offset=8192,
    )
    head = b"QREC" + b"\x03\x00" + bytes(2) + le(32, 4) + le(0xDEADBEEF, 4) + PAIR + GENERATION.bytes
    head += le(5, 8) + le(6, 8) + le(700, 8) + le(699, 8) + le(8192, 4)
    golden = head + le(slow_crc32c(head), 4)
    assert len(golden) == 80
    assert fmt.pack_record_header(header) == golden
    assert fmt.unpack_record_header(golden) == header


def test_record_types_keep_their_numbers() -> None:
    assert [(kind.name, kind.value) for kind in RecordType] == [
        ("EXTENTS", 1),
        ("END", 2),
        ("COMMIT", 3),
        ("ABORT", 4),
        ("TRIM", 5),
        ("DISKS", 6),
    ]


def test_extent_table_keeps_its_bytes() -> None:
    extents = (Extent(1, 4096, 3), Extent(2, 1 << 40, 1 << 33, zero=True))
    golden = le(2, 4) + le(0, 4)
    golden += le(1, 4) + le(0, 4) + le(4096, 8) + le(3, 8)
    golden += le(2, 4) + le(1, 4) + le(1 << 40, 8) + le(1 << 33, 8)
    assert fmt.pack_extents(extents) == golden
    found, data = fmt.unpack_extents(golden + b"abc")
    assert (found, bytes(data)) == (extents, b"abc")
    assert fmt.data_length(golden + b"abc") == (2, 3)


def test_totals_and_trim_keep_their_bytes() -> None:
    totals = Totals(EpochNumber(3), 4, 5, 0x01020304)
    golden = le(3, 8) + le(4, 8) + le(5, 8) + b"\x04\x03\x02\x01" + bytes(4)
    assert fmt.pack_totals(totals) == golden
    assert fmt.unpack_totals(golden) == totals
    assert fmt.unpack_totals(fmt.pack_totals(Totals(None, 0, 0, 0))).base is None
    assert fmt.pack_trim(258) == le(258, 8)
    assert fmt.unpack_trim(le(258, 8)) == 258


def test_document_keeps_its_bytes() -> None:
    head = b"QREMUSSB" + le(2, 4) + le(3, 4) + le(slow_crc32c(b"{}\n"), 4)
    golden = head + le(slow_crc32c(head), 4) + b"{}\n"
    assert fmt.pack_document(b"{}\n") == golden
    assert fmt.unpack_document(golden) == b"{}\n"


def test_documents_of_the_first_version_are_read() -> None:
    head = b"QREMUSSB" + le(1, 4) + le(3, 4) + le(slow_crc32c(b"{}\n"), 4)
    assert fmt.unpack_document(head + le(slow_crc32c(head), 4) + b"{}\n") == b"{}\n"


def test_a_table_of_disks_keeps_its_bytes() -> None:
    table = ((0, 512), (3, 1 << 40))
    golden = le(2, 4) + le(0, 4) + le(0, 4) + le(0, 4) + le(512, 8) + le(3, 4) + le(0, 4) + le(1 << 40, 8)
    assert fmt.pack_disks(table) == golden
    assert fmt.unpack_disks(golden) == table


@pytest.mark.parametrize("table", [((1, 512), (0, 512)), ((1, 512), (1, 1024)), ((0, 0),)])
def test_a_table_of_disks_that_contradicts_itself_is_refused(table: fmt.DiskTable) -> None:
    with pytest.raises(FormatError):
        fmt.unpack_disks(fmt.pack_disks(table))


def test_pair_hash_keeps_its_value() -> None:
    # printf vm1 | sha256sum
    assert fmt.pair_hash(PairName("vm1")).hex() == "7b11e3d1b4ef77af"


def test_digest_is_a_checksum_of_checksums() -> None:
    digest = fmt.extend_digest(fmt.extend_digest(0, 0x01020304), 5)
    assert digest == slow_crc32c(b"\x04\x03\x02\x01\x05\x00\x00\x00")


def test_only_records_behind_a_sync_start_a_new_block() -> None:
    for kind in (RecordType.EXTENTS, RecordType.DISKS):
        assert fmt.next_offset(kind, 4096, 1) == 4096 + 88
    for kind in (RecordType.END, RecordType.COMMIT, RecordType.ABORT, RecordType.TRIM):
        assert fmt.next_offset(kind, 4096, 32) == 8192


@pytest.mark.parametrize("position", range(96))
def test_no_changed_segment_header_is_taken_for_one(position: int) -> None:
    header = SegmentHeader(65536, PAIR, GENERATION, 1, 1, 1, None, 0)
    data = bytearray(fmt.pack_segment_header(header))
    data[position] ^= 0x10
    assert fmt.unpack_segment_header(bytes(data)) is None


@pytest.mark.parametrize("position", range(80))
def test_no_changed_record_header_is_taken_for_one(position: int) -> None:
    header = RecordHeader(RecordType.END, 32, 1, PAIR, GENERATION, 1, 1, 1, 1, 4096)
    data = bytearray(fmt.pack_record_header(header))
    data[position] ^= 0x10
    assert fmt.unpack_record_header(bytes(data)) is None


def test_segments_and_documents_of_another_version_are_refused_by_name() -> None:
    head = b"QREMUSSG" + le(2, 4) + le(4096, 4) + bytes(76)
    with pytest.raises(FormatError, match="version is 2"):
        fmt.unpack_segment_header(head + le(slow_crc32c(head), 4))
    head = b"QREMUSSB" + le(3, 4) + le(0, 4) + le(0, 4)
    with pytest.raises(FormatError, match="version is 3; this program reads versions 1 and 2"):
        fmt.unpack_document(head + le(slow_crc32c(head), 4))


extents_strategy = st.lists(
    st.builds(
        Extent,
        disk=st.integers(0, 2**32 - 1),
        offset=st.integers(0, 2**63),
        length=st.integers(1, 64),
        zero=st.booleans(),
    ),
    max_size=20,
)


@given(extents_strategy)
def test_extents_come_back_as_they_went(extents: list[Extent]) -> None:
    data = bytes(sum(extent.payload for extent in extents))
    found, found_data = fmt.unpack_extents(fmt.pack_extents(extents) + data)
    assert found == tuple(extents)
    assert bytes(found_data) == data


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_and_nothing_else(data: bytes) -> None:
    assert fmt.unpack_segment_header(data) is None
    assert fmt.unpack_record_header(data) is None
    for unpack in (fmt.unpack_document, fmt.unpack_extents, fmt.unpack_totals, fmt.unpack_trim, fmt.unpack_disks):
        try:
            unpack(data)
        except FormatError:
            continue
        # Totals and trim records have no redundancy of their own: their record's checksum is over them.
        assert unpack is not fmt.unpack_document
