"""Whatever one registration comes to, all the others are registered, also after a restart."""

from __future__ import annotations

import contextlib
import errno
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ocs
import pytest

from socs_monitor.wire.publisher import Publisher, data_file
from tests.attack import spoolfile
from tests.evidence import entries, path_of, send_files, spool_of, wait_rows
from tests.hung import hung_folder
from tests.integration.test_cli import command, site
from tests.testbed.processes import Agent, Router
from tests.testbed.smurf_server import SmurfServer

DAY_S = 86_400


def announce(agent: Agent, path: str) -> None:
    """Send one registration of a path that need not be there."""
    with contextlib.closing(Publisher("crate1slot2", agent.address)) as publisher:
        publisher.data_file(path, action="take_iv", action_ts="1700000000")


def message(path: object) -> str:
    """A registration as it is kept in the spool."""
    payload = data_file("", timestamp=1_700_000_000, action="take_iv", action_ts="1700000000")
    return json.dumps({"id": "crate1slot2", "type": "data_file", "payload": {**payload, "path": path}})


def fate(agent: Agent, part: str) -> tuple[str, str]:
    """State and reason of the only entry of the spool whose message holds `part`."""
    ((state, reason),) = [(entry["state"], entry["reason"]) for entry in entries(agent) if part in entry["message"]]
    return state, reason or ""


def check_that_it_alone_suffers(router: Router, folder: Path, path: str, reason: str) -> None:
    """Of all that is announced only `path` is not registered, and it says why; a restart changes nothing."""
    agent = Agent(folder / "agent", router)
    with agent, SmurfServer(folder / "server", agent.address) as server:
        agent.wait_listening()
        announce(agent, path)
        wait_rows(agent, send_files(server, 12), 10)
        name = path[-200:]
        agent.wait_for(lambda: reason in fate(agent, name)[1], 10, "says why it could not register the one")
        assert fate(agent, name)[0] in ("waiting", "dead")
        assert agent.stop() == 0

        agent.start()
        agent.wait_listening()
        wait_rows(agent, send_files(server, 12), 10)
        agent.wait_for(lambda: fate(agent, name)[0] in ("waiting", "dead"), 10, "has put the one aside")
        assert reason in fate(agent, name)[1]
        assert "Traceback" not in agent.log, agent.log[-3000:]
        assert agent.stop() == 0


def test_a_path_longer_than_the_kernel_takes(no_router: Router, tmp_path: Path) -> None:
    path = f"{tmp_path}/{'x/' * 2100}{'y' * 253}"
    assert len(path) > 4096
    check_that_it_alone_suffers(no_router, tmp_path, path, "File name too long")


@pytest.mark.parametrize("length", [252, 255])  # with .npy it is longer than a file system takes
def test_a_loop_of_links(no_router: Router, tmp_path: Path, length: int) -> None:
    path = tmp_path / ("z" * length)
    path.symlink_to(path.name)
    check_that_it_alone_suffers(no_router, tmp_path, str(path), "Too many levels of symbolic links")


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.EACCES, "Permission denied"), (errno.EIO, "Input/output error"), (errno.ESTALE, "Stale file handle")],
)
def test_a_file_system_that_refuses(no_router: Router, tmp_path: Path, number: int, reason: str) -> None:
    with hung_folder(tmp_path / "mount") as folder:
        folder.fail(number)
        check_that_it_alone_suffers(no_router, tmp_path, str(folder.path / ("z" * 253)), reason)


# --- entries that the running version cannot use

# What somebody else, another version or a damaged disk left in the spool's messages.
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
    """Let the agent make its spool."""
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
    """Wait until the running agent has so many dead letters, and return them as its task lists them."""
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
        wait_dead(agent, len(GARBAGE))
        assert command("failed", "retry", *site(agent))
        wait_rows(agent, send_files(server, 12), 10)
        wait_dead(agent, len(GARBAGE))
        assert agent.stop() == 0


def test_dead_letters_that_cannot_be_parsed(router: Router, tmp_path: Path) -> None:
    """An earlier version made them dead letters, and took them for messages."""
    agent = Agent(tmp_path / "agent", router)
    of_this_version(agent)
    spoolfile.insert(spool_of(agent), GARBAGE.values(), state="dead", reason="of old", attempts=3)
    assert f"{len(GARBAGE)} of {len(GARBAGE)} dead letters" in command("failed", "list", *site(agent))
    with agent, SmurfServer(tmp_path / "server", agent.address) as server:
        agent.wait_listening()
        wait_dead(agent, len(GARBAGE))
        wait_rows(agent, send_files(server, 12), 10)
        assert command("failed", "discard", "--all", *site(agent))
        wait_dead(agent, 0)
        assert agent.stop() == 0


# Columns beside a good message, of which none is a reason not to register the file.
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


def test_files_that_were_missed_for_seventeen_hours(no_router: Router, tmp_path: Path) -> None:
    agent = Agent(tmp_path / "agent", no_router, options=[["--give-up-after", DAY_S]])
    of_this_version(agent)
    missing = {attempts: str(tmp_path / f"missing_{attempts}.txt") for attempts in (1023, 1024, 1025, 2**62)}
    old = {"received": time.time() - 17 * 3600, "state": "waiting", "due": 0.0, "reason": "of old"}
    for attempts, path in missing.items():
        spoolfile.insert(spool_of(agent), [message(path)], attempts=attempts, **old)
    late = write_real(tmp_path / "real", 1)
    spoolfile.insert(spool_of(agent), [message(late[0])], attempts=2**63 - 1, **old)
    with agent, SmurfServer(tmp_path / "server", agent.address) as server:
        agent.wait_listening()
        wait_rows(agent, send_files(server, 12), 10)

        def looked_again() -> bool:
            found = {path_of(entry["message"]): entry for entry in entries(agent)}
            return all(
                found[path]["attempts"] > attempts or found[path]["state"] == "dead"
                for attempts, path in missing.items()
            )

        agent.wait_for(looked_again, 75, "has looked for the missing files again")  # a retry may be a minute away
        for attempts, path in missing.items():
            state, reason = fate(agent, path)
            assert "No such file or directory" in reason
            assert state == "waiting" or attempts == 2**62
        wait_rows(agent, late, 10)
        wait_rows(agent, send_files(server, 12), 10)
        assert "Traceback" not in agent.log, agent.log[-3000:]
        assert agent.stop() == 0
