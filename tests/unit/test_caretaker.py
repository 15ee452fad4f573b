"""Rows that SupRsync cannot finish are given the present content of their files."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from socs_monitor.caretaker import RETRY_S, Caretaker, NoSum, hash_file
from socs_monitor.checksum import StoppedError
from socs_monitor.finder import Policy

from socs_monitor import caretaker as caretaker_module
from socs_monitor.archive import Entry
from socs_monitor.stats import Stats
from socs_monitor.suprsync.database import Database, DatabaseUnavailableError
from socs_monitor.suprsync.upsert import HashedFile
from tests.chain import Clock, execute, md5, write_file, write_lock
from tests.harness import rows, wait_until


class Site:
    """A database, its files and their caretaker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.db_path = folder / "suprsync.db"
        self.clock = Clock()
        self.said: list[str] = []
        self.stats = Stats(lambda _, text: self.said.append(text), self.clock)
        self.hashed: list[str] = []
        self.opened = [self.open(create_table=True)]
        self.begin()

    def open(self, *, create_table: bool) -> Database:
        return Database(
            str(self.db_path), create_table=create_table, echo=False, report=self.said.append, clock=self.clock
        )

    def begin(self, hash_it: Callable[[str, Callable[[], bool]], str | NoSum] | None = None) -> None:
        """Make a caretaker, as a start of the process does."""
        hash_it = hash_it or hash_file(Policy(own=(str(self.db_path),)))

        def noting(path: str, stopped: Callable[[], bool]) -> str | NoSum:
            self.hashed.append(os.path.basename(path))
            return hash_it(path, stopped)

        self.opened.append(self.open(create_table=False))
        self.caretaker = Caretaker(self.opened[-1], noting, self.stats, self.clock)

    def register(self, name: str, content: bytes, **state: Any) -> str:
        """Write a file, register it and set columns of its row; return its path."""
        path = self.folder / "files" / name
        entry = Entry("smurf", str(path), f"17000/slot2/a/outputs/{name}", deletable=True)
        self.opened[0].register([HashedFile(entry, write_file(path, content))])
        columns = ", ".join(f"{column} = ?" for column in state)
        execute(self.db_path, f"UPDATE supersync_v0 SET {columns} WHERE local_path = ?", *state.values(), str(path))
        return str(path)

    def row(self, name: str = "a") -> dict[str, Any]:
        (row,) = (row for row in rows(self.db_path) if row["local_path"].endswith(f"/{name}"))
        return row


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    for database in site.opened:
        database.close()


def test_a_row_that_suprsync_gave_up_is_copied_again_at_most_once_an_hour(site: Site) -> None:
    path = site.register("a", b"content", failed_copy_attempts=6, remote_md5sum="other")
    before = site.row()

    assert site.caretaker.run_pass() == 1
    assert site.row() == {**before, "failed_copy_attempts": 0}
    assert site.stats.data(site_counts())["database"]["corrected"] == 1
    assert [line for line in site.said if "event=corrected" in line and f"path={path}" in line]
    for attempts in (0, 2, 4, 5, 6):
        execute(site.db_path, "UPDATE supersync_v0 SET failed_copy_attempts = ?", attempts)
        site.clock.advance(60)
        assert site.caretaker.run_pass() == 0
    site.clock.advance(RETRY_S - 5 * 60)
    assert site.caretaker.run_pass() == 1


def site_counts() -> dict[str, int]:
    states = ("received", "settled", "settling", "pending", "waiting", "dead", "discarded")
    return dict.fromkeys(states, 0)


@pytest.mark.parametrize("state", [{"failed_copy_attempts": 1}, {"removed": 9.0, "remote_md5sum": "other"}])
def test_a_row_whose_file_has_other_content_takes_it(site: Site, state: dict[str, Any]) -> None:
    path = site.register("a", b"content", copied=7.0, **state)
    before = site.row()
    content = write_file(Path(path), b"overwritten")

    assert site.caretaker.run_pass() == 1
    assert site.row() == {
        **before, "local_md5sum": content, "remote_md5sum": None, "removed": None, "failed_copy_attempts": 0
    }  # fmt: skip


def test_a_removed_row_whose_file_is_there_is_copied(site: Site) -> None:
    site.register("a", b"content", removed=9.0, failed_copy_attempts=2, remote_md5sum="other")

    assert site.caretaker.run_pass() == 1
    assert (site.row()["removed"], site.row()["failed_copy_attempts"]) == (None, 0)


@pytest.mark.parametrize(
    "state",
    [
        {"failed_copy_attempts": 0},
        {"failed_copy_attempts": 4},
        {"failed_copy_attempts": 6, "ignore": 1},
        {"failed_copy_attempts": 6, "removed": 9.0, "remote_md5sum": md5(b"content")},
    ],
    ids=["new", "SupRsync still tries it", "ignored by a person", "verified"],
)
def test_other_rows_are_left_alone(site: Site, state: dict[str, Any]) -> None:
    site.register("a", b"content", **state)
    before = site.row()

    assert site.caretaker.run_pass() == 0
    assert site.row() == before


def test_a_file_that_does_not_change_is_hashed_once_an_hour_while_suprsync_tries_to_copy_it(site: Site) -> None:
    site.register("a", b"content", failed_copy_attempts=1)
    for _ in range(4):
        assert site.caretaker.run_pass() == 0
        site.clock.advance(60)

    assert site.hashed == ["a"]


def test_rows_of_files_that_are_gone_are_reported_and_left_as_they_are(site: Site) -> None:
    for name in "abc":
        os.unlink(site.register(name, b"content", failed_copy_attempts=6))
    before = rows(site.db_path)
    for _ in range(3):
        assert site.caretaker.run_pass() == 0

    assert rows(site.db_path) == before
    assert site.stats.data(site_counts())["database"]["file_missing"] == 3
    (line,) = (line for line in site.said if "event=file_missing" in line)
    assert line.startswith("3 rows wait for a copy of a file that is gone, among them ")


def test_a_file_that_is_back_is_copied(site: Site) -> None:
    path = Path(site.register("a", b"content", failed_copy_attempts=6))
    path.unlink()
    site.caretaker.run_pass()
    write_file(path, b"content")

    assert site.caretaker.run_pass() == 1
    assert site.row()["failed_copy_attempts"] == 0
    assert site.stats.data(site_counts())["database"]["file_missing"] == 0


def test_a_file_that_cannot_be_read_is_left_for_later(site: Site) -> None:
    path = site.register("a", b"content", failed_copy_attempts=6)
    os.rename(path, path + ".aside")
    os.symlink(path, path)  # ELOOP
    assert site.caretaker.run_pass() == 0
    assert site.stats.writes.file_missing == 0
    os.rename(path + ".aside", path)

    assert site.caretaker.run_pass() == 1


def test_nothing_but_regular_files_below_the_data_roots_is_opened(site: Site, tmp_path: Path) -> None:
    site.register("a", b"content", failed_copy_attempts=6)
    Path(site.register("b", b"content", failed_copy_attempts=6)).unlink()
    os.mkfifo(tmp_path / "files" / "b")
    site.begin(hash_file(Policy(data_roots=("/nowhere",))))
    assert site.caretaker.run_pass() == 0
    site.begin()

    assert site.caretaker.run_pass() == 1
    assert site.row("b")["failed_copy_attempts"] == 6


def test_every_stuck_row_is_looked_at_however_many_there_are(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caretaker_module, "_BATCH", 10)
    for number in range(35):
        site.register(f"{number:02}", b"content", failed_copy_attempts=6)

    assert site.caretaker.run_pass() == 35
    assert site.hashed == [f"{number:02}" for number in range(35)]
    lines = [line for line in site.said if "event=corrected" in line]
    assert len(lines) == 21
    assert "count=35" in lines[-1]


def test_a_row_that_suprsync_writes_meanwhile_is_left_to_the_next_pass(site: Site) -> None:
    site.register("a", b"content", failed_copy_attempts=6)
    hash_it = hash_file(Policy())

    def meanwhile(path: str, stopped: Callable[[], bool]) -> str | NoSum:
        execute(site.db_path, "UPDATE supersync_v0 SET remote_md5sum = local_md5sum")
        return hash_it(path, stopped)

    site.begin(meanwhile)
    before = site.row()
    assert site.caretaker.run_pass() == 0
    assert site.row() == {**before, "remote_md5sum": before["local_md5sum"]}


def test_a_row_whose_place_another_path_holds_is_hashed_once_an_hour(site: Site) -> None:
    site.register("a", b"content", failed_copy_attempts=6)
    site.register("b", b"other", copied=None)
    execute(site.db_path, "UPDATE supersync_v0 SET remote_path = 'same'")
    for _ in range(3):
        assert site.caretaker.run_pass() == 0

    assert site.hashed == ["a"]


def test_a_locked_database_ends_the_pass(site: Site) -> None:
    site.register("a", b"content", failed_copy_attempts=6)
    with write_lock(site.db_path), pytest.raises(DatabaseUnavailableError, match="locked"):
        site.caretaker.run_pass()

    assert site.caretaker.run_pass() == 1


def test_the_thread_looks_again_and_again_whatever_happens(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caretaker_module, "FIRST_S", 0.01)
    monkeypatch.setattr(caretaker_module, "INTERVAL_S", 0.01)
    hash_it = hash_file(Policy())
    faults = iter([DatabaseUnavailableError("no"), ZeroDivisionError("nobody thought of it")])

    def faulty(path: str, stopped: Callable[[], bool]) -> str | NoSum:
        for fault in faults:
            raise fault
        return hash_it(path, stopped)

    site.register("a", b"content", failed_copy_attempts=6)
    site.begin(faulty)
    site.caretaker.start()
    wait_until(lambda: site.row()["failed_copy_attempts"] == 0, 10, "it is corrected")
    site.caretaker.stop()

    assert not site.caretaker._thread.is_alive()
    assert [line for line in site.said if "nobody thought of it" in line and "event=unforeseen" in line]


def test_a_stop_ends_it_within_a_second_also_while_it_hashes(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caretaker_module, "FIRST_S", 0.0)
    path = site.register("a", b"content", failed_copy_attempts=6)
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    site.begin()
    site.caretaker.start()
    wait_until(lambda: site.hashed, 10, "it hashes")
    begin = time.monotonic()
    site.caretaker.stop()

    assert time.monotonic() - begin < 1
    assert not site.caretaker._thread.is_alive()


def test_a_disk_that_hangs_does_not_hold_up_a_stop(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caretaker_module, "FIRST_S", 0.0)
    site.register("a", b"content", failed_copy_attempts=6)
    release = threading.Event()

    def hanging(path: str, stopped: Callable[[], bool]) -> str | NoSum:
        release.wait(30)
        if stopped():
            raise StoppedError(path)
        return NoSum.GONE

    site.begin(hanging)
    site.caretaker.start()
    wait_until(lambda: site.hashed, 10, "it hashes")
    begin = time.monotonic()
    site.caretaker.stop()
    assert time.monotonic() - begin < 1.5
    release.set()
    site.caretaker._thread.join(10)
    assert not site.caretaker._thread.is_alive()
