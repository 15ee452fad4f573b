"""Attacks on the feeds: floods of one stream, streams that do not exist, and registers of the wrong type."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ocs.ocs_client import OCSClient

from socs_monitor.wire.publisher import Publisher, metadata
from tests import hostile
from tests.integration.test_end_to_end import data
from tests.integration.test_hostile import resident_mib
from tests.testbed.processes import Agent, Router
from tests.testbed.subscriber import Subscriber

StartAgent = Callable[..., Agent]

MAX_STREAMS = 64
REAL = [f"ufm_mv{number}" for number in range(6)]


def sample(stream_id: str, value: Any, register: str = "AMCc.Temperature") -> bytes:
    with contextlib.closing(Publisher(f"STREAMER:{stream_id}")) as publisher:
        return publisher.encode(metadata(register, value), "metadata")


def invented(numbers: range) -> Iterator[bytes]:
    return (sample(f"invented{number}", number) for number in numbers)


def values(subscriber: Subscriber, stream_id: str) -> list[Any]:
    return [value for _, _, value in subscriber.metadata(stream_id)]


def feeds(client: OCSClient) -> list[str]:
    """Names of the metadata feeds that the agent has registered with OCS."""
    return [name for name, _ in client._client.get_feeds() if name.endswith("_meta")]


def test_a_flood_on_one_stream_is_published_and_its_feed_lives_on(
    agent: StartAgent, router: Router, tmp_path: Path
) -> None:
    monitor = agent()
    client = monitor.client()
    flood = [sample("flooded", f"{number:02}" + "x" * 60_000, "AMCc.Tag") for number in range(40)]
    last = sample("flooded", "after", "AMCc.Tag")
    with Subscriber(tmp_path, router) as subscriber:
        hostile.send(monitor.udp_port, [sample("calm", 1.5), *flood, last, sample("calm", 2.5)])
        monitor.wait_for(lambda: "after" in values(subscriber, "flooded"), 20, "published the last value")
        monitor.wait_for(lambda: values(subscriber, "calm") == [1.5, 2.5], 5, "published the other stream")

        assert [value[:2] for value in values(subscriber, "flooded")[:-1]] == [f"{number:02}" for number in range(40)]
    assert data(client)["unpublished"] == {}
    assert "Traceback" not in monitor.log
    assert "PayloadExceeded" not in monitor.log


def test_the_largest_session_message_is_published(agent: StartAgent, router: Router, tmp_path: Path) -> None:
    monitor = agent()
    client = monitor.client()
    envelope = {"id": "crate1slot2", "type": "session_log", "payload": "é" * 32_000}
    datagram = json.dumps(envelope, ensure_ascii=False).encode()
    assert 64_000 < len(datagram) < 65_507
    with Subscriber(tmp_path, router) as subscriber:
        hostile.send(monitor.udp_port, [datagram])
        monitor.wait_for(subscriber.session_messages, 10, "published it")
        assert subscriber.session_messages() == [json.loads(datagram)]
    assert data(client)["unpublished"] == {}


def test_streams_that_do_not_exist_keep_no_real_one_from_its_feed(
    agent: StartAgent, router: Router, tmp_path: Path
) -> None:
    monitor = agent()
    client = monitor.client()
    with Subscriber(tmp_path, router) as subscriber:
        hostile.send(monitor.udp_port, invented(range(70)))
        hostile.send(monitor.udp_port, (sample(stream, number + 0.5) for number in range(20) for stream in REAL))
        expected = [number + 0.5 for number in range(20)]
        for stream in REAL:
            monitor.wait_for(lambda: values(subscriber, stream) == expected, 5, f"published {stream}")  # noqa: B023
        assert len(feeds(client)) == MAX_STREAMS
        assert set(feeds(client)) >= {f"{stream}_meta" for stream in REAL}

        hostile.send(monitor.udp_port, [sample("invented0", 7)])
        monitor.wait_for(lambda: values(subscriber, "invented0") == [0, 7], 5, "published one that came back")
        assert len(feeds(client)) == MAX_STREAMS
    assert "Traceback" not in monitor.log


def test_a_lasting_attack_with_ever_new_streams_starves_no_real_one(
    agent: StartAgent, router: Router, tmp_path: Path
) -> None:
    monitor = agent()
    client = monitor.client()
    early, late = REAL[:3], REAL[3:]
    numbers = range(100)
    with Subscriber(tmp_path, router) as subscriber:
        for number in numbers:
            hostile.send(monitor.udp_port, (sample(stream, number) for stream in early))
            hostile.send(monitor.udp_port, invented(range(30 * number, 30 * number + 30)))
            if number >= 50:  # these start while it is going on
                hostile.send(monitor.udp_port, (sample(stream, number) for stream in late))
        for stream in REAL:
            monitor.wait_for(lambda: 99 in values(subscriber, stream), 10, f"published {stream}")  # noqa: B023
        assert len(feeds(client)) == MAX_STREAMS
        assert set(feeds(client)) >= {f"{stream}_meta" for stream in REAL}
        for stream in early:
            assert values(subscriber, stream) == list(numbers)
        for stream in late:
            assert values(subscriber, stream)[-48:] == list(numbers)[-48:], "it took more than two messages to get in"
        published = {message.topic for message in subscriber.messages("_meta")}
        assert len(published) < 3 * MAX_STREAMS, "readers keep what they see of a feed"
    assert "Traceback" not in monitor.log


def test_one_integer_on_an_invented_stream_pins_no_register(agent: StartAgent, router: Router, tmp_path: Path) -> None:
    monitor = agent()
    client = monitor.client()
    with Subscriber(tmp_path, router) as subscriber:
        hostile.send(monitor.udp_port, [sample("invented", 7), sample("invented", True, "AMCc.FrameBuildTime")])
        real = [54.0, 54.25, 55, 54.5]
        hostile.send(monitor.udp_port, (sample("ufm_mv1", value) for value in real))
        hostile.send(monitor.udp_port, (sample("ufm_mv1", value, "AMCc.FrameBuildTime") for value in real))
        hostile.send(monitor.udp_port, [sample("invented", 8)])
        monitor.wait_for(lambda: len(values(subscriber, "ufm_mv1")) == 8, 5, "published all")
        monitor.wait_for(lambda: len(values(subscriber, "invented")) == 3, 5, "published all")

        assert values(subscriber, "ufm_mv1") == real * 2
        assert {type(value) for value in values(subscriber, "ufm_mv1")} == {float}
        later = [value for field, _, value in subscriber.metadata("invented") if field == "AMCcTemperature"][-1]
        assert (type(later), later) == (float, 8.0)
    assert data(client)["unpublished"] == {}


@pytest.mark.parametrize("kind", ["metadata", "session_log"])
def test_a_flood_of_large_messages_fills_no_memory_and_starves_no_register(
    agent: StartAgent, router: Router, tmp_path: Path, kind: str
) -> None:
    monitor = agent()
    client = monitor.client()
    hostile.send(monitor.udp_port, [sample("ufm_mv1", 0)])
    before = resident_mib(monitor)
    flood = [sample(f"flooded{number}", "x" * 60_000, "AMCc.Tag") for number in range(10)]
    if kind == "session_log":
        flood = [json.dumps({"id": "a", "type": kind, "payload": "x" * 60_000}).encode()]
    with Subscriber(tmp_path, router, ["observatory.pysmurf-monitor.feeds.ufm_mv1_meta"]) as subscriber:
        for number in range(100):
            hostile.send(monitor.udp_port, [*itertools.islice(itertools.cycle(flood), 50), sample("ufm_mv1", number)])
        after = resident_mib(monitor)
        monitor.wait_for(lambda: values(subscriber, "ufm_mv1")[-100:] == [*range(100)], 30, "published the register")
    assert data(client)["unpublished"].keys() <= {"overload"}
    assert after - before < 100, "megabytes of 300 that were sent"
