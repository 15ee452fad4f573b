"""`make demo`: run a real router, the real agent and a simulated SMuRF server, and print the result.

The exit code is 0 if every file is registered exactly once and every feed message arrived.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.testbed.processes import CROSSBAR, SITE_CONFIG, Agent, Router, wait_until
from tests.testbed.smurf_server import FULL_MIX, REGISTERS, Message, SmurfServer
from tests.testbed.subscriber import Subscriber

STREAMS = 3
RATE = 50.0  # messages a second
DEADLINE_S = 15.0

_BEGIN = time.monotonic()


def say(text: str) -> None:
    """Print a line of progress with the seconds since the start."""
    print(f"[{time.monotonic() - _BEGIN:5.1f} s] {text}", flush=True)


def send(server: SmurfServer, agent: Agent) -> list[Message]:
    """Play an observation, and print how registration keeps up."""
    plan = itertools.chain(
        server.messages(STREAMS * len(FULL_MIX), FULL_MIX),
        server.messages(STREAMS * len(REGISTERS), ("metadata",)),
    )
    sent: list[Message] = []
    while part := list(itertools.islice(plan, 24)):
        sent += server.send(part, RATE)
        files = sum(message.file is not None for message in sent)
        say(f"  sent {len(sent)} messages, {files} of them files; {len(agent.rows())} files are registered")
    return sent


def show_rows(rows: Sequence[dict[str, Any]], root: str) -> None:
    """Print the rows as a table, with local paths relative to `root`."""
    print(f"\nRows in the database for SupRsync (local paths below {root}):\n")
    print("  archive      deletable  md5       local path\n" + " " * 36 + "-> remote path")
    for row in rows:
        deletable = "yes" if row["deletable"] else "no"
        local = os.path.relpath(row["local_path"], root)
        print(f"  {row['archive_name']:11}  {deletable:9}  {row['local_md5sum'][:8]}  {local}")
        print(" " * 36 + f"-> {row['remote_path']}")


def show_feeds(subscriber: Subscriber) -> None:
    """Print the number of messages on each feed, and the latest one."""
    print("\nMessages on the feeds (number, topic, latest message):\n")
    latest = {message.topic: message.message for message in subscriber.messages()}
    for topic, count in sorted(Counter(message.topic for message in subscriber.messages()).items()):
        print(f"  {count:4}  {topic}\n        {json.dumps(latest[topic])[:150]}")


def faults(sent: Sequence[Message], agent: Agent, subscriber: Subscriber, server: SmurfServer) -> list[str]:
    """Return a line for everything that is wrong; none if all is well."""
    found = []
    registered = Counter(row["local_path"] for row in agent.rows())
    expected = {message.file for message in sent if message.file is not None}
    found += [f"not registered: {path}" for path in sorted(expected - set(registered))]
    found += [f"registered but never sent: {path}" for path in sorted(set(registered) - expected)]
    found += [f"registered {count} times: {path}" for path, count in registered.items() if count != 1]
    for row in agent.rows():
        if hashlib.md5(Path(row["local_path"]).read_bytes()).hexdigest() != row["local_md5sum"]:
            found.append(f"wrong MD5 sum in the database: {row['local_path']}")
    expect_session, expect_metadata = expected_on_feeds(sent)
    if (session := [m["payload"] for m in subscriber.session_messages()]) != expect_session:
        found.append(f"sent {len(expect_session)} session messages, received these: {session}")
    for stream in server.streams:
        count = len(subscriber.metadata(stream.stream_id))
        if count != expect_metadata[stream.streamer.pub_id]:
            found.append(
                f"sent {expect_metadata[stream.streamer.pub_id]} metadata of {stream.stream_id}, received {count}"
            )
    return found


def expected_on_feeds(sent: Sequence[Message]) -> tuple[list[Any], Counter[str]]:
    """Return the payloads of the session messages, and the number of metadata messages by publisher id."""
    session = [message.payload for message in sent if message.kind.startswith("session_")]
    return session, Counter(message.publisher.pub_id for message in sent if message.kind == "metadata")


def all_arrived(sent: Sequence[Message], agent: Agent, subscriber: Subscriber, server: SmurfServer) -> bool:
    """Return whether every file is registered and every feed message has arrived."""
    session, metadata = expected_on_feeds(sent)
    received = sum(len(subscriber.metadata(stream.stream_id)) for stream in server.streams)
    return (
        len(agent.rows()) >= sum(message.file is not None for message in sent)
        and len(subscriber.session_messages()) >= len(session)
        and received >= metadata.total()
    )


def demo(root: Path) -> list[str]:
    """Run the demo in the folder `root`, and return what is wrong."""
    work = root / "processes"
    router = Router(work)
    say(f"starting a crossbar router on port {router.port} ...")
    with router, Subscriber(work, router) as subscriber:
        agent = Agent(work, router)
        say(f"starting the agent with {SITE_CONFIG.name}, on UDP port {agent.udp_port} ...")
        with agent:
            agent.wait_listening()
            client = agent.client()
            # dated folders directly below the root, so that files are deletable as on a real server
            with SmurfServer(root, agent.address, streams=STREAMS, smurf_data="") as server:
                say(f"a SMuRF server with {STREAMS} streams sends, {RATE:g} messages a second ...")
                sent = send(server, agent)
                say("waiting for the last file and message ...")
                try:
                    wait_until(
                        lambda: all_arrived(sent, agent, subscriber, server), DEADLINE_S, "everything has arrived"
                    )
                except AssertionError as error:
                    say(str(error))
                show_rows(agent.rows(), str(root))
                show_feeds(subscriber)
                print("\nThe agent's own report (session data of `run`):\n")
                print("  " + json.dumps(client.run.status().session["data"], indent=2).replace("\n", "\n  ") + "\n")
            say("stopping the agent and the router ...")
            code = agent.stop()
            found = faults(sent, agent, subscriber, server)
            if code != 0:
                found.append(f"the agent ended with exit code {code}")
            if found:
                print(f"\nThe agent's log:\n\n{agent.log}")
    return found


def main() -> int:
    """Run the demo and return the exit code."""
    if not CROSSBAR.exists():
        print("The router is not installed. Install it and run the demo with: make demo", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # raises, so that everything is stopped and removed
    with tempfile.TemporaryDirectory(prefix="smurf-demo-") as scratch:
        found = demo(Path(scratch))
    for fault in found:
        print(f"FAULT: {fault}")
    say("FAILED, see above" if found else "every file is registered once, every feed message arrived")
    return 1 if found else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
