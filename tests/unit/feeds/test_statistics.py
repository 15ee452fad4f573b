"""What is on the feed `monitor_stats`: numbers only, names that no reader takes for another's, all in one message."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from socs_monitor.feeds.statistics import FIELDS, INTERVAL_S, MAX_STREAMS, StatsFeed, numbers
from socs_monitor.health.health import Health
from tests.unit.feeds.test_forwarding import Agent

NO_COUNTS: Counter[str] = Counter()


def session_data() -> dict[str, Any]:
    """Session data of which no two numbers are the same."""
    return {
        **Health(lambda _level, _line: None).data(NO_COUNTS),
        "degraded": {},
        "datagrams": {"total": 1042, "bytes": 331811, "by_type": {}},
        "malformed": {"empty": 2, "not JSON": 3},
        "refused": {"spool": 6},
        "unpublished": {},
        "lost": {"gaps": 7, "kernel": 8, "reordered": 9, "senders": []},
        "socket": {"buffer_asked": 100, "buffer": 50, "rebinds": 10, "listening": True},
        "files": {
            **{"received": 20, "registered": 11, "pending": 1, "waiting": 4, "dead": 12, "discarded": 13},
            **{"settling": 14, "last": "/x", "last_time": 1.0},
        },
        "queue": {"depth": 1, "oldest": 2.5},
        "database": {"write": 0.25, "write_max": 0.5, "errors": 15},
        "spool": {"bytes": 16, "max_bytes": 17},
    }


class Bench:
    def __init__(self) -> None:
        self.agent = Agent()
        self.files: dict[str, int] = {}
        self.feed = StatsFeed(self.agent, session_data, lambda: self.files, clock=lambda: 1_700_000_000.0)

    def publish(self) -> dict[str, dict[str, int | float]]:
        """Publish, and return the data of each block of the one message that was made."""
        feed = self.agent.recorded["monitor_stats"]
        before = len(feed.published)
        self.feed.publish()
        (blocks,) = feed.published[before:]
        assert {block["timestamp"] for block in blocks} == {1_700_000_000.0}
        return {block["block_name"]: block["data"] for block in blocks}


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_the_block_has_the_documented_numbers() -> None:
    fields = numbers(session_data())

    assert fields == {
        **{"datagrams": 1042, "bytes": 331811, "malformed": 5, "refused": 6, "unpublished": 0},
        **{"lost_gaps": 7, "lost_kernel": 8, "rebinds": 10, "listening": 1, "receive_buffer": 50},
        **{"files_received": 20, "files_registered": 11, "files_pending": 1, "files_waiting": 4, "files_settling": 14},
        **{"files_dead": 12, "files_discarded": 13, "queue_depth": 1, "queue_oldest": 2.5},
        **{"database_write": 0.25, "database_write_max": 0.5, "database_errors": 15},
        **{"spool_bytes": 16, "spool_max_bytes": 17, "degraded": 0},
    }
    assert set(fields) == set(FIELDS)
    assert all(type(value) in (int, float) for value in fields.values())
    assert numbers({**session_data(), "degraded": {"messages_lost": "x", "spool": "y"}})["degraded"] == 1


def test_it_is_recorded_but_not_by_the_aggregator(bench: Bench) -> None:
    ((name, options),) = bench.agent.registered

    assert name == "monitor_stats"
    assert options.pop("buffer_time") > INTERVAL_S, "OCS would publish some blocks by themselves"
    assert options == {"record": True, "agg_params": {"exclude_aggregator": True}}


def test_each_stream_has_a_block_of_its_own_in_the_same_message(bench: Bench) -> None:
    bench.files = {"crate1slot2": 5, "s-1": 0}
    blocks = bench.publish()
    assert set(blocks.pop("monitor_stats")) == set(FIELDS)
    assert blocks == {"stream_crate1slot2": {"registered_crate1slot2": 5}, "stream_s1": {"registered_s1": 0}}
    bench.files["crate1slot2"] = 6

    assert bench.publish()["stream_crate1slot2"] == {"registered_crate1slot2": 6}


@pytest.mark.parametrize("name", ["metal", "x_meta", "_meta", "m-e_meta", "", "-", "\n"])
def test_a_stream_that_readers_would_take_for_another_thing_is_left_out(bench: Bench, name: str) -> None:
    bench.files = {name: 1}

    assert list(bench.publish()) == ["monitor_stats"]


def test_of_streams_with_the_same_field_name_the_first_is_published(bench: Bench) -> None:
    bench.files = {"s1": 1}
    bench.publish()
    bench.files = {"s-1": 5, "s1": 2}

    assert bench.publish()["stream_s1"] == {"registered_s1": 2}


def test_streams_of_senders_making_do_not_keep_out_those_with_files(bench: Bench) -> None:
    for number in range(1000):
        bench.files = {f"junk{number}": 0}
        bench.publish()
    bench.files = {"crate1slot2": 1}
    assert "stream_crate1slot2" in bench.publish()
    for number in range(1000):
        bench.files = {f"more{number}": 1}
        bench.publish()

    assert len(bench.feed._streams) == MAX_STREAMS


def test_without_a_router_nothing_is_published(bench: Bench) -> None:
    bench.agent.leave()
    bench.feed.publish()
    assert bench.agent.recorded["monitor_stats"].published == []
    assert bench.agent.recorded["monitor_stats"].buffer == []
    bench.agent.join()

    assert "monitor_stats" in bench.publish()
