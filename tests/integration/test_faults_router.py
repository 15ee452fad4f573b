"""The real agent without a router. Files are registered all the same; everything else resumes with the router."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from socs_monitor.wire.publisher import Publisher
from tests.evidence import send_files, wait_acknowledged, wait_registered
from tests.testbed.processes import Agent, Router, wait_until
from tests.testbed.smurf_server import SmurfServer
from tests.testbed.subscriber import Subscriber

# OCS gives up after 10 s by default.
AWAY_S = 11.0
KEPT = 10


@pytest.fixture
def own_router(tmp_path: Path) -> Iterator[Router]:
    """Provide a router that the test starts and stops itself."""
    router = Router(tmp_path)
    yield router
    with contextlib.suppress(AssertionError):  # it was never started
        router.kill()


@contextlib.contextmanager
def router_back(router: Router, agent: Agent, folder: Path) -> Iterator[Subscriber]:
    """Start the router, and a subscriber that is connected before the agent."""
    with contextlib.ExitStack() as stack:
        os.kill(agent.pid, signal.SIGSTOP)
        try:
            router.start()
            subscriber = stack.enter_context(Subscriber(folder, router))
        finally:
            os.kill(agent.pid, signal.SIGCONT)
        yield subscriber


def session_logs(subscriber: Subscriber) -> list[str]:
    return [message["payload"] for message in subscriber.session_messages()]


def check_everything_works(
    agent: Agent, sender: SmurfServer, subscriber: Subscriber, kept: int, sent: list[str]
) -> None:
    """Check the session messages that were kept, operations, both kinds of feeds, and files."""
    subscriber.wait_for(lambda: len(session_logs(subscriber)) >= kept, 60, "received the kept messages")
    assert session_logs(subscriber) == [str(number) for number in range(kept)]
    client = agent.client()
    assert client.run.status().session["status"] == "running"
    assert client.list_failed().session["data"]["total"] == 0
    stream = sender.streams[0]
    stream.pysmurf.session_log("the last one")
    subscriber.wait_for(lambda: session_logs(subscriber)[-1:] == ["the last one"], 10, "received a session message")
    stream.streamer.metadata("AMCc.enable", True)
    subscriber.wait_for(lambda: subscriber.metadata(stream.stream_id), 10, "received metadata")
    wait_registered(agent, [*sent, *send_files(sender, 3)])


def test_a_router_that_is_absent_at_boot(own_router: Router, tmp_path: Path) -> None:
    with Agent(tmp_path / "agent", own_router) as agent, SmurfServer(tmp_path / "data", agent.address) as sender:
        agent.wait_listening()
        sent = send_files(sender, 20)
        wait_registered(agent, sent, 10)
        for number in range(20):
            sender.streams[0].pysmurf.session_log(str(number))
        with router_back(own_router, agent, tmp_path) as subscriber:
            check_everything_works(agent, sender, subscriber, 20, sent)


def test_a_router_that_is_away_longer_than_ocs_waits(own_router: Router, tmp_path: Path) -> None:
    own_router.start()
    with (
        Agent(tmp_path / "agent", own_router) as agent,
        SmurfServer(tmp_path / "data", agent.address) as sender,
        Publisher("crate1slot2", agent.address) as publisher,
    ):
        agent.client()
        sent = send_files(sender, 3)
        own_router.kill()
        away = time.monotonic()
        agent.wait_log("(session left|transport disconnected)")
        for number in range(KEPT):
            sent += send_files(sender, 3)
            publisher.session_log(str(number))
            wait_registered(agent, sent, 5)
            wait_until(lambda n=number: time.monotonic() > away + AWAY_S * (n + 1) / KEPT, 5, "the next message is due")
        assert agent.exit_code is None
        with router_back(own_router, agent, tmp_path) as subscriber:
            check_everything_works(agent, sender, subscriber, KEPT, sent)


def test_an_explicit_timeout_is_honoured(own_router: Router, tmp_path: Path) -> None:
    own_router.start()
    with (
        Agent(tmp_path / "agent", own_router, arguments=["--crossbar-timeout", "2"]) as agent,
        SmurfServer(tmp_path / "data", agent.address) as sender,
    ):
        agent.client()
        sent = send_files(sender, 3)
        wait_registered(agent, sent)
        own_router.kill()
        begin = time.monotonic()
        agent.wait(15)
        assert time.monotonic() - begin > 1.9


def test_a_router_that_comes_and_goes(own_router: Router, tmp_path: Path) -> None:
    with Agent(tmp_path / "agent", own_router) as agent, SmurfServer(tmp_path / "data", agent.address) as sender:
        agent.wait_listening()
        own_router.start()
        sent = send_files(sender, 20)
        agent.client()
        sent += send_files(sender, 20)
        own_router.kill()
        sent += send_files(sender, 20)
        wait_registered(agent, sent)
        own_router.start()
        with Subscriber(tmp_path, own_router) as subscriber:
            check_everything_works(agent, sender, subscriber, 0, sent)


def test_stopping_without_a_router(own_router: Router, tmp_path: Path) -> None:
    with Agent(tmp_path / "agent", own_router) as agent, SmurfServer(tmp_path / "data", agent.address) as sender:
        agent.wait_listening()
        sent = send_files(sender, 50)
        wait_acknowledged(agent, sent)
        begin = time.monotonic()
        assert agent.stop() == 0
        assert time.monotonic() - begin < 6
        agent.start()
        wait_registered(agent, sent)
