"""Writing rows is idempotent, takes effect as a whole, and follows the rules of decision record 10."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from socs_monitor.suprsync import database as database_module
from socs_monitor.suprsync import sql
from socs_monitor.suprsync.archive import Entry
from socs_monitor.suprsync.database import Database, DatabaseUnavailableError
from socs_monitor.suprsync.sql import Outcome
from socs_monitor.suprsync.tables import INDEXES
from socs_monitor.suprsync.upsert import Correction, HashedFile, Row
from tests.chain import execute, write_lock
from tests.testbed.processes import rows, wait_until

OLD, NEW = "0" * 32, "1" * 32
NAMES = list(INDEXES)

INSERTED = RESET = Outcome(True)
KEPT = Outcome(False)


def entry(path: str = "/data/x", action: str = "a") -> Entry:
    return Entry("smurf", path, f"17000/slot2/{action}/outputs/{os.path.basename(path)}", deletable=True)


def file(md5: str = NEW, path: str = "/data/x", action: str = "a") -> HashedFile:
    return HashedFile(entry(path, action), md5)


class Ticks:
    """Unix time that is another at every look."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


Open = Callable[..., Database]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def db_path(tmp_path: Path) -> str:
    return str(tmp_path / "suprsync.db")


@pytest.fixture
def open_database(db_path: str, said: list[str]) -> Iterator[Open]:
    opened: list[Database] = []

    def open_it(**changed: Any) -> Database:
        options = {"create_table": True, "echo": False, "report": said.append, "clock": Ticks()}
        opened.append(Database(db_path, **{**options, **changed}))
        return opened[-1]

    yield open_it
    for database in opened:
        database.close()


def register(database: Database, files: list[HashedFile]) -> list[Outcome]:
    """Register all, in as many transactions as it takes."""
    outcomes: list[Outcome] = []
    while len(outcomes) < len(files):
        outcomes += database.register(files[len(outcomes) :])
    return outcomes


def sums(path: str) -> list[tuple[str, str]]:
    return [(row["remote_path"].split("/")[2], row["local_md5sum"]) for row in rows(path)]


def test_a_row_is_new_in_every_column(open_database: Open, db_path: str) -> None:
    open_database().register([file(NEW)])

    assert rows(db_path) == [
        {
            "id": 1, "local_path": "/data/x", "local_md5sum": NEW, "archive_name": "smurf",
            "remote_path": "17000/slot2/a/outputs/x", "timestamp": 1_700_000_001.0, "remote_md5sum": None,
            "copied": None, "removed": None, "failed_copy_attempts": 0, "deletable": 1, "ignore": 0,
        }
    ]  # fmt: skip


def test_a_row_that_is_overwritten_is_reset_in_place(open_database: Open, db_path: str) -> None:
    database = open_database()
    database.register([file(OLD)])
    execute(
        db_path, "UPDATE supersync_v0 SET remote_md5sum = ?, copied = 7, removed = 8, failed_copy_attempts = 3", OLD
    )
    new = rows(db_path)[0]
    database.register([file(NEW)])

    reset = {"remote_md5sum": None, "copied": None, "removed": None, "failed_copy_attempts": 0}
    assert rows(db_path) == [{**new, "local_md5sum": NEW, "timestamp": new["timestamp"] + 1, **reset}]


def test_a_row_of_another_key_keeps_its_content_and_may_no_longer_delete(open_database: Open, db_path: str) -> None:
    database = open_database()
    database.register([file(OLD, action="a")])
    execute(db_path, "UPDATE supersync_v0 SET remote_md5sum = 'of a failed copy', copied = 7, failed_copy_attempts = 3")
    (waiting,) = rows(db_path)
    database.register([file(NEW, action="b")])

    first, second = rows(db_path)
    assert first == {**waiting, "deletable": 0}
    assert (second["local_md5sum"], second["deletable"]) == (NEW, 1)


def test_a_verified_row_of_a_removed_file_that_is_back_is_no_longer_removed(open_database: Open, db_path: str) -> None:
    database = open_database()
    database.register([file(NEW)])
    execute(db_path, "UPDATE supersync_v0 SET remote_md5sum = ?, copied = 7, removed = 8, deletable = 0", NEW)
    (archived,) = rows(db_path)

    assert database.register([file(NEW)]) == [KEPT]
    assert rows(db_path) == [{**archived, "removed": None, "deletable": 1, "timestamp": archived["timestamp"] + 1}]


def test_a_row_that_was_given_up_is_copied_again(open_database: Open, db_path: str) -> None:
    database = open_database()
    database.register([file(NEW)])
    execute(db_path, "UPDATE supersync_v0 SET failed_copy_attempts = 6, removed = 0, ignore = 1")
    (given_up,) = rows(db_path)

    assert database.register([file(NEW)]) == [KEPT]
    assert rows(db_path) == [{**given_up, "removed": None, "failed_copy_attempts": 0}]


@pytest.mark.parametrize(("md5", "ignore"), [(OLD, 0), (NEW, 1)])
def test_a_person_ignores_content_not_a_file(open_database: Open, db_path: str, md5: str, ignore: int) -> None:
    database = open_database()
    database.register([file(NEW)])
    execute(db_path, "UPDATE supersync_v0 SET ignore = 1")
    database.register([file(md5)])

    assert [row["ignore"] for row in rows(db_path)] == [ignore]


def test_several_rows_of_a_key_become_one_that_counts(open_database: Open, db_path: str) -> None:
    database = open_database()
    database.register([file(NEW)])
    execute(db_path, "UPDATE supersync_v0 SET remote_md5sum = ?", NEW)
    columns = "local_path, local_md5sum, archive_name, remote_path, timestamp, failed_copy_attempts, deletable, ignore"
    for _ in range(2):
        execute(db_path, f"INSERT INTO supersync_v0 ({columns}) SELECT {columns} FROM supersync_v0 WHERE id = 1")

    assert database.register([file(NEW)]) == [KEPT]
    states = [(row["removed"], row["deletable"], row["ignore"], row["local_md5sum"]) for row in rows(db_path)]
    assert states == [(0.0, 0, 1, NEW), (0.0, 0, 1, NEW), (None, 1, 0, NEW)]
    assert rows(db_path)[0]["remote_md5sum"] == NEW


def test_a_place_that_another_path_holds_is_refused_with_its_name(open_database: Open, db_path: str) -> None:
    database = open_database()
    database.register([file(OLD, path="/data/1/x"), file(OLD, path="/data/2/x", action="b")])
    taken, free = file(NEW, path="/data/2/x"), file(NEW, path="/data/3/x", action="c")

    refused, inserted = database.register([taken, free])
    assert (refused.changed, inserted) == (False, INSERTED)
    assert refused.refusal is not None
    assert refused.refusal.startswith("/data/1/x holds its place in the archive: 17000/slot2/a/outputs/x of smurf")
    after = [(row["local_path"], row["local_md5sum"], row["deletable"]) for row in rows(db_path)]
    assert after == [("/data/1/x", OLD, 1), ("/data/2/x", OLD, 0), ("/data/3/x", NEW, 1)]


def test_of_two_paths_for_one_place_in_a_batch_the_first_has_it(open_database: Open, db_path: str) -> None:
    outcomes = register(open_database(), [file(NEW, path="/data/1/x"), file(NEW, path="/data/2/x")])

    assert [outcome.refusal is None for outcome in outcomes] == [True, False]
    assert [row["local_path"] for row in rows(db_path)] == ["/data/1/x"]


def test_one_place_in_two_archives_is_two_places(open_database: Open, db_path: str) -> None:
    same = HashedFile(file(path="/data/1/x").entry._replace(archive_name="timestreams"), NEW)

    assert register(open_database(), [file(path="/data/2/x"), same]) == [INSERTED, INSERTED]
    assert len(rows(db_path)) == 2


def test_a_path_as_the_published_agent_spells_it_is_the_same_path(open_database: Open, db_path: str) -> None:
    database = open_database()
    database.register([file(OLD)])
    execute(db_path, "UPDATE supersync_v0 SET local_path = '/data//./x'")

    assert database.register([file(NEW)]) == [RESET]
    assert [(row["local_path"], row["local_md5sum"]) for row in rows(db_path)] == [("/data//./x", NEW)]


def test_paths_that_come_twice_in_a_batch_end_as_the_last_one_says(open_database: Open, db_path: str) -> None:
    other = file(OLD, path="/data/y")
    batch = [file(OLD)] * 2 + [file(OLD, action="b"), other, file(NEW), file(NEW, action="c"), file(NEW), file(NEW)]

    assert register(open_database(), batch) == [INSERTED, KEPT, INSERTED, INSERTED, RESET, INSERTED, KEPT, KEPT]
    last = [
        (row["local_path"], row["remote_path"].split("/")[2], row["local_md5sum"], row["deletable"])
        for row in rows(db_path)
    ]
    assert last == [
        ("/data/x", "a", NEW, 1), ("/data/x", "b", OLD, 0), ("/data/y", "a", OLD, 1), ("/data/x", "c", NEW, 0)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "transactions"),
    [
        ([file(NEW)] * 20_000, 11),
        ([file(md5=str(number), action=str(number)) for number in range(300)], 40),
        ([file(md5=str(number)) for number in range(400)], 12),
    ],
    ids=["equal", "keys", "contents"],
)
def test_a_transaction_does_bounded_work_however_often_a_file_is_named(
    open_database: Open, db_path: str, batch: list[HashedFile], transactions: int
) -> None:
    database = open_database()
    database.register([file(OLD)])
    done = calls = 0
    longest = 0.0
    while done < len(batch):
        begin = time.perf_counter()
        done += len(database.register(batch[done:]))
        longest = max(longest, time.perf_counter() - begin)
        calls += 1

    assert calls <= transactions
    assert longest < 1, "SupRsync waits for the write lock meanwhile"
    assert rows(db_path)[-1]["local_md5sum"] == batch[-1].md5


@pytest.mark.parametrize("known", [[0, 49], [49, 50], [100, 119]])
def test_among_many_paths_each_that_is_known_is_found(open_database: Open, db_path: str, known: list[int]) -> None:
    database = open_database()
    database.register([file(OLD, path=f"/data/{number:03}") for number in known])
    database.register([file(NEW, path=f"/data/{number:03}") for number in range(120)])

    sums = sorted((row["local_path"], row["local_md5sum"]) for row in rows(db_path))
    assert sums == [(f"/data/{number:03}", NEW) for number in range(120)]


def test_a_path_that_is_looked_up_repeatedly_has_its_rows_once(open_database: Open) -> None:
    database = open_database()
    database.register([file()])

    assert [row.local_path for row in database.rows(["/data/x"] * 120)["/data/x"]] == ["/data/x"]


BATCHES = st.lists(
    st.lists(
        st.builds(
            file,
            md5=st.sampled_from([OLD, NEW]),
            path=st.sampled_from(["/data/x", "/data/y"]),
            action=st.sampled_from("ab"),
        ),
        max_size=4,
    ),
    max_size=4,
)


@given(
    batches=BATCHES,
    last=st.lists(st.builds(file, md5=st.sampled_from([OLD, NEW]), action=st.sampled_from("ab")), max_size=1),
)
@settings(max_examples=60, deadline=None)
def test_registering_again_changes_nothing(batches: list[list[HashedFile]], last: list[HashedFile]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "suprsync.db")
        database = Database(path, create_table=True, echo=False, report=print, clock=Ticks())
        for batch in [*batches, last]:
            register(database, batch)
        before = rows(path)
        assert register(database, last) == [KEPT] * len(last)
        database.close()

        assert rows(path) == before
        keys = {wanted.entry[:3] for batch in [*batches, last] for wanted in batch}
        assert len(before) == len(keys), "a key has more than one row"


def test_a_batch_may_be_large(open_database: Open, db_path: str) -> None:
    batch = [file(NEW, path=f"/data/{number}") for number in range(3000)]
    register(open_database(), batch)

    assert [each["local_path"] for each in rows(db_path)] == [wanted.entry.local_path for wanted in batch]


def test_the_time_of_a_row_is_taken_under_the_write_lock(open_database: Open, db_path: str) -> None:
    looks: list[str] = []

    def clock() -> float:
        with pytest.raises(sqlite3.OperationalError, match="locked"), sqlite3.connect(db_path, timeout=0) as other:
            other.execute("BEGIN IMMEDIATE")
        other.close()
        looks.append("locked")
        return 12.5

    open_database(clock=clock).register([file()])

    assert looks
    assert [each["timestamp"] for each in rows(db_path)] == [12.5]


def test_a_row_that_the_database_rejects_does_not_hold_up_the_others(open_database: Open, db_path: str) -> None:
    database = open_database()
    database.register([file()])
    execute(
        db_path,
        "CREATE TRIGGER refuse BEFORE INSERT ON supersync_v0 WHEN NEW.local_path = '/data/bad'"
        " BEGIN SELECT RAISE(ABORT, 'not this one'); END",
    )
    good, bad, other = file(path="/data/1"), file(path="/data/bad"), file(path="/data/2")

    refused = Outcome(False, "the database refused it: not this one")
    assert register(database, [good, bad, other]) == [INSERTED, refused, INSERTED]
    assert [row["local_path"] for row in rows(db_path)] == ["/data/x", "/data/1", "/data/2"]


def test_a_path_that_sqlite_cannot_store_does_not_hold_up_the_others(open_database: Open, db_path: str) -> None:
    first, last = register(open_database(), [file(path="/data/\ud800"), file()])

    assert "surrogates not allowed" in (first.refusal or "")
    assert last == INSERTED
    assert [row["local_path"] for row in rows(db_path)] == ["/data/x"]


# --- the file


def test_a_locked_database_is_unavailable_for_now(open_database: Open, db_path: str) -> None:
    database = open_database()
    database.register([file(OLD)])
    with write_lock(db_path):
        begin = time.monotonic()
        with pytest.raises(DatabaseUnavailableError, match=r"database is locked; another process holds the write lock"):
            database.register([file(NEW)])
        assert time.monotonic() - begin < 2, "a stop would be held up"
        assert [each.local_md5sum for each in database.rows(["/data/x"])["/data/x"]] == [OLD]

    database.register([file(NEW)])
    assert sums(db_path) == [("a", NEW)]


def test_nothing_is_registered_after_waiting_for_a_lock(
    open_database: Open, db_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "_BUSY_TIMEOUT_S", 30.0)
    database = open_database()
    database.register([])
    begun: list[str] = []
    assert database._db is not None
    database._db.set_trace_callback(begun.append)
    with contextlib.ExitStack() as lock, ThreadPoolExecutor(1) as pool:
        lock.enter_context(write_lock(db_path))
        registering = pool.submit(database.register, [file()])
        wait_until(lambda: begun.count("BEGIN IMMEDIATE") == 2, 10, "it waits")
        lock.close()
        assert registering.result(30) == []
    assert rows(db_path) == []

    assert database.register([file()]) == [INSERTED]


def test_a_file_that_is_not_a_database_stays_unchanged(open_database: Open, db_path: str) -> None:
    Path(db_path).write_bytes(b"not a database" * 1000)
    with pytest.raises(DatabaseUnavailableError, match="it is not an SQLite database: move it away"):
        open_database().register([file()])

    assert Path(db_path).read_bytes() == b"not a database" * 1000


def test_a_path_that_cannot_be_a_database_is_unavailable(open_database: Open, db_path: str, tmp_path: Path) -> None:
    Path(db_path).mkdir()
    with pytest.raises(DatabaseUnavailableError, match=db_path):
        open_database().register([file()])
    (tmp_path / "file").touch()
    below = Database(str(tmp_path / "file" / "x.db"), create_table=True, echo=False, report=print)
    with pytest.raises(DatabaseUnavailableError, match="cannot be opened"):
        below.register([file()])


def test_a_database_is_made_with_its_folder_where_it_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "suprsync.db"
    database = Database(str(path), create_table=True, echo=False, report=print)
    database.register([file()])
    database.close()

    assert len(rows(path)) == 1


@pytest.mark.parametrize(("made", "reason"), [(False, "does not exist"), (True, "has no table supersync_v0")])
def test_tables_are_made_only_where_that_is_asked_for(
    open_database: Open, db_path: str, made: bool, reason: str
) -> None:
    if made:
        execute(db_path, "CREATE TABLE of_somebody (x)")
    database = open_database(create_table=False)
    for _ in range(2):
        with pytest.raises(DatabaseUnavailableError, match=f"{reason}: start the agent with --create-table True"):
            database.register([file()])
    assert os.path.exists(db_path) == made

    open_database().register([])
    database.register([file()])
    assert len(rows(db_path)) == 1


def test_the_tables_are_the_published_ones(open_database: Open, db_path: str) -> None:
    open_database().register([])

    def columns(table: str) -> list[str]:
        return [
            f"{name} {kind}{' not null' * notnull}{' key' * key}"
            for _, name, kind, notnull, _, key in execute(db_path, f"PRAGMA table_info({table})")
        ]

    assert columns("supersync_v0") == [
        "id INTEGER not null key", "local_path VARCHAR not null", "local_md5sum VARCHAR not null",
        "archive_name VARCHAR not null", "remote_path VARCHAR not null", "timestamp FLOAT not null",
        "remote_md5sum VARCHAR", "copied FLOAT", "removed FLOAT", "failed_copy_attempts INTEGER",
        "deletable BOOLEAN", "ignore BOOLEAN",
    ]  # fmt: skip
    assert columns("timecode_dirs_v0") == [
        "id INTEGER not null key", "timecode INTEGER not null", "archive_name VARCHAR not null",
        "completed BOOLEAN", "synced BOOLEAN", "finalized BOOLEAN", "finalize_file_id INTEGER",
    ]  # fmt: skip
    assert [key[2:5] for key in execute(db_path, "PRAGMA foreign_key_list(timecode_dirs_v0)")] == [
        ("supersync_v0", "finalize_file_id", "id")
    ]
    assert execute(db_path, "PRAGMA journal_mode") == [("wal",)]


def test_indexes_are_made_once_in_a_database_that_lacks_them(
    open_database: Open, db_path: str, said: list[str]
) -> None:
    first = open_database()
    first.register([file()])
    first.close()
    assert said == []
    for name in NAMES:
        execute(db_path, f"DROP INDEX {name}")

    for _ in range(2):
        database = open_database(create_table=False)
        database.register([file()])
        database.close()
    assert [line.split(" of ")[0] for line in said] == [f"made the index {name}" for name in NAMES]
    made = execute(db_path, "SELECT name, tbl_name FROM sqlite_master WHERE type = 'index'")
    assert made == [(name, "supersync_v0") for name in NAMES]


@pytest.mark.parametrize("analyzed", [False, True])
@pytest.mark.parametrize(
    ("statement", "index"),
    [
        ("BY_LOCAL_PATH", "SEARCH supersync_v0 USING INDEX ix_supersync_v0_local_path (local_path=?)"),
        ("BY_REMOTE_PATH", "SEARCH supersync_v0 USING INDEX ix_supersync_v0_remote_path (remote_path=?)"),
        ("BY_ID", "SEARCH supersync_v0 USING INTEGER PRIMARY KEY (rowid=?)"),
        ("STUCK", "SCAN supersync_v0 USING INDEX ix_supersync_v0_stuck"),
    ],
)
def test_every_look_up_uses_its_index(
    open_database: Open, db_path: str, statement: str, index: str, analyzed: bool
) -> None:
    register(open_database(), [file(path=f"/data/{number}") for number in range(300)])
    execute(db_path, "UPDATE supersync_v0 SET failed_copy_attempts = 1 WHERE id % 100 = 0")
    if analyzed:
        execute(db_path, "ANALYZE")
    text = getattr(sql, statement)

    assert [step[3] for step in execute(db_path, f"EXPLAIN QUERY PLAN {text}", *[1] * text.count("?"))] == [index]


def test_a_database_that_is_replaced_is_noticed(open_database: Open, db_path: str, said: list[str]) -> None:
    database = open_database()
    database.register([file(OLD)])
    before = database.identity
    for suffix in ("", "-wal", "-shm"):
        os.rename(db_path + suffix, db_path + ".old" + suffix)
    database.register([file(NEW)])

    assert sums(db_path) == [("a", NEW)]
    assert sums(db_path + ".old") == [("a", OLD)]
    assert database.identity not in (None, before)
    assert said == [f"the database {db_path} was moved away or replaced: opened the file that is there now"]


def test_a_database_that_is_replaced_while_it_is_written_has_not_taken_the_rows(
    open_database: Open, db_path: str
) -> None:
    def clock() -> float:
        if not os.path.exists(db_path + ".old"):
            os.rename(db_path, db_path + ".old")
        return 1.0

    database = open_database(clock=clock)
    with pytest.raises(DatabaseUnavailableError, match="was replaced while it was written"):
        database.register([file()])
    database.register([file()])

    assert sums(db_path) == [("a", NEW)]


def test_rows_are_found_by_path(open_database: Open) -> None:
    database = open_database()
    database.register([file(path="/data/x"), file(path="/data/y")])
    database.register([file(path="/data/y", action="b")])

    found = database.rows(["/data/y", "/data/%", "/none", "/data/y"])
    assert {path: [each.id for each in known] for path, known in found.items()} == {"/data/y": [2, 3]}
    when = found["/data/y"][1].timestamp
    expected = Row(3, "/data/y", NEW, "smurf", "17000/slot2/b/outputs/y", when, None, None, None, 0, True, False)
    assert found["/data/y"][1] == expected


# --- rows that SupRsync cannot finish


def test_only_rows_that_suprsync_may_never_copy_are_stuck(open_database: Open, db_path: str) -> None:
    database = open_database()
    states = [
        "remote_md5sum = NULL",  # it is yet to be copied
        "failed_copy_attempts = 1",
        "removed = 9",
        "removed = 0, remote_md5sum = 'other'",
        "removed = 9, ignore = 1",
        "removed = 9, failed_copy_attempts = 6, remote_md5sum = local_md5sum",
    ]
    register(database, [file(path=f"/data/{number}") for number in range(len(states))])
    for number, state in enumerate(states, 1):
        execute(db_path, f"UPDATE supersync_v0 SET {state} WHERE id = {number}")

    assert [row.id for row in database.stuck(0, 10)] == [2, 3, 4]
    assert [row.id for row in database.stuck(0, 2)] == [2, 3]
    assert [row.id for row in database.stuck(3, 2)] == [4]


def test_a_row_is_corrected_only_if_it_is_as_it_was_selected(open_database: Open, db_path: str) -> None:
    database = open_database()
    register(database, [file(OLD, path=f"/data/{number}") for number in range(3)])
    execute(db_path, "UPDATE supersync_v0 SET failed_copy_attempts = 6, remote_md5sum = 'x', copied = 7")
    stuck = database.stuck(0, 10)
    execute(db_path, "UPDATE supersync_v0 SET copied = 8 WHERE id = 2")
    before = rows(db_path)

    corrections = [Correction(row, NEW, None) for row in stuck]
    assert database.correct(corrections) == [corrections[0], corrections[2]]
    corrected = {"local_md5sum": NEW, "remote_md5sum": None, "failed_copy_attempts": 0, "removed": None}
    assert rows(db_path) == [{**before[0], **corrected}, before[1], {**before[2], **corrected}]


def test_a_row_whose_place_another_path_holds_is_not_corrected(open_database: Open, db_path: str) -> None:
    database = open_database()
    register(database, [file(OLD, path="/data/1/x"), file(OLD, path="/data/2/x", action="b")])
    execute(db_path, "UPDATE supersync_v0 SET failed_copy_attempts = 6, remote_path = '17000/slot2/a/outputs/x'")
    before = rows(db_path)

    assert database.correct([Correction(row, NEW, None) for row in database.stuck(0, 10)]) == []
    assert rows(db_path) == before


def test_a_withdrawn_file_is_neither_copied_nor_deleted_and_no_other_row_changes(
    open_database: Open, db_path: str
) -> None:
    database = open_database()
    paths = ("/data/new", "/data/copied", "/data/verified", "/data/summed")
    database.register([file(path=path, action=action) for path in paths for action in ("a", "other")])
    mine = "UPDATE supersync_v0 SET copied = ?, remote_md5sum = ? WHERE local_path = ? AND remote_path LIKE '%/a/%'"
    for path, copied, remote in (("copied", 5.0, None), ("verified", 5.0, NEW), ("summed", None, OLD)):
        execute(db_path, mine, copied, remote, f"/data/{path}")
    before = {row["id"]: row for row in rows(db_path)}
    database.withdraw([entry(path) for path in (*paths, "/data/none")])

    changed = {row["id"]: row for row in rows(db_path) if row != before[row["id"]]}
    names = [before[id_]["local_path"] for id_ in changed]
    assert names == list(paths)
    assert [before[id_]["remote_path"].split("/")[2] for id_ in changed] == ["a"] * 4
    for id_, row in changed.items():
        expected = {**before[id_], "ignore": 1, "deletable": 0}
        if before[id_]["local_path"] == "/data/new":
            expected["local_path"] = "withdrawn:/data/new"
            expected["remote_path"] = "withdrawn/17000/slot2/a/outputs/new"
        assert row == expected


def test_a_withdrawn_file_that_is_registered_again_is_copied(open_database: Open, db_path: str) -> None:
    database = open_database()
    database.register([file(OLD, "/data/new"), file(OLD, "/data/copied")])
    execute(db_path, "UPDATE supersync_v0 SET copied = 5 WHERE local_path = '/data/copied'")
    database.withdraw([entry("/data/new"), entry("/data/copied")])
    database.register([file(NEW, "/data/new"), file(NEW, "/data/copied")])

    shown = [(r["local_path"], r["local_md5sum"], r["copied"], r["ignore"], r["deletable"]) for r in rows(db_path)]
    assert shown == [
        ("withdrawn:/data/new", OLD, None, 1, 0),
        ("/data/copied", NEW, None, 0, 1),
        ("/data/new", NEW, None, 0, 1),
    ]


def test_a_withdrawn_file_is_found_however_the_published_agent_spelled_its_path(
    open_database: Open, db_path: str
) -> None:
    database = open_database()
    database.register([file()])
    execute(db_path, "UPDATE supersync_v0 SET local_path = '/data//./x'")
    database.withdraw([entry()])

    (row,) = rows(db_path)
    assert (row["ignore"], row["local_path"]) == (1, "withdrawn:/data//./x")


def test_withdrawing_what_has_no_row_waits_for_no_lock(open_database: Open, db_path: str) -> None:
    database = open_database()
    database.register([file()])
    with write_lock(db_path):
        database.withdraw([entry("/data/none"), entry(action="other")])
        with pytest.raises(DatabaseUnavailableError):
            database.withdraw([entry()])
    database.withdraw([entry()])
    (row,) = rows(db_path)
    assert row["ignore"] == 1
