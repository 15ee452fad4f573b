"""What becomes of a register's value on its way to a recorded feed."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ocs.ocs_feed import Feed

from socs_monitor.fields import MAX_FIELDS, MAX_PATH, MAX_STREAM_ID, MAX_STREAMS, FieldError, Streams, convert

NOW = 1.7e9

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


class Said(list[str]):
    def streams(self) -> Streams:
        return Streams(Feed.enforce_field_name_rules, self.append)


def field(streams: Streams, value: Any, path: str = "AMCc.Register", stream: str = "ufm_mv1") -> Any:
    return streams.field(stream, path, value, NOW)[1]


def refused(streams: Streams, value: Any, **where: Any) -> str:
    with pytest.raises(FieldError) as caught:
        field(streams, value, **where)
    return caught.value.reason


@pytest.mark.parametrize("value", ["uxm_relock", "a b, c=d; (e) {f} µ", 17, -1, 2**63 - 1, 0.25, True, ""])
def test_ordinary_values_go_unchanged(value: Any) -> None:
    assert field(Said().streams(), value) == value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([1, 2.5, "x"], "[1,2.5,'x']"),
        ({"a": None}, "{'a':null}"),
        ([], "[]"),
        ('say "hi"\n', "say 'hi' "),
        ("a\\", "a/"),
    ],
)
def test_what_the_line_protocol_cannot_take_is_made_safe(value: Any, text: str) -> None:
    assert field(Said().streams(), value) == text


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), -float("inf"), 2**63, -(10**400)])
def test_what_no_reader_can_take_is_refused(value: Any) -> None:
    assert refused(Said().streams(), value)


@pytest.mark.parametrize(
    ("first", "then", "published"),
    [
        (1.0, 3, 3.0),
        (1, 3.0, 3),
        (1, "17", 17),
        (1.0, "2.5", 2.5),
        ("x", 2.5, "2.5"),
        ("x", True, "True"),
        ("x", [1], "[1]"),
        (1, True, 1),
        (False, 1, True),
    ],
)
def test_a_value_of_another_type_is_converted_where_nothing_is_lost(first: Any, then: Any, published: Any) -> None:
    streams = Said().streams()
    field(streams, first)
    result = field(streams, then)
    assert (type(result), result) == (type(published), published)


@pytest.mark.parametrize(("first", "then"), [(1, 2.5), (1, "x"), (1, "2.5"), (1.0, 2**60 + 1), (True, 2), (1.0, "nan")])
def test_a_value_of_another_type_is_dropped_where_something_would_be_lost_and_said_once(first: Any, then: Any) -> None:
    said = Said()
    streams = said.streams()
    field(streams, first)
    assert refused(streams, then) == refused(streams, then) == "type changed"
    assert len(said) == 1
    assert "AMCc.Register" in said[0]
    assert field(streams, first) == first


def test_two_paths_that_map_to_one_name_do_not_mix() -> None:
    said = Said()
    streams = said.streams()
    first, _ = streams.field("ufm_mv1", "AMCc.Base[0].x", 1, NOW)
    second, _ = streams.field("ufm_mv1", "AMCc.Base.0x", 2, NOW)
    assert first == "AMCcBase0x"
    assert re.fullmatch("AMCcBase0x_[0-9a-f]{8}", second)
    assert len(said) == 1
    assert streams.field("ufm_mv1", "AMCc.Base.0x", 3, NOW)[0] == second
    other = Said().streams()
    other.field("ufm_mv1", "AMCc.Base[0].x", 1, NOW)
    assert other.field("ufm_mv1", "AMCc.Base.0x", 2, NOW)[0] == second  # the same after a restart


@pytest.mark.parametrize(
    "stream", ["", "a b", "a,b", "a=b", "a..b", ".a", "a.", "a#", "a/b", "é", "x" * (MAX_STREAM_ID + 1)]
)
def test_a_stream_id_that_breaks_a_reader_is_refused(stream: str) -> None:
    assert "stream id" in refused(Said().streams(), 1, stream=stream)


@pytest.mark.parametrize("path", ["", "123", "___", "µ", "x" * (MAX_PATH + 1)])
def test_a_path_that_makes_no_name_is_refused_or_named_by_ocs(path: str) -> None:
    try:
        name, _ = Said().streams().field("ufm_mv1", path, 1, NOW)
    except FieldError:
        return
    assert name == Feed.enforce_field_name_rules(path) == "invalid_field"


@pytest.mark.parametrize("time", [-1.0, 1e10, float("nan"), float("inf")])
def test_a_time_beyond_influxdb_s_range_is_refused(time: float) -> None:
    with pytest.raises(FieldError, match="time"):
        Said().streams().field("ufm_mv1", "AMCc.x", 1, time)


def test_the_number_of_streams_and_fields_is_bounded() -> None:
    streams = Said().streams()
    for n in range(MAX_FIELDS):
        field(streams, n, path=f"AMCc.r{n}")
    assert "fields" in refused(streams, 1, path="AMCc.another")
    assert field(streams, 1, path="AMCc.r0") == 1
    for n in range(MAX_STREAMS - 1):
        field(streams, n, stream=f"s{n}")
    assert "streams" in refused(streams, 1, stream="another")


@given(st.lists(st.tuples(st.text(max_size=300), JSON_VALUES), max_size=8))
def test_whatever_comes_is_a_field_that_ocs_takes_or_refused(registers: list[tuple[str, Any]]) -> None:
    streams = Said().streams()
    kinds: dict[str, type] = {}
    for path, value in registers:
        try:
            name, published = streams.field("ufm_mv1", path, value, NOW)
        except FieldError:
            continue
        assert Feed.verify_data_field_string(name)
        Feed.verify_message_data_type(published)
        assert kinds.setdefault(name, type(published)) is type(published)
        if isinstance(published, str):
            assert not re.search('["\\\\\\n\\r]', published)


def test_convert_keeps_what_is_of_the_type() -> None:
    assert convert("1", str) == "1"
