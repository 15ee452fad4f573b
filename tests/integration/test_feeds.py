"""What the real agent publishes on its feeds, as a real subscriber of a real router gets it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from socs_monitor.wire.publisher import Publisher, metadata
from tests.testbed.processes import Agent, Router, wait_until
from tests.testbed.subscriber import Subscriber

StartAgent = Callable[..., Agent]


def test_session_messages_reach_subscribers_unmodified(agent: StartAgent, router: Router, tmp_path: Path) -> None:
    monitor = agent()
    with Subscriber(tmp_path, router) as subscriber:
        publisher = Publisher("crate1slot2", monitor.address, script="uxm_setup.py")
        payloads = [("step 1 of 2", "session_log"), ({"bands": [0, 1], "nested": {"é": None}}, "session_data")] * 20
        envelopes = []
        for payload, kind in [*payloads, ("", "session_log"), ({}, "session_data")]:
            datagram = publisher.encode(payload, kind)
            envelopes.append(json.loads(datagram))
            publisher.send(datagram)
        publisher.close()
        monitor.wait_for(lambda: len(subscriber.session_messages()) >= len(envelopes), 10, "published all")

        assert subscriber.session_messages() == envelopes
        message = subscriber.messages(".pysmurf_session_data")[0]
        assert message.topic == "observatory.pysmurf-monitor.feeds.pysmurf_session_data"
        assert message.feed["record"] is False


def test_a_register_is_one_block_of_one_field_on_its_streams_feed(
    agent: StartAgent, router: Router, tmp_path: Path
) -> None:
    monitor = agent()
    values: list[tuple[str, Any, str]] = [
        ("AMCc.SmurfProcessor.SOStream.open_g3stream", 1, "AMCcSmurfProcessorSOStreamopen_g3stream"),
        ("AMCc.SmurfProcessor.SOStream.stream_tag", "obs", "AMCcSmurfProcessorSOStreamstream_tag"),
        ("AMCc.enable", True, "AMCcenable"),
        ("AMCc.Base[0].bandCenterMHz", 4250.5, "AMCcBase0bandCenterMHz"),
        ("AMCc.SmurfProcessor.SOStream.open_g3stream", 0, "AMCcSmurfProcessorSOStreamopen_g3stream"),
    ]
    with Subscriber(tmp_path, router) as subscriber:
        sent: dict[str, list[tuple[str, float, Any]]] = {}
        for pub_id, stream_id in (("STREAMER:ufm_mv5", "ufm_mv5"), ("crate1slot2", "crate1slot2")):
            publisher = Publisher(pub_id, monitor.address)
            for path, value, field in values:
                datagram = publisher.encode(metadata(path, value), "metadata")
                publisher.send(datagram)
                sent.setdefault(stream_id, []).append((field, json.loads(datagram)["time"], value))
            publisher.close()
        for stream_id, samples in sent.items():
            monitor.wait_for(lambda: len(subscriber.metadata(stream_id)) >= len(values), 10, "published all")  # noqa: B023

            assert sorted(subscriber.metadata(stream_id), key=repr) == sorted(samples, key=repr)
            for message in subscriber.messages(f".feeds.{stream_id}_meta"):
                assert message.feed["record"] is True
                assert all(list(block["data"]) == [name] for name, block in message.message.items())
                assert all(block["block_name"] == name for name, block in message.message.items())


def test_the_last_metadata_message_needs_no_further_one(agent: StartAgent, router: Router, tmp_path: Path) -> None:
    monitor = agent()
    monitor.client()
    with Subscriber(tmp_path, router) as subscriber, contextlib.closing(Publisher("a:s1", monitor.address)) as sender:
        for number in range(1, 4):
            sender.metadata("AMCc.x", number)
            monitor.wait_for(lambda: len(subscriber.metadata("s1")) == number, 2, "published it")  # noqa: B023
        assert [value for _, _, value in subscriber.metadata("s1")] == [1, 2, 3]


def test_metadata_that_lies_in_the_buffer_is_published_at_a_stop(
    agent: StartAgent, router: Router, tmp_path: Path
) -> None:
    monitor = agent()
    monitor.client()
    with Subscriber(tmp_path, router) as subscriber, contextlib.closing(Publisher("a:s1", monitor.address)) as sender:
        sender.metadata("AMCc.x", 1)
        monitor.wait_for(lambda: len(subscriber.metadata("s1")) == 1, 2, "published the first")
        sender.metadata("AMCc.x", 2)  # the next flush by the timer is a second away
        begin = time.monotonic()
        assert monitor.stop() == 0

        assert time.monotonic() - begin < 1, "the timer may have done it"
        wait_until(lambda: len(subscriber.metadata("s1")) == 2, 5, "the second was published")
        assert subscriber.metadata("s1")[1][2] == 2
