"""What becomes of a register's value on its way to a recorded feed."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ocs.ocs_feed import Feed

from socs_monitor.feeds.fields import (
    IDLE_S,
    MAX_FIELDS,
    MAX_PATH,
    MAX_PROVEN,
    MAX_STREAM_ID,
    MAX_STREAMS,
    PROVEN_MESSAGES,
    REPLACE_BURST,
    FieldError,
    Streams,
    convert,
)
from tests.chain import Clock

NOW = 1.7e9
NUMBERS = [bool, int, float]

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


class Said(list[str]):
    """What was reported; `forgotten` are replaced streams, `widened` fields with another type, `clock` is monotonic."""

    def __init__(self) -> None:
        self.forgotten: list[str] = []
        self.widened: list[tuple[str, type]] = []
        self.clock = Clock()

    def streams(self) -> Streams:
        return Streams(
            Feed.enforce_field_name_rules,
            self.append,
            self.forgotten.append,
            lambda *field: self.widened.append(field),
            self.clock,
        )


def field(streams: Streams, value: Any, path: str = "AMCc.Register", stream: str = "ufm_mv1") -> Any:
    return streams.field(stream, path, value, NOW)[1]


def refused(streams: Streams, value: Any, **where: Any) -> str:
    with pytest.raises(FieldError) as caught:
        field(streams, value, **where)
    return str(caught.value)


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
        ("a\udcffb", "a\ufffdb"),
    ],
)
def test_text_is_made_safe_for_the_line_protocol(value: Any, text: str) -> None:
    assert field(Said().streams(), value) == text


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), -float("inf"), 2**63, -(10**400)])
def test_values_that_no_reader_accepts_are_refused(value: Any) -> None:
    assert refused(Said().streams(), value)


@pytest.mark.parametrize(
    ("first", "then", "published"),
    [
        (1.0, 3, 3.0),
        (1, 3.0, 3.0),
        (1, 2.5, 2.5),
        (True, 2, 2),
        (True, 2.5, 2.5),
        (1, "17", 17),
        (1.0, "2.5", 2.5),
        ("x", 2.5, "2.5"),
        ("x", True, "True"),
        ("x", [1], "[1]"),
        (1, True, 1),
        (False, 1, 1),
        (True, "0", False),
    ],
)
def test_a_value_of_another_type_is_converted_if_nothing_is_lost(first: Any, then: Any, published: Any) -> None:
    streams = Said().streams()
    field(streams, first)
    result = field(streams, then)
    assert (type(result), result) == (type(published), published)


@pytest.mark.parametrize(("first", "then"), [(1, "x"), (1, "2.5"), (1.0, 2**60 + 1), (True, "2"), (1.0, "nan")])
def test_a_value_of_another_type_is_dropped_if_something_would_be_lost(first: Any, then: Any) -> None:
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


def test_the_number_of_fields_is_bounded() -> None:
    streams = Said().streams()
    for n in range(MAX_FIELDS):
        field(streams, n, path=f"AMCc.r{n}")
    assert "fields" in refused(streams, 1, path="AMCc.another")
    assert field(streams, 1, path="AMCc.r0") == 1


def test_a_wider_number_changes_the_type_for_all_streams() -> None:
    said = Said()
    streams = said.streams()
    field(streams, 1, stream="a")
    field(streams, 2, stream="b")
    assert field(streams, 2.5, stream="b") == 2.5
    for stream in ("a", "b", "new"):
        assert repr(field(streams, 3, stream=stream)) == "3.0"
    assert len(said) == 1
    assert "changed from int to float" in said[0]
    assert said.widened == [("AMCcRegister", float)]


def fill(streams: Streams, messages: int = 1) -> list[str]:
    """Let as many streams send as there may be, one after the other."""
    names = [f"s{number}" for number in range(MAX_STREAMS)]
    for name in names:
        for _ in range(messages):
            field(streams, 1, stream=name)
    return names


def test_a_new_stream_replaces_the_one_that_has_been_silent_longest() -> None:
    said = Said()
    streams = said.streams()
    names = fill(streams)
    field(streams, 1, stream=names[0])
    field(streams, 1, stream="new")
    field(streams, 1, stream="newer")

    assert said.forgotten == names[1:3]


def test_an_active_stream_is_not_replaced_and_there_is_always_a_place_for_a_new_one() -> None:
    said = Said()
    streams = said.streams()
    names = fill(streams, PROVEN_MESSAGES)
    said.clock.advance(IDLE_S - 1)
    for number in range(REPLACE_BURST // 2):
        field(streams, 1, stream=f"new{number}")
    assert said.forgotten[: MAX_STREAMS - MAX_PROVEN] == names[MAX_PROVEN:]
    assert not {*said.forgotten} & {*names[:MAX_PROVEN]}

    said.clock.advance(1)
    field(streams, 1, stream="another")
    assert said.forgotten[-1] == names[0]


def test_streams_are_replaced_at_a_bounded_rate_but_those_that_send_again_come_first() -> None:
    said = Said()
    streams = said.streams()
    fill(streams)
    for number in range(REPLACE_BURST // 2):
        field(streams, 1, stream=f"new{number}")
    for number in range(20_000):
        assert "streams" in refused(streams, 1, stream=f"newer{number}")
    assert field(streams, 1, stream="newer19999") == 1
    assert "streams" in refused(streams, 1, stream="newer0"), "it was turned away too long ago"
    assert len(said.forgotten) == REPLACE_BURST // 2 + 1

    said.clock.advance(2)
    assert field(streams, 1, stream="last") == 1
    assert "streams" in refused(streams, 1, stream="really-last")
    said.clock.advance(1e6)
    for number in range(REPLACE_BURST // 2):
        field(streams, 1, stream=f"later{number}")
    assert "streams" in refused(streams, 1, stream="much-too-late")


def test_the_type_of_a_field_is_forgotten_with_the_last_stream_that_has_it() -> None:
    streams = Said().streams()
    field(streams, "x", path="A", stream="first")
    field(streams, "x", path="B", stream="first")
    field(streams, "x", path="B", stream="second")
    for number in range(MAX_STREAMS - 1):
        field(streams, 1, path="C", stream=f"s{number}")

    assert field(streams, 1.5, path="A", stream="s0") == 1.5
    assert field(streams, 1.5, path="B", stream="s0") == "1.5"


def test_a_deeply_nested_list_is_refused() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    assert refused(Said().streams(), value) == "nested too deeply"


@given(st.lists(st.tuples(st.text(max_size=300), JSON_VALUES), max_size=8))
def test_any_value_is_a_field_that_ocs_accepts_or_refused(registers: list[tuple[str, Any]]) -> None:
    streams = Said().streams()
    kinds: dict[str, type] = {}
    for path, value in registers:
        try:
            name, published = streams.field("ufm_mv1", path, value, NOW)
        except FieldError:
            continue
        assert Feed.verify_data_field_string(name)
        Feed.verify_message_data_type(published)
        kind = kinds.get(name, bool)
        if kind in NUMBERS and type(published) in NUMBERS:
            assert NUMBERS.index(type(published)) >= NUMBERS.index(kind)
        elif name in kinds:
            assert type(published) is kind
        kinds[name] = type(published)
        if isinstance(published, str):
            assert not re.search('["\\\\\\n\\r]', published)


def test_convert_keeps_what_is_of_the_type() -> None:
    assert convert("1", str) == "1"
