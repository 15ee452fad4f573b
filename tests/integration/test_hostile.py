"""The running agent under attack: whatever arrives, files, feeds, the heartbeat and operations continue."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ocs
import pytest
from ocs.ocs_client import OCSClient

from socs_monitor.spool.intake import INBOX_MAX
from socs_monitor.wire.publisher import Publisher
from tests import hostile
from tests.integration.test_end_to_end import announce, data, files, wait_registered
from tests.testbed.processes import Agent, Router
from tests.testbed.subscriber import Subscriber

StartAgent = Callable[..., Agent]

HEARTBEAT = ".feeds.heartbeat"

# Limits of the log, however much garbage arrives: lines, and characters a line.
LOG_LINES, LOG_LINE = 200, 3000


def counted(client: OCSClient) -> int:
    """Return the number of datagrams in the session data."""
    shown = data(client)
    return shown["datagrams"]["total"] + sum(shown["malformed"].values())


def wait_counted(monitor: Agent, client: OCSClient, count: int) -> None:
    monitor.wait_for(lambda: counted(client) >= count, 20, f"counted {count} datagrams")
    assert counted(client) == count


def resident_mib(monitor: Agent) -> float:
    """Return the resident memory of the agent's process."""
    status = Path(f"/proc/{monitor.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def assert_log_is_bounded(monitor: Agent) -> None:
    lines = monitor.log.splitlines()
    assert "Traceback" not in monitor.log, monitor.log[:5000]
    assert "internal_error" not in monitor.log
    assert len(lines) < LOG_LINES, "\n".join(line[:150] for line in lines)
    assert max(map(len, lines)) < LOG_LINE, max(lines, key=len)[:3000]


def assert_works(monitor: Agent, client: OCSClient, subscriber: Subscriber, folder: Path) -> None:
    """Check that files, both kinds of feeds, the heartbeat and the operations work promptly."""
    before, beats = len(monitor.rows()), len(subscriber.messages(HEARTBEAT))
    begin = time.monotonic()
    sent = announce(monitor, folder, 20, "afterwards")
    monitor.wait_for(lambda: len(monitor.rows()) == before + 20, 2, "registered 20 files")
    with Publisher("STREAMER:fine", monitor.address) as publisher:
        publisher.session_log("still here")
        publisher.metadata("AMCc.x", 1)
    last = lambda: [message["payload"] for message in subscriber.session_messages()[-1:]]  # noqa: E731
    monitor.wait_for(lambda: last() == ["still here"], 2, "published a session message")
    monitor.wait_for(lambda: subscriber.metadata("fine"), 3, "published metadata")
    monitor.wait_for(lambda: len(subscriber.messages(HEARTBEAT)) > beats, 3, "beat")
    assert client.list_failed().status == ocs.OK
    assert client.run.status().session["status"] == "running"
    assert time.monotonic() - begin < 8
    assert [row["local_path"] for row in monitor.rows()][before:] == sent


def assert_rows_stay_in_the_archive(monitor: Agent) -> None:
    for row in monitor.rows():
        parts = row["remote_path"].split("/")
        assert parts, row
        assert not {"", ".", ".."} & set(parts), row


def test_twenty_thousand_damaged_datagrams_are_counted_and_harm_nothing(
    agent: StartAgent, router: Router, tmp_path: Path
) -> None:
    monitor = agent()
    client = monitor.client()
    known = hostile.damaged()
    others = [*hostile.odd_values(), *hostile.traversals(str(tmp_path / "none.txt"))]
    with Subscriber(tmp_path, router) as subscriber:
        sent = hostile.send(monitor.udp_port, (datagram for datagram, _ in known))
        wait_counted(monitor, client, sent)
        assert data(client)["malformed"] == Counter(reason for _, reason in known)
        assert counted(client) == len(known)

        sent += hostile.send(monitor.udp_port, others)
        sent += hostile.send(monitor.udp_port, itertools.islice(hostile.mutated(seed=1), 20_000 - sent))
        assert sent == 20_000
        wait_counted(monitor, client, sent)
        assert set(data(client)["degraded"]) <= {"messages_lost"}, "any sender can fake that one"
        assert_works(monitor, client, subscriber, tmp_path / "data")
    assert_log_is_bounded(monitor)
    assert_rows_stay_in_the_archive(monitor)


def test_no_registration_gets_a_path_outside_the_archive(agent: StartAgent, router: Router, tmp_path: Path) -> None:
    monitor = agent()
    client = monitor.client()
    ((path,), attempts) = announce(monitor, tmp_path / "x" / "y", 1, "secret"), hostile.traversals
    wait_registered(monitor, [path])
    registrations = attempts(path)
    hostile.send(monitor.udp_port, registrations)
    monitor.wait_for(lambda: files(client).get("dead", 0) == len(registrations), 10, "refused all")

    assert [row["local_path"] for row in monitor.rows()] == [path]
    letters = client.list_failed().session["data"]["failed"]
    assert len(letters) == len(registrations)
    assert all(letter["refused"] and letter["reason"] for letter in letters)
    with Subscriber(tmp_path, router) as subscriber:
        assert_works(monitor, client, subscriber, tmp_path / "data")
    assert_log_is_bounded(monitor)


@contextlib.contextmanager
def no_files(folder: Path) -> Iterator[dict[str, str]]:
    """Create things that are not regular files; provides their paths, and what the agent has to call them."""
    folder.mkdir(parents=True)
    kinds = {str(folder / "folder"): "a directory", str(folder / "fifo"): "a FIFO", str(folder / "socket"): "a socket"}
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        here = os.getcwd()
        os.chdir(folder)  # the address of such a socket has at most 107 bytes
        try:
            listener.bind("socket")
        finally:
            os.chdir(here)
        for name in ("zero", "random", "tty", "full"):
            assert stat.S_ISCHR(os.stat(f"/dev/{name}").st_mode)
            kinds[f"/dev/{name}"] = "a character device"
        for target in list(kinds):
            link = folder / f"link-to-{os.path.basename(target)}"
            link.symlink_to(target)
            kinds[str(link)] = kinds[target]
        yield kinds


def refusals(monitor: Agent, client: OCSClient, paths: list[str]) -> dict[str, str]:
    """Register paths, wait until all are refused, and return the reasons by path."""
    with contextlib.closing(Publisher("crate1slot2", monitor.address)) as publisher:
        for path in paths:
            publisher.data_file(path)
    monitor.wait_for(lambda: files(client).get("dead", 0) == len(paths), 10, f"refused {len(paths)} files")
    letters = client.list_failed().session["data"]["failed"]
    assert all(letter["refused"] for letter in letters), letters
    return {letter["path"]: letter["reason"] for letter in letters}


def test_nothing_but_a_regular_file_is_opened(agent: StartAgent, router: Router, tmp_path: Path) -> None:
    monitor = agent()
    client = monitor.client()
    with no_files(tmp_path / "odd") as kinds, Subscriber(tmp_path, router) as subscriber:
        reasons = refusals(monitor, client, list(kinds))

        assert reasons.keys() == kinds.keys()
        for path, kind in kinds.items():
            assert f"is {kind}, not a regular file" in reasons[path]
        assert_works(monitor, client, subscriber, tmp_path / "data")
    assert {row["local_path"] for row in monitor.rows()}.isdisjoint(kinds)
    assert_log_is_bounded(monitor)


def test_files_outside_the_data_roots_are_refused_also_through_a_link(agent: StartAgent, tmp_path: Path) -> None:
    first, second, beside, outside = (tmp_path / name for name in ("first", "second", "first-but-not", "outside"))
    for folder in (first, second, beside, outside):
        folder.mkdir()
        (folder / "x.txt").write_text("x")
    links = {"out.txt": outside / "x.txt", "in.txt": first / "x.txt", "across.txt": second / "x.txt"}
    for name, target in links.items():
        (first / name).symlink_to(target)
    (first / "folder-out").symlink_to(outside)
    (outside / "in.txt").symlink_to(first / "x.txt")
    monitor = agent(options=[["--data-root", str(first), str(second)]])
    client = monitor.client()
    inside = [first / "x.txt", second / "x.txt", first / "in.txt", first / "across.txt"]
    with contextlib.closing(Publisher("crate1slot2", monitor.address)) as publisher:
        for number, path in enumerate(inside):
            publisher.data_file(
                str(path), action=f"number-{number}"
            )  # files of the same name need different remote paths
    wait_registered(monitor, [str(path) for path in inside])

    refused = [
        *(first / "out.txt", first / "folder-out" / "x.txt", outside / "x.txt", beside / "x.txt"),
        outside / "in.txt",  # its target is inside, but its path is not
        *(Path("/etc/passwd"), Path("/dev/null"), Path("/proc/self/mem"), Path("/etc/there is none")),
        Path(f"{first}/../outside/x.txt"),
    ]
    reasons = refusals(monitor, client, [str(path) for path in refused])
    assert len(reasons) == len(refused)
    assert len(monitor.rows()) == len(inside)
    assert_log_is_bounded(monitor)


@pytest.mark.alone
def test_a_flood_delays_neither_heartbeat_nor_operations(agent: StartAgent, router: Router, tmp_path: Path) -> None:
    monitor = agent()
    client = monitor.client()
    with Subscriber(tmp_path, router) as subscriber, hostile.Flood(tmp_path, monitor.udp_port, 6) as flood:
        beats = [(time.monotonic(), len(subscriber.messages(HEARTBEAT)))]
        latencies = []
        while flood.exit_code is None:
            begin = time.monotonic()
            assert client.run.status().session["status"] == "running"
            latencies.append(time.monotonic() - begin)
            if (count := len(subscriber.messages(HEARTBEAT))) > beats[-1][1]:
                beats.append((time.monotonic(), count))
        assert flood.exit_code == 0, flood.log
        gaps = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(beats)]
        assert len(beats) > 4, beats
        assert max(gaps) < 3, gaps
        assert max(latencies) < 1.5, latencies
        hostile.wait_read(monitor.udp_port)  # the kernel drops what finds no room
        assert_works(monitor, client, subscriber, tmp_path / "data")

    lost = hostile.queue_of(monitor.udp_port).drops
    useful = 20 + 4
    monitor.wait_for(lambda: counted(client) == flood.sent + useful - lost, 5, "counted what the kernel did not drop")
    assert flood.sent - lost > 50_000, "that was not a flood"
    assert_log_is_bounded(monitor)


def test_garbage_does_not_grow_the_process(agent: StartAgent) -> None:
    monitor = agent()
    client = monitor.client()
    garbage = [*(datagram for datagram, _ in hostile.damaged()), *itertools.islice(hostile.mutated(seed=2), 10_000)]
    no_registrations = [datagram for datagram in garbage if b"_file" not in datagram and len(datagram) < 10_000]
    assert len(no_registrations) > 5000
    sent = hostile.send(monitor.udp_port, no_registrations)
    wait_counted(monitor, client, sent)
    before = resident_mib(monitor)
    for _ in range(10):
        sent += hostile.send(monitor.udp_port, no_registrations)
    wait_counted(monitor, client, sent)

    assert resident_mib(monitor) - before < 8


def test_long_texts_from_senders_do_not_grow_the_output(agent: StartAgent, tmp_path: Path) -> None:
    monitor = agent()
    client = monitor.client()
    long = "/" + "/".join(["x" * 250] * 200)
    paths = (long, "/a/\nb/" + "y" * 60_000, "/dev/null\nb/")
    refused = {**hostile.envelopes()[0], "id": ".."}, hostile.envelopes()[0]
    datagrams = [
        json.dumps({**envelope, "payload": {**envelope["payload"], "path": path}}).encode()
        for envelope, path in itertools.product(refused, paths)
    ]
    sent = hostile.send(monitor.udp_port, datagrams * 40)
    monitor.wait_for(lambda: files(client).get("received") == sent, 10, "received all")
    monitor.wait_for(lambda: files(client)["pending"] == 0, 10, "handled all")

    assert len(json.dumps(data(client))) < 100_000
    reply = client.list_failed()
    assert reply.status == ocs.OK
    assert reply.session["data"]["total"] >= sent / 2
    assert len(json.dumps(reply.session["data"])) < 100_000
    assert_log_is_bounded(monitor)
    assert not [line for line in monitor.log.splitlines() if line.startswith("b/")], "a sender wrote a line of its own"


def test_register_names_do_not_fill_the_log(agent: StartAgent) -> None:
    monitor = agent()
    client = monitor.client()
    with contextlib.closing(Publisher("STREAMER:s1", monitor.address)) as publisher:
        count = 3000
        for number in range(count // 3):
            for value in (1, "text", None):
                publisher.metadata("AMCc." + "." * number + "x", value)
    wait_counted(monitor, client, count)

    assert_log_is_bounded(monitor)


def test_only_allowed_senders_are_accepted(agent: StartAgent, router: Router, tmp_path: Path) -> None:
    monitor = agent(options=[["--allow-sender", "127.0.0.2/31", "fd00::/8"]])
    client = monitor.client()
    path = tmp_path / "x.txt"
    path.write_text("x")
    datagram = hostile.traversals(str(path))[0].replace(b'"id": ".."', b'"id": "a"')
    for host, count in (("127.0.0.1", 30), ("127.0.0.2", 1), ("127.0.0.3", 1), ("127.0.0.4", 2)):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.bind((host, 0))
            for _ in range(count):
                sender.sendto(datagram, monitor.address)
    wait_counted(monitor, client, 34)

    shown = data(client)
    assert shown["malformed"] == {"sender not allowed": 32}
    assert shown["datagrams"]["by_type"] == {"data_file": 2}
    assert shown["files"]["received"] == 2
    monitor.wait_log("Dropped .*sender not allowed.*127.0.0.1")
    assert_log_is_bounded(monitor)


@pytest.mark.parametrize(
    ("bound", "reached", "deaf"), [("127.0.0.1", "127.0.0.1", "127.0.0.2"), ("::1", "::1", "127.0.0.1")]
)
def test_one_interface_is_bound(agent: StartAgent, tmp_path: Path, bound: str, reached: str, deaf: str) -> None:
    monitor = agent(options=[["--udp-host", bound]])
    path = tmp_path / "x.txt"
    path.write_text("x")
    with contextlib.closing(Publisher("crate1slot2", (reached, monitor.udp_port))) as publisher:
        publisher.data_file(str(path))
    wait_registered(monitor, [str(path)])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect((deaf, monitor.udp_port))
        sender.send(b"is anybody there?")
        with pytest.raises(ConnectionRefusedError):  # the kernel reports that no socket is bound there
            sender.send(b"is anybody there?")


def test_a_full_spool_refuses_registrations_and_recovers(agent: StartAgent, tmp_path: Path) -> None:
    monitor = agent(options=[["--spool-size", 40_000_000]])
    client = monitor.client()
    assert client.run.stop().status == ocs.OK
    assert client.run.wait(timeout=10).status == ocs.OK
    path = tmp_path / "x.txt"
    path.write_text("x")
    large = _registration(path, 60_000)
    sent = hostile.send(monitor.udp_port, [large] * 500)
    monitor.wait_for(lambda: files(client)["pending"] == 500, 10, "spooled 500")
    assert data(client)["degraded"] == {}

    sent += hostile.send(monitor.udp_port, [large] * 100)
    monitor.wait_for(lambda: data(client)["degraded"], 10, "is degraded")
    assert set(data(client)["degraded"]) == {"spool_size"}
    sent += hostile.send(monitor.udp_port, [large] * 200)
    monitor.wait_for(lambda: "spool" in data(client)["degraded"], 10, "is full")
    assert client.run.status().session["degraded"] is True
    reason = data(client)["degraded"]["spool"]
    assert "is full (40000000 bytes, --spool-size)" in reason
    assert reason in monitor.log

    wide = _registration(path, 60_000, comment="µ")  # the agent counts 8 bytes of memory for each of its characters
    in_memory = INBOX_MAX // (4 * len(wide))  # at most: a path is stored in the text and by itself
    sent += hostile.send(monitor.udp_port, [wide] * (in_memory + 50))
    wait_counted(monitor, client, sent)
    spooled = files(client)["received"]
    assert 600 < spooled < 800
    refused = data(client)["refused"]["spool"]
    assert sent - spooled - in_memory <= refused < sent - spooled - 0.4 * in_memory

    client.run.start()
    monitor.wait_for(lambda: files(client).get("registered") == sent - refused, 60, "registered all that it accepted")
    monitor.wait_for(lambda: data(client)["degraded"] == {}, 10, "recovered")
    assert client.run.status().session["degraded"] is False
    assert data(client)["refused"] == {"spool": refused}
    assert [row["local_path"] for row in monitor.rows()] == [str(path)]
    assert_log_is_bounded(monitor)


def _registration(path: Path, size: int, **fields: str) -> bytes:
    """Return a registration of about `size` bytes."""
    with contextlib.closing(Publisher("crate1slot2")) as publisher:
        spelled = str(path.parent) + "/." * (size // 2) + f"/{path.name}"  # other long texts are cut
        payload: dict[str, Any] = {**hostile.envelopes()[0]["payload"], "path": spelled, **fields}
        return publisher.encode(payload, "data_file")
