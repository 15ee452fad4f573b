"""Whatever happens to one registration, all others are registered, also after a restart."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ocs
import pytest

from socs_monitor.cli.health import State
from socs_monitor.registration.lookup import RETRY_MAX_S, Policy
from socs_monitor.wire.publisher import Publisher, data_file
from tests.attack import spoolfile
from tests.chain import Chain, Clock, execute
from tests.evidence import entries, path_of, send_files, spool_of, wait_rows
from tests.hung import hung_folder
from tests.integration.test_cli import command, site
from tests.testbed.processes import OWN_BIN, Agent, Router
from tests.testbed.smurf_server import SmurfServer

DAY_S = 86_400


def announce(agent: Agent, path: str) -> None:
    """Send one registration of a path that need not exist."""
    with contextlib.closing(Publisher("crate1slot2", agent.address)) as publisher:
        publisher.data_file(path, action="take_iv", action_ts="1700000000")


def message(path: object) -> str:
    """Return a registration as the spool stores it."""
    payload = data_file("", timestamp=1_700_000_000, action="take_iv", action_ts="1700000000")
    return json.dumps({"id": "crate1slot2", "type": "data_file", "payload": {**payload, "path": path}})


def fate(agent: Agent, part: str) -> tuple[str, str]:
    """Return state and reason of the only spool entry whose message contains `part`."""
    ((state, reason),) = [(entry["state"], entry["reason"]) for entry in entries(agent) if part in entry["message"]]
    return state, reason or ""


def check_only_this_one_fails(router: Router, folder: Path, path: str, reason: str) -> None:
    """Check that every file but `path` is registered, that its reason is shown, and the same after a restart."""
    agent = Agent(folder / "agent", router)
    with agent, SmurfServer(folder / "server", agent.address) as server:
        agent.wait_listening()
        announce(agent, path)
        wait_rows(agent, send_files(server, 12), 10)
        name = path[-200:]
        agent.wait_for(lambda: reason in fate(agent, name)[1], 10, "gave the reason")
        assert fate(agent, name)[0] in ("waiting", "dead")
        assert agent.stop() == 0

        agent.start()
        agent.wait_listening()
        wait_rows(agent, send_files(server, 12), 10)
        agent.wait_for(lambda: fate(agent, name)[0] in ("waiting", "dead"), 10, "gave the reason again")
        assert reason in fate(agent, name)[1]
        assert "Traceback" not in agent.log, agent.log[-3000:]
        assert agent.stop() == 0


def test_a_path_longer_than_the_kernel_takes(no_router: Router, tmp_path: Path) -> None:
    path = f"{tmp_path}/{'x/' * 2100}{'y' * 253}"
    assert len(path) > 4096
    check_only_this_one_fails(no_router, tmp_path, path, "File name too long")


@pytest.mark.parametrize("length", [252, 255])  # with .npy, longer than a file system allows
def test_a_loop_of_links(no_router: Router, tmp_path: Path, length: int) -> None:
    path = tmp_path / ("z" * length)
    path.symlink_to(path.name)
    check_only_this_one_fails(no_router, tmp_path, str(path), "Too many levels of symbolic links")


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.EACCES, "Permission denied"), (errno.EIO, "Input/output error"), (errno.ESTALE, "Stale file handle")],
)
def test_a_file_system_that_refuses(no_router: Router, tmp_path: Path, number: int, reason: str) -> None:
    with hung_folder(tmp_path / "mount") as folder:
        folder.fail(number)
        check_only_this_one_fails(no_router, tmp_path, str(folder.path / ("z" * 253)), reason)


# --- entries that this version cannot use

# Messages that another program, another version or a damaged disk left in the spool.
GARBAGE: dict[str, str | bytes] = {
    "empty": "",
    "cut": message("/data/x.txt")[:40],
    "list": "[]",
    "null": "null",
    "number": "1" * 5000,
    "string": '"text"',
    "nested": "[" * 65_000,
    "no payload": '{"id": "crate1slot2", "type": "data_file"}',
    "no registration": '{"id": "crate1slot2", "type": "session_log", "payload": "a line"}',
    "no path": '{"id": "crate1slot2", "type": "data_file", "payload": {"timestamp": 1700000000}}',
    "path is a list": message(["/data/x.txt"]),
    "path is huge": message(0).replace('"path": 0', '"path": 1' + "0" * 4300),
    "path is empty": message(""),
    "path with NUL": message("/data/\0.txt"),
    "no UTF-8": b'{"id": "\xff\xfe", "type": "data_file"}',
    "bytes": bytes(range(1, 256)),
}


def of_this_version(agent: Agent) -> None:
    """Let the agent create its spool."""
    with agent:
        agent.wait_listening()
        assert agent.stop() == 0


def of_version_1(agent: Agent) -> None:
    spoolfile.make_version_1(spool_of(agent))


def write_real(folder: Path, count: int) -> list[str]:
    folder.mkdir()
    paths = [folder / f"real_{number}.txt" for number in range(count)]
    for path in paths:
        path.write_text(path.name)
    return [str(path) for path in paths]


def wait_dead(agent: Agent, count: int) -> list[dict[str, Any]]:
    """Wait until the running agent has `count` dead letters, and return what its task lists."""
    client = agent.client()
    agent.wait_for(lambda: client.list_failed().session["data"].get("total") == count, 15, f"has {count} dead letters")
    reply = client.list_failed()
    assert reply.status == ocs.OK
    letters: list[dict[str, Any]] = reply.session["data"]["failed"]
    assert len(letters) == count
    assert all(letter["reason"] and isinstance(letter["path"], str) for letter in letters), letters
    return letters


@pytest.mark.parametrize("begin", [of_this_version, of_version_1])
def test_a_spool_with_garbage(router: Router, tmp_path: Path, begin: Callable[[Agent], None]) -> None:
    agent = Agent(tmp_path / "agent", router)
    begin(agent)
    real = write_real(tmp_path / "real", 20)
    for number, garbage in enumerate(GARBAGE.values()):
        spoolfile.insert(spool_of(agent), [garbage, message(real[number])])
    spoolfile.insert(spool_of(agent), map(message, real[len(GARBAGE) :]))

    with agent, SmurfServer(tmp_path / "server", agent.address) as server:
        agent.wait_listening()
        wait_rows(agent, [*real, *send_files(server, 12)], 15)
        wait_dead(agent, len(GARBAGE))
        shown = command("failed", "list", *site(agent))
        assert f"{len(GARBAGE)} of {len(GARBAGE)} dead letters" in shown
        assert "Traceback" not in agent.log, agent.log[-3000:]
        assert agent.stop() == 0

        assert f"{len(GARBAGE)} of {len(GARBAGE)} dead letters" in command("failed", "list", *site(agent))
        agent.start()
        agent.wait_listening()
        wait_rows(agent, send_files(server, 12), 10)
        assert all(letter["refused"] for letter in wait_dead(agent, len(GARBAGE)))
        assert command("failed", "retry", *site(agent))
        wait_rows(agent, send_files(server, 12), 10)
        wait_dead(agent, len(GARBAGE))
        assert agent.stop() == 0


def test_status_of_a_stopped_agent_with_garbage(router: Router, tmp_path: Path) -> None:
    agent = Agent(tmp_path / "agent", router)
    of_this_version(agent)
    spoolfile.insert(spool_of(agent), GARBAGE.values())
    status = [OWN_BIN / "socs-monitor", "status", "--brief", "--site-file", agent.site_config]
    asked = subprocess.run(status, capture_output=True, text=True, timeout=60, check=False)
    assert (asked.returncode, asked.stderr) == (State.NOT_RUNNING.value, "")
    assert "backlog" in asked.stdout


def test_dead_letters_that_cannot_be_parsed(router: Router, tmp_path: Path) -> None:
    """An earlier version stored these as dead letters."""
    agent = Agent(tmp_path / "agent", router)
    of_this_version(agent)
    spoolfile.insert(spool_of(agent), GARBAGE.values(), state="dead", reason="of an earlier version", attempts=3)
    assert f"{len(GARBAGE)} of {len(GARBAGE)} dead letters" in command("failed", "list", *site(agent))
    with agent, SmurfServer(tmp_path / "server", agent.address) as server:
        agent.wait_listening()
        wait_dead(agent, len(GARBAGE))
        wait_rows(agent, send_files(server, 12), 10)
        assert command("failed", "discard", "--all", *site(agent))
        wait_dead(agent, 0)
        assert agent.stop() == 0


# Odd columns of a good message; its file has to be registered all the same.
ODD_COLUMNS: tuple[dict[str, Any], ...] = (
    {"received": float("inf")},
    {"received": -1e308},
    {"attempts": -(2**63)},
    {"attempts": 2**63 - 1},
    {"state": "waiting", "due": -1e308},
    {"state": "waiting", "due": 1e308},
    {"state": "no such state"},
    {"sender": ""},
)


@pytest.mark.parametrize("begin", [of_this_version, of_version_1])
def test_odd_columns_beside_a_good_message(no_router: Router, tmp_path: Path, begin: Callable[[Agent], None]) -> None:
    agent = Agent(tmp_path / "agent", no_router)
    begin(agent)
    real = write_real(tmp_path / "real", 2 * len(ODD_COLUMNS))
    for number, columns in enumerate(ODD_COLUMNS):
        spoolfile.insert(spool_of(agent), [message(real[2 * number])], **columns)
        spoolfile.insert(spool_of(agent), [message(real[2 * number + 1])])
    with agent, SmurfServer(tmp_path / "server", agent.address) as server:
        agent.wait_listening()
        wait_rows(agent, send_files(server, 12), 10)
        wait_rows(agent, real, 10)
        assert agent.stop() == 0


def test_files_that_were_missed_for_seventeen_hours(tmp_path: Path) -> None:
    """Step by step, with a clock of the test's own: the next attempt is a minute away."""
    clock = Clock()
    chain = Chain(tmp_path, clock, clock.monotonic, Policy(give_up_after=DAY_S))
    missing = {attempts: f"missing_{attempts}.txt" for attempts in (1023, 1024, 1025, 2**62)}
    old = {"received": clock() - 17 * 3600, "state": "waiting", "due": 0.0, "reason": "missing"}
    for attempts, name in {**missing, 2**63 - 1: "late.txt"}.items():
        spoolfile.insert(chain.spool_path, [message(str(chain.path(name)))], attempts=attempts, **old)
    chain.reopen()
    chain.step()
    chain.accept("new.txt")
    expected = {name: chain.write(name, name.encode()) for name in ("late.txt", "new.txt")}
    chain.step()
    clock.advance(RETRY_MAX_S)
    chain.step()

    assert chain.sums() == expected
    stored = execute(chain.spool_path, "SELECT message, state, attempts, reason FROM registrations")
    found = {os.path.basename(path_of(text)): rest for text, *rest in stored}
    for attempts, name in missing.items():
        state, attempts_now, reason = found[name]
        assert "No such file or directory" in reason
        assert (state, attempts_now) == ("waiting", attempts + 1) or attempts == 2**62
    chain.crash()
