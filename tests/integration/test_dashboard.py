"""Every query of Grafana's dashboard and alert rules, asked of a real InfluxDB that OCS's real publisher has filled."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from socs_monitor.wire.publisher import Publisher
from tests.downstream import InfluxDB
from tests.grafana import PANEL_QUERIES, RULE_QUERIES, RULES, VARIABLE, Query
from tests.testbed.processes import Agent, Router
from tests.testbed.smurf_server import SmurfServer

# The night that the fixture makes takes a minute: statistics come every 10 s.
pytestmark = pytest.mark.timeout(240)

LOST = 3
FLOOD = 3000
BUFFER = 1 << 16
OPEN = "AMCc.SmurfProcessor.SOStream.open_g3stream"


class Night(NamedTuple):
    """What happened, and where it was written down."""

    database: InfluxDB
    agent: str
    begin: float
    end: float
    registered: int  # files
    by_stream: dict[str, int]  # of them, without those of the stream's first statistics
    dropped: int  # datagrams, by the kernel

    def ask(self, query: Query, later_s: float = 0) -> dict[str, list[Any]]:
        """The values of each series that Grafana makes of a query's answer, without nulls; asked so much later."""
        now = self.end + later_s
        statement = query.sent(self.agent, now - query.range_s if query.range_s else self.begin, now)
        found = {}
        for series in self.database.query(statement):
            for name, *values in zip(series["columns"], *series["values"], strict=True):
                if name != "time":
                    label = " ".join([series["name"], *series.get("tags", {}).values(), name])
                    found[label] = [value for value in values if value is not None]
        return found


class Statistics:
    """What of the agent's statistics is in InfluxDB by now."""

    def __init__(self, database: InfluxDB, monitor: Agent) -> None:
        self._database = database
        self._select = f"FROM \"observatory.{monitor.INSTANCE}\" WHERE feed = 'monitor_stats'"

    def first(self, field: str) -> Any:
        """The earliest value of a field; None before there is one."""
        return self._value("first", field)

    def last(self, field: str) -> Any:
        """The latest value of a field; None before the first."""
        return self._value("last", field)

    def _value(self, which: str, field: str) -> Any:
        found = self._database.query(f'SELECT {which}("{field}") {self._select}')
        return found[0]["values"][0][1] if found else None

    def wait(self, field: str, condition: Callable[[Any], bool], what: str) -> None:
        """Wait until the latest value of a field fulfils a condition."""

        def fulfilled() -> bool:
            value = self.last(field)
            return value is not None and condition(value)

        self._database.wait_for(fulfilled, 40, what)


@contextlib.contextmanager
def paused(monitor: Agent) -> Iterator[None]:
    """The agent does not get to run, as on a machine that is busy with something else."""
    os.kill(monitor.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(monitor.pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def night(router: Router, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Night]:
    """Files of two streams, one that never comes, a refused one; lost messages, a flood, a locked database."""
    folder = tmp_path_factory.mktemp("night")
    begin = time.time()
    monitor = Agent(folder / "agent", router, options=[["--udp-buffer", BUFFER]])
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(InfluxDB(folder))
        stack.enter_context(database.publisher(folder, monitor))
        stack.enter_context(monitor)
        monitor.wait_listening()
        statistics = Statistics(database, monitor)
        statistics.wait("degraded", lambda value: value == 0, "has got the first statistics")

        server = stack.enter_context(SmurfServer(folder, monitor.address, streams=2))
        for is_open, stream in enumerate(server.streams):
            stream.streamer.metadata(OPEN, is_open)
        sent = server.send(server.messages(4, ["npy", "g3"]))  # one of each publisher, who is known from here on
        statistics.wait("files_registered", lambda value: value == len(sent), "knows the streams")
        sent += server.send(server.messages(40))
        pysmurf = server.streams[0].pysmurf
        pysmurf.data_file(str(folder / "never_comes.txt"))
        pysmurf.data_file("/dev/zero")
        for _ in range(LOST):
            pysmurf.encode({}, "general")
        pysmurf.publish({})
        monitor.wait_for(lambda: len(monitor.rows()) == len(sent), 20, "registered the files")

        sender = stack.enter_context(contextlib.closing(Publisher("flood", monitor.address)))
        with paused(monitor):
            for _ in range(FLOOD):
                sender.send(b"no message")
        data = monitor.client().run.status
        monitor.wait_for(lambda: data().session["data"]["malformed"], 20, "read what was left of the flood")
        with contextlib.closing(sqlite3.connect(monitor.db_path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            sent += server.send(server.messages(4))
            statistics.wait("database_errors", lambda value: value > 0, "tells that the database is locked")
        statistics.wait("files_registered", lambda value: value == len(sent), "has got the last files")
        by_stream = Counter(message.publisher.pub_id.rpartition(":")[2] for message in sent)
        by_stream.subtract({stream: statistics.first(f"registered_{stream}") for stream in by_stream})
        dropped = FLOOD - statistics.last("malformed")
        yield Night(database, f"observatory.{monitor.INSTANCE}", begin, time.time(), len(sent), by_stream, dropped)


Check = Callable[[Night, dict[str, list[Any]]], bool]


def series(check: Callable[[Night, list[Any]], bool]) -> Check:
    """There is one series, and its values are as they are to be."""
    return lambda night, found: len(found) == 1 and all(check(night, values) for values in found.values())


def last(value: Callable[[Night], float]) -> Check:
    return series(lambda night, values: values[-1] == value(night))


def total(value: Callable[[Night], float]) -> Check:
    return series(lambda night, values: sum(values) == value(night))


def rose_to(value: float) -> Check:
    return series(lambda _, values: values[0] == 0 == values[-1] and max(values) >= value)


def within(low: float, high: float) -> Check:
    return series(lambda _, values: low < max(values) <= high)


def by_stream(night: Night, found: dict[str, list[Any]]) -> bool:
    sums = {name.rpartition("registered_")[2]: sum(values) for name, values in found.items()}
    return sums == night.by_stream


def open_streams(night: Night, found: dict[str, list[Any]]) -> bool:
    return {name.split()[1]: {*values} for name, values in found.items()} == {
        "ufm_emu2_meta": {0},
        "ufm_emu3_meta": {1},
    }


# What is to be seen of the night, by panel and series.
SEEN: dict[tuple[str, str], Check] = {
    ("State of every agent", "$m"): last(lambda night: 1),
    ("Last statistics", "A"): last(lambda night: 1),
    ("Pending", "A"): last(lambda night: 0),
    ("Waiting", "A"): last(lambda night: 1),
    ("Dead letters", "A"): last(lambda night: 1),
    ("Oldest pending", "A"): last(lambda night: 0),
    ("Spool used", "A"): within(0, 1),
    ("Degraded, by agent", "$m"): series(lambda night, values: values[0] == 0 and values[-1] == 1),
    ("Files per hour, by stream", "$col"): by_stream,
    ("Files not registered", "pending"): rose_to(4),
    ("Files not registered", "waiting"): last(lambda night: 1),
    ("Files not registered", "dead"): last(lambda night: 1),
    ("Age of the oldest pending", "oldest pending"): rose_to(0.1),
    ("Messages lost", "missing"): total(lambda night: LOST),
    ("Messages lost", "kernel"): total(lambda night: night.dropped),
    ("Datagrams per second", "datagrams"): within(1, 100),
    ("Database write time", "last"): within(0, 20),
    ("Database write time", "longest of a minute"): within(0, 20),
    ("Database write time", "errors"): within(0, 1000),
    ("Spool", "used"): within(1000, 1e7),
    ("Spool", "limit"): last(lambda night: 1 << 30),
    ("Stream open, by stream", "$tag_feed"): open_streams,
    ("Rejected messages", "malformed"): total(lambda night: FLOOD - night.dropped),
    ("Rejected messages", "refused"): total(lambda night: 0),
    ("Rejected messages", "unpublished"): total(lambda night: 0),
    ("Files received and registered", "received"): total(lambda night: night.registered + 2),
    ("Files received and registered", "registered"): total(lambda night: night.registered),
    ("Files received and registered", "discarded"): total(lambda night: 0),
    ("UDP socket", "listens"): last(lambda night: 1),
    ("UDP socket", "bound again"): last(lambda night: 0),
    ("UDP socket", "receive buffer"): last(lambda night: BUFFER),
}
# What each alert rule compares.
TOLD: dict[str, Check] = {
    "pysmurf-monitor-degraded": last(lambda night: 1),
    "pysmurf-monitor-silent": series(lambda night, values: sum(values) > 3),
    "pysmurf-monitor-dead-letters": last(lambda night: 1),
    "pysmurf-monitor-oldest-pending": last(lambda night: 0),
    "pysmurf-monitor-gaps": last(lambda night: LOST),
    "pysmurf-monitor-kernel-drops": last(lambda night: night.dropped),
    "pysmurf-monitor-spool": within(0, 1),
}


@pytest.mark.parametrize("query", PANEL_QUERIES, ids=str)
def test_a_panel_shows_what_happened(night: Night, query: Query) -> None:
    found = night.ask(query)
    assert SEEN[query.owner, query.name](night, found), found


@pytest.mark.parametrize("query", RULE_QUERIES, ids=str)
def test_an_alert_rule_sees_what_happened(night: Night, query: Query) -> None:
    found = night.ask(query)
    assert TOLD[query.owner](night, found), found


def fires(night: Night, query: Query, later_s: float = 0) -> bool:
    """Whether the rule's condition is fulfilled; that alone, where it is to last."""
    (rule,) = (rule for rule in RULES if rule["uid"] == query.owner)
    (condition,) = rule["data"][1]["model"]["conditions"]
    assert condition["reducer"] == {"type": "last"}
    (value,) = (values[-1] for values in night.ask(query, later_s).values())
    (limit,) = condition["evaluator"]["params"]
    return {"gt": value > limit, "lt": value < limit}[condition["evaluator"]["type"]]


def test_the_alerts_of_this_night(night: Night) -> None:
    fired = {query.owner.removeprefix("pysmurf-monitor-") for query in RULE_QUERIES if fires(night, query)}
    assert fired - {"silent"} == {"degraded", "dead-letters", "gaps", "kernel-drops"}


def test_silence_is_told_when_it_lasts(night: Night) -> None:
    (query,) = (query for query in RULE_QUERIES if query.owner == "pysmurf-monitor-silent")
    # in the first seconds of each three minutes there is nothing yet
    assert not (fires(night, query) and fires(night, query, later_s=-15))
    assert fires(night, query, later_s=240)
    assert fires(night, query, later_s=3600)


def test_the_agent_can_be_chosen(night: Night) -> None:
    (measurements,) = night.database.query(VARIABLE["query"]["query"])
    assert measurements["values"] == [[night.agent]]


def test_nothing_is_expected_that_is_not_asked() -> None:
    assert SEEN.keys() == {(query.owner, query.name) for query in PANEL_QUERIES}
    assert TOLD.keys() == {query.owner for query in RULE_QUERIES}
