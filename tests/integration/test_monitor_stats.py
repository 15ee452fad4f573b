"""What the real agent says of itself: session data, the feed `monitor_stats` and the log, with a real router."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ocs
import pytest
from ocs.ocs_client import OCSClient

from socs_monitor.feeds.statistics import FIELDS, INTERVAL_S
from socs_monitor.health.events import EVENTS
from socs_monitor.wire.publisher import Publisher
from socs_monitor.wire.sequences import GRACE_S
from tests import hostile
from tests.chain import write_lock
from tests.evidence import send_files, wait_registered
from tests.testbed.ports import free_udp_port
from tests.testbed.processes import Agent, Router
from tests.testbed.smurf_server import SmurfServer
from tests.testbed.subscriber import FeedMessage, Subscriber

StartAgent = Callable[..., Agent]

FEED = ".feeds.monitor_stats"

# What OCS and Twisted log themselves in the agent's process.
OCS_LINE = re.compile(
    r"ocs: starting|Using OCS|log_file is|PysmurfMonitor starting|Starting protocol|Stopper for|st(art|op) called"
    r"|(run|list_failed|retry_failed|backfill):\d+ |transport |session (joined|left)|caught SIG|[Ss]topping"
    r"|\(UDP Port|waiting for reconnection|Scheduling retry|Main loop"
)
STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+0000 (.*)")


@pytest.fixture
def own_router(tmp_path: Path) -> Iterator[Router]:
    """A router that the test stops."""
    with Router(tmp_path) as router:
        yield router


def data(client: OCSClient) -> dict[str, Any]:
    """The session data of `run`; empty before the first."""
    return client.run.status().session.get("data") or {}


def blocks(message: FeedMessage) -> dict[str, dict[str, Any]]:
    """The fields of each block of a message, which has one sample of each."""
    made = {name: block["data"] for name, block in message.message.items()}
    assert all(len(values) == 1 for fields in made.values() for values in fields.values()), made
    return {name: {field: values[0] for field, values in fields.items()} for name, fields in made.items()}


def lose(publisher: Publisher, count: int) -> None:
    """Have messages not arrive."""
    publisher.seq_no += count
    publisher.session_log("after the gap")


def test_the_feed_has_numbers_for_alarms_and_a_last_message_at_a_stop(
    agent: StartAgent, router: Router, tmp_path: Path
) -> None:
    with Subscriber(tmp_path, router) as subscriber:
        monitor = agent()
        client = monitor.client()
        with SmurfServer(tmp_path / "data", monitor.address, streams=2) as server:
            server.send(server.messages(24, ("npy", "g3", "session_log", "metadata")))
            with Publisher("STREAMER:x_metal", monitor.address) as publisher:
                publisher.metadata("AMCc.x", 1)
        monitor.wait_for(lambda: data(client).get("files", {}).get("registered") == 12, 20, "registered all")
        subscriber.wait_for(lambda: subscriber.messages(FEED), INTERVAL_S + 5, "got the figures")
        before = len(subscriber.messages(FEED))
        late = tmp_path / "late.txt"
        late.write_text("late")
        with contextlib.closing(Publisher("late", monitor.address)) as publisher:
            publisher.data_file(str(late))
        monitor.wait_for(lambda: len(monitor.rows()) == 13, 10, "registered it")
        assert monitor.stop() == 0
        subscriber.wait_for(lambda: len(subscriber.messages(FEED)) > before, 5, "got the last figures")
        messages = subscriber.messages(FEED)

    for message in messages:
        assert message.feed["record"] is True
        assert message.feed["agg_params"] == {"exclude_aggregator": True}
        assert set(blocks(message)["monitor_stats"]) == set(FIELDS)
        for name, fields in blocks(message).items():
            assert "_meta" not in "".join([name, *fields])
            assert all(type(value) in (int, float) for value in fields.values()), fields
            assert re.fullmatch("monitor_stats|stream_[A-Za-z0-9_]+", name)
    last = blocks(messages[-1])
    stats = last.pop("monitor_stats")
    assert (stats["files_received"], stats["files_registered"], stats["degraded"]) == (13, 13, 0)
    assert (stats["listening"], stats["lost_gaps"], stats["rebinds"]) == (1, 0, 0)
    assert 0 < stats["database_write"] <= stats["database_write_max"]
    assert stats["spool_max_bytes"] == 1 << 30
    assert last["stream_late"] == {"registered_late": 1}
    assert sum(value for fields in last.values() for value in fields.values()) == 13
    assert len(last) == 5, "two of pysmurf, two of the streamer, and the late one"


def test_without_a_router_nothing_is_published_and_all_goes_on(own_router: Router, tmp_path: Path) -> None:
    with Agent(tmp_path / "agent", own_router) as monitor, SmurfServer(tmp_path / "data", monitor.address) as sender:
        monitor.client()
        own_router.kill()
        monitor.wait_log("(session left|transport disconnected)")
        sent = send_files(sender, 3)
        wait_registered(monitor, sent)
        begin = time.monotonic()
        monitor.wait_for(lambda: time.monotonic() > begin + INTERVAL_S + 1, 20, "came to publish")
        own_router.start()
        with Subscriber(tmp_path, own_router) as subscriber:
            subscriber.wait_for(lambda: subscriber.messages(FEED), 30, "got figures again")
            assert blocks(subscriber.messages(FEED)[0])["monitor_stats"]["files_registered"] == 3
        assert "Could not publish" not in monitor.log
        assert "internal_error" not in monitor.log


def test_a_gap_is_logged_and_shown_and_degrades(agent: StartAgent) -> None:
    monitor = agent()
    client = monitor.client()
    with contextlib.closing(Publisher("crate1slot2", monitor.address)) as publisher:
        datagrams = [publisher.encode(str(number), "session_log") for number in range(5)]
        publisher.send(datagrams[0])
        publisher.send(datagrams[4])
        monitor.wait_for(lambda: data(client).get("lost", {}).get("gaps") == 3, 10, "tells of the gap")
        port = publisher._socket.getsockname()[1]
        shown = data(client)
        (sender,) = shown["lost"]["senders"]
        assert sender == {
            **{"sender": f"127.0.0.1:{port}", "id": "crate1slot2", "script": "undeclared", "lost": 3},
            "last": sender["last"],
        }
        assert abs(sender["last"] - time.time()) < 10
        assert "socs-monitor backfill ROOT" in shown["degraded"]["messages_lost"]
        assert client.run.status().session["degraded"] is True
        assert len(re.findall(f"event=messages_lost sender=127.0.0.1:{port} id=crate1slot2 .*lost=3", monitor.log)) == 1
        for late in datagrams[1:4]:
            publisher.send(late)
        none = {"gaps": 0, "kernel": 0, "reordered": 3, "senders": []}
        monitor.wait_for(lambda: data(client)["lost"] == none, 5, "takes it back")


def test_no_message_is_missed_that_arrived(agent: StartAgent, tmp_path: Path) -> None:
    monitor = agent()
    client = monitor.client()
    with SmurfServer(tmp_path / "data", monitor.address, streams=3) as server:
        server.burst(server.encode(server.messages(3000)))
        for stream in server.streams:
            for payload in ("text", 5, None):
                stream.pysmurf.publish(payload, "session_data")  # which is refused, but did arrive
            stream.pysmurf.publish("x" * 70_000, "general")  # which its sender drops
            stream.pysmurf.session_log("the last one")
    sent = time.time()
    monitor.wait_for(lambda: data(client).get("datagrams", {}).get("total", 0) > 3000, 10, "read them all")
    monitor.wait_for(lambda: data(client)["files"]["pending"] == 0, 20, "registered them all")
    monitor.wait_for(lambda: data(client)["timestamp"] > sent + GRACE_S + 3, 10, "waited for late ones")
    shown = data(client)

    assert shown["lost"] == {"gaps": 0, "kernel": 0, "reordered": 0, "senders": []}
    assert shown["malformed"] == {"wrong or missing field": 9}
    assert shown["degraded"] == {}


def test_what_the_kernel_drops_is_counted(agent: StartAgent) -> None:
    monitor = agent(options=[["--udp-buffer", 10_000]])
    client = monitor.client()
    monitor.wait_for(lambda: data(client).get("lost", {}).get("kernel") == 0, 10, "has dropped nothing")
    with contextlib.closing(Publisher("crate1slot2", monitor.address)) as publisher:
        publisher.session_log("the first")
        os.kill(monitor.pid, signal.SIGSTOP)
        try:
            for number in range(100):
                publisher.session_log(f"{number}" * 1000)
        finally:
            os.kill(monitor.pid, signal.SIGCONT)
        monitor.wait_for(lambda: data(client)["lost"]["kernel"] > 0, 10, "tells of the drops")
        publisher.session_log("the last")
        monitor.wait_for(lambda: data(client)["lost"]["gaps"] > 0, 10, "tells of the gap")
    shown = data(client)

    assert shown["lost"]["kernel"] == shown["lost"]["gaps"]
    assert shown["datagrams"]["total"] == 102 - shown["lost"]["kernel"]
    assert set(shown["degraded"]) == {"messages_lost", "kernel_drops"}
    assert shown["socket"]["buffer_asked"] == 10_000
    monitor.wait_log("The kernel dropped .*event=kernel_drops")


def test_a_database_that_is_locked_shows_in_the_figures(agent: StartAgent, tmp_path: Path) -> None:
    monitor = agent()
    client = monitor.client()
    with SmurfServer(tmp_path / "data", monitor.address) as sender:
        wait_registered(monitor, send_files(sender, 2))
        with write_lock(monitor.db_path):
            send_files(sender, 2)
            monitor.wait_for(lambda: data(client)["database"]["errors"] > 0, 10, "met the lock")
            monitor.wait_for(lambda: data(client)["queue"]["oldest"] > 1, 10, "tells the age")
            assert data(client)["queue"]["depth"] == 2
            assert set(data(client)["degraded"]) == {"database"}

            assert client.run.stop().status == ocs.OK
            client.run.wait(timeout=10)
        assert client.run.start().status == ocs.OK
        monitor.wait_for(lambda: data(client)["degraded"] == {}, 10, "is well")
        monitor.wait_for(lambda: data(client)["queue"] == {"depth": 0, "oldest": 0.0}, 10, "registered them")


def test_the_session_data_stays_small_whoever_sends_what(agent: StartAgent, tmp_path: Path) -> None:
    monitor = agent()
    client = monitor.client()
    path = tmp_path / "x.txt"
    path.write_text("x")
    for number in range(200):
        for name in (f"{number}\U0001f600" * 20, f"s{number}"):
            with contextlib.closing(Publisher(name, monitor.address, script="\n" * 20)) as publisher:
                publisher.data_file(str(path))
                publisher.data_file(f"/nowhere/{name}")
                lose(publisher, 1)
                publisher.metadata("AMCc." + name, 1)
    monitor.wait_for(lambda: data(client)["lost"]["gaps"] == 400, 20, "tells of the gaps")
    monitor.wait_for(lambda: data(client)["files"]["pending"] == 0, 20, "handled all")
    shown = data(client)

    assert len(json.dumps(shown)) < 100_000
    assert (len(shown["streams"]), len(shown["lost"]["senders"])) == (50, 10)


def test_every_line_of_the_log_is_an_event(agent: StartAgent, tmp_path: Path) -> None:
    monitor = agent(options=[["--give-up-after", 0.1]])
    client = monitor.client()
    with SmurfServer(tmp_path / "data", monitor.address) as sender:
        sent = send_files(sender, 5)
        wait_registered(monitor, sent)
        publisher = sender.streams[0].pysmurf
        publisher.data_file(str(tmp_path / "never_comes.txt"))
        publisher.data_file('/data/a path/with "quotes" and = and \n', action="..")
        publisher.data_file(str(tmp_path))
        publisher.metadata("AMCc.x", 1)
        publisher.metadata("AMCc.x", "text")
        publisher.send(b"no JSON")
        lose(publisher, 2)
        hostile.send(monitor.udp_port, hostile.traversals(str(tmp_path / "x")))
        with write_lock(monitor.db_path):
            send_files(sender, 1)
            monitor.wait_log("event=degraded")
    monitor.wait_log("event=recovered")
    monitor.wait_log("event=messages_lost")
    monitor.wait_log("event=file_missing")
    Path(sent[0]).write_text("another")
    client.list_failed()
    client.retry_failed()
    client.backfill(root=str(tmp_path))
    monitor.wait_log("event=backfill")
    monitor.wait_log("event=dead_letters")
    monitor.wait_log("event=changed", 15)
    assert monitor.stop() == 0

    own = [match[1] for match in map(STAMP.fullmatch, monitor.log.splitlines()) if match]
    own = [line for line in own if not OCS_LINE.match(line)]
    events = []
    for line in own:
        match = re.search(r' \| event=([a-z_]+)((?: [a-z0-9_]+=("([^"\\]|\\.)*"|[^\s"]+))*)$', line)
        assert match, line
        events.append(match[1])
    assert set(events) <= set(EVENTS)
    expected = {
        "registered",
        "waiting",
        "changed",
        "file_missing",
        "refused",
        "dead_letters",
        "backfill",
        "messages_lost",
    }
    assert set(events) >= expected | {"degraded", "recovered", "dropped", "field"}


def test_each_file_is_logged_at_debug(agent: StartAgent, tmp_path: Path) -> None:
    monitor = agent(env={"LOGLEVEL": "debug"})
    with SmurfServer(tmp_path / "data", monitor.address) as sender:
        sent = send_files(sender, 5)
        wait_registered(monitor, sent)
    for row in monitor.rows():
        keys = f"path={row['local_path']} archive={row['archive_name']} remote={row['remote_path']}"
        monitor.wait_log(re.escape(f"{keys} md5={row['local_md5sum']}"))


@pytest.mark.parametrize("moment", range(12))
def test_a_stop_is_clean_at_any_moment_of_the_start(router: Router, tmp_path: Path, moment: int) -> None:
    with Agent(tmp_path, router, udp_port=free_udp_port()) as monitor:
        monitor.wait_listening()
        begin = time.monotonic()
        while time.monotonic() < begin + moment * 0.01:
            pass
        assert monitor.stop() == 0
