"""The NBD session against a fake server, without I/O: what it understands, refuses and never exceeds."""

from __future__ import annotations

import contextlib
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qemu_remus.core.errors import InternalError, NbdProtocolError
from qemu_remus.nbd.protocol import (
    ALLOCATION,
    OWED_BUDGET,
    STATUS_EXTENTS,
    Event,
    NbdSession,
    Negotiated,
    ReadReply,
    RequestError,
    StatusReply,
    dirty_context,
    read_cost,
    status_cost,
)
from tests.nbd_server import Behaviour, Connection, FakeDisk

CONTENTS = random.Random(1).randbytes(60_000) + bytes(4096) + b"end!"
DIRTY = [(4096, 1), (8192, 0), (len(CONTENTS) - 12288, 1)]
ALLOCATED = [(60_000, 0), (4096, 3), (4, 0)]
DIRTY_B0 = dirty_context("b0")


def a_disk(**behaviour: object) -> FakeDisk:
    disk = FakeDisk.from_bytes(CONTENTS, DIRTY, ALLOCATED)
    disk.behaviour = Behaviour(**behaviour)  # type: ignore[arg-type]
    return disk


def take(session: NbdSession) -> list[Event]:
    """All events, their data copied."""
    events: list[Event] = []
    while (event := session.next_event()) is not None:
        if isinstance(event, ReadReply) and event.data is not None:
            event = ReadReply(event.request, bytes(event.data))
        events.append(event)
    return events


def connect(disk: FakeDisk, *contexts: str) -> tuple[NbdSession, Connection]:
    """A session whose handshake is over, and the server's side of it."""
    session, server = NbdSession("disk", contexts), Connection(disk)
    session.receive_data(server.greeting())
    events = take(session)
    while not events:
        sent = session.data_to_send()
        assert sent, "the handshake got stuck"
        session.receive_data(server.feed(sent))
        events = take(session)
    assert events == [Negotiated()]
    return session, server


def ask(session: NbdSession, server: Connection) -> list[Event]:
    """Send what is asked and take the answers."""
    server.feed(session.data_to_send())
    session.receive_data(server.answer())
    return take(session)


def chunk(kind: int, body: bytes, *, cookie: int = 1, done: bool = True) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, done, kind, cookie, len(body)) + body


def reading(offset: int = 0, length: int = 4) -> NbdSession:
    """A session that owes us one read, number 1."""
    session, _ = connect(a_disk())
    session.read(offset, length)
    return session


def test_handshake_learns_the_exports_size_and_contexts() -> None:
    session, _ = connect(a_disk(), DIRTY_B0, ALLOCATION)
    assert session.info.size == len(CONTENTS)
    assert session.info.contexts == {7: DIRTY_B0, 8: ALLOCATION}
    assert session.info.maximum_block == 32 << 20


@pytest.mark.parametrize(
    ("behaviour", "context", "text"),
    [
        ({"structured": False}, DIRTY_B0, "structured replies"),
        ({"df": False}, DIRTY_B0, "in one piece"),
        ({}, dirty_context("gone"), "does not offer qemu:dirty-bitmap:gone"),
    ],
)
def test_handshake_names_what_the_server_lacks(behaviour: dict[str, bool], context: str, text: str) -> None:
    with pytest.raises(NbdProtocolError, match=text):
        connect(a_disk(**behaviour), context)


@pytest.mark.parametrize(
    ("kind", "text"),
    [((1 << 31) + 6, "no export 'disk' .not here."), ((1 << 31) + 5, "TLS"), ((1 << 31) + 9, "0x80000009")],
)
def test_handshake_says_why_the_export_was_refused(kind: int, text: str) -> None:
    session = NbdSession("disk")
    structured = struct.pack(">QIII", 0x0003E889045565A9, 8, 1, 0)
    refusal = struct.pack(">QIII", 0x0003E889045565A9, 7, kind, 8) + b"not here"
    session.receive_data(b"NBDMAGICIHAVEOPT\x00\x03" + structured + refusal)
    with pytest.raises(NbdProtocolError, match=text):
        take(session)


@pytest.mark.parametrize(
    "greeting", [b"QMP greeting, or so", b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\0\0", b"NBDMAGICIHAVEOPT\0\0"]
)
def test_whatever_is_no_fixed_newstyle_server_is_refused(greeting: bytes) -> None:
    session = NbdSession("disk")
    session.receive_data(greeting)
    with pytest.raises(NbdProtocolError):
        take(session)


def test_option_replies_without_end_do_not_take_our_memory() -> None:
    session = NbdSession("disk")
    session.receive_data(b"NBDMAGICIHAVEOPT\x00\x03")
    session.receive_data(struct.pack(">QIII", 0x0003E889045565A9, 8, 1, 0))
    session.receive_data((struct.pack(">QIII", 0x0003E889045565A9, 7, 3, 2) + b"\0\x09") * 1000)
    with pytest.raises(NbdProtocolError, match="too long"):
        take(session)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("shuffle", [None, random.Random(3)])
def test_replies_are_matched_whatever_their_order_and_number_of_chunks(
    chunked: bool, shuffle: random.Random | None
) -> None:
    session, server = connect(a_disk(chunked=chunked, shuffle=shuffle), DIRTY_B0)
    reads = [session.read(offset, 4000, offset) for offset in range(0, 40_000, 4000)]
    status = session.block_status(0, len(CONTENTS), extents=100)
    replies = ask(session, server)
    assert len(replies) == len(reads) + 1
    for reply in replies:
        if isinstance(reply, ReadReply):
            at = reply.request.offset
            assert reply.data == CONTENTS[at : at + 4000]
            assert reply.request.tag == at
        else:
            assert reply == StatusReply(status, {DIRTY_B0: tuple(DIRTY)})
    assert session.owed == session.unanswered == 0


def test_a_hole_reads_as_zeroes() -> None:
    session, server = connect(a_disk(holes=True))
    request = session.read(60_000, 4096)
    assert ask(session, server) == [ReadReply(request, None)]


def test_status_of_two_contexts_keeps_them_apart() -> None:
    session, server = connect(a_disk(), DIRTY_B0, ALLOCATION)
    request = session.block_status(0, len(CONTENTS), extents=100)
    assert ask(session, server) == [StatusReply(request, {DIRTY_B0: tuple(DIRTY), ALLOCATION: tuple(ALLOCATED)})]


def test_asking_for_one_extent_tells_the_server_so() -> None:
    session, server = connect(a_disk(), DIRTY_B0)
    request = session.block_status(0, len(CONTENTS), extents=1)
    assert ask(session, server) == [StatusReply(request, {DIRTY_B0: (DIRTY[0],)})]


def test_an_error_is_of_its_request_only() -> None:
    session, server = connect(a_disk(fail=lambda command, offset, length: 5 if offset == 4096 else 0))
    good, bad = session.read(0, 4096), session.read(4096, 4096)
    assert ask(session, server) == [ReadReply(good, CONTENTS[:4096]), RequestError(bad, 5, "text")]


def test_an_error_after_data_discards_the_data() -> None:
    session = reading()
    session.receive_data(chunk(1, bytes(8) + b"data", done=False))
    assert take(session) == []
    assert session.unanswered == 1
    session.receive_data(chunk(1 << 15 | 2, struct.pack(">IHQ", 5, 0, 0)))
    (reply,) = take(session)
    assert isinstance(reply, RequestError)
    assert reply.error == 5


def test_data_whose_reply_ends_later_survive_what_is_received_in_between() -> None:
    session = reading()
    session.receive_data(chunk(1, bytes(8) + b"data", done=False))
    assert take(session) == []
    for byte in chunk(0, b""):
        session.receive_data(bytes([byte]))
    (reply,) = take(session)
    assert isinstance(reply, ReadReply)
    assert reply.data == b"data"


@pytest.mark.parametrize(
    ("stream", "text"),
    [
        (struct.pack(">IIQ", 0x67446698, 0, 1) + b"data", "simple reply"),
        (b"garbage garbage garbage", "where a reply should begin"),
        (chunk(1, bytes(8) + b"data", cookie=2), "not made"),
        (chunk(1, bytes(8) + b"dat"), "a chunk of type 1"),
        (chunk(1, bytes(8) + b"data5"), "a chunk of type 1"),
        (chunk(1, struct.pack(">Q", 1) + b"data"), "from elsewhere"),
        (chunk(2, struct.pack(">QI", 0, 3)), "hole elsewhere"),
        (chunk(5, struct.pack(">III", 7, 4, 0)), "a chunk of type 5"),
        (chunk(9, b""), "a chunk of type 9"),
        (chunk(0, b""), "before it was complete"),
        (chunk(0, b"x"), "a chunk of type 0"),
        (chunk(1 << 15 | 1, struct.pack(">IH", 0, 0)), "malformed error"),
        (chunk(1 << 15 | 1, struct.pack(">IH", 5, 1)), "malformed error"),
        (chunk(1 << 15 | 1, b"12345"), "a chunk of type"),
        (chunk(1, bytes(8) + b"data", done=False) * 2, "several pieces"),
        (chunk(1, bytes(8) + b"data") * 2, "not made"),
    ],
)
def test_a_broken_reply_to_a_read_is_refused_for_good(stream: bytes, text: str) -> None:
    session = reading()
    session.receive_data(stream)
    for _ in range(2):
        with pytest.raises(NbdProtocolError, match=text):
            take(session)


@pytest.mark.parametrize(
    ("body", "extents", "text"),
    [
        (struct.pack(">I", 7), 9, "a chunk of type 5"),
        (struct.pack(">III", 8, 4096, 0), 9, "unasked"),
        (struct.pack(">III", 7, 0, 0), 9, "no bytes"),
        (struct.pack(">IIII", 7, 4096, 0, 4096)[:-1], 9, "a chunk of type 5"),
        (struct.pack(">IIIII", 7, 512, 0, 512, 1), 1, "than the one"),
        (struct.pack(">III", 7, 8192, 0), 1, "than the one"),
    ],
)
def test_a_broken_block_status_is_refused(body: bytes, extents: int, text: str) -> None:
    session, _ = connect(a_disk(), DIRTY_B0)
    session.block_status(0, 4096, extents=extents)
    session.receive_data(chunk(5, body))
    with pytest.raises(NbdProtocolError, match=text):
        take(session)


def test_a_status_that_lacks_a_context_is_refused() -> None:
    session, _ = connect(a_disk(), DIRTY_B0, ALLOCATION)
    session.block_status(0, 4096, extents=9)
    session.receive_data(chunk(5, struct.pack(">III", 7, 4096, 0)))
    with pytest.raises(NbdProtocolError, match="complete"):
        take(session)


def test_a_length_out_of_the_blue_is_refused_before_its_bytes_come() -> None:
    session, _ = connect(a_disk(), DIRTY_B0)
    session.block_status(0, 4096, extents=9)
    session.receive_data(struct.pack(">IHHQI", 0x668E33EF, 1, 5, 1, 4 + 8 * (1 << 28)))
    with pytest.raises(NbdProtocolError):
        take(session)


def test_a_status_far_larger_than_counted_on_is_still_understood() -> None:
    session, _ = connect(a_disk(), DIRTY_B0)
    session.block_status(0, len(CONTENTS), extents=9)
    stream = chunk(5, struct.pack(">I", 7) + struct.pack(">II", 1, 0) * 100_000)
    for start in range(0, len(stream), 5000):
        session.receive_data(stream[start : start + 5000])
        events = take(session)
    (reply,) = events
    assert isinstance(reply, StatusReply)
    assert len(reply.contexts[DIRTY_B0]) == 100_000


def test_nothing_may_be_asked_beyond_the_export_or_after_the_goodbye() -> None:
    session, server = connect(a_disk())
    with pytest.raises(InternalError):
        session.read(len(CONTENTS) - 1, 2)
    with pytest.raises(InternalError):
        session.read(0, 0)
    with pytest.raises(InternalError):
        session.block_status(0, 1, extents=1)
    session.disconnect()
    server.feed(session.data_to_send())
    assert server.closed
    with pytest.raises(InternalError):
        session.read(0, 1)


def test_costs_cover_what_was_measured_in_a_sockets_buffer() -> None:
    # 512-byte replies: 83 KiB of 208 fit; 4 KiB replies: 176 KiB.
    assert read_cost(512) >= 512 * 208 / 83
    assert read_cost(4096) >= 4096 * 208 / 176
    assert status_cost(STATUS_EXTENTS) <= OWED_BUDGET < status_cost(STATUS_EXTENTS + 1)


# --- properties ---------------------------------------------------------------------------------------------------

Script = list[tuple[bool, int, int]]
scripts = st.lists(
    st.tuples(st.booleans(), st.integers(0, len(CONTENTS) - 1), st.integers(1, 30_000)), min_size=1, max_size=40
)


@given(script=scripts, answers=st.randoms(use_true_random=False), chunked=st.booleans(), holes=st.booleans())
@settings(max_examples=60, deadline=None)
def test_what_is_owed_never_exceeds_the_budget(
    script: Script, answers: random.Random, chunked: bool, holes: bool
) -> None:
    disk = a_disk(shuffle=answers, chunked=chunked, holes=holes)
    session, server = connect(disk, DIRTY_B0)
    answered = 0
    for read, offset, wish in script:
        length = min(wish, len(CONTENTS) - offset)
        cost = read_cost(length) if read else status_cost(3)
        while not session.room_for(cost):
            with pytest.raises(InternalError):
                _make(session, read, offset, length)
            answered += len(ask(session, server))
        _make(session, read, offset, length)
        server.feed(session.data_to_send())
        assert session.owed <= OWED_BUDGET
    answered += len(ask(session, server))
    assert answered == len(script)
    assert session.owed == 0
    assert 0 < disk.largest_owed <= OWED_BUDGET


def _make(session: NbdSession, read: bool, offset: int, length: int) -> None:
    if read:
        session.read(offset, length)
    else:
        session.block_status(offset, length, extents=3)


def recorded(script: Script, chunked: bool, seed: int) -> tuple[bytes, list[Event]]:
    """All that a server sends for a script, and what it means."""
    requests = [(read, offset, min(length, 900, len(CONTENTS) - offset)) for read, offset, length in script]
    session, server = NbdSession("disk", (DIRTY_B0,)), Connection(a_disk(chunked=chunked, shuffle=random.Random(seed)))
    stream = server.greeting()
    session.receive_data(stream)
    events = take(session)
    while not events:
        more = server.feed(session.data_to_send())
        stream += more
        session.receive_data(more)
        events = take(session)
    for request in requests[:20]:
        _make(session, *request)
    server.feed(session.data_to_send())
    more = server.answer()
    session.receive_data(more)
    return stream + more, events + take(session)


def replay(script: Script, pieces: list[bytes]) -> list[Event]:
    """The same requests, the server's bytes in other pieces."""
    requests = [(read, offset, min(length, 900, len(CONTENTS) - offset)) for read, offset, length in script]
    session = NbdSession("disk", (DIRTY_B0,))
    events: list[Event] = []
    for piece in pieces:
        session.receive_data(piece)
        while new := take_until_negotiated(session):
            events += new
            if new[-1] == Negotiated():
                for read, offset, length in requests[:20]:
                    if offset + length <= session.info.size:  # it may have been damaged
                        _make(session, read, offset, length)
        assert session.owed <= OWED_BUDGET
    return events


def take_until_negotiated(session: NbdSession) -> list[Event]:
    event = session.next_event()
    if isinstance(event, ReadReply) and event.data is not None:
        event = ReadReply(event.request, bytes(event.data))
    return [] if event is None else [event]


def meaning(events: list[Event]) -> list[object]:
    return [
        (type(event), event.request.offset, event.request.length, getattr(event, "data", None))
        if isinstance(event, ReadReply | RequestError | StatusReply)
        else event
        for event in events
    ]


@given(script=scripts, chunked=st.booleans(), seed=st.integers(0, 9), cut=st.integers(0, 1 << 20))
@settings(max_examples=40, deadline=None)
def test_replies_mean_the_same_whole_byte_by_byte_and_cut(script: Script, chunked: bool, seed: int, cut: int) -> None:
    stream, expected = recorded(script, chunked, seed)
    cut %= len(stream) + 1
    assert meaning(replay(script, [stream])) == meaning(expected)
    assert meaning(replay(script, [stream[:cut], stream[cut:]])) == meaning(expected)
    assert meaning(replay(script, [bytes([byte]) for byte in stream])) == meaning(expected)
    partly = meaning(replay(script, [stream[:cut]]))
    assert partly == meaning(expected)[: len(partly)]


@given(
    script=scripts,
    seed=st.integers(0, 9),
    damage=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 255)), min_size=1, max_size=4),
    size=st.integers(1, 5000),
)
@settings(max_examples=150, deadline=None)
def test_damaged_replies_give_results_or_a_protocol_error_and_nothing_else(
    script: Script, seed: int, damage: list[tuple[int, int]], size: int
) -> None:
    stream, _ = recorded(script, False, seed)
    bad = bytearray(stream)
    for position, flip in damage:
        bad[position % len(bad)] ^= flip
    pieces = [bytes(bad[start : start + size]) for start in range(0, len(bad), size)]
    with contextlib.suppress(NbdProtocolError):
        replay(script, pieces)


@given(noise=st.binary(max_size=3000))
@settings(max_examples=60, deadline=None)
def test_noise_after_the_handshake_gives_a_protocol_error_or_nothing(noise: bytes) -> None:
    session = reading()
    session.receive_data(noise)
    with contextlib.suppress(NbdProtocolError):
        assert take(session) == []
