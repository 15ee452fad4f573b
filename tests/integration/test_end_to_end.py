"""The real agent, started by `ocs-agent-cli` with a real router: its rows, its operations, its start and its stop."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ocs
import pytest
from ocs.ocs_client import OCSClient

from socs_monitor.suprsync.database import Database
from socs_monitor.wire.publisher import MAX_DATAGRAM, Publisher, data_file
from tests.testbed.processes import OWN_BIN, ROOT, Agent, Router, wait_until
from tests.testbed.smurf_server import SmurfServer

StartAgent = Callable[..., Agent]

# Words that the log of a healthy agent must not contain.
TROUBLE = re.compile(r"traceback|warn|error|exception|unhandled|deprecat", re.IGNORECASE)


def announce(agent: Agent, folder: Path, count: int, name: str = "file") -> list[str]:
    """Write files, send their registrations in one burst, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}_{number}.txt" for number in range(count)]
    for path in paths:
        path.write_text(path.name)
    publisher = Publisher("crate1slot2", agent.address)
    for path in paths:
        publisher.data_file(str(path), timestamp=1700000000.5, action="take_iv", action_ts="1700000000")
    publisher.close()
    return [str(path) for path in paths]


def wait_registered(agent: Agent, paths: list[str], deadline_s: float = 20) -> None:
    """Wait until the database has a row for each path, in this order, and no other row."""
    agent.wait_for(lambda: len(agent.rows()) >= len(paths), deadline_s, f"registered {len(paths)} files")
    assert [row["local_path"] for row in agent.rows()] == paths


def data(client: OCSClient) -> dict[str, Any]:
    """Return the session data of `run`; empty before its first update."""
    return client.run.status().session.get("data") or {}


def files(client: OCSClient) -> dict[str, Any]:
    """Return the counts of files in the session data."""
    return data(client).get("files", {})


def wait_running(agent: Agent, client: OCSClient) -> None:
    agent.wait_for(lambda: client.run.status().session.get("status") == "running", 10, "started `run`")


def wait_ended(client: OCSClient) -> dict[str, Any]:
    """Wait until `run` ends successfully, and return its session."""
    reply = client.run.wait(timeout=30)
    assert (reply.status, reply.session["success"]) == (ocs.OK, True), reply
    session: dict[str, Any] = reply.session
    return session


def stop_run(client: OCSClient) -> float:
    """Stop `run`, check that it succeeded, and return the seconds that it took."""
    begin = time.monotonic()
    assert client.run.stop().status == ocs.OK
    wait_ended(client)
    return time.monotonic() - begin


def test_an_observation_becomes_the_documented_rows(agent: StartAgent, tmp_path: Path) -> None:
    monitor = agent()
    with SmurfServer(tmp_path / "data", monitor.address, streams=3) as server:
        sent = server.send(server.messages(48, ("npy", "png", "txt", "tune", "g3", "session_log", "metadata")))
    expected = [message for message in sent if message.file is not None]
    monitor.wait_for(lambda: len(monitor.rows()) >= len(expected), 20, "registered all files")

    rows = monitor.rows()
    assert [row["local_path"] for row in rows] == [message.file for message in expected]
    for row, message in zip(rows, expected, strict=True):
        local = Path(row["local_path"])
        assert row["local_md5sum"] == hashlib.md5(local.read_bytes()).hexdigest()
        if message.kind == "g3_file":
            assert (row["archive_name"], row["remote_path"]) == ("timestreams", "/".join(local.parts[-3:]))
            assert row["deletable"] == 1
        else:
            payload = message.payload
            folder = f"{payload['action_ts']}_{payload['action']}/{'plots' if payload['plot'] else 'outputs'}"
            remote = f"{str(payload['timestamp'])[:5]}/{message.publisher.pub_id}/{folder}/{local.name}"
            assert (row["archive_name"], row["remote_path"]) == ("smurf", remote)
            assert row["deletable"] == 0  # not below /data/smurf_data/<digits>, but in a scratch folder
        untouched = {"remote_md5sum": None, "copied": None, "removed": None, "failed_copy_attempts": 0, "ignore": 0}
        assert row.items() >= untouched.items()


def test_the_session_data_accounts_for_every_message(agent: StartAgent, tmp_path: Path) -> None:
    monitor = agent()
    client = monitor.client()
    with SmurfServer(tmp_path / "data", monitor.address, streams=2) as server:
        sent = server.send(server.messages(32, ("npy", "g3", "session_log", "metadata")))
        server.streams[0].pysmurf.send(b"no JSON")
        server.streams[0].pysmurf.data_file(str(tmp_path / "comes_later.txt"))
    count = sum(message.file is not None for message in sent)
    monitor.wait_for(
        lambda: files(client).get("registered") == count and files(client)["waiting"] == 1, 10, "accounted for all"
    )

    shown = data(client)
    last = monitor.rows()[-1]
    assert shown["files"].pop("last") == last["local_path"]
    assert abs(shown["files"].pop("last_time") - last["timestamp"]) < 5
    accounted = {"received": count + 1, "registered": count, "waiting": 1, "settling": count}
    assert shown["files"] == {"pending": 0, "dead": 0, "discarded": 0, **accounted}
    sent_types = Counter(message.kind for message in sent) + Counter(start=4, stop=4, data_file=1)
    assert shown["datagrams"]["by_type"] == sent_types
    assert shown["malformed"] == {"not JSON": 1}
    assert shown["degraded"] == {}
    assert abs(shown["timestamp"] - time.time()) < 5
    assert len(json.dumps(shown)) < 100_000


@pytest.mark.alone
def test_run_starts_by_itself_and_registers_files_as_they_arrive(agent: StartAgent, tmp_path: Path) -> None:
    monitor = agent()
    wait_running(monitor, monitor.client())
    took: list[float] = []
    sent: list[str] = []
    for number in range(9):
        begin = time.monotonic()
        sent += announce(monitor, tmp_path / "data", 1, f"single{number}")
        wait_registered(monitor, sent)
        took.append(time.monotonic() - begin)

    assert statistics.median(took) < 0.4, took  # the test polls every 0.02 s; an agent that polls would fail


@pytest.mark.alone
def test_a_client_stops_run_within_a_second_and_starts_it_again_any_number_of_times(
    agent: StartAgent, tmp_path: Path
) -> None:
    monitor = agent()
    client = monitor.client()
    wait_running(monitor, client)
    sent: list[str] = []
    for turn in range(4):
        assert stop_run(client) < 1
        sent += announce(monitor, tmp_path / "data", 20, f"turn{turn}")
        assert client.run.start().status == ocs.OK
        wait_registered(monitor, sent)
    assert stop_run(client) < 1
    # each stop interrupted the re-checks; they are repeated, and rows stay as they are
    before = monitor.rows()
    assert client.run.start().status == ocs.OK
    monitor.wait_for(lambda: files(client).get("settling") == len(sent), 10, "re-checks all files again")
    assert monitor.rows() == before


def test_files_announced_while_run_is_stopped_wait_for_it(agent: StartAgent, tmp_path: Path) -> None:
    monitor = agent()
    client = monitor.client()
    wait_running(monitor, client)
    stop_run(client)
    sent = announce(monitor, tmp_path / "data", 50)
    monitor.wait_for(lambda: files(client).get("pending") == 50, 10, "shows 50 pending files")
    assert monitor.rows() == []

    client.run.start()
    wait_registered(monitor, sent)


def test_pending_files_survive_a_restart_of_the_agent(agent: StartAgent, tmp_path: Path) -> None:
    monitor = agent()
    client = monitor.client()
    wait_running(monitor, client)
    stop_run(client)
    sent = announce(monitor, tmp_path / "data", 50)
    assert monitor.stop() == 0
    assert monitor.rows() == []

    monitor.start()
    wait_registered(monitor, sent)


def unread_bytes(router: Router) -> int:
    """Return the number of bytes that the router has sent and its clients have not read."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(int(line[4].split(":")[1], 16) for line in lines if line[2].endswith(f":{router.port:04X}"))


@pytest.mark.parametrize("params", [{}, {"test_mode": True}, {"test_mode": False}], ids=str)
def test_in_test_mode_run_handles_what_has_arrived_and_stops(
    agent: StartAgent, router: Router, tmp_path: Path, params: dict[str, Any]
) -> None:
    monitor = agent(options=[["--test-mode"]])
    client = monitor.client()
    assert client.run.status().session == {}, "run was started at start-up"
    for turn in range(1, 3):
        with ThreadPoolExecutor(1) as pool:
            os.kill(monitor.pid, signal.SIGSTOP)  # so that the kernel still holds every datagram when run starts
            start = pool.submit(client.run.start, **params)
            wait_until(lambda: unread_bytes(router) > 0, 10, "the call has reached the agent's socket")
            sent = announce(monitor, tmp_path / "data", 300, f"turn{turn}")
            os.kill(monitor.pid, signal.SIGCONT)
            assert start.result().status == ocs.OK
        session = wait_ended(client)

        assert [row["local_path"] for row in monitor.rows()][-300:] == sent
        assert len(monitor.rows()) == turn * 300
        assert session["data"]["files"]["registered"] == turn * 300


def test_in_test_mode_run_stops_at_once_with_nothing_to_do(agent: StartAgent) -> None:
    monitor = agent(options=[["--test-mode"]])
    client = monitor.client()
    begin = time.monotonic()
    assert client.run.start(test_mode=True).status == ocs.OK
    wait_ended(client)
    assert time.monotonic() - begin < 2


def test_test_mode_is_also_a_parameter_of_one_start(agent: StartAgent, tmp_path: Path) -> None:
    monitor = agent()
    client = monitor.client()
    wait_running(monitor, client)
    stop_run(client)
    sent = announce(monitor, tmp_path / "data", 100)
    client.run.start(test_mode=True)
    wait_ended(client)
    wait_registered(monitor, sent)


@pytest.mark.parametrize("exists", [False, True], ids=["no database", "a database without tables"])
def test_without_a_table_nothing_is_lost_and_run_gives_the_reason(
    agent: StartAgent, tmp_path: Path, exists: bool
) -> None:
    monitor = agent(options=[["--create-table", False]])
    if exists:
        monitor.db_path.touch()
    client = monitor.client()
    sent = announce(monitor, tmp_path / "data", 30)
    monitor.wait_for(lambda: files(client).get("received") == 30 and data(client)["degraded"], 10, "is degraded")

    session = client.run.status().session
    assert (session["status"], session["degraded"]) == ("running", True)
    reason = session["data"]["degraded"]["database"]
    assert str(monitor.db_path) in reason
    assert "--create-table True" in reason
    assert ("no table supersync_v0" if exists else "does not exist") in reason
    assert monitor.db_path.exists() == exists
    assert stop_run(client) < 1
    client.run.start()

    database = Database(str(monitor.db_path), create_table=True, echo=False, report=print)
    database.register([])
    database.close()
    wait_registered(monitor, sent)
    monitor.wait_for(lambda: data(client).get("degraded") == {}, 10, "recovered")
    assert client.run.status().session["degraded"] is False


def test_the_module_is_a_program_of_its_own(router: Router, tmp_path: Path) -> None:
    monitor = Agent(tmp_path, router, options=[["--test-mode"]])
    monitor.command = [str(OWN_BIN / "python3"), str(ROOT / "socs_monitor" / "agent.py")]
    monitor.command += ["--site-file", str(monitor.site_config), "--instance-id", Agent.INSTANCE]
    with monitor:
        monitor.wait_listening()
        client = monitor.client()
        sent = announce(monitor, tmp_path / "data", 10)
        client.run.start(test_mode=True)
        wait_ended(client)
        wait_registered(monitor, sent)
        assert monitor.stop() == 0
    assert not TROUBLE.search(monitor.log), monitor.log


def test_a_healthy_agent_logs_no_warning(agent: StartAgent, tmp_path: Path) -> None:
    monitor = agent()
    wait_running(monitor, monitor.client())
    wait_registered(monitor, announce(monitor, tmp_path / "data", 10))
    begin = time.monotonic()
    assert monitor.stop() == 0

    assert time.monotonic() - begin < 3
    assert "registered 10 files" in monitor.log or "file_9.txt" in monitor.log
    assert not TROUBLE.search(monitor.log), monitor.log


def test_files_are_registered_while_the_router_refuses_the_agent(agent: StartAgent, tmp_path: Path) -> None:
    """The router may still know an earlier process of the agent, e.g. after a power failure."""
    agent()
    refused = agent()
    refused.wait_log("Is this agent already running")
    wait_registered(refused, announce(refused, tmp_path / "data", 1))
    assert refused.stop() == 0


def test_sql_statements_are_logged_on_request_only(agent: StartAgent, tmp_path: Path) -> None:
    silent, echoing = agent(), agent(options=[["--echo-sql"]], instance="echoing-monitor")
    for monitor in (silent, echoing):
        wait_registered(monitor, announce(monitor, tmp_path / "data", 1))

    echoing.wait_log("INSERT INTO supersync_v0")
    assert "INSERT INTO" not in silent.log


def test_the_largest_message_of_a_sender_is_registered(agent: StartAgent, tmp_path: Path) -> None:
    monitor = agent()
    path = tmp_path / "x.txt"
    path.touch()
    publisher = Publisher("crate1slot2", monitor.address)
    payload = data_file(str(path), action="large")
    padding = MAX_DATAGRAM - len(publisher.encode(payload, "data_file")) - 100
    datagram = publisher.encode({**payload, "comment": "x" * padding}, "data_file")
    assert MAX_DATAGRAM - 200 < len(datagram) <= MAX_DATAGRAM
    publisher.send(datagram)
    publisher.close()

    wait_registered(monitor, [str(path)])


def test_damaged_datagrams_are_counted_and_the_log_stays_quiet(agent: StartAgent, tmp_path: Path) -> None:
    monitor = agent()
    client = monitor.client()
    publisher = Publisher("crate1slot2", monitor.address)
    damaged = [b"", b"{", b"\xff\xfe", b"[1]", b'{"id": 1}', b'{"id": "a", "type": "data_file", "payload": null}']
    for _ in range(50):
        for datagram in damaged:
            publisher.send(datagram)
    sent = announce(monitor, tmp_path / "data", 1)
    with contextlib.closing(publisher):
        wait_registered(monitor, sent)

    monitor.wait_for(lambda: sum(data(client).get("malformed", {}).values()) == 300, 10, "counted 300")
    assert data(client)["malformed"] == {"empty": 50, "not JSON": 100, "wrong or missing field": 150}
    assert not TROUBLE.search(monitor.log), monitor.log
