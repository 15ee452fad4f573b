"""From a datagram to one typed message or one `MessageError`: nothing else comes out, whatever goes in."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from socs_monitor.wire import messages
from socs_monitor.wire.messages import (
    MAX_FIELDS,
    MAX_STRING,
    FileMessage,
    Ignored,
    Message,
    MessageError,
    Metadata,
    SessionMessage,
)
from socs_monitor.wire.publisher import Publisher, data_file, g3_file, metadata
from tests.strategies import json_values

WHOLE = data_file("/x", action="a", action_ts="1")
REASONS = {"empty", "not JSON", "wrong or missing field"}
FIELD = "wrong or missing field"


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    with contextlib.closing(Publisher("crate1slot2")) as publisher:
        yield publisher


def datagram(kind: str, payload: Any, **changed: Any) -> bytes:
    envelope = {"host": "h", "id": "crate1slot2", "script": "s", "time": 1.5, "seq_no": 3, "type": kind}
    return json.dumps({**envelope, "payload": payload, **changed}).encode()


def test_a_data_file_message_carries_its_payload_and_the_publishers_id(publisher: Publisher) -> None:
    payload = data_file("/data/x.npy", file_type="tune", file_format="npy", action="t", action_ts="1700000000")
    sent = publisher.encode(payload, "data_file")

    message = messages.parse(sent)
    assert isinstance(message, FileMessage)
    assert message.meta == {**payload, "pub_id": "crate1slot2"}
    assert message.envelope == json.loads(sent)


def test_a_g3_file_message_needs_a_path_only(publisher: Publisher) -> None:
    message = messages.parse(publisher.encode(g3_file("/a/b/c.g3"), "g3_file"))

    assert isinstance(message, FileMessage)
    assert message.meta == {"path": "/a/b/c.g3", "archive_name": "timestreams", "pub_id": "crate1slot2"}


@pytest.mark.parametrize(
    ("kind", "payload"), [("session_data", {"a": [1, None]}), ("session_log", "ü"), ("session_log", "")]
)
def test_a_session_message_keeps_its_envelope(kind: str, payload: Any) -> None:
    sent = datagram(kind, payload, extra=[1])

    assert messages.parse(sent) == SessionMessage(json.loads(sent))


@pytest.mark.parametrize(
    ("pub_id", "stream_id"),
    [("STREAMER:ufm_mv5", "ufm_mv5"), ("crate1slot2", "crate1slot2"), ("a:b:c", "b:c"), ("STREAMER:", "")],
)
def test_metadata_is_of_the_stream_that_follows_the_first_colon(pub_id: str, stream_id: str) -> None:
    sent = datagram("metadata", metadata("AMCc.x", 1), id=pub_id)

    assert messages.parse(sent) == Metadata(json.loads(sent), stream_id, "AMCc.x", 1, 1.5)


@pytest.mark.parametrize("value", [0, -1.5, "", True, None, [1, [2]], {"a": 1}], ids=repr)
def test_metadata_carries_any_value(value: Any) -> None:
    message = messages.parse(datagram("metadata", metadata("AMCc.x", value)))

    assert isinstance(message, Metadata)
    assert (message.value, type(message.value)) == (value, type(value))


def test_numbers_that_json_does_not_know_come_as_the_senders_write_them() -> None:
    message = messages.parse(datagram("metadata", metadata("AMCc.x", math.nan)))

    assert isinstance(message, Metadata)
    assert isinstance(message.value, float)
    assert math.isnan(message.value)


@pytest.mark.parametrize("kind", ["start", "stop", "log", "backend_error", "general", "of_a_newer_publisher", ""])
@pytest.mark.parametrize("payload", [{}, None, "text", [1]], ids=repr)
def test_messages_that_need_no_action_are_ignored(kind: str, payload: Any) -> None:
    sent = datagram(kind, payload)

    assert messages.parse(sent) == Ignored(json.loads(sent))


def test_text_is_taken_as_bytes_are() -> None:
    for sent in (datagram("data_file", data_file("/data/ü.txt")), datagram("session_log", "ü")):
        assert messages.parse(sent.decode()) == messages.parse(sent)


def test_a_publishers_id_is_the_envelopes_whatever_the_payload_says() -> None:
    message = messages.parse(datagram("g3_file", {"path": "/x", "pub_id": "forged"}))

    assert isinstance(message, FileMessage)
    assert message.meta["pub_id"] == "crate1slot2"


# A list or an object in one of these is what a registration is refused for.
OF_ROW = {"path", "archive_name", "format", "timestamp", "action", "action_ts", "plot"}


def kept(payload: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a payload that has few fields: no long texts but the path, and nothing with parts."""
    return {
        key: value[:MAX_STRING]
        if isinstance(value, str) and key != "path"
        else bool(value)
        if key == "plot" and isinstance(value, (list, dict))
        else type(value)()
        if isinstance(value, (list, dict))
        else value
        for key, value in payload.items()
        if key in OF_ROW or not isinstance(value, (list, dict))
    }


LONG = st.builds(lambda part, times: part * times, st.text(min_size=1, max_size=3), st.integers(1, 5000))
FIELDS = st.sampled_from(sorted(OF_ROW - {"path"})) | st.text(max_size=5) | LONG


@given(
    path=st.text(st.characters(exclude_characters="\0"), min_size=1) | LONG.filter(lambda path: "\0" not in path),
    fields=st.dictionaries(FIELDS, json_values() | LONG, max_size=60),
    id_=json_values() | LONG,
    kind=st.sampled_from(["data_file", "g3_file"]),
)
def test_what_is_kept_of_a_registration_is_bounded_and_survives_the_spool(
    path: str, fields: dict[str, Any], id_: Any, kind: str
) -> None:
    payload = {**fields, "path": path}
    message = messages.parse(json.dumps({"id": id_, "type": kind, "payload": payload}))
    assert isinstance(message, FileMessage)
    meta = message.meta

    assert meta["path"] == path
    assert repr(messages.parse_file(message.text).meta) == repr(meta), "as text, since NaN equals nothing"
    assert isinstance(meta["pub_id"], str)
    assert len(meta) <= MAX_FIELDS + 1
    expected = {**kept(payload), "pub_id": meta["pub_id"]}
    assert all(repr(value) == repr(expected[key]) for key, value in meta.items())
    assert OF_ROW & payload.keys() <= meta.keys(), "that makes a row"
    if len(payload) <= MAX_FIELDS:
        assert meta.keys() == expected.keys()
    lengths = [len(value) for key, value in meta.items() if isinstance(value, str) and key != "path"]
    assert max(lengths, default=0) <= MAX_STRING


@pytest.mark.parametrize("value", [None, True, 0, -1.5, 1e300, math.inf, "", "1.795e9", "x" * 3000, [1], {}], ids=repr)
@pytest.mark.parametrize("field", [*sorted(data_file("/x").keys() - {"path"}), "archive_name", "of a newer publisher"])
@pytest.mark.parametrize("kind", ["data_file", "g3_file"])
def test_a_registration_with_a_path_is_accepted_whatever_its_other_fields(kind: str, field: str, value: Any) -> None:
    payload = {**data_file("/x"), field: value}
    message = messages.parse(datagram(kind, payload))

    assert isinstance(message, FileMessage)
    assert message.meta == {**kept(payload), "pub_id": "crate1slot2"}
    assert messages.parse_file(message.text).meta == message.meta


@pytest.mark.parametrize("kind", ["data_file", "g3_file"])
def test_a_registration_needs_its_type_and_path_only(kind: str) -> None:
    message = messages.parse(json.dumps({"type": kind, "payload": {"path": "/x"}}))

    assert isinstance(message, FileMessage)
    assert message.meta == {"path": "/x", "pub_id": ""}


@pytest.mark.parametrize(
    ("id_", "pub_id"), [(7, "7"), (1.5, "1.5"), (True, "True"), (None, ""), ([1], ""), ({}, ""), ("\ud800", "\ud800")]
)
def test_a_publishers_id_is_text(id_: Any, pub_id: str) -> None:
    message = messages.parse(datagram("data_file", data_file("/x"), id=id_))

    assert isinstance(message, FileMessage)
    assert message.meta["pub_id"] == pub_id


DEEP = b"[" * 500 + b"1" + b"]" * 500


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"{", b"\xef\xbb\xbf{"),
        (b'"replaced"', b'"\\ud800"'),
        (b'"replaced"', b'"\xed\xa0\x80"'),
        (b'"replaced"', DEEP),
        (b'"pub"', b'"p\\udfff"'),
    ],
    ids=lambda text: str(text[:10]),
)
def test_unusual_text_is_stored_in_a_form_that_reads_the_same(before: bytes, after: bytes) -> None:
    sent = datagram("data_file", {**WHOLE, "comment": "replaced", "list": [1]}, id="pub").replace(before, after, 1)
    message = messages.parse(sent)

    assert isinstance(message, FileMessage)
    assert message.text.isascii()
    assert messages.parse_file(message.text).meta == message.meta
    assert {**message.meta, **WHOLE} == message.meta
    assert "list" not in message.meta
    assert messages.parse(sent.decode(errors="surrogatepass")) == message


@pytest.mark.parametrize(
    ("sent", "reason", "detail"),
    [
        (b"", "empty", ""),
        ("", "empty", ""),
        (b" ", "not JSON", ""),
        (b"{", "not JSON", ""),
        (b"\xff{}", "not JSON", ""),
        (b"{} {}", "not JSON", ""),
        ("\ud800", "not JSON", ""),
        (b"[" * 60_000, "not JSON", ""),
        (b'{"id": ' + b"9" * 5000 + b"}", "not JSON", ""),
        (b"null", FIELD, "message"),
        (b"[]", FIELD, "message"),
        (b"7", FIELD, "message"),
        (b"{}", FIELD, "id"),
        (datagram("data_file", WHOLE, type=["data_file"]), FIELD, "type"),
        (b'{"id": "a", "type": "start"}', FIELD, "payload"),
        (datagram("data_file", None), FIELD, ""),
        (datagram("data_file", "/x"), FIELD, ""),
        (datagram("data_file", {}), FIELD, "path"),
        (datagram("data_file", {**WHOLE, "path": None}), FIELD, "path"),
        (datagram("data_file", {**WHOLE, "path": 7}), FIELD, "path"),
        (datagram("data_file", {**WHOLE, "path": ""}), FIELD, "path"),
        (datagram("data_file", {**WHOLE, "path": "/x\0y"}), FIELD, "path"),
        (datagram("g3_file", {"path": ""}), FIELD, "path"),
        (datagram("g3_file", {"archive_name": "timestreams"}), FIELD, "path"),
        (datagram("session_log", "", id=None), FIELD, "id"),
        (datagram("session_log", "", id=7), FIELD, "id"),
        (datagram("session_data", "text"), FIELD, "payload"),
        (datagram("session_data", [{}]), FIELD, "payload"),
        (datagram("session_log", {}), FIELD, "payload"),
        (datagram("session_log", None), FIELD, "payload"),
        (datagram("metadata", None), FIELD, ""),
        (datagram("metadata", {"value": 1}), FIELD, "path"),
        (datagram("metadata", {"path": "x"}), FIELD, "value"),
        (datagram("metadata", {"path": 1, "value": 1}), FIELD, "path"),
        (datagram("metadata", metadata("x", 1), time=None), FIELD, "time"),
        (datagram("metadata", metadata("x", 1), time="1.5"), FIELD, "time"),
        (datagram("metadata", metadata("x", 1), time=math.nan), FIELD, "time"),
    ],
    ids=lambda value: repr(value)[-40:],
)  # fmt: skip
def test_a_malformed_datagram_is_refused_with_its_reason(sent: bytes | str, reason: str, detail: str) -> None:
    with pytest.raises(MessageError) as error:
        messages.parse(sent)

    assert error.value.reason == reason
    assert detail in error.value.detail
    assert str(error.value).startswith(reason)


def outcome(sent: bytes | str) -> Message | None:
    """The message, or None for a refusal in the fixed vocabulary."""
    refusal = ""
    try:
        return messages.parse(sent)
    except MessageError as error:
        refusal = error.reason
    assert refusal in REASONS
    return None


@given(st.binary())
def test_any_bytes_are_a_message_or_refused(sent: bytes) -> None:
    outcome(sent)


@given(st.text())
def test_any_text_is_a_message_or_refused(sent: str) -> None:
    outcome(sent)


TYPES = st.sampled_from(["data_file", "g3_file", "session_data", "session_log", "metadata", "start", "x"])
PAYLOADS = st.fixed_dictionaries(
    {},
    optional={
        name: json_values()
        for name in ("path", "timestamp", "action", "action_ts", "archive_name", "format", "plot", "value", "pub_id")
    },
)


@given(
    kind=TYPES | json_values(),
    payload=PAYLOADS | json_values(),
    more=st.dictionaries(st.sampled_from(["id", "time", "x"]), json_values()),
)
@example(kind="data_file", payload={**WHOLE, "action_ts": 10**4299}, more={})
@example(kind="metadata", payload={"path": "x", "value": 10**4299}, more={"time": 10**4299})
def test_any_json_is_a_message_that_holds_what_was_sent_or_refused(kind: Any, payload: Any, more: Any) -> None:
    envelope = {"id": "crate1slot2", "type": kind, "payload": payload, **more}
    message = outcome(json.dumps(envelope))

    if message is not None:
        assert repr(message.envelope) == repr(envelope)  # as text, since NaN equals nothing
    if isinstance(message, FileMessage):
        assert repr(message.meta["path"]) == repr(payload["path"])
        assert message.meta.keys() == {*kept(payload), "pub_id"}


@pytest.mark.parametrize(
    "sent", [datagram("start", {}), datagram("session_log", "x"), datagram("metadata", metadata("x", 1))]
)
def test_parse_file_refuses_other_messages(sent: bytes) -> None:
    with pytest.raises(MessageError, match="no registration"):
        messages.parse_file(sent)


@pytest.mark.parametrize("payload", [data_file("/data/ü x.txt", action="a", action_ts=1), g3_file("/a/b/c.g3")])
def test_metadata_of_a_file_goes_to_a_datagram_and_back(payload: dict[str, Any]) -> None:
    meta = {**payload, "pub_id": "crate1slot2"}

    assert messages.parse_file(messages.encode_file(meta)).meta == meta


def nested(levels: int) -> dict[str, Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return {**WHOLE, "x": value}


@pytest.mark.parametrize(
    "meta", [{}, {"path": 1}, {"path": ""}, {**WHOLE, "pub_id": "a", "x": {1}}, nested(100_000), [], None]
)
def test_encode_file_refuses_what_is_not_metadata_of_a_file(meta: Any) -> None:
    with pytest.raises(MessageError):
        messages.encode_file(meta)
