"""A real WAMP subscriber, in a process of its own: `Subscriber` starts and reads it, `main` is what it runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.testbed.processes import OWN_BIN, REALM, Process, Router

_READY = "ready"


class FeedMessage(NamedTuple):
    """What came on a feed: the topic's address, the message, and what OCS says about the feed."""

    topic: str
    message: Any
    feed: dict[str, Any]


class Subscriber(Process):
    """Collects all messages that the router delivers for some topics. It comes back when the router does.

    Args:
        folder: Scratch folder.
        router: The router, which must run when this is started.
        topics: Addresses, e.g. ``observatory.pysmurf-monitor.feeds.pysmurf_session_data``; one with a point at its
            end stands for all that begin with it.
    """

    def __init__(self, folder: Path, router: Router, topics: Sequence[str] = ("observatory.",)) -> None:
        command = [OWN_BIN / "python", "-m", "tests.testbed.subscriber", router.ws_url, *topics]
        super().__init__(command, folder / "subscriber.log")
        self._messages: list[FeedMessage] = []

    def start(self) -> None:
        """Start it and wait until it has subscribed."""
        super().start()
        self.wait_log(f"^{_READY}$")

    def messages(self, topic: str = "") -> list[FeedMessage]:
        """All messages so far whose topic's address ends with `topic`."""
        self._messages += [FeedMessage(*json.loads(line)) for line in self.new_lines() if line.startswith("[")]
        return [message for message in self._messages if message.topic.endswith(topic)]

    def session_messages(self) -> list[dict[str, Any]]:
        """The envelopes on the feed `pysmurf_session_data`."""
        return [message.message for message in self.messages(".feeds.pysmurf_session_data")]

    def metadata(self, stream_id: str) -> list[tuple[str, float, Any]]:
        """The samples on a stream's metadata feed: field, time (unix seconds), value."""
        return [
            (field, timestamp, value)
            for message in self.messages(f".feeds.{stream_id}_meta")
            for block in message.message.values()
            for field, values in block["data"].items()
            for timestamp, value in zip(block["timestamps"], values, strict=True)
        ]


def main(url: str, *topics: str) -> None:
    """Print every message on the topics as a line of JSON, for ever."""
    from autobahn.twisted.wamp import ApplicationRunner, ApplicationSession
    from autobahn.wamp.types import SubscribeOptions

    out = sys.stdout  # autobahn puts its logger in this place

    class Session(ApplicationSession):  # type: ignore[misc]
        async def onJoin(self, _details: object) -> None:
            for topic in topics:
                match = "prefix" if topic.endswith(".") else "exact"
                await self.subscribe(self.on_event, topic, SubscribeOptions(match=match, details_arg="details"))
            print(_READY, file=out, flush=True)

        def on_event(self, *args: Any, details: Any) -> None:
            # an OCS feed publishes one pair: message and feed; other topics publish as they like
            pair = args[0] if len(args) == 1 and isinstance(args[0], list) and len(args[0]) == 2 else [args, {}]
            print(json.dumps([details.topic, *pair], default=repr), file=out, flush=True)

    ApplicationRunner(url, REALM).run(Session, auto_reconnect=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
