"""A real WAMP subscriber in its own process. `Subscriber` starts it and reads its output; `main` runs in it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.testbed.processes import OWN_BIN, REALM, Process, Router

_READY = "ready"


class FeedMessage(NamedTuple):
    """A message of a feed: address of the topic, content, and OCS's description of the feed."""

    topic: str
    message: Any
    feed: dict[str, Any]


class Subscriber(Process):
    """Collects all messages of some topics, and reconnects when the router returns.

    Args:
        folder: Scratch folder.
        router: The router. It must run when the subscriber is started.
        topics: Addresses, such as ``observatory.pysmurf-monitor.feeds.pysmurf_session_data``. One with a dot at its end
            matches all addresses that begin with it.
    """

    def __init__(self, folder: Path, router: Router, topics: Sequence[str] = ("observatory.",)) -> None:
        command = [OWN_BIN / "python", "-m", "tests.testbed.subscriber", router.ws_url, *topics]
        super().__init__(command, folder / "subscriber.log")
        self._messages: list[FeedMessage] = []

    def start(self) -> None:
        """Start it, and wait until it has subscribed."""
        super().start()
        self.wait_log(f"^{_READY}$")

    def messages(self, topic: str = "") -> list[FeedMessage]:
        """Return all messages so far whose address ends with `topic`."""
        self._messages += [FeedMessage(*json.loads(line)) for line in self.new_lines() if line.startswith("[")]
        return [message for message in self._messages if message.topic.endswith(topic)]

    def session_messages(self) -> list[dict[str, Any]]:
        """Return the envelopes on the feed `pysmurf_session_data`."""
        return [message.message for message in self.messages(".feeds.pysmurf_session_data")]

    def metadata(self, stream_id: str) -> list[tuple[str, float, Any]]:
        """Return the samples on a stream's metadata feed: field, time (unix seconds), value."""
        return [
            (field, timestamp, value)
            for message in self.messages(f".feeds.{stream_id}_meta")
            for block in message.message.values()
            for field, values in block["data"].items()
            for timestamp, value in zip(block["timestamps"], values, strict=True)
        ]


def main(url: str, *topics: str) -> None:
    """Print every message of the topics as a line of JSON, until the process is killed."""
    from autobahn.twisted.wamp import ApplicationRunner, ApplicationSession
    from autobahn.wamp.types import SubscribeOptions

    out = sys.stdout  # autobahn replaces sys.stdout with its logger

    class Session(ApplicationSession):  # type: ignore[misc]
        async def onJoin(self, _details: object) -> None:
            for topic in topics:
                match = "prefix" if topic.endswith(".") else "exact"
                await self.subscribe(self.on_event, topic, SubscribeOptions(match=match, details_arg="details"))
            print(_READY, file=out, flush=True)

        def on_event(self, *args: Any, details: Any) -> None:
            # OCS publishes a pair of message and feed; other topics publish anything
            pair = args[0] if len(args) == 1 and isinstance(args[0], list) and len(args[0]) == 2 else [args, {}]
            print(json.dumps([details.topic, *pair], default=repr), file=out, flush=True)

    ApplicationRunner(url, REALM).run(Session, auto_reconnect=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
