"""SQL on the table `SupRsyncFile`: finding rows, and writing what `upsert` plans, in the caller's transaction.

It runs on sqlite3 itself, because SQLAlchemy's work on each statement and row would be a third of what a batch costs.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from socs_monitor.suprsync import tables
from socs_monitor.suprsync.archive import Entry, collapse
from socs_monitor.suprsync.upsert import INSERT, Action, Correction, HashedFile, Plan, Row, plan_upsert

# Values in one look-up. Each statement lets other threads take the interpreter, so a batch needs few of them.
GROUP = 50

_SELECT = f"SELECT {', '.join(Row._fields)} FROM supersync_v0 WHERE"  # noqa: S608 (column names only)
_GROUP = ", ".join("?" * GROUP)
BY_ID = f"{_SELECT} id IN ({_GROUP})"
BY_LOCAL_PATH = f"{_SELECT} local_path IN ({_GROUP})"
BY_REMOTE_PATH = f"{_SELECT} remote_path IN ({_GROUP})"
# The unary plus keeps SQLite from walking the whole table by id.
STUCK = f"{_SELECT} {tables.STUCK} AND +id > ? ORDER BY id LIMIT ?"

_INSERT = """
INSERT INTO supersync_v0 (local_path, local_md5sum, archive_name, remote_path, timestamp, deletable,
    failed_copy_attempts, "ignore")
VALUES (?, ?, ?, ?, ?, ?, 0, 0)
"""
_UPDATE = "UPDATE supersync_v0 SET"
_CONFIRM = f"""{_UPDATE} timestamp = CASE WHEN removed IS NULL THEN timestamp ELSE ? END, removed = NULL, deletable = ?
WHERE id = ?"""
_RETRY = f"{_UPDATE} removed = NULL, failed_copy_attempts = 0, deletable = ? WHERE id = ?"
_RESET = f"""{_UPDATE} local_md5sum = ?, timestamp = ?, deletable = ?, "ignore" = ?,
    remote_md5sum = NULL, copied = NULL, removed = NULL, failed_copy_attempts = 0
WHERE id = ?"""
_MAKE_UNDELETABLE = f"{_UPDATE} deletable = 0 WHERE id = ?"
# SupRsync writes 0 for a file that is gone; a time would mean that it removed the file then.
_RETIRE = f'{_UPDATE} deletable = 0, "ignore" = 1, removed = 0.0 WHERE id = ?'
_CORRECT = f"{_UPDATE} local_md5sum = ?, remote_md5sum = ?, removed = NULL, failed_copy_attempts = 0 WHERE id = ?"
_IGNORE = f'{_UPDATE} deletable = 0, "ignore" = 1 WHERE id = ?'
_MARK_UNCOPIED = f"""{_UPDATE} local_path = 'withdrawn:' || local_path, remote_path = 'withdrawn/' || remote_path
WHERE id = ? AND copied IS NULL AND remote_md5sum IS NULL"""

# Result codes that concern the values of one row; all others concern the database.
_ROW_CODES = (sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_RANGE)

_HELD = "{} holds its place in the archive: {} of {}. Announce it under another action, or rename the file"


class Outcome(NamedTuple):
    """The result of registering one file.

    Attributes:
        changed: Whether its row was inserted, or reset to other content.
        refusal: Why it can have no row; None if it has one.
    """

    changed: bool
    refusal: str | None = None


_CHANGED, _KEPT = Outcome(True), Outcome(False)


def code(error: BaseException) -> int:
    """Return SQLite's primary result code."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def read(db: sqlite3.Connection, statement: str, parameters: Sequence[object]) -> list[Row]:
    """Read rows. Their local paths are collapsed, because the published agent stores them as they were announced."""
    return [Row(id_, collapse(local_path), *others) for id_, local_path, *others in db.execute(statement, parameters)]


def find(db: sqlite3.Connection, statement: str, values: Iterable[object]) -> list[Row]:
    """Return the rows that have one of the values, in the order they were added."""
    found: list[Row] = []
    distinct = list(dict.fromkeys(values))
    for start in range(0, len(distinct), GROUP):
        group = distinct[start : start + GROUP]
        found += read(db, statement, (*group, *(None,) * (GROUP - len(group))))
    found.sort()
    return found


def by_path(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Group rows by local path; their order stays."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row.local_path, []).append(row)
    return grouped


def _by_place(rows: Iterable[Row]) -> dict[tuple[str, str], set[str]]:
    """Return the local paths that have rows for each archive and remote path."""
    places: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        places.setdefault((row.archive_name, row.remote_path), set()).add(row.local_path)
    return places


def independent(files: Sequence[HashedFile], start: int) -> Sequence[HashedFile]:
    """Return the files from `start` on, of at most `GROUP` paths, up to one that depends on an earlier one's row.

    A file that equals the latest one of its path is registered with that one.
    """
    latest: dict[str, HashedFile] = {}
    places: dict[str, str] = {}
    for end in range(start, len(files)):
        file = files[end]
        path = file.entry.local_path
        if latest.setdefault(path, file) != file or places.setdefault(file.entry.remote_path, path) != path:
            return files[start:end]
        if len(latest) > GROUP:
            return files[start:end]
    return files[start:]


def write(db: sqlite3.Connection, files: Sequence[HashedFile], now: float) -> tuple[list[Outcome], int]:
    """Register files that are independent of each other; return their outcomes, and the number of rows they had.

    A file whose values SQLite rejects is refused, and does not hold up the others.
    """
    db.execute("SAVEPOINT files")
    try:
        written, known = _write(db, files, now)
    except (sqlite3.Error, UnicodeError) as error:
        if isinstance(error, sqlite3.Error) and code(error) not in _ROW_CODES:
            raise
        db.execute("ROLLBACK TO files")
        written, known = [Outcome(False, f"the database refused it: {error}")], 0
        if len(files) > 1:
            written = [write(db, [file], now)[0][0] for file in files]
    db.execute("RELEASE files")
    return written, known


def _write(db: sqlite3.Connection, files: Sequence[HashedFile], now: float) -> tuple[list[Outcome], int]:
    files_by_path = {file.entry.local_path: file for file in files}
    holding = find(db, BY_REMOTE_PATH, [file.entry.remote_path for file in files])
    rows = {row.id: row for row in holding + find(db, BY_LOCAL_PATH, files_by_path)}
    known, places = by_path(rows[id_] for id_ in sorted(rows)), _by_place(holding)
    outcomes = dict.fromkeys(files_by_path, _CHANGED)
    new: list[tuple[object, ...]] = []
    for path, file in files_by_path.items():
        (archive_name, _, remote_path, deletable), md5 = file
        plan = plan_upsert(known.get(path, ()), file, places.get((archive_name, remote_path), ())) if rows else INSERT
        if plan.action is Action.INSERT:
            new.append((path, md5, archive_name, remote_path, now, deletable))
        if plan is not INSERT:
            outcomes[path] = _update(db, plan, file, now)
    db.executemany(_INSERT, new)
    written = []
    for file in files:
        path = file.entry.local_path
        written.append(outcomes[path])
        if outcomes[path].changed:
            outcomes[path] = _KEPT  # for files equal to this one
    return written, len(rows)


def _update(db: sqlite3.Connection, plan: Plan, file: HashedFile, now: float) -> Outcome:
    """Write what is planned for the rows that a path has."""
    if plan.undeletable:
        db.executemany(_MAKE_UNDELETABLE, [(id_,) for id_ in plan.undeletable])
    if plan.retired:
        db.executemany(_RETIRE, [(id_,) for id_ in plan.retired])
    entry, row = file.entry, plan.row
    if plan.action is Action.REFUSE:
        return Outcome(False, _HELD.format(plan.holder, entry.remote_path, entry.archive_name))
    if row is None:
        return _CHANGED
    if plan.action is Action.RESET:
        ignore = bool(row.ignore) and row.local_md5sum == file.md5
        db.execute(_RESET, (file.md5, now, entry.deletable, ignore, row.id))
        return _CHANGED
    if plan.action is Action.CONFIRM:
        db.execute(_CONFIRM, (now, entry.deletable, row.id))
    elif plan.action is Action.RETRY:
        db.execute(_RETRY, (entry.deletable, row.id))
    return _KEPT


def find_keys(db: sqlite3.Connection, entries: Iterable[Entry]) -> list[int]:
    """Return the ids of the rows that have the key of an entry."""
    places = {entry[:3]: entry.remote_path for entry in entries}
    found = find(db, BY_REMOTE_PATH, places.values())
    return [row.id for row in found if (row.archive_name, row.local_path, row.remote_path) in places]


def withdraw(db: sqlite3.Connection, ids: Iterable[int]) -> None:
    """Keep SupRsync from copying or deleting the files of rows; see `Database.withdraw`."""
    for id_ in ids:
        db.execute(_IGNORE, (id_,))
        db.execute(_MARK_UNCOPIED, (id_,))


def correct(db: sqlite3.Connection, corrections: Sequence[Correction]) -> list[Correction]:
    """Correct rows that are as they were selected, and whose places no other path holds; return those corrections."""
    rows = [correction.row for correction in corrections]
    present = set(find(db, BY_ID, [row.id for row in rows]))
    places = _by_place(find(db, BY_REMOTE_PATH, [row.remote_path for row in rows]))
    valid = [
        correction
        for correction, row in zip(corrections, rows, strict=True)
        if row in present and places[row.archive_name, row.remote_path] == {row.local_path}
    ]
    db.executemany(_CORRECT, [(each.local_md5sum, each.remote_md5sum, each.row.id) for each in valid])
    return valid
