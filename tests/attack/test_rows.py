"""Rows that would do harm: run commands on the archive host, delete what must stay, archive what is not data."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ocs.ocs_client import OCSClient

from socs_monitor.wire.publisher import Publisher
from socs_monitor.wire.text import sanitize
from tests.chain import execute
from tests.integration.test_end_to_end import files
from tests.socs import server_root, suprsync
from tests.testbed.processes import Agent, require, wait_until

StartAgent = Callable[..., Agent]

# Like ssh, it joins its arguments and gives them to the shell of the other host, in the user's home there.
_SSH = """#!/bin/sh
host="$1"
shift
cd "{home}" || exit 255
exec sh -c "$*"
"""

# Says that it was started, and copies only when it may.
_RSYNC = """#!/bin/sh
: > "{started}"
read -r _ < "{gate}"
exec {rsync} "$@"
"""

COMMANDS = ("$(cd${IFS}..;id>PWNED)", "`cd${IFS}..;id>PWNED`", ";cd${IFS}..;id>PWNED;", "a|id>PWNED", "a&id>PWNED")
ODD_NAMES = ("O'Brien", 'a"b', "a*b", "a#b", "~root", "a{b,c}", "-rf", "a\u00a0b", "a\u200bb", "\u2028")


@pytest.fixture
def root() -> Iterator[Path]:
    with server_root() as root:
        yield root


def program(folder: Path, name: str, script: str) -> Path:
    """Write an executable file and return its folder."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(script)
    (folder / name).chmod(0o755)
    return folder


class Sender:
    """One publisher; each file that it announces is one of its own."""

    def __init__(self, monitor: Agent, folder: Path) -> None:
        self._monitor = monitor
        self._folder = folder
        self.sent = 0

    def announce(self, *, action: str = "take_iv", pub_id: str = "ufm_mv19", name: str = "data.txt") -> Path:
        """Write a file and announce it."""
        path = self._folder / str(self.sent) / name
        path.parent.mkdir(parents=True)
        path.write_text(f"file {self.sent}")
        publisher = Publisher(pub_id, self._monitor.address)
        publisher.data_file(str(path), timestamp=1700000000, action=action, action_ts="1700000000")
        publisher.close()
        self.sent += 1
        return path

    def wait_decided(self, client: OCSClient) -> dict[str, str]:
        """Wait until every file has a row or is a dead letter, and return path and reason of the refused ones."""

        def decided() -> bool:
            return len(self._monitor.rows()) + files(client).get("dead", 0) == self.sent

        self._monitor.wait_for(decided, 30, f"decided on {self.sent} files")
        letters = client.list_failed().session["data"]["failed"]
        return {letter["path"]: letter["reason"] for letter in letters if letter["refused"]}


@pytest.mark.parametrize("odd", [COMMANDS, ODD_NAMES], ids=["commands", "odd names"])
def test_no_registration_means_anything_to_the_shell_of_the_archive_host(
    agent: StartAgent, tmp_path: Path, odd: tuple[str, ...]
) -> None:
    monitor = agent()
    sender = Sender(monitor, tmp_path / "data")
    good = sender.announce()
    bad = [sender.announce(action=part) for part in odd if part != "-rf"]  # the action's time comes before it
    bad += [sender.announce(pub_id=part) for part in odd]
    bad += [sender.announce(name=part) for part in odd]
    reasons = sender.wait_decided(monitor.client())
    home = tmp_path / "archive-host" / "home"
    home.mkdir(parents=True)
    ssh = program(tmp_path / "programs", "ssh", _SSH.format(home=home))
    done = suprsync(monitor.db_path, "smurf", home / "base", ssh_host="archive", programs=ssh)

    assert not list(tmp_path.rglob("PWNED")), "a command was executed on the archive host"
    assert done.copied == [(str(good), True)]
    assert reasons.keys() == {sanitize(str(path)) for path in bad}
    for path, reason in reasons.items():
        assert "is not allowed" in reason, path
        assert reason.endswith("socs-monitor send"), path


def test_a_file_that_is_not_a_timestream_is_never_deleted_as_one(agent: StartAgent, root: Path, tmp_path: Path) -> None:
    stays = [
        root / "smurf_data" / "tune" / "1700000000_tune.npy",
        root / "smurf_data" / "status" / "1700000000_status.g3",
        root / "17000" / "ufm_mv19" / "1700000000_tune.npy",
        root / "170000" / "ufm_mv19" / "1700000000_000.g3",
        root / "20240105" / "x" / ".." / ".." / "status" / "1700000000_status.txt",
    ]
    goes = root / "timestreams" / "17000" / "ufm_mv19" / "1700000000_000.g3"
    monitor = agent()
    publisher = Publisher("STREAMER:ufm_mv19", monitor.address)
    (root / "20240105" / "x").mkdir(parents=True)
    for path in (*stays, goes):
        os.makedirs(os.path.realpath(path.parent), exist_ok=True)
        path.write_text(str(path))
        if ".." in path.parts:
            publisher.data_file(str(path), timestamp=1700000000)
        else:
            publisher.g3_file(str(path))
    publisher.close()
    monitor.wait_for(lambda: len(monitor.rows()) == len(stays) + 1, 30, "registered all")
    for archive in ("smurf", "timestreams"):
        done = suprsync(monitor.db_path, archive, tmp_path / archive, delete_after=0)
        assert all(verified for _, verified in done.copied)

    assert [path for path in stays if not path.exists()] == []
    assert not goes.exists()


class Link:
    """A link below the data root, registered, and an agent that looks at it again some seconds later."""

    def __init__(self, agent: StartAgent, folder: Path) -> None:
        self.root, self.outside = folder / "root", folder / "outside"
        for place in (self.root / "real", self.outside):
            place.mkdir(parents=True)
            (place / "x.txt").write_text(place.name)
        self.path = self.root / "link.txt"
        self.path.symlink_to(self.root / "real" / "x.txt")
        self.monitor = agent(options=[["--data-root", str(self.root)]])
        self.client = self.monitor.client()
        self.announce(self.path)

    def announce(self, path: Path) -> None:
        """Announce a path, and wait for its row."""
        publisher = Publisher("ufm_mv19", self.monitor.address)
        publisher.data_file(str(path), timestamp=1700000000, action="take_iv", action_ts="1700000000")
        publisher.close()
        self.monitor.wait_for(lambda: self.rows_of(path), 30, f"registered {path}")

    def rows_of(self, path: Path) -> list[dict[str, Any]]:
        """The rows that name a path."""
        return [row for row in self.monitor.rows() if row["local_path"] == str(path)]

    def retarget(self, target: Path) -> None:
        """Let the link lead to another file, at once."""
        new = self.path.with_name("new")
        new.symlink_to(target)
        os.replace(new, self.path)

    def wait_refused(self, reason: str) -> None:
        """Wait until the only registration is a refused dead letter."""
        self.monitor.wait_for(lambda: files(self.client).get("dead") == 1, 30, "refused the link")
        (letter,) = self.client.list_failed().session["data"]["failed"]
        assert letter["refused"]
        assert reason in letter["reason"]


@pytest.fixture
def link(agent: StartAgent, tmp_path: Path) -> Link:
    return Link(agent, tmp_path)


OUTSIDE = "outside of the data roots"


def test_a_link_retargeted_before_it_was_copied_loses_its_row(link: Link, tmp_path: Path) -> None:
    link.retarget(link.outside / "x.txt")
    link.wait_refused(OUTSIDE)
    assert link.rows_of(link.path) == []

    done = suprsync(link.monitor.db_path, "smurf", tmp_path / "archive")
    assert done.copied == []
    assert done.after["uncopied_files"] == 0
    assert done.after["finalized_until"] == pytest.approx(time.time(), abs=60)


@pytest.mark.parametrize("becomes", ["a directory", "a character device"])
def test_a_path_that_is_no_longer_a_file_loses_its_row(link: Link, becomes: str) -> None:
    link.retarget(Path("/dev/null") if becomes == "a character device" else link.root)
    link.wait_refused(f"{becomes}, not a regular file" if becomes == "a directory" else becomes)
    assert link.rows_of(link.path) == []


def test_a_file_moved_out_of_the_data_roots_loses_its_row(link: Link) -> None:
    os.rename(link.root / "real" / "x.txt", link.outside / "moved.txt")
    link.retarget(link.outside / "moved.txt")
    link.wait_refused(OUTSIDE)
    assert link.rows_of(link.path) == []


def test_a_link_retargeted_after_it_was_copied_is_ignored(link: Link) -> None:
    execute(link.monitor.db_path, "UPDATE supersync_v0 SET copied = 1700000001, failed_copy_attempts = 1")
    link.retarget(link.outside / "x.txt")
    link.wait_refused(OUTSIDE)
    (row,) = link.rows_of(link.path)
    assert (row["ignore"], row["deletable"], row["copied"]) == (1, 0, 1700000001)


def test_a_link_retargeted_while_the_agent_is_dead_loses_its_row(link: Link) -> None:
    link.monitor.kill()
    link.retarget(link.outside / "x.txt")
    link.monitor.start()
    link.client = link.monitor.client()
    link.wait_refused(OUTSIDE)
    assert link.rows_of(link.path) == []


def test_a_withdrawn_file_is_registered_when_it_is_in_order_again(link: Link) -> None:
    link.retarget(link.outside / "x.txt")
    link.wait_refused(OUTSIDE)
    link.retarget(link.root / "real" / "x.txt")
    link.client.retry_failed()
    link.monitor.wait_for(lambda: link.rows_of(link.path), 30, "registered it again")
    (row,) = link.rows_of(link.path)
    assert (row["ignore"], row["copied"], row["remote_path"]) == (
        0,
        None,
        "17000/ufm_mv19/1700000000_take_iv/outputs/link.txt",
    )


def test_suprsync_survives_that_a_row_is_withdrawn_while_it_copies(link: Link, tmp_path: Path) -> None:
    started, gate = tmp_path / "started", tmp_path / "gate"
    os.mkfifo(gate)
    script = _RSYNC.format(started=started, gate=gate, rsync=require("rsync"))
    rsync = program(tmp_path / "programs", "rsync", script)
    other = link.root / "other.txt"
    other.write_text("other")
    link.announce(other)
    results: list[Any] = []
    copying = threading.Thread(
        target=lambda: results.append(suprsync(link.monitor.db_path, "smurf", tmp_path / "archive", programs=rsync))
    )
    copying.start()
    try:
        wait_until(started.exists, 30, "SupRsync copies")
        link.retarget(link.outside / "x.txt")
        link.wait_refused(OUTSIDE)
        assert link.rows_of(link.path) == []
    finally:
        gate.write_text("go\n")
        copying.join(60)

    (done,) = results
    assert (str(other), True) in done.copied
    assert [row["remote_md5sum"] for row in link.rows_of(other)] == [row["local_md5sum"] for row in link.rows_of(other)]
