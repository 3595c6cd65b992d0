"""Readers fed whole, in pieces, cut, damaged and too much."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_remus.core import messages as m
from qemu_remus.core import wire
from qemu_remus.core.connection import NEED_DATA, RECEIVE_LIMIT, Connection, ConnectionClosed
from qemu_remus.core.errors import LocalProtocolError, RemoteProtocolError
from qemu_remus.core.extents import Extent
from tests.core_connection.pair import E6, P, S, begin, extents, forged
from tests.message_strategies import hello

CONVERSATION: list[m.Message] = [
    hello(P),
    m.Heartbeat(captured=E6),
    begin(),
    extents(),
    m.EpochExtents(E6, (Extent(0, 0, 70_000),), bytes(range(250)) * 280),
    m.EpochEnd(E6, 3, 70_003, 1, True),
]


def listening() -> Connection:
    """A secondary that has said hello."""
    secondary = Connection(S)
    secondary.start()
    secondary.send(hello(S))
    return secondary


def spoken() -> bytes:
    primary = Connection(P)
    raw = primary.start()
    secondary = Connection(S)
    for message in CONVERSATION:
        raw += b"".join(primary.send(message))
        if isinstance(message, m.Hello):
            primary.receive_data(secondary.start() + b"".join(secondary.send(hello(S))))
            primary.next_event()
    return raw


SPOKEN = spoken()


def events(reader: Connection) -> list[object]:
    """All that is there, and whether the end was reached."""
    found: list[object] = []
    while (event := reader.next_event()) is not NEED_DATA:
        found.append(event)
        if isinstance(event, ConnectionClosed):
            break
    return found


def test_a_reader_fed_whole_or_byte_by_byte_hears_the_same() -> None:
    whole = listening()
    whole.receive_data(SPOKEN)
    assert events(whole) == CONVERSATION
    bytewise = listening()
    heard: list[object] = []
    for number in range(len(SPOKEN)):
        bytewise.receive_data(SPOKEN[number : number + 1])
        heard += events(bytewise)
    assert heard == CONVERSATION


@given(st.lists(st.integers(0, len(SPOKEN)), max_size=10))
def test_a_reader_fed_in_any_pieces_hears_the_same(cuts: list[int]) -> None:
    reader = listening()
    heard: list[object] = []
    edges = [0, *sorted(cuts), len(SPOKEN)]
    for start, stop in pairwise(edges):
        if start != stop:
            reader.receive_data(memoryview(SPOKEN)[start:stop])
            heard += events(reader)
    assert heard == CONVERSATION


@given(st.integers(0, len(SPOKEN)))
def test_a_reader_cut_off_anywhere_hears_what_was_complete_and_that_it_was_cut(length: int) -> None:
    reader = listening()
    if length:
        reader.receive_data(SPOKEN[:length])
    reader.receive_data(b"")
    *heard, last = events(reader)
    assert heard == CONVERSATION[: len(heard)]
    boundaries = {0, len(wire.BANNER)}
    position = len(wire.BANNER)
    for number, message in enumerate(CONVERSATION):
        position += len(forged(message, number))
        boundaries.add(position)
    assert last == ConnectionClosed(mid_frame=length not in boundaries)
    assert events(reader) == [last]


@given(st.binary(min_size=wire.HEADER_SIZE, max_size=300))
def test_garbage_behind_good_messages_spoils_none_of_them(garbage: bytes) -> None:
    reader = listening()
    reader.receive_data(SPOKEN + garbage)
    for message in CONVERSATION:
        assert reader.next_event() == message
    with pytest.raises(RemoteProtocolError):
        reader.next_event()


@given(st.integers(0, len(SPOKEN) - 1), st.integers(1, 255))
def test_a_reader_of_a_changed_byte_hears_a_true_beginning_then_a_protocol_error_or_nothing(at: int, by: int) -> None:
    raw = bytearray(SPOKEN)
    raw[at] ^= by
    reader = listening()
    reader.receive_data(raw)
    heard: list[object] = []
    with pytest.raises(RemoteProtocolError):
        heard.extend(iter(reader.next_event, NEED_DATA))
    assert heard == CONVERSATION[: len(heard)]


@given(st.binary(max_size=400))
def test_any_first_bytes_are_waited_on_or_a_protocol_error(raw: bytes) -> None:
    reader = listening()
    reader.receive_data(raw)
    try:
        event = reader.next_event()
    except RemoteProtocolError:
        return
    assert event is NEED_DATA or event == ConnectionClosed(mid_frame=False)


def test_what_waits_to_be_heard_is_bounded() -> None:
    reader = listening()
    reader.receive_data(SPOKEN)
    with pytest.raises(LocalProtocolError):
        reader.receive_data(bytes(RECEIVE_LIMIT - len(SPOKEN) + 1))
    assert len(reader._buffer) == len(SPOKEN)


def test_nothing_can_be_received_after_the_end() -> None:
    reader = listening()
    reader.receive_data(b"")
    with pytest.raises(LocalProtocolError):
        reader.receive_data(b"x")


def test_data_of_a_message_stay_as_they_are_while_more_is_received() -> None:
    reader = listening()
    reader.receive_data(SPOKEN)
    data = [event.data for event in events(reader) if isinstance(event, m.EpochExtents)]
    reader.receive_data(bytes(100_000))
    assert [bytes(view) for view in data] == [b"abc", bytes(range(250)) * 280]
