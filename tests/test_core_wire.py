"""The wire format: golden bytes, every message there and back, limits on both sides, and hostile input.

A changed golden vector means that old and new releases no longer understand each other: raise ``VERSION`` with it.
"""

from __future__ import annotations

import struct
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_remus.core import messages as m
from qemu_remus.core import wire
from qemu_remus.core.checksum import crc32c
from qemu_remus.core.comparison import digest_blocks
from qemu_remus.core.errors import LocalProtocolError, RefusalCode, RemoteProtocolError, VersionMismatch
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import DiskName, DiskSpec, DiskState, EpochNumber, Generation, InstanceId, PairName, Role

from .message_strategies import epoch_extents, messages

E7 = EpochNumber(7)


def frame(message: m.Message, sequence: int = 0) -> bytes:
    return b"".join(wire.encode(message, sequence))


def read(raw: bytes) -> m.Message:
    header = wire.decode_header(raw[: wire.HEADER_SIZE])
    assert len(raw) == wire.HEADER_SIZE + header.length
    return wire.decode(header, raw[wire.HEADER_SIZE :])


def sealed(kind: int, payload: bytes, *, flags: int = 0, reserved: int = 0, sequence: int = 0) -> bytes:
    """A frame with any contents and right checksums, made without the code under test."""
    head = struct.pack(">4sBBHIIQ", b"QRMF", kind, flags, reserved, len(payload), crc32c(payload), sequence)
    return head + struct.pack(">I", crc32c(head)) + payload


HELLO = m.Hello(
    pair=PairName("vm"),
    role=Role.PRIMARY,
    instance=InstanceId(UUID("00112233-4455-6677-8899-aabbccddeeff")),
    session=3,
    generation=Generation(UUID("ffeeddcc-bbaa-9988-7766-554433221100")),
    disks=(DiskSpec(DiskName("vda"), 1 << 30, EpochNumber(4)), DiskSpec(DiskName("vdb"), 512, None)),
    committed=EpochNumber(4),
    staged=None,
    highest_epoch=6,
    disk_state=DiskState.UP_TO_DATE,
    history=((Generation(UUID(int=1)), EpochNumber(9)),),
    begun=0x65000000,
    decided=0x65000001,
)

GOLDEN = [
    (
        HELLO,
        1,
        (
            "02 766d 01 00112233445566778899aabbccddeeff 0000000000000003 ffeeddccbbaa99887766554433221100"
            "0002 03 766461 0000000040000000 0000000000000004 03 766462 0000000000000200 0000000000000000"
            "0000000000000004 0000000000000000 0000000000000006 03"
            "01 00000000000000000000000000000001 0000000000000009"
            "0000000065000000 0000000065000001"
        ),
    ),
    (
        m.Heartbeat(captured=EpochNumber(9), committed=E7, backlog=4096),
        2,
        "0000000000000009 0000000000000000 0000000000000007 0000000000000000 0000000000001000",
    ),
    (m.Goodbye(RefusalCode.FENCED, "späť"), 3, "06 66656e636564 0006 7370c3a4c5a5"),
    (
        m.SyncBegin(Generation(UUID(int=255)), (DiskSpec(DiskName("a"), 512),)),
        16,
        "000000000000000000000000000000ff 0001 01 61 0000000000000200 0000000000000000",
    ),
    (m.SyncReady((True, False)), 17, "0002 01 00"),
    (
        m.SyncExtents((Extent(0, 4096, 3), Extent(1, 0, 1 << 33, True)), b"abc"),
        18,
        (
            "0000000000000000 00000002 0000 0000 0000000000001000 0000000000000003"
            "0001 0001 0000000000000000 0000000200000000 616263"
        ),
    ),
    (
        m.SyncResume(Generation(UUID(int=5)), (DiskSpec(DiskName("a"), 512, None),)),
        70,
        "00000000000000000000000000000005 0001 01 61 0000000000000200 0000000000000000",
    ),
    (m.SyncResumed(True, 9, (True, False)), 71, "01 0000000000000009 0002 01 00"),
    (m.SyncFlush(2), 19, "0000000000000002"),
    (m.SyncFlushed(2), 20, "0000000000000002"),
    (m.EpochBegin(E7, None), 32, "0000000000000007 0000000000000000"),
    (
        m.EpochExtents(E7, (Extent(2, 512, 2),), b"hi"),
        33,
        "0000000000000007 00000001 0002 0000 0000000000000200 0000000000000002 6869",
    ),
    (
        m.EpochEnd(E7, 1, 2, 0xDEADBEEF, True),
        34,
        "0000000000000007 0000000000000001 0000000000000002 deadbeef 01",
    ),
    (m.EpochStaged(E7), 35, "0000000000000007"),
    (m.CommitEpoch(E7), 36, "0000000000000007"),
    (m.Committed(E7), 37, "0000000000000007"),
    (m.AbortEpoch(E7), 38, "0000000000000007"),
    (m.EpochAborted(E7), 39, "0000000000000007"),
    (m.EpochRefused(E7, RefusalCode.NO_SPACE, "full"), 40, "0000000000000007 08 6e6f2d7370616365 0004 66756c6c"),
    (
        m.CompareBlocks(1, 8192, 4096, digest_blocks(bytes(4097), 4096)),
        48,
        "0001 0000000000002000 00001000 5f6df6002bc71ca2d81a7492de37025d 7025e075d5e2f6cde3cc051a31f07660",
    ),
    (m.BlocksDiffer(1, 8192, b"\x02"), 49, "0001 0000000000002000 02"),
    (m.HandOver(E7, Generation(UUID(int=255))), 50, "0000000000000007 000000000000000000000000000000ff"),
    (m.HandedOver(E7, Generation(UUID(int=255))), 51, "0000000000000007 000000000000000000000000000000ff"),
    (m.HandoverRefused(E7, RefusalCode.PROTOCOL, "no"), 52, "0000000000000007 08 70726f746f636f6c 0002 6e6f"),
]


@pytest.mark.parametrize(("message", "kind", "payload"), GOLDEN, ids=[type(entry[0]).__name__ for entry in GOLDEN])
def test_bytes_of_every_message_stay_as_documented(message: m.Message, kind: int, payload: str) -> None:
    expected = sealed(kind, bytes.fromhex(payload), sequence=0x0102030405060708)
    assert frame(message, 0x0102030405060708) == expected
    assert read(expected) == message


def test_a_whole_frame_stays_as_documented() -> None:
    assert frame(m.Committed(E7), 1).hex(" ", -4) == (
        "51524d46 25000000 00000008 58e2d661 00000000 00000001 d11a393a 00000000 00000007"
    )


def test_every_message_has_a_golden_vector() -> None:
    assert {type(message) for message, _, _ in GOLDEN} == set(m.Message.__args__)


def test_checksum_is_the_castagnoli_one() -> None:
    # RFC 3720, appendix B.4
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"123456789") == 0xE3069283


@given(st.binary(max_size=200_000), st.integers(0, 200_000))
def test_checksum_is_the_same_in_pieces_and_from_any_kind_of_buffer(data: bytes, cut: int) -> None:
    whole = crc32c(data)
    assert crc32c(data[cut:], crc32c(data[:cut])) == whole
    assert crc32c(memoryview(data)) == crc32c(bytearray(data)) == whole


@given(messages, st.integers(0, 2**64 - 1))
def test_every_message_comes_back_as_it_was_sent(message: m.Message, sequence: int) -> None:
    raw = frame(message, sequence)
    assert wire.decode_header(raw[: wire.HEADER_SIZE]).sequence == sequence
    assert read(raw) == message


def test_data_are_neither_copied_when_sent_nor_when_received() -> None:
    data = memoryview(bytearray(100_000))
    pieces = wire.encode(m.EpochExtents(E7, (Extent(0, 0, 100_000),), data), 0)
    assert pieces[-1] is data
    raw = b"".join(pieces)
    payload = raw[wire.HEADER_SIZE :]
    message = wire.decode(wire.decode_header(raw[: wire.HEADER_SIZE]), payload)
    assert isinstance(message, m.EpochExtents)
    assert isinstance(message.data, memoryview)
    assert message.data.obj is payload


@given(st.lists(epoch_extents, max_size=4))
def test_digest_is_the_chained_checksum_of_the_payloads(sent: list[m.EpochExtents]) -> None:
    digest = 0
    payloads = b""
    for message in sent:
        digest = wire.digest_update(digest, message)
        payloads += frame(message)[wire.HEADER_SIZE :]
    assert digest == crc32c(payloads)


# --- limits ----------------------------------------------------------------------------------------------------------


def test_the_largest_payload_passes_and_one_byte_more_does_not() -> None:
    room = wire.PAYLOAD_LIMIT - 12 - 20
    largest = m.EpochExtents(E7, (Extent(0, 0, room),), bytes(room))
    assert read(frame(largest)) == largest
    with pytest.raises(LocalProtocolError, match="too big"):
        wire.encode(m.EpochExtents(E7, (Extent(0, 0, room + 1),), bytes(room + 1)), 0)


def test_the_longest_table_passes_and_one_entry_more_does_not() -> None:
    extents = tuple(Extent(0, 4096 * number, 4096, True) for number in range(wire.EXTENTS_LIMIT))
    longest = m.SyncExtents(extents, b"")
    assert read(frame(longest)) == longest
    with pytest.raises(LocalProtocolError, match="too many"):
        wire.encode(m.SyncExtents((*extents, Extent(0, 0, 1, True)), b""), 0)
    with pytest.raises(RemoteProtocolError, match="too many"):
        read(sealed(18, struct.pack(">QI", 0, wire.EXTENTS_LIMIT + 1) + bytes(20 * (wire.EXTENTS_LIMIT + 1))))


@pytest.mark.parametrize(("block_size", "blocks"), [(4096, 1024), (65536, 1024), (1 << 20, 64)])
def test_the_longest_question_about_blocks_passes(block_size: int, blocks: int) -> None:
    longest = m.CompareBlocks(255, block_size, block_size, bytes(range(16)) * blocks)
    assert read(frame(longest)) == longest
    answer = m.BlocksDiffer(255, block_size, b"\xff" * (blocks // 8))
    assert read(frame(answer)) == answer


@pytest.mark.parametrize(
    "message",
    [
        m.EpochBegin(EpochNumber(0), None),
        m.EpochBegin(EpochNumber(2**63), None),
        m.EpochBegin(E7, EpochNumber(0)),
        m.Heartbeat(backlog=-1),
        m.SyncReady((True,) * 257),
        m.SyncBegin(Generation(UUID(int=1)), HELLO.disks * 2),
        m.SyncBegin(Generation(UUID(int=1)), (DiskSpec(DiskName("no good"), 512),)),
        m.SyncBegin(Generation(UUID(int=1)), tuple(DiskSpec(DiskName(f"d{n}"), 512) for n in range(257))),
        m.EpochEnd(E7, 0, 0, 2**32, False),
        m.EpochExtents(EpochNumber(0), (), b""),
        m.EpochExtents(E7, (Extent(0, 0, 4),), b"123"),
        m.EpochExtents(E7, (Extent(0, 0, 4, True),), b"1234"),
        m.EpochExtents(E7, (Extent(256, 0, 1),), b"1"),
        m.EpochExtents(E7, (Extent(0, 0, 0),), b""),
        m.EpochExtents(E7, (Extent(0, -1, 1),), b"1"),
        m.EpochExtents(E7, (Extent(0, 2**63 - 1, 1),), b"1"),
        m.CompareBlocks(256, 0, 4096, bytes(16)),
        m.CompareBlocks(0, -4096, 4096, bytes(16)),
        m.CompareBlocks(0, 2048, 4096, bytes(16)),
        m.CompareBlocks(0, 2**63 - 4096, 4096, bytes(16)),
        m.CompareBlocks(0, 0, 2048, bytes(16)),
        m.CompareBlocks(0, 0, 2 << 20, bytes(16)),
        m.CompareBlocks(0, 0, 12288, bytes(16)),
        m.CompareBlocks(0, 0, 4096, b""),
        m.CompareBlocks(0, 0, 4096, bytes(17)),
        m.CompareBlocks(0, 0, 4096, bytes(1025 * 16)),
        m.CompareBlocks(0, 0, 1 << 20, bytes(65 * 16)),
        m.BlocksDiffer(0, 0, b""),
        m.BlocksDiffer(0, 0, bytes(129)),
        m.BlocksDiffer(256, 0, b"\x01"),
    ],
    ids=repr,
)
def test_what_breaks_a_limit_is_not_sent(message: m.Message) -> None:
    with pytest.raises(LocalProtocolError):
        wire.encode(message, 0)


_EXTENT = struct.Struct(">QIHHQQ")
_BLOCKS = struct.Struct(">HQI")


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (35, b""),
        (35, bytes(7)),
        (35, bytes(8)),  # epoch 0
        (35, struct.pack(">Q", 2**63)),
        (35, struct.pack(">Q", 7) + b"x"),
        (17, b"\x00\x01\x02"),  # neither true nor false
        (17, b"\xff\xff"),
        (17, struct.pack(">H", 257) + bytes(257)),
        (3, b"\x06fenced\x00\x02\xff\xfe"),  # no UTF-8
        (3, b"\x06fenced\x00\x01\x1b"),  # would reach a terminal
        (3, b"\x06fenced" + struct.pack(">H", 4097) + b"a" * 4097),
        (16, bytes(16) + b"\x00\x02" + (b"\x01a" + bytes(16)) * 2),  # two disks of one name
        (16, bytes(16) + b"\x00\x01\x03a\x00b" + bytes(16)),
        (16, bytes(16) + b"\x00\x01\x00" + bytes(16)),
        (16, bytes(16) + b"\x00\x01\x02\xc3\xa4" + bytes(16)),
        (33, bytes(11)),
        (33, struct.pack(">QI", 7, 1)),
        (33, struct.pack(">QI", 7, 2**32 - 1)),
        (33, struct.pack(">QI", 0, 0)),  # epoch 0
        (18, struct.pack(">QI", 7, 0)),  # an epoch in a sync
        (33, _EXTENT.pack(7, 1, 0, 0, 0, 4) + b"123"),
        (33, _EXTENT.pack(7, 1, 0, 0, 0, 2) + b"123"),
        (33, _EXTENT.pack(7, 1, 0, 1, 0, 3) + b"123"),
        (33, _EXTENT.pack(7, 1, 0, 2, 0, 3) + b"123"),  # an unknown flag
        (33, _EXTENT.pack(7, 1, 256, 0, 0, 3) + b"123"),
        (33, _EXTENT.pack(7, 1, 0, 0, 0, 0)),
        (33, _EXTENT.pack(7, 1, 0, 1, 2**63 - 1, 1)),
        (33, _EXTENT.pack(7, 1, 0, 1, 2**64 - 1, 2**64 - 1)),
        (48, _BLOCKS.pack(0, 0, 4096)),
        (48, _BLOCKS.pack(0, 0, 4096) + bytes(15)),
        (48, _BLOCKS.pack(0, 0, 4096) + bytes(1025 * 16)),
        (48, _BLOCKS.pack(0, 0, 1 << 20) + bytes(65 * 16)),
        (48, _BLOCKS.pack(0, 2048, 4096) + bytes(16)),
        (48, _BLOCKS.pack(0, 0, 6144) + bytes(16)),
        (48, _BLOCKS.pack(0, 0, 0) + bytes(16)),
        (48, _BLOCKS.pack(256, 0, 4096) + bytes(16)),
        (48, _BLOCKS.pack(0, 2**63 - 4096, 4096) + bytes(16)),
        (48, _BLOCKS.pack(0, 2**64 - 4096, 4096) + bytes(16)),
        (49, bytes(10)),
        (49, bytes(10 + 129)),
        (49, b"\x01\x00" + bytes(9)),
    ],
)
def test_a_payload_that_breaks_its_layout_is_refused(kind: int, payload: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        read(sealed(kind, payload))


@pytest.mark.parametrize(
    "raw",
    [
        sealed(35, bytes(8), flags=1),
        sealed(35, bytes(8), reserved=1),
        sealed(0, b""),
        sealed(41, b""),
        sealed(47, b""),
        sealed(53, b""),
        sealed(35, bytes(wire.CONTROL_LIMIT + 1)),
        sealed(33, bytes(wire.PAYLOAD_LIMIT + 1)),
        b"QRMG" + sealed(35, bytes(8))[4:],
    ],
    ids=["flags", "reserved", "type 0", "type 41", "type 47", "type 53", "long control", "long payload", "magic"],
)
def test_a_header_of_what_this_version_does_not_know_is_refused_before_its_payload_is_read(raw: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        wire.decode_header(raw[: wire.HEADER_SIZE])


def test_an_unknown_reason_for_a_goodbye_is_read_by_its_text() -> None:
    assert read(sealed(3, b"\x03new\x00\x03why")) == m.Goodbye(RefusalCode.PROTOCOL, "why")


def test_a_reason_is_cut_and_cleaned_rather_than_lost() -> None:
    long = m.EpochRefused(E7, RefusalCode.NO_SPACE, "ä" * 3000)
    assert read(frame(long)) == m.EpochRefused(E7, RefusalCode.NO_SPACE, "ä" * 2048)
    dirty = m.Goodbye(RefusalCode.NO_SPACE, "disk \x1b[31m\udcff\x9b is full\nfree some")
    assert read(frame(dirty)) == m.Goodbye(RefusalCode.NO_SPACE, "disk  [31m?  is full\nfree some")


def test_a_long_history_is_cut_to_its_newest_part() -> None:
    ended = tuple((Generation(UUID(int=number)), EpochNumber(number)) for number in range(1, 50))
    hello = m.Hello(PairName("vm"), Role.SECONDARY, HELLO.instance, 1, None, (), None, None, 0, DiskState.FAILED, ended)
    received = read(frame(hello))
    assert isinstance(received, m.Hello)
    assert received.history == ended[-32:]


# --- hostile input ---------------------------------------------------------------------------------------------------


@given(messages, st.data())
def test_any_flipped_bit_is_a_protocol_error(message: m.Message, data: st.DataObject) -> None:
    raw = bytearray(frame(message))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(RemoteProtocolError):
        read(bytes(raw))


@given(st.sampled_from([*range(1, 4), *range(16, 21), *range(32, 41), 48, 49, 70, 71]), st.binary(max_size=200))
def test_any_payload_parses_to_what_would_be_sent_or_is_a_protocol_error(kind: int, payload: bytes) -> None:
    raw = sealed(kind, payload)
    try:
        message = read(raw)
    except RemoteProtocolError:
        return
    if not isinstance(message, m.Goodbye | m.EpochRefused):  # unknown codes are read as one known
        assert frame(message) == raw


@given(st.binary(min_size=wire.HEADER_SIZE, max_size=wire.HEADER_SIZE))
def test_any_header_parses_or_is_a_protocol_error(raw: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        wire.decode_header(raw)


# --- the banner ------------------------------------------------------------------------------------------------------


def test_the_banner_is_a_readable_line_and_is_found_in_any_pieces() -> None:
    assert wire.BANNER == b"QEMU-REMUS/1 replication\r\n"
    for length in range(len(wire.BANNER)):
        assert wire.parse_banner(wire.BANNER[:length]) is None
    assert wire.parse_banner(wire.BANNER + b"QRMF") == len(wire.BANNER)


@pytest.mark.parametrize("banner", [b"QEMU-REMUS/2 replication\r\n", b"QEMU-REMUS/9999\n", b"QEMU-REMUS/2 x y z\r\n"])
def test_another_version_is_named_together_with_ours(banner: bytes) -> None:
    with pytest.raises(VersionMismatch, match=r"version (2|9999) .* version 1"):
        wire.parse_banner(banner)


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n",
        b"\x16\x03\x01\x02\x00",
        b"SSH-2.0-x\r\n",
        b"Q\x1b[2J",
        b"QEMU-REMUS/1 control\r\n",
        b"QEMU-REMUS/one replication\r\n",
        b"QEMU-REMUS/1 replication\n",
        b"QEMU-REMUS/" + b"1" * 64,
    ],
)
def test_garbage_is_refused_and_shown_in_a_way_that_no_terminal_minds(garbage: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        wire.parse_banner(garbage)
    assert not isinstance(caught.value, VersionMismatch)
    assert repr(garbage[:32]) in str(caught.value)
    assert str(caught.value).isprintable()


@given(st.binary(max_size=100) | st.binary(max_size=60).map(lambda tail: b"QEMU-REMUS/" + tail))
def test_any_first_line_is_a_banner_needs_more_or_is_a_protocol_error(raw: bytes) -> None:
    try:
        length = wire.parse_banner(raw)
    except RemoteProtocolError:
        return
    if length is None:
        assert len(raw) < wire.BANNER_LIMIT
    else:
        assert raw[:length] == wire.BANNER
