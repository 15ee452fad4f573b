"""Reading beside a writer, without creating a file."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from socs_monitor.suprsync import readonly


def rows(path: Path) -> list[int]:
    with contextlib.closing(readonly.connect(str(path))) as db:
        return [value for (value,) in db.execute("SELECT a FROM t")]


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(tmp_path / "a?b.db", isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE t (a)")
        yield db


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a?b.db"


def test_committed_rows_are_read_while_a_writer_holds_the_lock(writer: sqlite3.Connection, path: Path) -> None:
    writer.execute("INSERT INTO t VALUES (1)")
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("INSERT INTO t VALUES (2)")
    assert rows(path) == [1]
    writer.execute("COMMIT")
    assert rows(path) == [1, 2]


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_reading_a_closed_database_creates_no_file(writer: sqlite3.Connection, path: Path, mode: str) -> None:
    writer.execute("INSERT INTO t VALUES (1)")
    writer.execute(f"PRAGMA journal_mode = {mode}")
    writer.close()
    assert rows(path) == [1]
    assert os.listdir(path.parent) == [path.name]


def test_rows_in_the_journal_of_a_killed_writer_are_read(path: Path) -> None:
    write = (
        "import os, sqlite3, sys; db = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "db.execute('PRAGMA journal_mode = WAL'); db.execute('CREATE TABLE t (a)');"
        "db.execute('INSERT INTO t VALUES (1)'); os._exit(0)"
    )
    assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", write, str(path)) == 0
    before = sorted(os.listdir(path.parent))
    assert rows(path) == [1]
    assert sorted(os.listdir(path.parent)) == before
    assert len(before) == 3


def test_nothing_can_be_written(writer: sqlite3.Connection, path: Path) -> None:
    with (
        contextlib.closing(readonly.connect(str(path))) as db,
        pytest.raises(sqlite3.OperationalError, match="readonly"),
    ):
        db.execute("INSERT INTO t VALUES (1)")


def test_a_missing_file_is_not_created(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        readonly.connect(str(path))
    assert os.listdir(path.parent) == []
