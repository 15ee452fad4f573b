"""What reaches the feeds, in which order, and what becomes of it while the router is away."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from autobahn.exception import Disconnected, PayloadExceededError
from autobahn.wamp.exception import SerializationError, TransportLost
from ocs.ocs_feed import Block
from twisted.internet.task import Clock as ReactorClock
from twisted.internet.testing import StringTransport

from socs_monitor.feeds import forwarding as feeds_module
from socs_monitor.feeds.fields import MAX_STREAMS
from socs_monitor.feeds.forwarding import BACKLOG_AGE_S, BACKLOG_BYTES, BACKLOG_MAX, BUFFER_BYTES, IN_FLIGHT_MAX, Feeds
from socs_monitor.health.health import Health
from socs_monitor.wire import messages
from socs_monitor.wire.messages import Metadata, SessionMessage
from tests.chain import Clock

NO_ROUTER = "session messages: no router"


class RecordedFeed:
    """Buffers as OCS's feed does: the first sample starts the buffer, a flush publishes and empties it.

    `error` is what the transport raises, if anything.
    """

    def __init__(self, name: str) -> None:
        self.feed_name = name
        self.buffer_start_time: float | None = None
        self.blocks: dict[str, Block] = {}
        self.buffer: list[dict[str, Any]] = []
        self.published: list[list[dict[str, Any]]] = []
        self.error: Exception | None = None

    def take(self, block: dict[str, Any]) -> None:
        self.blocks.setdefault(block["block_name"], Block(block["block_name"], block["data"])).append(block)
        self.buffer.append(block)
        self.buffer_start_time = 1.0

    def flush_buffer(self) -> None:
        if self.error is not None:
            raise self.error
        self.published.append(self.buffer)
        self.buffer = []
        for block in self.blocks.values():
            block.clear()


class Agent:
    """Records what an OCSAgent would publish. Like OCS's agent, it has a new transport after each `join`."""

    def __init__(self) -> None:
        self.realm_joined = True
        self.transport = SimpleNamespace(transport=StringTransport())  # autobahn's, with Twisted's
        self.registered: list[tuple[str, dict[str, Any]]] = []
        self.session_messages: list[Any] = []
        self.recorded: dict[str, RecordedFeed] = {}
        self.feeds: dict[str, RecordedFeed] = {}  # those that are registered now
        self._ready: list[Callable[..., None]] = []

    def register_feed(self, name: str, **options: Any) -> RecordedFeed:
        self.registered.append((name, options))
        self.feeds[name] = self.recorded[name] = RecordedFeed(name)
        return self.recorded[name]

    def publish_to_feed(self, name: str, message: Any, from_reactor: bool) -> None:
        assert from_reactor
        assert self.realm_joined, "published without a router"
        if name == feeds_module.SESSION_FEED:
            self.session_messages.append(message)
        else:
            self.feeds[name].take(message)

    def on(self, event: str, handler: Callable[..., None]) -> None:
        assert event == "ready"
        self._ready.append(handler)

    def leave(self) -> None:
        """Lose the connection, of which Twisted notifies the producer first."""
        if self.transport.transport.producer is not None:
            self.transport.transport.producer.stopProducing()
        self.realm_joined = False

    def join(self) -> None:
        self.realm_joined = True
        self.transport = SimpleNamespace(transport=StringTransport())  # autobahn's, with Twisted's
        for handler in self._ready:
            handler(self)


class Bench:
    """Feeds over such an agent; `reactor` drives the timer."""

    def __init__(self) -> None:
        self.agent = Agent()
        self.health = Health(lambda _level, _text: None)
        self.clock = Clock()
        self.reactor = ReactorClock()
        self.feeds = Feeds(self.agent, self.health, self.clock.monotonic)
        self.feeds.start(self.reactor)
        self.agent.join()

    def session(self, number: int, size: int = 0) -> None:
        """Let session message `number` arrive, as a datagram of at least `size` bytes."""
        envelope = {"id": "a", "type": "session_log", "payload": str(number)}
        missing = size - len(json.dumps(envelope | {"padding": ""}))
        datagram = json.dumps(envelope | {"padding": "x" * missing} if size else envelope).encode()
        message = messages.parse(datagram)
        assert isinstance(message, SessionMessage)
        self.feeds.session(message, datagram)

    def numbers(self) -> list[int]:
        return [int(envelope["payload"]) for envelope in self.agent.session_messages]

    def pause(self) -> None:
        """Let the transport's buffer be full, as while the router reads nothing."""
        self.agent.transport.transport.producer.pauseProducing()

    def metadata(self, value: object, stream_id: str = "s1", path: str = "AMCc.x", time: float = 5.0) -> None:
        self.feeds.metadata(Metadata({}, stream_id, path, value, time))

    def published(self, name: str = "s1_meta") -> list[list[Any]]:
        """Values in each message of a recorded feed."""
        feed = self.agent.recorded[name]
        return [[value for block in blocks for value in block["data"].values()] for blocks in feed.published]


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_the_session_feed_is_there_from_the_start_and_not_recorded(bench: Bench) -> None:
    assert bench.agent.registered == [("pysmurf_session_data", {})]


def test_a_session_message_is_published_at_once_and_as_it_came(bench: Bench) -> None:
    envelope = {"id": "a", "type": "session_data", "payload": {"x": [None, 1]}, "of a newer publisher": 1}
    bench.feeds.session(SessionMessage(envelope), json.dumps(envelope).encode())

    assert bench.agent.session_messages == [envelope]
    assert bench.agent.session_messages[0] is envelope


def test_session_messages_wait_for_the_router_in_order(bench: Bench) -> None:
    bench.session(0)
    bench.agent.leave()
    bench.session(1)
    bench.session(2)
    assert bench.numbers() == [0]
    bench.agent.join()
    bench.session(3)

    assert bench.numbers() == [0, 1, 2, 3]
    assert not bench.health.counters.unpublished


def test_a_message_that_comes_before_the_backlog_was_published_does_not_overtake_it(bench: Bench) -> None:
    bench.agent.leave()
    bench.session(1)
    bench.agent.realm_joined = True  # OCS has joined, but not yet said "ready"
    bench.session(2)

    assert bench.numbers() == [1, 2]


def test_the_oldest_of_too_many_waiting_session_messages_are_dropped_and_counted(bench: Bench) -> None:
    bench.agent.leave()
    for number in range(BACKLOG_MAX + 3):
        bench.session(number)
    bench.agent.join()

    assert bench.numbers() == list(range(3, 1003))
    assert bench.health.counters.unpublished == {NO_ROUTER: 3}


def test_the_backlog_is_bounded_by_bytes_too(bench: Bench) -> None:
    size = 64_000
    most = BACKLOG_BYTES // size
    assert most < BACKLOG_MAX
    bench.agent.leave()
    for number in range(most + 3):
        bench.session(number, size)
    assert bench.health.counters.unpublished == {NO_ROUTER: 3}
    bench.agent.join()

    assert bench.numbers() == list(range(3, most + 3))


def test_a_published_backlog_frees_its_room(bench: Bench) -> None:
    size = 64_000
    most = BACKLOG_BYTES // size
    for time in range(3):
        bench.agent.leave()
        for number in range(most):
            bench.session(time * most + number, size)
        bench.agent.join()

    assert bench.numbers() == list(range(3 * most))
    assert not bench.health.counters.unpublished


def test_the_backlog_is_published_unmodified(bench: Bench) -> None:
    envelope = {"id": "a", "type": "session_data", "payload": {"x": [None, 1, "\u00e9"]}, "of a newer publisher": 1}
    bench.agent.leave()
    bench.feeds.session(SessionMessage(envelope), json.dumps(envelope).encode())
    bench.agent.join()

    assert bench.agent.session_messages == [envelope]


def test_session_messages_that_are_too_old_are_dropped_and_counted(bench: Bench) -> None:
    bench.agent.leave()
    bench.session(0)
    bench.clock.advance(1)
    bench.session(1)
    bench.clock.advance(300)
    bench.session(2)
    bench.agent.join()

    assert BACKLOG_AGE_S == 300
    assert bench.numbers() == [1, 2], "a message may be 300 s old, no more"
    assert bench.health.counters.unpublished == {NO_ROUTER: 1}


def test_the_rest_of_a_backlog_waits_if_the_router_leaves_again(bench: Bench) -> None:
    bench.agent.leave()
    for number in range(4):
        bench.session(number)
    publish = bench.agent.publish_to_feed

    def publish_two(*args: Any, **options: Any) -> None:
        publish(*args, **options)
        bench.agent.realm_joined = len(bench.agent.session_messages) != 2

    bench.agent.publish_to_feed = publish_two  # type: ignore[method-assign]
    bench.agent.join()
    assert bench.numbers() == [0, 1]
    bench.agent.join()
    assert bench.numbers() == [0, 1, 2, 3]


def test_a_register_is_one_block_with_one_field_on_its_streams_recorded_feed(bench: Bench) -> None:
    bench.metadata(1, path="AMCc.SmurfProcessor.SOStream.open_g3stream", time=1700000000.5)

    assert bench.agent.registered[1:] == [("s1_meta", {"record": True, "buffer_time": 1})]
    name = "AMCcSmurfProcessorSOStreamopen_g3stream"
    assert bench.agent.recorded["s1_meta"].buffer == [
        {"block_name": name, "timestamp": 1700000000.5, "data": {name: 1}}
    ]


def test_recorded_values_are_published_within_a_second_without_further_ones(bench: Bench) -> None:
    bench.metadata(1)
    bench.metadata(2)
    assert bench.published() == []
    bench.reactor.advance(1)
    assert bench.published() == [[1, 2]]
    bench.metadata(3)
    bench.reactor.advance(1)
    assert bench.published() == [[1, 2], [3]]


def test_empty_buffers_publish_nothing(bench: Bench) -> None:
    bench.metadata(1)
    for _ in range(5):
        bench.reactor.advance(1)

    assert bench.published() == [[1]]


def test_all_streams_are_flushed(bench: Bench) -> None:
    bench.metadata(1, "s1")
    bench.metadata(2, "s2")
    bench.feeds.flush()

    assert (bench.published("s1_meta"), bench.published("s2_meta")) == ([[1]], [[2]])


def test_without_a_router_metadata_is_dropped_and_counted(bench: Bench) -> None:
    bench.metadata(1)
    bench.agent.leave()
    bench.metadata(2)
    bench.metadata(3, stream_id="not seen before")
    bench.agent.join()
    bench.metadata(4)
    bench.feeds.flush()

    assert bench.published() == [[1, 4]]
    assert bench.health.counters.unpublished == {"metadata: no router": 2}


def test_a_buffer_that_has_values_when_the_router_goes_is_published_when_it_is_back(bench: Bench) -> None:
    bench.metadata(1)
    bench.agent.leave()
    bench.reactor.advance(5)
    assert bench.published() == []
    bench.agent.join()
    bench.reactor.advance(1)

    assert bench.published() == [[1]]


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), 2**70], ids=repr)
def test_a_value_that_no_reader_survives_is_counted_and_the_others_go_on(bench: Bench, value: object) -> None:
    bench.metadata(1.5)
    bench.metadata(value)
    bench.metadata(2.5)
    bench.reactor.advance(1)

    assert bench.published() == [[1.5, 2.5]]
    assert bench.health.counters.unpublished.total() == 1
    assert all(reason.startswith("metadata: ") for reason in bench.health.counters.unpublished)


def test_a_stream_with_unusable_values_only_gets_no_feed(bench: Bench) -> None:
    bench.metadata(None, "s9")
    bench.metadata(1, "no name/for a feed")

    assert [name for name, _ in bench.agent.registered] == ["pysmurf_session_data"]


@pytest.mark.parametrize(
    "error", [TransportLost(), Disconnected("gone"), SerializationError("odd"), OverflowError("2**64")]
)
def test_what_ocs_refuses_is_counted_and_the_next_message_is_published(
    bench: Bench, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(bench.agent, "publish_to_feed", refuse)
        bench.session(1)
    bench.session(2)

    assert bench.health.counters.unpublished == {"not taken by OCS": 1}
    assert bench.numbers() == [2]


def test_a_buffer_is_published_when_it_is_large(bench: Bench) -> None:
    text = "é" * 20_000
    for _ in range(20):
        bench.metadata(text)
    published = bench.published()

    assert [len(values) for values in published] == [7, 7]
    assert BUFFER_BYTES <= 7 * len(text.encode()) < BUFFER_BYTES + 30_000
    bench.reactor.advance(1)
    assert [len(values) for values in bench.published()] == [7, 7, 6]


def test_a_buffer_that_a_timer_has_published_is_empty(bench: Bench) -> None:
    for _ in range(8):
        bench.metadata("x" * 60_000)
        bench.reactor.advance(1)

    assert [len(values) for values in bench.published()] == [1] * 8


@pytest.mark.parametrize("error", [PayloadExceededError("large"), SerializationError("odd"), AssertionError("OCS")])
def test_a_buffer_that_the_transport_refuses_is_dropped_and_counted_and_all_feeds_go_on(
    bench: Bench, error: Exception
) -> None:
    for value in (1, 2, 3):
        bench.metadata(value)
        bench.metadata(value, "s2")
    bench.agent.recorded["s1_meta"].error = error
    bench.reactor.advance(1)
    assert bench.health.counters.unpublished == {"not taken by OCS": 3}
    assert bench.published("s2_meta") == [[1, 2, 3]]

    bench.agent.recorded["s1_meta"].error = None
    bench.agent.recorded["s1_meta"].buffer.clear()  # which stands for OCS's own blocks; these are emptied
    assert all(block.empty() for block in bench.agent.recorded["s1_meta"].blocks.values())
    bench.reactor.advance(1)
    bench.metadata(4)
    bench.reactor.advance(1)
    assert bench.published() == [[4]]
    assert bench.health.counters.unpublished == {"not taken by OCS": 3}


def test_buffered_values_get_the_new_type_of_their_field(bench: Bench) -> None:
    bench.metadata(True, "s1")
    bench.metadata(2, "s2")
    bench.metadata(7, "s2", "AMCc.other")
    bench.metadata(0.5, "s3")
    blocks = [bench.agent.recorded[f"s{number}_meta"].blocks["AMCcx"].data["AMCcx"] for number in (1, 2, 3)]

    assert repr(blocks) == "[[1.0], [2.0], [0.5]]"
    assert repr(bench.agent.recorded["s2_meta"].blocks["AMCcother"].data) == "{'AMCcother': [7]}"


def test_a_replaced_stream_publishes_its_buffer_and_leaves_ocs(bench: Bench) -> None:
    for number in range(MAX_STREAMS + 1):
        bench.metadata(number, f"s{number}")

    assert bench.published("s0_meta") == [[0]]
    assert "s0_meta" not in bench.agent.feeds
    assert len(bench.agent.feeds) == 1 + MAX_STREAMS
    bench.metadata(7, "s0")
    bench.reactor.advance(1)
    assert bench.published("s0_meta") == [[7]]


def test_while_the_router_reads_there_is_room_for_any_number_of_datagrams(bench: Bench) -> None:
    assert all(bench.feeds.has_room(64_000) for _ in range(2 * IN_FLIGHT_MAX // 64_000))


def test_while_the_router_reads_nothing_there_is_room_for_a_limited_number_of_bytes(bench: Bench) -> None:
    assert bench.feeds.has_room(IN_FLIGHT_MAX), "not counted before"
    bench.pause()
    assert bench.feeds.has_room(IN_FLIGHT_MAX - 10)
    assert not bench.feeds.has_room(11)
    assert bench.feeds.has_room(10), "what was refused does not count"
    assert not bench.feeds.has_room(1)


def test_there_is_room_again_when_the_router_reads(bench: Bench) -> None:
    for _ in range(2):
        bench.pause()
        assert bench.feeds.has_room(IN_FLIGHT_MAX)
        assert not bench.feeds.has_room(1)
        bench.agent.transport.transport.producer.resumeProducing()
        assert bench.feeds.has_room(2 * IN_FLIGHT_MAX)


def test_a_second_pause_does_not_make_room(bench: Bench) -> None:
    bench.pause()
    assert bench.feeds.has_room(IN_FLIGHT_MAX)
    bench.pause()

    assert not bench.feeds.has_room(1)


def test_a_lost_connection_frees_the_bytes_in_flight(bench: Bench) -> None:
    bench.pause()
    assert bench.feeds.has_room(IN_FLIGHT_MAX)
    bench.agent.leave()

    assert bench.feeds.has_room(2 * IN_FLIGHT_MAX)


def test_each_connection_to_the_router_is_watched(bench: Bench) -> None:
    bench.pause()
    assert bench.feeds.has_room(IN_FLIGHT_MAX)
    bench.agent.join()  # without a word of the former connection's end
    assert bench.agent.transport.transport.streaming, "a push producer: called when the buffer is full"
    assert bench.feeds.has_room(2 * IN_FLIGHT_MAX)
    bench.pause()

    assert bench.feeds.has_room(IN_FLIGHT_MAX)
    assert not bench.feeds.has_room(1)


def test_the_transport_is_watched_before_the_backlog_goes_out(bench: Bench) -> None:
    bench.agent.leave()
    bench.session(0)
    publish = bench.agent.publish_to_feed

    def fill(*args: Any, **options: Any) -> None:
        publish(*args, **options)
        bench.pause()

    bench.agent.publish_to_feed = fill  # type: ignore[method-assign]
    bench.agent.join()

    assert bench.numbers() == [0]
    assert not bench.feeds.has_room(IN_FLIGHT_MAX + 1)
