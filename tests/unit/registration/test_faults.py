"""The registrar when the database or the spool fails, or an error is unexpected."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from socs_monitor.registration.retry import StoppedError
from socs_monitor.registration.workers import SMALL
from socs_monitor.suprsync import archive
from socs_monitor.wire.publisher import data_file
from tests.chain import SETTLE_S, Chain, Clock, execute, md5, write_lock


def test_one_bad_row_does_not_hold_up_the_others(chain: Chain, clock: Clock) -> None:
    chain.write("0.dat", b"0")
    chain.accept("0.dat")
    chain.step()
    execute(
        chain.db_path,
        "CREATE TRIGGER bad BEFORE INSERT ON supersync_v0 WHEN NEW.local_path LIKE '%/bad.dat'"
        " BEGIN SELECT RAISE(ABORT, 'it is bad'); END",
    )
    sums = {name: chain.write(name, name.encode()) for name in ("1.dat", "bad.dat", "2.dat")}
    for name in sums:
        chain.accept(name)
    chain.step()

    assert list(chain.sums()) == ["0.dat", "1.dat", "2.dat"]
    ((name, reason, refused),) = chain.dead_letters()
    assert (name, refused) == ("bad.dat", True)
    assert "it is bad" in reason
    assert not bool(chain.health.conditions)

    execute(chain.db_path, "DROP TRIGGER bad")
    chain.registrar.retry()
    chain.step()
    assert chain.sums() == {"0.dat": md5(b"0"), **sums}


def test_a_locked_database_is_waited_out_while_intake_goes_on(chain: Chain, clock: Clock) -> None:
    chain.write("0.dat", b"0")
    chain.accept("0.dat")
    chain.step()
    said = len(chain.said)
    number = itertools.count(1)

    def more() -> None:
        name = f"{next(number)}.dat"
        chain.write(name, name.encode())
        chain.accept(name)
        clock.advance(10)
        reason = chain.health.data(chain.spool.counts)["degraded"]["database"]
        assert "another process holds the write lock" in reason
        assert chain.counts()["pending"] == len(chain.waits) + 1

    chain.write("first.dat", b"first")
    chain.accept("first.dat")
    with chain.lock_for(12, chain.db_path, more):
        chain.step()

    names = {f"{number}.dat" for number in range(1, 13)}
    assert chain.sums() == {
        "0.dat": md5(b"0"),
        "first.dat": md5(b"first"),
        **{name: md5(name.encode()) for name in names},
    }
    assert not bool(chain.health.conditions)
    assert chain.health.counters.writes.errors == 12
    assert [level for level, _ in chain.said[said:]] == ["error", "info", "info"], chain.said[said:]


def test_a_lock_is_retried_with_backoff_up_to_two_seconds(chain: Chain) -> None:
    chain.write("0.dat", b"0")
    chain.accept("0.dat")
    chain.step()
    for path in (chain.db_path, chain.spool_path):
        chain.waits.clear()
        chain.write("a.dat", b"a")
        chain.accept("a.dat")
        with chain.lock_for(20, path):
            chain.step()
        assert chain.waits[0] <= 0.05
        assert all(1.0 <= wait <= 2.0 for wait in chain.waits[6:])


def test_a_stop_while_the_database_is_locked_loses_nothing(chain: Chain) -> None:
    sum_ = chain.write("a.dat", b"a")
    chain.accept("a.dat")
    with write_lock(chain.db_path), pytest.raises(StoppedError):
        chain.step()
    assert chain.counts() == {"received": 1, "pending": 1}
    chain.registrar.begin()
    chain.step()
    assert chain.sums() == {"a.dat": sum_}


def test_nothing_leaves_the_spool_before_its_row_is_on_the_disk(
    chain: Chain, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fdatasync
    held: list[dict[str, int]] = []

    def synced(journal: int) -> None:
        assert os.path.samestat(os.fstat(journal), os.stat(f"{chain.db_path}-wal"))
        held.append(chain.counts())
        if len(held) == 1:
            raise OSError(errno.EIO, "Input/output error")
        sync(journal)

    def reason_is_shown() -> bool:
        reason = chain.health.data(chain.spool.counts)["degraded"]["database"]
        assert "cannot be synced: [Errno 5] Input/output error; the disk fails or is full" in reason
        return True

    monkeypatch.setattr(os, "fdatasync", synced)
    chain.locked = reason_is_shown
    chain.write("a.dat", b"a")
    chain.accept("a.dat")
    chain.step()
    assert not held, "a commit waits for no disk"
    clock.advance(SETTLE_S + 0.5)
    chain.step()

    assert held == [{"received": 1, "registered": 1}] * 2
    assert chain.counts() == {"received": 1, "settled": 1}
    assert not bool(chain.health.conditions)


def test_a_spool_that_is_locked_after_the_commit_is_updated_later(chain: Chain, clock: Clock) -> None:
    def row_is_there() -> None:
        assert chain.sums() == {"a.dat": sum_}
        assert chain.counts() == {"received": 1, "pending": 1}
        chain.accept("b.dat")  # finds the spool locked
        assert set(chain.health.data(chain.spool.counts)["degraded"]) == {"spool", "spool_update"}

    sum_ = chain.write("a.dat", b"a")
    chain.accept("a.dat")
    with chain.lock_for(1, chain.spool_path, row_is_there):
        chain.step()
    chain.intake.flush()
    clock.advance(SETTLE_S)
    chain.step()

    assert not bool(chain.health.conditions)
    assert chain.counts() == {"received": 2, "settled": 1, "waiting": 1}
    assert chain.sums() == {"a.dat": sum_}


@pytest.mark.parametrize("garbage", [b"garbage" * 1000, b"short"])
def test_garbage_in_the_databases_place_is_left_alone(chain: Chain, garbage: bytes) -> None:
    chain.write("0.dat", b"0")
    chain.accept("0.dat")
    chain.step()
    chain.crash()  # a database that is closed has no journal
    saved = chain.db_path.read_bytes()
    chain.db_path.unlink()
    chain.db_path.write_bytes(garbage)
    chain.open()
    chain.registrar.begin()
    sum_ = chain.write("1.dat", b"1")
    chain.accept("1.dat")

    def restore() -> bool:
        assert "not an SQLite database" in chain.health.data(chain.spool.counts)["degraded"]["database"]
        assert chain.db_path.read_bytes() == garbage
        if len(chain.waits) == 3:
            chain.db_path.unlink()
            chain.db_path.write_bytes(saved)
        return True

    chain.locked = restore
    chain.step()
    assert chain.sums() == {"0.dat": md5(b"0"), "1.dat": sum_}
    assert not bool(chain.health.conditions)


def move_database_away(chain: Chain) -> None:
    for path in chain.db_path.parent.glob("suprsync.db*"):
        path.unlink()


def test_settling_files_are_registered_again_after_the_database_was_removed(chain: Chain, clock: Clock) -> None:
    sum_ = chain.write("a.dat", b"a")
    chain.accept("a.dat")
    chain.step()
    move_database_away(chain)
    clock.advance(SETTLE_S)
    chain.step()
    assert chain.sums() == {"a.dat": sum_}
    clock.advance(SETTLE_S)
    chain.step()
    assert chain.counts() == {"received": 1, "settled": 1}


def test_settling_files_are_registered_in_a_database_that_replaced_another(chain: Chain, clock: Clock) -> None:
    for name in ("a.dat", "b.dat"):
        chain.write(name, name.encode())
        chain.accept(name)
        chain.step()
    move_database_away(chain)
    chain.write("c.dat", b"c.dat")
    chain.accept("c.dat")
    chain.step()
    chain.step()

    assert chain.sums() == {name: md5(name.encode()) for name in ("a.dat", "b.dat", "c.dat")}
    clock.advance(SETTLE_S)
    chain.step()
    assert chain.counts() == {"received": 3, "settled": 3}


def test_a_replaced_database_is_noticed_even_after_a_read_reopened_it(chain: Chain, clock: Clock) -> None:
    chain.accept("missing.dat")
    chain.step()
    execute(chain.spool_path, "UPDATE registrations SET attempts = 1000, due = ?", clock.monotonic() + 1)
    sum_ = chain.write("a.dat", b"a")
    chain.accept("a.dat")
    chain.step()
    move_database_away(chain)
    clock.advance(1)
    chain.step()  # the missing file is given up, which reads the rows
    assert chain.counts() == {"received": 2, "registered": 1, "dead": 1}
    clock.advance(SETTLE_S)
    chain.step()
    assert chain.sums() == {"a.dat": sum_}


_COUNT = """
import contextlib, sqlite3, sys
with contextlib.closing(sqlite3.connect(sys.argv[1])) as connection:
    print(*connection.execute("SELECT count(*) FROM supersync_v0").fetchone())
"""


def rows_for_others(chain: Chain) -> int:
    """Number of rows that another program sees. If it thinks that it is the last one, it removes the journal."""
    done = subprocess.run([sys.executable, "-c", _COUNT, chain.db_path], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.parametrize("linked", [False, True])
def test_a_registration_that_names_our_own_databases_does_no_harm(chain: Chain, linked: bool) -> None:
    chain.write("a.dat", b"a")
    chain.accept("a.dat")
    chain.step()
    named = [Path(f"{path}{suffix}") for path in (chain.db_path, chain.spool_path) for suffix in ("", "-wal", "-shm")]
    for path in named:
        if linked:
            os.link(path, chain.path(path.name))
        payload = data_file(str(chain.path(path.name) if linked else path), timestamp=1, action="x", action_ts="1")
        chain.accept_datagram({"id": "x", "type": "data_file", "payload": payload})
    chain.step()
    assert [(name, refused) for name, _, refused in chain.dead_letters()] == [(path.name, True) for path in named]

    assert rows_for_others(chain) == 1
    chain.write("b.dat", b"b")
    chain.accept("b.dat")
    chain.step()
    assert rows_for_others(chain) == 2


class Broken:
    """Stands in for the database's method `name`: it fails unexpectedly for files named ``bad.dat``.

    Args:
        chain: The chain.
        name: The method, which takes files, entries or paths.
    """

    def __init__(self, chain: Chain, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self._patch = monkeypatch
        method = getattr(chain.database, name)

        def broken(things: Iterable[object]) -> object:
            things = list(things)
            if "/bad.dat" in str(things):
                raise ValueError("odd")
            return method(things)

        monkeypatch.setattr(chain.database, name, broken)

    def repair(self) -> None:
        self._patch.undo()


def check_culprit(chain: Chain, broken: Broken, count: int = 1) -> None:
    """The culprits alone are dead letters that can be retried."""
    assert chain.dead_letters() == [("bad.dat", "Unexpected error ValueError('odd'). Please report it", False)] * count
    broken.repair()
    assert chain.registrar.retry() == count
    sum_ = chain.write("bad.dat", b"repaired")
    chain.step()
    assert chain.sums()["bad.dat"] == sum_
    assert chain.spool.counts["dead"] == 0


@pytest.mark.parametrize("waiting", [False, True])
def test_a_pending_registration_that_fails_unexpectedly_twice_is_a_dead_letter(
    chain: Chain, clock: Clock, monkeypatch: pytest.MonkeyPatch, waiting: bool
) -> None:
    broken = Broken(chain, monkeypatch, "register")
    sum_ = chain.write("a.dat", b"a")
    for name in ("a.dat", "bad.dat"):
        if not waiting:
            chain.write(name, b"a")
        chain.accept(name)
    if waiting:
        chain.step()
        assert chain.spool.counts["waiting"] == 1
        chain.write("bad.dat", b"bad")
        clock.advance(1)
    chain.step()
    assert chain.sums() == {"a.dat": sum_}
    check_culprit(chain, broken)


def test_a_registered_file_that_fails_unexpectedly_twice_is_a_dead_letter(
    chain: Chain, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.dat", "bad.dat"):
        chain.write(name, b"x")
        chain.accept(name)
    chain.step()
    for name in ("a.dat", "bad.dat"):  # what is refused now is withdrawn
        chain.path(name).unlink()
        chain.path(name).mkdir()
    broken = Broken(chain, monkeypatch, "withdraw")
    clock.advance(SETTLE_S)
    chain.step()
    assert chain.counts() == {"received": 2, "dead": 2}
    assert [refused for _, _, refused in chain.dead_letters()] == [True, False]
    chain.path("bad.dat").rmdir()
    chain.spool.discard([chain.spool.dead()[0].id])
    check_culprit(chain, broken)


def test_a_large_file_that_fails_for_one_registration_is_registered_for_the_others(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    sum_ = chain.write("large.dat", bytes(SMALL + 1))
    for action in ("one", "bad", "two"):
        chain.accept("large.dat", action=action)
    chain.step()
    candidates = archive.candidates

    def broken(meta: dict[str, object]) -> object:
        if meta["action"] == "bad":
            raise ValueError("odd")
        return candidates(meta)

    monkeypatch.setattr(archive, "candidates", broken)
    chain.hash_large()
    chain.step()
    assert [row["local_md5sum"] for row in chain.rows()] == [sum_, sum_]
    assert chain.counts() == {"received": 3, "registered": 2, "dead": 1}
