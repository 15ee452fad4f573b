"""`make demo`: a router, the agent and an emulated SMuRF server, all real but the server; and what came of it.

Exit code 0 says that every file sent is registered exactly once and that every feed message arrived.
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
    """Print a line of progress with the seconds since the begin."""
    print(f"[{time.monotonic() - _BEGIN:5.1f} s] {text}", flush=True)


def send(server: SmurfServer, agent: Agent) -> list[Message]:
    """Play an observation, and tell how registration keeps up."""
    plan = itertools.chain(
        server.messages(STREAMS * len(FULL_MIX), FULL_MIX),
        server.messages(STREAMS * len(REGISTERS), ("metadata",)),
    )
    sent: list[Message] = []
    while part := list(itertools.islice(plan, 24)):
        sent += server.send(part, RATE)
        files = sum(message.file is not None for message in sent)
        say(f"  sent {len(sent)} messages, {files} files of them; {len(agent.rows())} files are registered")
    return sent


def show_rows(rows: Sequence[dict[str, Any]], root: str) -> None:
    """Print the rows as a table, local paths below `root`."""
    print(f"\nWhat SupRsync finds in the database (local paths below {root}):\n")
    print("  archive      deletable  md5       local path\n" + " " * 36 + "-> remote path")
    for row in rows:
        deletable = "yes" if row["deletable"] else "no"
        local = os.path.relpath(row["local_path"], root)
        print(f"  {row['archive_name']:11}  {deletable:9}  {row['local_md5sum'][:8]}  {local}")
        print(" " * 36 + f"-> {row['remote_path']}")


def show_feeds(subscriber: Subscriber) -> None:
    """Print how many messages came on each feed, and the latest of each."""
    print("\nWhat a subscriber received (number of messages, the latest of them):\n")
    latest = {message.topic: message.message for message in subscriber.messages()}
    for topic, count in sorted(Counter(message.topic for message in subscriber.messages()).items()):
        print(f"  {count:4}  {topic}\n        {json.dumps(latest[topic])[:150]}")


def faults(sent: Sequence[Message], agent: Agent, subscriber: Subscriber, server: SmurfServer) -> list[str]:
    """What is not as it must be, each as a line for a person; none if all is well."""
    found = []
    registered = Counter(row["local_path"] for row in agent.rows())
    expected = {message.file for message in sent if message.file is not None}
    found += [f"not registered: {path}" for path in sorted(expected - set(registered))]
    found += [f"registered but never sent: {path}" for path in sorted(set(registered) - expected)]
    found += [f"registered {count} times: {path}" for path, count in registered.items() if count != 1]
    for row in agent.rows():
        if hashlib.md5(Path(row["local_path"]).read_bytes()).hexdigest() != row["local_md5sum"]:
            found.append(f"md5 in the database is not the file's: {row['local_path']}")
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
    """Payloads of the session messages, and the number of metadata messages by publisher id."""
    session = [message.payload for message in sent if message.kind.startswith("session_")]
    return session, Counter(message.publisher.pub_id for message in sent if message.kind == "metadata")


def all_arrived(sent: Sequence[Message], agent: Agent, subscriber: Subscriber, server: SmurfServer) -> bool:
    """Whether there is nothing left to wait for."""
    session, metadata = expected_on_feeds(sent)
    received = sum(len(subscriber.metadata(stream.stream_id)) for stream in server.streams)
    return (
        len(agent.rows()) >= sum(message.file is not None for message in sent)
        and len(subscriber.session_messages()) >= len(session)
        and received >= metadata.total()
    )


def demo(root: Path) -> list[str]:
    """Run it in the folder `root` and return the faults."""
    work = root / "processes"
    router = Router(work)
    say(f"starting a crossbar router on port {router.port} ...")
    with router, Subscriber(work, router) as subscriber:
        agent = Agent(work, router)
        say(f"starting the agent out of {SITE_CONFIG.name}, on UDP port {agent.udp_port} ...")
        with agent:
            agent.wait_listening()
            client = agent.client()
            # dated folders right below the root, so that the rule about deletable files holds as on a real server
            with SmurfServer(root, agent.address, streams=STREAMS, smurf_data="") as server:
                say(f"a SMuRF server with {STREAMS} streams sends, {RATE:g} messages a second ...")
                sent = send(server, agent)
                say("waiting for the last of it ...")
                try:
                    wait_until(lambda: all_arrived(sent, agent, subscriber, server), DEADLINE_S, "all has arrived")
                except AssertionError as error:
                    say(str(error))
                show_rows(agent.rows(), str(root))
                show_feeds(subscriber)
                print("\nWhat the agent says about itself (session data of `run`):\n")
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
        print("The router is not installed: start this with `make demo`, which installs it.", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # cleans up like any other end
    with tempfile.TemporaryDirectory(prefix="smurf-demo-") as scratch:
        found = demo(Path(scratch))
    for fault in found:
        print(f"FAULT: {fault}")
    say("NOT all is well, see above" if found else "every file is registered once, every feed message arrived")
    return 1 if found else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
