"""The real agent and a database that cannot be written: files are accepted, none is lost, and the reason is shown."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ocs.ocs_client import OCSClient

from tests.evidence import check_registered, send_files, spool_of, spooled, wait_acknowledged, wait_registered
from tests.testbed.processes import OWN_BIN, Agent, Process, Router, require, unavailable
from tests.testbed.smurf_server import SmurfServer

StartAgent = Callable[..., Agent]

GARBAGE = b"This is no database.\n" * 1000

_HOLD_LOCK = """
import signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=20)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
signal.pause()
"""


@contextlib.contextmanager
def locked(db_path: Path) -> Iterator[None]:
    """Let another process hold the write lock."""
    holder = Process([OWN_BIN / "python", "-c", _HOLD_LOCK, db_path], db_path.with_name("holder.log"))
    with holder:
        holder.wait_log("^locked$")
        yield
        assert holder.exit_code is None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[[Agent], SmurfServer]]:
    """Start a SMuRF server that sends to an agent."""
    with contextlib.ExitStack() as stack:
        yield lambda agent: stack.enter_context(SmurfServer(tmp_path / "data", agent.address))


def degraded(client: OCSClient) -> dict[str, str]:
    """Return the reasons why the running agent is degraded, by condition."""
    session: dict[str, Any] = client.run.status().session
    assert session["status"] == "running"
    reasons: dict[str, str] = session["data"]["degraded"]
    return reasons if session["degraded"] else {}


def files(client: OCSClient) -> dict[str, int]:
    """Return the counts of files in the session data."""
    counts: dict[str, int] = client.run.status().session["data"]["files"]
    return counts


def wait_degraded(agent: Agent, client: OCSClient, reason: str, condition: str = "database") -> None:
    """Wait until the session shows the condition with this reason."""
    agent.wait_for(
        lambda: re.search(reason, degraded(client).get(condition, "")), 15, f"was degraded because of {reason}"
    )


def wait_well(agent: Agent, client: OCSClient) -> None:
    agent.wait_for(lambda: not degraded(client), 5, "recovered")


def lines(agent: Agent, pattern: str) -> int:
    """Return the number of log lines that match a pattern."""
    return len(re.findall(f"^.*{pattern}.*$", agent.log, re.MULTILINE))


# --- locked


def test_a_lock_longer_than_any_timeout_is_waited_out(
    agent: StartAgent, server: Callable[[Agent], SmurfServer]
) -> None:
    monitor = agent()
    client, sender = monitor.client(), server(monitor)
    sent = send_files(sender, 3)
    wait_registered(monitor, sent)
    with locked(monitor.db_path):
        begin = time.monotonic()
        sent += send_files(sender, 160, rate=20)
        assert time.monotonic() - begin > 7.9
        wait_degraded(monitor, client, "another process holds the write lock")
        wait_acknowledged(monitor, sent, 2)
        monitor.wait_for(lambda: files(client)["received"] == len(sent), 3, "counted all files")
        assert (files(client)["registered"], files(client)["pending"]) == (3, len(sent) - 3)
    wait_registered(monitor, sent, 4)
    wait_well(monitor, client)

    assert lines(monitor, "holds the write lock") == 1, "one line at its begin"
    assert lines(monitor, "the database can be used again") == 1


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_an_end_during_a_lock_loses_nothing(
    agent: StartAgent, server: Callable[[Agent], SmurfServer], end: signal.Signals
) -> None:
    monitor = agent()
    sender = server(monitor)
    sent = send_files(sender, 3)
    wait_registered(monitor, sent)
    with locked(monitor.db_path):
        sent += send_files(sender, 50)
        wait_acknowledged(monitor, sent)
        monitor.wait_log("holds the write lock")
        begin = time.monotonic()
        os.kill(monitor.pid, end)
        monitor.wait(6)
        assert time.monotonic() - begin < 6
        assert monitor.exit_code == (0 if end == signal.SIGTERM else -end)
        check_registered(monitor.db_path, sent[:3])
    monitor.start()
    wait_registered(monitor, sent)


# --- moved, or replaced


def files_of(database: Path) -> list[Path]:
    return [path for suffix in ("", "-wal", "-shm") if (path := Path(f"{database}{suffix}")).exists()]


@pytest.mark.parametrize("with_journal", [True, False], ids=["with its journal", "without its journal"])
def test_a_deleted_database_is_created_again(
    agent: StartAgent, server: Callable[[Agent], SmurfServer], with_journal: bool
) -> None:
    monitor = agent()
    client, sender = monitor.client(), server(monitor)
    sent = send_files(sender, 3)
    wait_registered(monitor, sent)
    for path in files_of(monitor.db_path)[: None if with_journal else 1]:
        path.unlink()
    sent += send_files(sender, 3)
    wait_registered(monitor, sent)  # the first ones, too: their re-check was still due
    assert not degraded(client)
    assert lines(monitor, "moved away or replaced") == 1
    assert sqlite3.connect(monitor.db_path).execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.parametrize("with_journal", [True, False], ids=["with its journal", "without its journal"])
def test_garbage_in_place_of_the_database_is_never_overwritten(
    agent: StartAgent, server: Callable[[Agent], SmurfServer], tmp_path: Path, with_journal: bool
) -> None:
    monitor = agent()
    client, sender = monitor.client(), server(monitor)
    sent = send_files(sender, 3)
    wait_registered(monitor, sent)
    moved = files_of(monitor.db_path)[: None if with_journal else 1]
    aside = tmp_path / "aside"
    aside.mkdir()
    for path in moved:
        path.rename(aside / path.name)
    monitor.db_path.write_bytes(GARBAGE)
    sent += send_files(sender, 3)
    wait_degraded(monitor, client, "not an SQLite database: move it away")
    monitor.wait_for(lambda: set(spooled(spool_of(monitor))) >= set(sent[3:]), 5, "spooled the files")
    assert monitor.db_path.read_bytes() == GARBAGE

    for path in moved:
        (aside / path.name).rename(path)
    wait_registered(monitor, sent)
    wait_well(monitor, client)
    assert lines(monitor, "not an SQLite database") == 1


# --- not writable


@pytest.fixture
def unprivileged(router: Router, tmp_path: Path) -> Agent:
    """An agent that obeys file modes, not started. As root it runs without the capabilities that override them."""
    monitor = Agent(tmp_path / "agent", router)
    if os.geteuid() == 0:
        without = "-dac_override,-dac_read_search"
        drop = [require("setpriv"), f"--bounding-set={without}", f"--inh-caps={without}"]
        monitor.command[:0] = map(str, drop)
    return monitor


def test_a_database_restored_read_only(unprivileged: Agent) -> None:
    monitor, folder = unprivileged, unprivileged.db_path.parent
    with monitor, SmurfServer(folder / "data", monitor.address) as sender:
        monitor.wait_listening()
        client = monitor.client()
        sent = send_files(sender, 3)
        wait_registered(monitor, sent)
        restored = folder / "restored.db"
        with contextlib.closing(sqlite3.connect(monitor.db_path)) as source:
            source.execute("VACUUM INTO ?", [str(restored)])
        restored.chmod(0o444)
        for path in files_of(monitor.db_path)[1:]:
            path.unlink()
        restored.rename(monitor.db_path)
        sent += send_files(sender, 3)
        wait_degraded(monitor, client, "it is read-only: check owner and mode")
        wait_acknowledged(monitor, sent)

        monitor.db_path.chmod(0o666)
        wait_registered(monitor, sent)
        wait_well(monitor, client)
        assert lines(monitor, "it is read-only") == 1


def test_a_file_that_may_not_be_read_yet(unprivileged: Agent) -> None:
    monitor, folder = unprivileged, unprivileged.db_path.parent
    with monitor, SmurfServer(folder / "data", monitor.address) as sender:
        monitor.wait_listening()
        (message,) = sender.messages(1, ["txt"])
        assert message.file
        os.chmod(message.file, 0o000)
        sender.send([message])
        monitor.wait_for(lambda: spooled(spool_of(monitor)) == {message.file: "waiting"}, 10, "waits for it")
        assert lines(monitor, f"{message.file}: Permission denied") == 1
        assert monitor.rows() == []

        os.chmod(message.file, 0o444)
        wait_registered(monitor, [message.file])


# --- full


def fill(disk: Path) -> Path:
    """Use up the free space of a disk."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 512):
            pass
    return filler


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False, capture_output=True, text=True
    )
    if done.returncode:
        unavailable(f"mounting needs root: {done.stderr}")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("spool_too", [False, True], ids=["of the database", "of database and spool"])
def test_a_full_disk(router: Router, small_disk: Path, tmp_path: Path, spool_too: bool) -> None:
    options = [["--spool-path", str((small_disk if spool_too else tmp_path) / "spool")]]
    monitor = Agent(tmp_path / "agent", router, db_path=small_disk / "suprsync.db", options=options)
    with monitor, SmurfServer(tmp_path / "data", monitor.address) as sender:
        monitor.wait_listening()
        client = monitor.client()
        sent = send_files(sender, 3)
        wait_registered(monitor, sent)
        filler = fill(small_disk)
        sent += send_files(sender, 300, rate=300)
        if spool_too:
            wait_degraded(monitor, client, "kept in memory", "spool")
        else:
            wait_degraded(monitor, client, "disk is full")
            monitor.wait_for(lambda: files(client)["received"] == len(sent), 10, "accepted all")
        filler.unlink()
        wait_registered(monitor, sent)
        wait_well(monitor, client)
        assert monitor.stop() == 0


def test_files_that_may_not_grow(agent: StartAgent, server: Callable[[Agent], SmurfServer]) -> None:
    monitor = agent()
    client, sender = monitor.client(), server(monitor)
    sent = send_files(sender, 3)
    wait_registered(monitor, sent)
    sizes = [
        path.stat().st_size for path in files_of(monitor.db_path)
    ]  # the spool's files are larger, so they still have room
    room = 100_000  # for its log
    before = resource.prlimit(monitor.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(monitor.pid, resource.RLIMIT_FSIZE, (max(sizes) + room, before[1]))
    while not degraded(client):
        sent += send_files(sender, 50, rate=500)
    assert set(degraded(client)) <= {"database", "spool", "spool_update", "spool_sync"}

    resource.prlimit(monitor.pid, resource.RLIMIT_FSIZE, before)
    wait_registered(monitor, sent)
    wait_well(monitor, client)
