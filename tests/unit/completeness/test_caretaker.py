"""Rows that SupRsync cannot finish are given the present content of their files."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from socs_monitor.completeness import caretaker as caretaker_module
from socs_monitor.completeness.caretaker import RETRY_S, Caretaker, HashFile
from socs_monitor.registration import checksum
from socs_monitor.registration.checksum import Access
from socs_monitor.registration.lookup import Policy
from socs_monitor.registration.retry import StoppedError
from socs_monitor.registration.work import FailedLarge, HashedLarge
from socs_monitor.suprsync.archive import Entry
from socs_monitor.suprsync.database import Database, DatabaseUnavailableError
from socs_monitor.suprsync.upsert import HashedFile
from tests.chain import Chain, Clock, execute, md5, write_file, write_lock
from tests.testbed.processes import rows, wait_until


class Site:
    """A database, its files, the workers that hash them, and the caretaker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = Clock()
        self.hashed: list[str] = []
        self._opened: list[Database] = []
        self._chains: list[Chain] = []
        self.begin()

    def begin(self, data_roots: tuple[str, ...] = (), hash_it: HashFile | None = None) -> None:
        """Begin as a start of the process does; `hash_it` stands in for hashing a file."""
        self.end()
        policy = Policy(data_roots=data_roots)
        chain = Chain(self.folder, self.clock, self.clock.monotonic, policy, threads=True, reserve=0)
        self._chains.append(chain)
        chain.registrar.begin()
        self.db_path = chain.db_path
        self.database = chain.database
        self.health = chain.health
        self.hash_file = chain.registrar.hash_file

        def noting(path: str, stopped: Callable[[], bool]) -> HashedLarge | FailedLarge | None:
            self.hashed.append(os.path.basename(path))
            return (hash_it or self.hash_file)(path, stopped)

        database = Database(str(self.db_path), create_table=False, echo=False, report=print, clock=self.clock)
        self._opened.append(database)
        self.caretaker = Caretaker(database, noting, self.health, self.clock.monotonic)

    def end(self) -> None:
        while self._chains:
            chain = self._chains.pop()
            chain.registrar.workers.close()
            chain.crash()
        while self._opened:
            self._opened.pop().close()

    @property
    def said(self) -> list[str]:
        """Lines of the log since `begin`."""
        return [text for _, text in self._chains[-1].said]

    def figures(self) -> dict[str, Any]:
        """What the session data tells of the database."""
        figures: dict[str, Any] = self.health.data(self._chains[-1].spool.counts)["database"]
        return figures

    def register(self, name: str, content: bytes, **state: Any) -> str:
        """Write a file, register it and set columns of its row; return its path."""
        path = self.folder / "files" / name
        entry = Entry("smurf", str(path), f"17000/slot2/a/outputs/{name}", deletable=True)
        self.database.register([HashedFile(entry, write_file(path, content))])
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
    site.end()


def test_a_row_that_suprsync_gave_up_is_copied_again_at_most_once_an_hour(site: Site) -> None:
    path = site.register("a", b"content", failed_copy_attempts=6, remote_md5sum="other")
    before = site.row()

    assert site.caretaker.run_pass() == 1
    assert site.row() == {**before, "failed_copy_attempts": 0}
    assert site.figures()["corrected"] == 1
    assert [line for line in site.said if "event=corrected" in line and f"path={path}" in line]
    for attempts in (0, 2, 4, 5, 6):
        execute(site.db_path, "UPDATE supersync_v0 SET failed_copy_attempts = ?", attempts)
        site.clock.advance(60)
        assert site.caretaker.run_pass() == 0
    site.clock.advance(RETRY_S - 5 * 60)
    assert site.caretaker.run_pass() == 1


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
    assert site.figures()["row_without_file"] == 3
    (line,) = (line for line in site.said if "event=row_without_file" in line)
    assert line.startswith("3 rows wait for the copy of a file that is gone, for example ")


def test_a_file_that_is_back_is_copied(site: Site) -> None:
    path = Path(site.register("a", b"content", failed_copy_attempts=6))
    path.unlink()
    site.caretaker.run_pass()
    write_file(path, b"content")

    assert site.caretaker.run_pass() == 1
    assert site.row()["failed_copy_attempts"] == 0
    assert site.figures()["row_without_file"] == 0


def test_a_file_that_cannot_be_read_is_left_for_later(site: Site) -> None:
    path = site.register("a", b"content", failed_copy_attempts=6)
    os.rename(path, path + ".aside")
    os.symlink(path, path)  # ELOOP
    assert site.caretaker.run_pass() == 0
    assert site.health.counters.writes.row_without_file == 0
    os.rename(path + ".aside", path)

    assert site.caretaker.run_pass() == 1


def test_nothing_but_regular_files_below_the_data_roots_is_opened(site: Site, tmp_path: Path) -> None:
    site.register("a", b"content", failed_copy_attempts=6)
    Path(site.register("b", b"content", failed_copy_attempts=6)).unlink()
    os.mkfifo(tmp_path / "files" / "b")
    site.begin(data_roots=("/nowhere",))
    assert site.caretaker.run_pass() == 0
    assert site.figures()["row_without_file"] == 0
    site.begin(data_roots=(str(tmp_path),))

    assert site.caretaker.run_pass() == 1
    assert site.row("b")["failed_copy_attempts"] == 6


def test_every_stuck_row_is_checked_however_many_there_are(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caretaker_module, "_BATCH", 10)
    for number in range(35):
        site.register(f"{number:02}", b"content", failed_copy_attempts=6)

    assert site.caretaker.run_pass() == 35
    assert site.hashed == [f"{number:02}" for number in range(35)]
    lines = [line for line in site.said if "event=corrected" in line]
    assert len(lines) == 21
    assert "count=35" in lines[-1]


def test_a_row_that_suprsync_writes_meanwhile_is_left_for_the_next_pass(site: Site) -> None:
    site.register("a", b"content", failed_copy_attempts=6)

    def meanwhile(path: str, stopped: Callable[[], bool]) -> HashedLarge | FailedLarge | None:
        execute(site.db_path, "UPDATE supersync_v0 SET remote_md5sum = local_md5sum")
        return site.hash_file(path, stopped)

    site.begin(hash_it=meanwhile)
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
    assert not [line for line in site.said if "event=corrected" in line]


def test_a_locked_database_ends_the_pass(site: Site) -> None:
    site.register("a", b"content", failed_copy_attempts=6)
    with write_lock(site.db_path), pytest.raises(DatabaseUnavailableError, match="locked"):
        site.caretaker.run_pass()

    assert site.caretaker.run_pass() == 1


def test_the_thread_survives_every_error(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caretaker_module, "FIRST_S", 0.01)
    monkeypatch.setattr(caretaker_module, "INTERVAL_S", 0.01)
    faults = iter([DatabaseUnavailableError("no"), ZeroDivisionError("nobody thought of it")])

    def faulty(path: str, stopped: Callable[[], bool]) -> HashedLarge | FailedLarge | None:
        for fault in faults:
            raise fault
        return site.hash_file(path, stopped)

    site.register("a", b"content", failed_copy_attempts=6)
    site.begin(hash_it=faulty)
    site.caretaker.start()
    wait_until(lambda: site.row()["failed_copy_attempts"] == 0, 10, "it is corrected")
    site.caretaker.stop()

    assert not site.caretaker._thread.is_alive()
    assert [line for line in site.said if "nobody thought of it" in line and "event=internal_error" in line]


def test_it_stops_within_a_second_even_while_hashing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caretaker_module, "FIRST_S", 0.0)
    path = site.register("a", b"content", failed_copy_attempts=6)
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    site.caretaker.start()
    wait_until(lambda: site.hashed, 10, "it hashes")
    begin = time.monotonic()
    site.caretaker.stop()

    assert time.monotonic() - begin < 1
    assert not site.caretaker._thread.is_alive()


def test_a_disk_that_hangs_does_not_hold_up_a_stop(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caretaker_module, "FIRST_S", 0.0)
    site.register("a", b"content", failed_copy_attempts=6)
    hanging, release = threading.Event(), threading.Event()
    find = checksum._find

    def hanging_find(path: str, access: Access) -> tuple[int, os.stat_result]:
        hanging.set()
        release.wait(60)
        return find(path, access)

    monkeypatch.setattr(checksum, "_find", hanging_find)
    site.caretaker.start()
    assert hanging.wait(10)
    begin = time.monotonic()
    site.caretaker.stop()
    taken = time.monotonic() - begin
    release.set()

    assert taken < 1
    assert not site.caretaker._thread.is_alive()
    assert site.row()["failed_copy_attempts"] == 6


def test_a_pass_ends_if_the_workers_have_ended(site: Site) -> None:
    site.register("a", b"content", failed_copy_attempts=6)
    site.begin(hash_it=lambda path, stopped: None)
    with pytest.raises(StoppedError):
        site.caretaker.run_pass()

    assert site.row()["failed_copy_attempts"] == 6
