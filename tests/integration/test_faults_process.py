"""The real agent at its start and its end: an unusable spool, a spool in use, a stop at a bad moment."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import ocs
import pytest

from socs_monitor.wire.publisher import Publisher
from tests.evidence import md5_of, send_files, spool_of, wait_acknowledged, wait_registered
from tests.testbed.processes import Agent, Router
from tests.testbed.smurf_server import SmurfServer

StartAgent = Callable[..., Agent]


# --- start


def garbage(spool: Path) -> None:
    spool.write_bytes(b"no spool" * 1000)


def damaged(spool: Path) -> None:
    """Create a spool of which every page but the first is overwritten."""
    with contextlib.closing(sqlite3.connect(spool)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE registrations (id INTEGER PRIMARY KEY, message TEXT)")
        connection.executemany("INSERT INTO registrations (message) VALUES (?)", [["x" * 500]] * 100)
        connection.execute("PRAGMA user_version = 1")
        connection.commit()
    with open(spool, "r+b") as file:
        file.seek(4096)
        file.write(os.urandom(8192))


def of_another_version(spool: Path) -> None:
    with contextlib.closing(sqlite3.connect(spool)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE unknown_yet (id INTEGER)")
        connection.execute("PRAGMA user_version = 99")
        connection.commit()


@pytest.mark.parametrize("make", [garbage, damaged, of_another_version])
def test_a_spool_that_cannot_be_read_is_set_aside(router: Router, tmp_path: Path, make: Callable[[Path], None]) -> None:
    agent = Agent(tmp_path / "agent", router)
    spool = spool_of(agent)
    make(spool)
    before = md5_of(spool)
    with agent, SmurfServer(tmp_path / "data", agent.address) as sender:
        agent.wait_listening()
        wait_registered(agent, send_files(sender, 3))
        (aside,) = spool.parent.glob(f"{spool.name}.*.set-aside")
        assert md5_of(aside) == before
        client = agent.client()
        agent.wait_for(lambda: client.run.status().session.get("data"), 5, "published its session data")
        problems = [problem["text"] for problem in client.run.status().session["data"]["problems"]]
        assert any(f"set aside as {aside}" in problem for problem in problems), problems
        assert agent.stop() == 0
    assert len(re.findall("set aside as", agent.log)) == 1


def test_a_second_agent_on_the_same_spool_is_refused(agent: StartAgent, router: Router, tmp_path: Path) -> None:
    first = agent()
    second = Agent(tmp_path / "second", router, options=[["--spool-path", str(spool_of(first))]])
    with second, SmurfServer(tmp_path / "data", first.address) as sender:
        assert second.wait(20) not in (0, None)
        assert f"the spool {spool_of(first)} is in use by another process" in second.log
        assert "--spool-path" in second.log
        assert "Traceback" not in second.log
        wait_registered(first, send_files(sender, 3))
        assert second.rows() == []


# --- end


def is_open(agent: Agent, path: Path) -> bool:
    """Return whether the agent has begun to read the file."""
    for number in Path(f"/proc/{agent.pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if (
                os.readlink(f"/proc/{agent.pid}/fd/{number.name}") == str(path)
                and "pos:\t0\n" not in number.read_text()
            ):
                return True
    return False


def test_sigterm_while_a_large_file_is_hashed(agent: StartAgent, tmp_path: Path) -> None:
    monitor = agent()
    streams = [tmp_path / "so" / "17000" / "stream" / f"1700000000_{number:03}.g3" for number in range(6)]
    streams[0].parent.mkdir(parents=True)
    with Publisher("STREAMER:stream", monitor.address) as streamer:
        for stream in streams:
            with open(stream, "wb") as file:
                file.truncate(8 << 30)
            streamer.g3_file(str(stream))
        wait_acknowledged(monitor, list(map(str, streams)))
        monitor.wait_for(lambda: any(is_open(monitor, stream) for stream in streams), 10, "reads a file")
        begin = time.monotonic()
        assert monitor.stop() == 0
        assert time.monotonic() - begin < 6
        assert monitor.rows() == []

    for stream in streams:
        os.truncate(stream, 4 << 20)
    monitor.start()
    wait_registered(monitor, list(map(str, streams)))


def test_run_stopped_and_started_while_files_arrive(agent: StartAgent, tmp_path: Path) -> None:
    monitor = agent()
    client = monitor.client()
    sent: list[str] = []
    done = threading.Event()

    def send() -> None:
        with SmurfServer(tmp_path / "data", monitor.address) as sender:
            while not done.is_set():
                sent.extend(send_files(sender, 20, rate=400))

    thread = threading.Thread(target=send)
    thread.start()
    try:
        turns = 0
        while turns < 8 or len(sent) <= 100:
            turns += 1
            assert client.run.stop().status == ocs.OK
            assert client.run.wait(timeout=5).session["success"] is True
            assert client.run.start().status == ocs.OK
    finally:
        done.set()
        thread.join()
    wait_registered(monitor, sent)
    assert client.run.status().session["degraded"] is False
