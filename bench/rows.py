"""Measure what rows cost with `python -m bench.rows`: making the indexes, registering, and a pass of the caretaker.

Registering among a million rows is compared with registering in an empty database, batch by batch in turn, so that a
busy machine affects both. Needs 600 MB of disk space.
"""

from __future__ import annotations

import argparse
import contextlib
import queue
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from socs_monitor.completeness.caretaker import Caretaker
from socs_monitor.health.health import Health
from socs_monitor.registration.lookup import Policy
from socs_monitor.registration.parking import Parking
from socs_monitor.registration.workers import FailedLarge, Hash, HashedLarge, Workers, start_thread
from socs_monitor.suprsync.archive import Entry
from socs_monitor.suprsync.database import Database
from socs_monitor.suprsync.tables import INDEXES
from socs_monitor.suprsync.upsert import HashedFile

ROWS = 1_000_000
BATCH = 500  # files, as many as the agent registers at a time under load
BATCHES = 100
STUCK = 1000
STUCK_BYTES = 4096

_COLUMNS = (
    "local_path, local_md5sum, archive_name, remote_path, timestamp, remote_md5sum, failed_copy_attempts, deletable,"
    ' "ignore"'
)


def _file(folder: Path, number: int) -> HashedFile:
    name = f"{number:010}.npy"
    path = str(folder / "smurf_data/20240105/crate1slot2/1704450000/outputs" / name)
    entry = Entry("smurf", path, f"17044/crate1slot2/1704450000_take_iv/outputs/{name}", deletable=True)
    return HashedFile(entry, "1" * 32)


def _open(path: Path) -> Database:
    return Database(str(path), create_table=True, echo=False, report=lambda _: None)


@contextlib.contextmanager
def _database(folder: Path, rows: int) -> Iterator[Database]:
    """Make a database with a number of archived rows, as the published agent leaves it, and open it."""
    folder.mkdir()
    path = folder / "suprsync.db"
    with contextlib.closing(_open(path)) as database:
        database.register([])
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        for index in INDEXES:
            db.execute(f"DROP INDEX {index}")
        entries = (_file(folder, number).entry for number in range(rows))
        db.executemany(
            f"INSERT INTO supersync_v0 ({_COLUMNS}) VALUES (?, ?, ?, ?, 1.0, ?, 0, 1, 0)",
            ((entry.local_path, "0" * 32, entry.archive_name, entry.remote_path, "0" * 32) for entry in entries),
        )
    with contextlib.closing(_open(path)) as database:
        begin = time.perf_counter()
        database.register([])
        if rows:
            print(f"making {len(INDEXES)} indexes of {rows:,} rows: {time.perf_counter() - begin:.1f} s")
        yield database


def _register(empty: Database, full: Database, folder: Path) -> None:
    costs: dict[Database, list[float]] = {empty: [], full: []}
    for batch in range(BATCHES):
        numbers = range(ROWS + batch * BATCH, ROWS + (batch + 1) * BATCH)
        files = [_file(folder, number) for number in numbers]
        for database, cost in costs.items():
            begin = time.perf_counter()
            outcomes = database.register(files)
            cost.append((time.perf_counter() - begin) / BATCH * 1e6)
            assert len(outcomes) == BATCH
    among_none, among_many = (statistics.median(cost) for cost in costs.values())
    print(
        f"registering a file in a batch of {BATCH}: {among_none:.1f} us in an empty database, {among_many:.1f} us among"
        f" {ROWS:,} rows, {among_many / among_none:.2f} times as much"
    )


def _correct(database: Database, folder: Path) -> None:
    files = [_file(folder, number) for number in range(10 * ROWS, 10 * ROWS + STUCK)]
    Path(files[0].entry.local_path).parent.mkdir(parents=True)
    for file in files:
        Path(file.entry.local_path).write_bytes(bytes(STUCK_BYTES))
    while files:
        del files[: len(database.register(files))]
    with contextlib.closing(sqlite3.connect(database.path)) as db, db:
        place = f"{folder}/smurf_data/20240105/crate1slot2/1704450000/outputs/{10 * ROWS:010}.npy"
        db.execute("UPDATE supersync_v0 SET failed_copy_attempts = 6 WHERE local_path >= ?", (place,))
    policy = Policy()
    workers = Workers(policy, Parking(policy.data_roots, start_thread), lambda: None)

    def hash_file(path: str, stopped: Callable[[], bool]) -> HashedLarge | FailedLarge:
        answer: queue.SimpleQueue[HashedLarge | FailedLarge] = queue.SimpleQueue()
        workers.submit([Hash(path, answer.put)])
        return answer.get()

    caretaker = Caretaker(database, hash_file, Health(lambda *_: None))
    for what in (f"that corrects {STUCK:,} rows with files of {STUCK_BYTES} bytes", "that finds nothing new"):
        begin = time.perf_counter()
        corrected = caretaker.run_pass()
        milliseconds = (time.perf_counter() - begin) * 1e3
        print(f"a pass of the caretaker {what}: {milliseconds:.1f} ms, {corrected:,} rows corrected")
    workers.close()


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.rows", description="Measure what rows cost.")
    parser.add_argument("--folder", type=Path, help="where the databases are made; default is a temporary folder")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as name:
        folder = Path(name)
        with _database(folder / "empty", 0) as empty, _database(folder / "full", ROWS) as full:
            _register(empty, full, folder)
            _correct(full, folder)


if __name__ == "__main__":
    main()
