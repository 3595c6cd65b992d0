"""The sans-IO QMP session: whatever a server sends, in whatever pieces, is a message or a ProtocolError."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qemu.qmp import QMPClient, StateError
from qemu.qmp.error import ProtocolError
from qemu.qmp.qmp_client import BadReplyError, GreetingError

from qemu_remus.qemu import commands
from qemu_remus.qemu.protocol import NEED_DATA, ErrorReply, Event, Greeting, NeedData, QmpSession, Received, Reply
from tests.fake_qemu import GREETING

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


def line(message: Any) -> bytes:
    return json.dumps(message).encode() + b"\r\n"


def drain(session: QmpSession) -> list[Received]:
    events: list[Received] = []
    while not isinstance(event := session.next_event(), NeedData):
        events.append(event)
    return events


def opened() -> QmpSession:
    session = QmpSession("me")
    session.receive_data(line(GREETING))
    assert [type(event) for event in drain(session)] == [Greeting]
    return session


def conversation(session: QmpSession) -> bytes:
    """An event, a reply, an error and another event, for two commands that are sent here."""
    first, _ = session.send_command(commands.stop())
    second, _ = session.send_command(commands.cont())
    return b"".join(
        map(
            line,
            [
                {"event": "STOP", "timestamp": {"seconds": 7, "microseconds": 250_000}},
                {"return": {"ok": [1, 2.5, "ü"]}, "id": first},
                {"error": {"class": "GenericError", "desc": "no"}, "id": second},
                {"event": "RESUME", "data": {"x": 1}, "timestamp": {"seconds": -1, "microseconds": -1}},
            ],
        )
    )


def expected() -> list[Received]:
    return [
        Event("STOP", {}, 7.25, 1),
        Reply("me.1", {"ok": [1, 2.5, "ü"]}, 2),
        ErrorReply("me.2", "cont", "GenericError", "no", 3),
        Event("RESUME", {"x": 1}, 0.0, 4),
    ]


def test_greeting_tells_version_and_package() -> None:
    session = QmpSession("me")
    assert session.next_event() is NEED_DATA
    session.receive_data(line(GREETING))
    assert session.next_event() == Greeting((7, 2, 22), "fake", 0)


def test_what_was_meant_for_the_connection_before_may_come_before_the_greeting() -> None:
    session = QmpSession("me")
    strays = (
        {"event": "STOP", "timestamp": {}},
        {"return": {}, "id": "you.7"},
        {"id": "you.8", "error": {"class": "GenericError", "desc": "no"}},
    )
    for number, stray in enumerate(strays, 1):
        session.receive_data(line(stray))
        assert session.next_event() is NEED_DATA
        assert session.strays == number
    session.receive_data(line(GREETING))
    assert session.next_event() == Greeting((7, 2, 22), "fake", len(strays))
    session.send_command(commands.query_status())


def test_replies_and_events_come_in_the_order_of_the_wire() -> None:
    session = opened()
    session.receive_data(conversation(session))
    assert drain(session) == expected()
    assert session.outstanding == 0


def test_a_conversation_may_come_byte_by_byte() -> None:
    session = opened()
    events = []
    for byte in conversation(session):
        session.receive_data(bytes([byte]))
        events += drain(session)
    assert events == expected()


@given(st.lists(st.integers(1, 40), min_size=1))
def test_a_conversation_may_come_in_any_pieces(sizes: list[int]) -> None:
    session = opened()
    data = conversation(session)
    events = []
    position = 0
    for size in [*sizes, len(data)]:
        session.receive_data(data[position : position + size])
        position += size
        events += drain(session)
    assert events == expected()


@given(st.dictionaries(st.text(max_size=8), JSON, max_size=4), st.integers(0, 3))
def test_pretty_printing_monitors_are_understood(value: dict[str, Any], indent: int) -> None:
    session = opened()
    ident, _ = session.send_command(commands.query_status())
    text = json.dumps({"return": value, "id": ident}, indent=indent + 1).replace("\n", "\r\n").encode() + b"\r\n"
    for byte in text:
        session.receive_data(bytes([byte]))
    assert drain(session) == [Reply(ident, value, 1)]


@given(JSON)
def test_any_json_value_survives_a_reply(value: Any) -> None:
    session = opened()
    ident, _ = session.send_command(commands.query_status())
    session.receive_data(line({"return": value, "id": ident}))
    assert drain(session) == [Reply(ident, value, 1)]


@given(st.binary(max_size=200))
def test_garbage_instead_of_a_greeting_is_a_greeting_error_and_nothing_else(data: bytes) -> None:
    session = QmpSession("me")
    session.receive_data(data + b"\n")
    try:
        event = session.next_event()
    except GreetingError:
        with pytest.raises(StateError):
            session.receive_data(b"more")
    else:
        # Blank lines, or the beginning of a pretty-printed object.
        assert event is NEED_DATA
        assert all(not part.strip() or part.rstrip(b"\r") == b"{" for part in data.split(b"\n")[:1])


@given(st.binary(min_size=1, max_size=200))
def test_garbage_later_is_a_protocol_error_or_an_event_and_nothing_else(data: bytes) -> None:
    session = opened()
    session.receive_data(data + b"\r\n")
    try:
        drain(session)
    except ProtocolError:
        with pytest.raises(StateError):
            session.next_event()


@given(JSON)
def test_json_that_is_not_qmp_is_a_protocol_error_or_dropped_as_a_stray(value: Any) -> None:
    session = opened()
    session.receive_data(line(value))
    try:
        assert all(isinstance(event, Event) for event in drain(session))
    except ProtocolError:
        return


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000 + b"\n",
        b'{"return": ' + b"9" * 5_000 + b', "id": "me.1"}\n',
        b'{"return": "\xff\xfe", "id": "me.1"}\n',
        b'{"event": 3}\n',
        b'{"event": "X", "data": []}\n',
        b'{"event": "X", "timestamp": {"seconds": "now"}}\n',
        b'{"error": {"class": 1}, "id": "me.1"}\n',
        b"{}\n",
        b"\x00{}\n",
    ],
)
def test_malicious_messages_are_protocol_errors(text: bytes) -> None:
    session = opened()
    session.send_command(commands.query_status())
    session.receive_data(text)
    with pytest.raises(ProtocolError):
        drain(session)


def test_lone_surrogates_as_qemu_may_send_them_are_taken() -> None:
    session = opened()
    ident, _ = session.send_command(commands.query_status())
    session.receive_data(b'{"return": "\\ud800", "id": "%s"}\r\n' % ident.encode())
    assert drain(session) == [Reply(ident, "\ud800", 1)]


def test_a_server_that_sends_no_line_ends_is_refused_as_soon_as_it_is_known_not_to_be_json() -> None:
    session = QmpSession("me")
    session.receive_data(b"NBDMAGICIHAVEOPT\x00\x03")
    with pytest.raises(GreetingError):
        session.next_event()


@pytest.mark.parametrize("data", [b'{"return": "' + b"x" * 2000, b"{\n" + b' "x": 1,\n' * 500])
def test_a_message_without_end_is_cut_off_at_the_bound(data: bytes) -> None:
    session = QmpSession("me", max_message=1000)
    session.receive_data(line(GREETING))
    drain(session)
    session.receive_data(data)
    with pytest.raises(ProtocolError, match="longer than 1000"):
        session.next_event()


def test_replies_to_a_predecessors_commands_are_dropped() -> None:
    session = opened()
    session.receive_data(line({"return": {}, "id": "libvirt-17"}))
    session.receive_data(line({"error": {"class": "GenericError", "desc": "x"}}))
    assert drain(session) == []
    assert session.strays == 2


def test_a_second_reply_to_one_command_is_refused() -> None:
    session = opened()
    ident, _ = session.send_command(commands.stop())
    session.receive_data(2 * line({"return": {}, "id": ident}))
    assert isinstance(session.next_event(), Reply)
    with pytest.raises(BadReplyError):
        session.next_event()


def test_nothing_can_be_sent_before_the_greeting_or_after_a_fault() -> None:
    session = QmpSession("me")
    with pytest.raises(StateError):
        session.send_command(commands.stop())
    session = opened()
    session.receive_data(b"nonsense\n")
    with pytest.raises(ProtocolError):
        session.next_event()
    with pytest.raises(StateError):
        session.send_command(commands.stop())


def test_commands_are_framed_as_qemus_own_client_frames_them() -> None:
    session = opened()
    command = commands.blockdev_del("n")  # type: ignore[arg-type]
    ident, data = session.send_command(command)
    theirs = QMPClient.make_execute_msg("blockdev-del", {"node-name": "n"})
    assert json.loads(data) == {**theirs, "id": ident}
    assert data.count(b"\n") == 1
    assert data.endswith(b"\n")


def test_a_large_reply_is_decoded_once_and_whole() -> None:
    session = opened()
    ident, _ = session.send_command(commands.query_named_block_nodes())
    data = line(
        {"return": [{"name": str(number), "members": [{"type": "int"}] * 4} for number in range(2500)], "id": ident}
    )
    assert len(data) > 200_000
    session.receive_data(data)
    (reply,) = drain(session)
    assert isinstance(reply, Reply)
    assert len(reply.value) == 2500
