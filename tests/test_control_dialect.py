"""The QMP dialect's reader: the same requests however the bytes are cut, and bounds that hold."""

import json
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qemu_remus.core import dialect
from qemu_remus.core.dialect import BadRequest, NeedData, Request, RequestReader

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(codec="utf-8"), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab{}[]\"\\\n'", max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


def read(chunks: Iterable[bytes], limit: int = dialect.REQUEST_LIMIT) -> list[Any]:
    reader = RequestReader(limit)
    events = []
    for chunk in chunks:
        reader.receive_data(chunk)
        while not isinstance(event := reader.next_event(), NeedData):
            events.append(event)
            if isinstance(event, BadRequest) and event.fatal:
                return events
    return events


def byte_by_byte(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


@settings(max_examples=50)
@given(st.lists(st.dictionaries(st.text(max_size=5), JSON, max_size=3), min_size=1, max_size=4), st.data())
def test_requests_are_the_same_however_the_stream_is_cut(arguments: list[dict[str, Any]], data: st.DataObject) -> None:
    lines = [json.dumps({"execute": "x", "arguments": each, "id": at}).encode() for at, each in enumerate(arguments)]
    stream = data.draw(st.sampled_from([b"", b"\n", b"\r\n", b"  "])).join(lines)
    expected = [Request("x", each, {"id": at}) for at, each in enumerate(arguments)]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert read([stream]) == read(pieces) == read(byte_by_byte(stream)) == expected


@given(st.lists(st.sampled_from([*b'{}[]"\\\n\r a:,', 0xFF, 0x00]).map(lambda byte: bytes([byte])), max_size=60))
def test_any_bytes_give_the_same_answers_whole_and_byte_by_byte_and_nothing_else_is_raised(chunks: list[bytes]) -> None:
    whole = b"".join(chunks)
    assert read([whole], limit=32) == read(chunks, limit=32)


def test_a_client_that_sends_nothing_between_its_objects_is_understood() -> None:
    assert [event.name for event in read([b'{"execute":"a"}{"execute":"b"}'])] == ["a", "b"]


def test_after_a_line_that_is_no_object_the_next_line_is_read() -> None:
    bad, good = read([b'hello {"execute":"lost"}\n{"execute":"a"}'])
    assert isinstance(bad, BadRequest)
    assert not bad.fatal
    assert good == Request("a", {}, {})


def test_after_a_string_without_end_the_next_line_is_read() -> None:
    bad, good = read([b'{"execute":"a\n{"execute":"b"}'])
    assert "string does not end" in bad.why
    assert good.name == "b"


def test_an_endless_request_is_refused_at_the_limit_and_not_buffered() -> None:
    reader = RequestReader(limit=1000)
    reader.receive_data(b'{"execute":"' + b"a" * 2000)
    event = reader.next_event()
    assert isinstance(event, BadRequest)
    assert event.fatal
    reader.receive_data(b"a" * 100_000)
    assert isinstance(reader.next_event(), BadRequest)
    assert not reader._objects._buffer


def test_a_request_of_just_the_limit_is_taken() -> None:
    request = b'{"execute":"' + b"a" * 100 + b'"}'
    assert read([request], limit=len(request))[0].name == "a" * 100
    assert read([request], limit=len(request) - 1)[0].fatal


def test_nesting_without_end_is_refused() -> None:
    (event,) = read([b'{"id":' + b"[" * 1000])
    assert event.fatal


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"id":1}', "lacks member 'execute'"),
        ('{"execute":1,"id":1}', "'execute' must be a string"),
        ('{"execute":"a","arguments":[],"id":1}', "'arguments' must be an object"),
        ('{"execute":"a","extra":1,"id":1}', "'extra' is unexpected"),
        ('{"exec-oob":"a","id":1}', "Out-of-band"),
    ],
)
def test_a_misshapen_request_is_answered_with_its_id(text: str, why: str) -> None:
    (event,) = read([text.encode()])
    assert why in event.why
    assert event.ident == {"id": 1}
    assert not event.fatal


@pytest.mark.parametrize("text", [b'{"execute":"a",}', b"{]", b'{"a":"\xff"}', b'{"execute":nul}', b'{"id":1e999}'])
def test_bad_json_is_an_error_and_the_connection_goes_on(text: bytes) -> None:
    bad, good = read([text + b'{"execute":"b"}'])
    assert "JSON parse error" in bad.why
    assert good.name == "b"


def test_a_null_id_is_sent_back_and_a_missing_one_is_not() -> None:
    (with_null,) = read([b'{"execute":"a","id":null}'])
    (without,) = read([b'{"execute":"a"}'])
    assert dialect.returned({}, with_null.ident) == b'{"return":{},"id":null}\r\n'
    assert dialect.returned({}, without.ident) == b'{"return":{}}\r\n'


def test_an_events_timestamp_is_split_as_qmp_splits_it() -> None:
    message = msgspec.json.decode(dialect.event("E", {"a": 1}, 1700000000.9999996))
    assert message == {"timestamp": {"seconds": 1700000001, "microseconds": 0}, "event": "E", "data": {"a": 1}}
