"""Figures by stream and by time, bounded whoever sends."""

from __future__ import annotations

import pytest

from socs_monitor.health.activity import MAX_NAME, MAX_STREAMS, StreamActivity, WriteTimes
from tests.chain import Clock

DAY_S = 86_400


@pytest.fixture
def streams(clock: Clock) -> StreamActivity:
    return StreamActivity(clock, clock.monotonic)


def test_files_and_metadata_are_counted_by_stream(streams: StreamActivity, clock: Clock) -> None:
    begin = clock.now
    streams.registered(["crate1slot2", "STREAMER:s1", "s1"])
    clock.advance(1)
    streams.metadata("s1")
    streams.metadata("s2")

    assert streams.data() == {
        "crate1slot2": {"files_today": 1, "last_file": begin, "last_metadata": None},
        "s1": {"files_today": 2, "last_file": begin, "last_metadata": begin + 1},
        "s2": {"files_today": 0, "last_file": None, "last_metadata": begin + 1},
    }
    assert streams.files() == {"crate1slot2": 1, "s1": 2, "s2": 0}


def test_files_today_restart_at_midnight_utc_and_the_total_does_not(streams: StreamActivity, clock: Clock) -> None:
    clock.now = 19_700 * DAY_S - 1.0
    streams.registered(["s1", "s1"])
    assert streams.data()["s1"]["files_today"] == 2
    clock.advance(1)
    assert streams.data()["s1"]["files_today"] == 0
    streams.registered(["s1"])

    assert (streams.data()["s1"]["files_today"], streams.files()) == (1, {"s1": 3})


def test_streams_without_files_are_dropped_first_then_the_longest_silent(streams: StreamActivity, clock: Clock) -> None:
    for number in range(MAX_STREAMS - 1):
        clock.advance(1)
        streams.registered([f"s{number}"])
    for number in range(1000):
        clock.advance(1)
        streams.metadata(f"junk{number}")
    assert set(streams.files()) == {*(f"s{number}" for number in range(MAX_STREAMS - 1)), "junk999"}
    clock.advance(1)
    streams.metadata("s0")
    clock.advance(1)
    streams.registered(["new", "newer"])

    assert len(streams.data()) == MAX_STREAMS
    assert {"s0", "s2", "new", "newer"} < set(streams.files())
    assert not {"s1", "junk999"} & set(streams.files())


@pytest.mark.parametrize("name", ["x" * 64_000, "\n" * 30, "\x1b[31m" * 1000])
def test_a_streams_name_is_short_and_fit_to_be_shown(streams: StreamActivity, name: str) -> None:
    streams.metadata(name)
    streams.registered([f"STREAMER:{name}"])

    ((shown, figures),) = streams.data().items()
    assert shown.isprintable()
    assert len(shown) <= MAX_NAME
    assert figures["files_today"] == 1


def test_the_last_and_the_longest_recent_write_are_reported(clock: Clock) -> None:
    writes = WriteTimes(clock.monotonic)
    assert writes.data() == {"write": 0.0, "write_max": 0.0, "errors": 0, "corrected": 0, "row_without_file": 0}
    for seconds in (0.1, 0.9, 0.2):
        writes.wrote(seconds)
    clock.advance(30)
    writes.wrote(0.3)
    writes.errors += 1
    assert writes.data() == {"write": 0.3, "write_max": 0.9, "errors": 1, "corrected": 0, "row_without_file": 0}
    clock.advance(31)
    assert writes.data()["write_max"] == 0.3
    clock.advance(31)

    assert writes.data() == {"write": 0.3, "write_max": 0.0, "errors": 1, "corrected": 0, "row_without_file": 0}


def test_any_number_of_writes_takes_little_memory(clock: Clock) -> None:
    writes = WriteTimes(clock.monotonic)
    for number in range(10_000):
        writes.wrote(float(number))
        clock.advance(0.25)

    assert len(writes._longest) == 60
    assert writes.data()["write_max"] == 9999.0
