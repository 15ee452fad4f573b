"""`socs-monitor files` shows the rows of a database that others write."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from socs_monitor.suprsync.database import Database
from tests.integration.test_cli import command, run, site
from tests.integration.test_end_to_end import announce, wait_registered
from tests.testbed.processes import OWN_BIN, Agent

StartAgent = Callable[..., Agent]

NOW = 1_700_000_000.0


def make(path: Path, rows: Sequence[tuple[str, str, float, str | None]]) -> Path:
    """A database with rows of local path, archive, time, and sum of the copy (all files have the sum "s")."""
    database = Database(str(path), create_table=True, echo=False, report=lambda *_, **__: None)
    database.rows([])  # makes the tables
    database.close()
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.executemany(
            "INSERT INTO supersync_v0 (local_path, archive_name, timestamp, remote_md5sum, remote_path, local_md5sum,"
            " failed_copy_attempts, deletable, ignore) VALUES (?, ?, ?, ?, 'there', 's', 0, 1, 0)",
            rows,
        )
    return path


def paths(*words: object) -> list[str]:
    """The local paths in the output of `--json`."""
    return [json.loads(line)["local_path"] for line in command("files", "--json", *words).splitlines()]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    rows = [
        ("/one.g3", "timestreams", NOW - 7200, "s"),
        ("/two.npy", "smurf", NOW - 3600, None),
        ("/three.g3", "timestreams", NOW - 60, "another"),
        ("/four.npy", "smurf", NOW, "s"),
    ]
    return make(tmp_path / "suprsync.db", rows)


def test_rows_of_the_running_agent_are_shown_newest_last(agent: StartAgent, tmp_path: Path) -> None:
    monitor = agent()
    registered = announce(monitor, tmp_path / "data", 5)
    wait_registered(monitor, registered)

    shown = command("files", *site(monitor))
    assert [line for line in shown.splitlines() if any(path in line for path in registered)]
    assert sorted(registered, key=shown.index) == registered
    assert shown.count("not copied") == 5
    assert paths(*site(monitor)) == registered
    wait_registered(monitor, registered + announce(monitor, tmp_path / "more", 2, "more"))


def test_json_has_every_column(database: Path) -> None:
    first = json.loads(command("files", "--db-path", database, "--json").splitlines()[0])
    assert first == {
        "id": 1,
        "local_path": "/one.g3",
        "local_md5sum": "s",
        "archive_name": "timestreams",
        "remote_path": "there",
        "timestamp": NOW - 7200,
        "remote_md5sum": "s",
        "copied": None,
        "removed": None,
        "failed_copy_attempts": 0,
        "deletable": 1,
        "ignore": 0,
    }


def test_rows_are_chosen_by_archive_and_copy(database: Path) -> None:
    assert paths("--db-path", database, "--archive", "smurf") == ["/two.npy", "/four.npy"]
    assert paths("--db-path", database, "--uncopied") == ["/two.npy", "/three.g3"]
    assert paths("--db-path", database, "--uncopied", "--archive", "timestreams") == ["/three.g3"]
    assert "No matching rows." in command("files", "--db-path", database, "--archive", "none")


@pytest.mark.parametrize("gone", ["ignore = 1", "removed = 1.0"])
def test_ignored_and_removed_rows_are_not_uncopied(database: Path, gone: str) -> None:
    with contextlib.closing(sqlite3.connect(database)) as db, db:
        db.execute(f"UPDATE supersync_v0 SET {gone} WHERE local_path = '/two.npy'")
    assert paths("--db-path", database, "--uncopied") == ["/three.g3"]


@pytest.mark.parametrize(
    ("since", "expected"),
    [
        (str(NOW - 60), ["/three.g3", "/four.npy"]),
        ("2023-11-14T21:13:20", ["/two.npy", "/three.g3", "/four.npy"]),
        ("2023-11-14 22:13:20Z", ["/four.npy"]),
        ("2023-11-14T23:12:20+01:00", ["/three.g3", "/four.npy"]),
        ("2023-11-14", ["/one.g3", "/two.npy", "/three.g3", "/four.npy"]),
        ("90m", ["/two.npy", "/three.g3", "/four.npy"]),
        ("0.5h", ["/three.g3", "/four.npy"]),
        ("59s", ["/four.npy"]),
        ("1d", ["/one.g3", "/two.npy", "/three.g3", "/four.npy"]),
    ],
)
def test_rows_are_chosen_by_time(
    database: Path, monkeypatch: pytest.MonkeyPatch, since: str, expected: Sequence[str]
) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW)
    assert paths("--db-path", database, "--since", since) == expected


@pytest.mark.parametrize("words", [("--since", "yesterday"), ("--since", "2x"), ("--limit", "0"), ("--limit", "-1")])
def test_an_invalid_time_or_number_is_wrong_usage(words: Sequence[str]) -> None:
    assert "usage: socs-monitor files" in command("files", *words, code=2)


def test_only_the_newest_rows_are_shown(tmp_path: Path) -> None:
    many = make(tmp_path / "many.db", [(f"/{number}", "smurf", NOW, None) for number in range(150)])

    assert paths("--db-path", many) == [f"/{number}" for number in range(50, 150)]
    assert "Only the newest 100 are shown. For more, use --limit." in command("files", "--db-path", many)
    assert "For more" not in command("files", "--db-path", many, "--limit", 150)
    assert paths("--db-path", many, "--limit", 1) == ["/149"]


def test_odd_paths_are_displayed_literally(tmp_path: Path) -> None:
    odd = ["/a/[/bold]x", "/a/[red]x", "/a/\x1b[31mred", "/a/\x1b]0;title\x07", "/a/\u202egpj.exe", "/a/x\ny"]
    database = make(tmp_path / "odd.db", [(path, "smurf", NOW, None) for path in odd])
    with contextlib.closing(sqlite3.connect(database)) as db, db:
        db.execute("UPDATE supersync_v0 SET remote_path = CAST(x'2fff' AS TEXT) WHERE id = 1")  # no UTF-8

    shown = command("files", "--db-path", database)
    assert "/a/[/bold]x" in shown
    assert "/a/[red]x" in shown
    assert all(character.isprintable() or character == "\n" for character in shown), repr(shown)
    assert paths("--db-path", database) == odd


def test_reading_works_beside_a_writer_and_leaves_no_files(database: Path) -> None:
    before = sorted(os.listdir(database.parent))
    assert len(paths("--db-path", database)) == 4
    assert sorted(os.listdir(database.parent)) == before == ["suprsync.db"]
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        db.execute("DELETE FROM supersync_v0")
        assert len(paths("--db-path", database)) == 4
        db.execute("COMMIT")
        assert paths("--db-path", database) == []


def test_a_closed_pipe_is_not_an_error(tmp_path: Path) -> None:
    many = make(tmp_path / "many.db", [(f"/{number}", "smurf", NOW, None) for number in range(2000)])
    for form in ("--json", "--limit=1999"):
        words = f"set -o pipefail; {OWN_BIN}/socs-monitor files --db-path {many} --limit 2000 {form} | head -1"
        done = run("bash", "-c", words)
        assert done.stderr == ""
        assert done.stdout.count("\n") == 1


def test_an_unreadable_database_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "garbage.db").write_bytes(b"garbage" * 1000)
    for name in ("none.db", "garbage.db"):
        said = command("files", "--db-path", tmp_path / name, code=1)
        assert f"The database {tmp_path / name} cannot be read" in said
