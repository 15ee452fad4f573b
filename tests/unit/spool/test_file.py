"""Opening a spool: by one process only, without overwriting an invalid file, and with a reserve for a full disk."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from socs_monitor.spool import file
from socs_monitor.spool.file import SpoolBusyError, SpoolError
from socs_monitor.spool.states import State
from socs_monitor.spool.store import Spool
from socs_monitor.wire import messages
from tests.attack.spoolfile import VERSION_1
from tests.attack.test_full_disk import Disk, mounted
from tests.chain import execute
from tests.testbed.processes import unavailable
from tests.unit.spool.conftest import OpenSpool, content, counts, incoming, move

STATES_1 = ("pending", "waiting", "settling", "dead")


def test_only_one_process_can_open_a_spool(open_spool: OpenSpool, path: str) -> None:
    first = open_spool(reserve=0)
    with pytest.raises(SpoolBusyError, match=r"in use by another process.*--spool-path.*fuser .*spool\.lock"):
        open_spool()
    assert file.is_locked(path)
    first.accept([incoming(0)])
    first.close()

    assert not file.is_locked(path)
    assert counts(open_spool(reserve=0)) == {"pending": 1, "received": 1}


@pytest.mark.parametrize("damage", ["unknown version", "other layout", "no database", "corrupt", "truncated"])
def test_an_invalid_spool_is_set_aside_unchanged_and_a_new_one_is_started(
    open_spool: OpenSpool, path: str, said: list[str], damage: str
) -> None:
    spool = open_spool(reserve=0)
    spool.accept([incoming(number) for number in range(300)])
    spool.close()
    content = Path(path).read_bytes()
    if damage == "unknown version":
        execute(path, "PRAGMA user_version = 99")
    elif damage == "other layout":
        execute(path, "ALTER TABLE registrations DROP COLUMN sender")
        execute(path, "PRAGMA user_version = 1")
    else:
        middle = len(content) // 2
        damaged = {
            "no database": b"x" * 5000,
            "corrupt": content[:middle] + os.urandom(8192) + content[middle + 8192 :],
            "truncated": content[:8192],
        }[damage]
        Path(path).write_bytes(damaged)
    before = Path(path).read_bytes()

    spool = open_spool(reserve=0)
    assert counts(spool) == {}
    assert spool.accept([incoming(0)]) == [1]
    (line,) = said
    assert f"The spool {path} cannot be read" in line
    (aside,) = [entry for entry in Path(path).parent.iterdir() if entry.name.endswith(".set-aside")]
    assert f"set aside as {aside}" in line
    assert aside.read_bytes() == before


def test_a_spool_that_cannot_be_opened_is_not_locked(open_spool: OpenSpool, path: str) -> None:
    os.mkdir(path)
    with pytest.raises(SpoolError, match=f"cannot open the spool {path}"):
        open_spool()
    os.rmdir(path)

    open_spool()


def test_a_spool_inside_a_file_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SpoolError, match="cannot open the spool"):
        Spool(str(tmp_path / "file" / "spool"), print)


def test_the_folder_of_a_spool_is_created(tmp_path: Path) -> None:
    spool = Spool(str(tmp_path / "a" / "b" / "spool"), print)
    spool.close()

    assert (tmp_path / "a" / "b" / "spool").is_file()


def test_a_registration_in_an_unknown_state_is_pending(open_spool: OpenSpool, path: str) -> None:
    spool = open_spool(reserve=0)
    spool.accept([incoming(0)])
    spool.close()
    execute(path, "UPDATE registrations SET state = 'settling'")

    assert counts(open_spool(reserve=0)) == {"pending": 1, "received": 1}


# --- migration


def write_version_1(path: str, messages_: list[str]) -> list[tuple[float, str, str]]:
    """Write a version 1 spool with registrations in all states; return when, from whom and what they are."""
    rows = [(1000.5 + number, f"10.0.0.5:{number}", message) for number, message in enumerate(messages_)]
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(VERSION_1)
        db.executemany(
            "INSERT INTO registrations (state, attempts, due, reason, refused, received, sender, message)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    STATES_1[number % 4],
                    number % 5,
                    1.7e9 if number % 4 == 1 else None,
                    "gone",
                    int(number % 8 == 3),
                    *row,
                )
                for number, row in enumerate(rows)
            ],
        )
        db.execute("DELETE FROM registrations WHERE id = 2")
        db.commit()
    return [rows[0], *rows[2:]]


def test_registrations_of_version_1_become_new_ones(open_spool: OpenSpool, path: str, said: list[str]) -> None:
    rows = write_version_1(path, [incoming(number).message for number in range(40)] + ["not JSON", ""])
    spool = open_spool(reserve=0)
    new: dict[str, Any] = {
        "state": "pending", "attempts": 0, "rounds": 0, "due": 0.0, "reason": None, "refused": 0
    }  # fmt: skip

    assert said == []
    assert counts(spool) == {"pending": len(rows), "received": len(rows)}
    expected = [
        {"id": number, "received": received, "sender": sender, "message": message, **new}
        for number, (received, sender, message) in enumerate(rows, 1)
    ]
    assert content(path) == expected
    assert [due.id for due in spool.apply([], 0.0, 100)] == [row["id"] for row in expected]
    spool.close()
    assert counts(open_spool(reserve=0)) == {"pending": len(rows), "received": len(rows)}


def test_a_large_version_1_spool_is_migrated_within_seconds(open_spool: OpenSpool, path: str) -> None:
    write_version_1(path, [incoming(number).message for number in range(50_000)])
    begin = time.monotonic()
    spool = open_spool(reserve=0)

    assert time.monotonic() - begin < 10
    assert counts(spool) == {"pending": 49_999, "received": 49_999}


def test_an_interrupted_migration_is_repeated(open_spool: OpenSpool, path: str) -> None:
    write_version_1(path, [incoming(number).message for number in range(9)])
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("BEGIN IMMEDIATE")
        with pytest.raises(SpoolError, match="locked"):
            open_spool(reserve=0, busy_timeout=0.05)

    assert counts(open_spool(reserve=0)) == {"pending": 8, "received": 8}


def test_a_message_of_version_1_takes_no_more_memory_than_a_new_one(open_spool: OpenSpool, path: str) -> None:
    text = incoming(0, nested=[{"": 0}] * 9000).message
    write_version_1(path, [text])

    (due,) = open_spool(reserve=0).apply([], 0.0, 1)
    assert due.message == text
    assert "nested" not in messages.parse_file(text).meta


# --- a full disk


MEGABYTE = 1 << 20


def room(path: str) -> int:
    """Size of the free pages in a spool's file."""
    return int(execute(path, "PRAGMA freelist_count")[0][0]) * 4096


def test_a_new_spool_has_a_reserve_in_its_file_and_its_journal(open_spool: OpenSpool, path: str) -> None:
    spool = open_spool(reserve=4 * MEGABYTE)

    assert room(path) >= 4 * MEGABYTE
    assert os.path.getsize(path + "-wal") >= 4 * MEGABYTE
    assert os.stat(path).st_blocks * 512 >= 4 * MEGABYTE, "it is sparse"
    assert spool.bytes < MEGABYTE
    spool.close()
    size = os.path.getsize(path)
    open_spool(reserve=4 * MEGABYTE)
    assert os.path.getsize(path) == size, "it grows with each start"


def test_the_reserve_does_not_count_as_used(open_spool: OpenSpool) -> None:
    spool = open_spool(max_bytes=200_000, reserve=4 * MEGABYTE)

    assert spool.accept([incoming(number, comment="x" * 1000) for number in range(100)])


def test_a_kill_while_the_reserve_is_made_costs_no_room(open_spool: OpenSpool, path: str, said: list[str]) -> None:
    open_spool(reserve=0).close()
    execute(path, "CREATE TABLE reserve (room BLOB)")
    execute(path, "INSERT INTO reserve VALUES (zeroblob(4194304))")
    spool = open_spool(reserve=4 * MEGABYTE)

    assert said == []
    assert room(path) >= 4 * MEGABYTE
    assert spool.bytes < MEGABYTE


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk of 32 MiB."""
    if os.geteuid():
        unavailable("mounting needs root")
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=32m", "none") as disk:
        yield disk


def test_a_full_disk_does_not_prevent_accepting_and_settling(disk: Disk) -> None:
    size = 2 * MEGABYTE
    said: list[str] = []
    spool = Spool(str(disk.path / "spool"), said.append, reserve=size)
    disk.fill()
    accepted = 0
    while accepted * 320 < size // 2:
        accepted += len(spool.accept([incoming(accepted + number) for number in range(500)], held=True))
    spool.sync()
    move(spool, State.SETTLED, *range(1, 501))
    spool.close()

    assert said == []
    spool = Spool(str(disk.path / "spool"), said.append, reserve=0)
    assert counts(spool) == {"pending": accepted - 500, "received": accepted - 500}
    spool.close()


def test_a_closed_spool_can_be_opened_on_a_full_disk(disk: Disk, said: list[str]) -> None:
    path = str(disk.path / "spool")
    spool = Spool(path, said.append, reserve=2 * MEGABYTE)
    spool.accept([incoming(number) for number in range(500)])
    spool.close()
    disk.fill()

    for accepted in (500, 1000, 1500):
        spool = Spool(path, said.append, reserve=2 * MEGABYTE)
        assert counts(spool) == {"pending": accepted, "received": accepted}
        assert room(path) >= MEGABYTE, "the reserve is gone"
        spool.accept([incoming(number) for number in range(500)])
        spool.close()
    assert said == []


def test_an_exhausted_reserve_fails_cleanly_and_recovers(disk: Disk) -> None:
    spool = Spool(str(disk.path / "spool"), print, reserve=MEGABYTE)
    disk.fill()
    ids: list[int] = []
    with contextlib.suppress(SpoolError):
        while len(ids) < 100_000:
            ids += spool.accept([incoming(number, comment="x" * 500) for number in range(100)], held=True)
    assert counts(spool) == {"pending": len(ids), "received": len(ids)}
    assert len(content(str(disk.path / "spool"))) == len(ids)
    assert 1000 <= len(ids) < 100_000
    disk.free()
    spool.sync()
    assert spool.accept([incoming(0)])
    move(spool, State.SETTLED, *ids)
    assert counts(spool) == {"pending": 1, "settled": len(ids), "received": len(ids) + 1}
    spool.close()


def test_a_missing_reserve_is_reported(disk: Disk) -> None:
    said: list[str] = []
    disk.fill()
    ballast = disk.path / "ballast"
    os.truncate(ballast, ballast.stat().st_size - 300_000)
    spool = Spool(str(disk.path / "spool"), said.append)

    (line,) = said
    assert "The disk has no room for the reserve of the spool" in line
    assert spool.accept([incoming(0)])
    spool.close()
