"""The durable intake: every accepted registration, until its row is committed and settled.

What the file looks like, and what becomes of one that cannot be read, is in `spoolfile`. What is promised:

* `Spool.accept` has handed its batch to the kernel when it returns: from then on a killed process loses none.
* `Spool.sync`, called every second by the intake, has it on the disk: a power cut loses at most that second.
* The fsyncs of a checkpoint happen in `sync`, on a connection of its own: accepting goes on meanwhile.

Accepting costs the thread that does it some 3 us a registration in a large batch and 100 us for one alone; the
reactor has `Intake.put` to do, which is below 2 us.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from socs_monitor import crashpoint, messages, spoolfile
from socs_monitor.archive import Entry
from socs_monitor.messages import MessageError
from socs_monitor.spoolfile import DEAD, PENDING, SpoolError

WAITING = "waiting"
SETTLING = "settling"
STATES = (PENDING, WAITING, SETTLING, DEAD)

# Beside the states, counted since the start: what left the spool, and all that ever was in it.
SETTLED = "settled"
DISCARDED = "discarded"
RECEIVED = "received"
_COUNTED = (*STATES, SETTLED, DISCARDED, RECEIVED)

# A dead letter is for a person to read; more than these nobody reads, and a hostile sender can make any number.
MAX_DEAD = 10_000

# Bytes that registrations may take: about a million of them.
MAX_BYTES = 1 << 30

# Several rows a statement, since each statement lets other threads have the interpreter, and while the reactor is
# busy it is milliseconds until it is given back; of few sizes, so that few statements are compiled.
_ACCEPT = {
    rows: "INSERT INTO registrations (received, sender, message) VALUES " + ", ".join(["(?, ?, ?)"] * rows)
    for rows in (50, 15, 1)
}

_BY_STATE = "SELECT state, count(*) FROM registrations GROUP BY 1"

_IDS = "id IN (SELECT value FROM json_each(?))"


class SpoolFullError(SpoolError):
    """The spool has its size; nothing more is accepted until something leaves it."""


class Incoming(NamedTuple):
    """A registration on its way into the spool; `received` is unix time, `sender` ``host:port``."""

    received: float
    sender: str
    message: str


class Registration(dict[str, Any]):
    """The metadata of one registered file (payload plus ``pub_id``), and its place in the spool.

    Attributes:
        id (int): Its key in the spool.
        received (float): Unix time of acceptance.
        attempts (int): How often its file was looked for in vain.
        state (str): One of `STATES`.
    """

    __slots__ = ("attempts", "id", "received", "state")

    def __init__(self, meta: dict[str, Any], id: int, received: float, attempts: int, state: str) -> None:  # noqa: A002
        self.update(meta)
        self.id = id
        self.received = received
        self.attempts = attempts
        self.state = state


class Failure(NamedTuple):
    """Why a registration is not a row: `due` (unix time) is when it is tried again, None for a dead letter.

    `entry` is the file that was refused, if the registration names an existing one.
    """

    registration: Registration
    reason: str
    due: float | None = None
    refused: bool = False
    entry: Entry | None = None


class DeadLetter(NamedTuple):
    """A registration that was given up or, with `refused`, can never become a row."""

    id: int
    received: float
    sender: str
    message: str
    attempts: int
    reason: str
    refused: bool

    def summary(self) -> dict[str, Any]:
        """What a person wants to know of it."""
        return {
            "id": self.id,
            "received": self.received,
            "sender": self.sender,
            "path": messages.brief(_meta(self.message)["path"]),
            "reason": self.reason,
            "refused": self.refused,
            "attempts": self.attempts,
        }


class Spool:
    """The spool file, opened for this process alone. Safe to use from several threads.

    Args:
        path: The file; its folder is made where it is missing.
        report: Called with a line for a person where the file had to be set aside.
        max_bytes: Size up to which registrations are accepted.

    Raises:
        SpoolBusyError: If another process holds the spool.
        SpoolError: If the file cannot be made or opened.
    """

    def __init__(self, path: str, report: Callable[[str], None], max_bytes: int = MAX_BYTES) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._unsynced = False
        self._lock_file = spoolfile.take_lock(path)
        try:
            self._db = spoolfile.open_or_begin(path, report)
            self._syncer = spoolfile.connect(path)
            states = dict(self._db.execute(_BY_STATE))
            self._counts = dict.fromkeys(_COUNTED, 0) | states | {RECEIVED: sum(states.values())}
        except (sqlite3.Error, OSError) as error:
            self._lock_file.close()
            raise SpoolError(f"cannot open the spool {path}: {error}") from error

    def close(self) -> None:
        """Close the file and let go of it."""
        with self._lock:
            self._syncer.close()
            self._db.close()
            self._lock_file.close()

    @property
    def counts(self) -> Mapping[str, int]:
        """How many registrations are where, consistent at any moment.

        `RECEIVED` counts all since the start, those then found in the spool included; it equals the sum of the
        `STATES`, of `SETTLED` (their row is committed and the file was looked at again) and of `DISCARDED`.
        """
        return self._counts  # never changed in place, so no lock is waited for

    def accept(self, batch: Sequence[Incoming]) -> list[int]:
        """Put registrations into the spool, all or none, and return their ids, in order.

        Raises:
            SpoolFullError: If the spool has its size.
            SpoolError: If they could not be written.
        """
        with self._writing() as db:
            if spoolfile.file_bytes(db) > self.max_bytes and not self._has_room(db):
                raise SpoolFullError(f"the spool {self.path} is full ({self.max_bytes} bytes, --spool-size)")
            last = done = 0
            for rows, statement in _ACCEPT.items():
                while len(batch) - done >= rows:
                    values = tuple(itertools.chain.from_iterable(batch[done : done + rows]))
                    last = db.execute(statement, values).lastrowid or 0
                    done += rows
            self._changes.update({PENDING: len(batch), RECEIVED: len(batch)})
        return list(range(last - len(batch) + 1, last + 1))

    def pending(self, after: int, limit: int) -> list[Registration]:
        """Return the first `limit` pending registrations with an id above `after`, in order."""
        return self._select("state = 'pending' AND id > ? ORDER BY id LIMIT ?", (after, limit))

    def waiting(self, ids: Iterable[int]) -> list[Registration]:
        """Return those of the registrations `ids` that are waiting, in order."""
        return self._select(f"state = 'waiting' AND {_IDS} ORDER BY id", (json.dumps(list(ids)),))

    def waiting_times(self) -> list[tuple[float, int]]:
        """Return when (unix time) each waiting registration is due, with its id."""
        with self._reading() as db:
            return db.execute("SELECT due, id FROM registrations WHERE state = 'waiting'").fetchall()

    def registered(self, registrations: Sequence[Registration]) -> None:
        """Count registrations as settling: their rows are committed.

        On the disk they stay as they are, since what was settling is taken up anew after a restart anyway, which
        changes nothing.
        """
        with self._lock:
            self._count(_moved(registrations, SETTLING))
        for registration in registrations:
            registration.state = SETTLING
        crashpoint.reach("settling")

    def settling(self, ids: Iterable[int]) -> list[Registration]:
        """Return registrations that are settling, in order."""
        registrations = self._select(f"{_IDS} ORDER BY id", (json.dumps(list(ids)),))
        for registration in registrations:
            registration.state = SETTLING
        return registrations

    def settle(self, ids: Sequence[int]) -> None:
        """Forget registrations that were settling: their rows are committed, their files looked at again."""
        with self._writing() as db:
            db.execute(f"DELETE FROM registrations WHERE {_IDS}", (json.dumps(ids),))
            self._changes.update({SETTLING: -len(ids), SETTLED: len(ids)})
        crashpoint.reach("settled")

    def remove(self, registrations: Sequence[Registration]) -> None:
        """Forget registrations that are done otherwise: their files were archived, and removed by SupRsync."""
        with self._moving(registrations, SETTLED) as db:
            db.execute(f"DELETE FROM registrations WHERE {_IDS}", (_ids(registrations),))

    def wait(self, failures: Sequence[Failure]) -> None:
        """Note when registrations are to be tried again, and why they failed so far."""
        with self._moving([failure.registration for failure in failures], WAITING) as db:
            db.executemany(
                "UPDATE registrations SET state = 'waiting', attempts = ?, due = ?, reason = ? WHERE id = ?",
                [(f.registration.attempts, f.due, f.reason, f.registration.id) for f in failures],
            )

    def bury(self, failures: Sequence[Failure]) -> int:
        """Make registrations dead letters; of more than `MAX_DEAD` drop the oldest, refusals first.

        Returns:
            How many were dropped.
        """
        with self._moving([failure.registration for failure in failures], DEAD) as db:
            db.executemany(
                "UPDATE registrations SET state = 'dead', attempts = ?, reason = ?, refused = ? WHERE id = ?",
                [(f.registration.attempts, f.reason, f.refused, f.registration.id) for f in failures],
            )
        if (excess := self._counts[DEAD] - MAX_DEAD) <= 0:
            return 0
        return self._drop(
            "DELETE FROM registrations WHERE id IN"
            " (SELECT id FROM registrations WHERE state = 'dead' ORDER BY refused DESC, id LIMIT ?)",
            excess,
        )

    def unsettle(self) -> None:
        """Count every settling registration as what the disk has, since what was known of its file is gone."""
        with self._writing() as db:
            db.execute("UPDATE registrations SET state = 'pending' WHERE state = 'settling'")  # of an earlier version
            states = dict(db.execute(_BY_STATE))
            self._changes.update({state: states.get(state, 0) - self._counts[state] for state in STATES})

    def dead(self, ids: Iterable[int] | None = None, limit: int = MAX_DEAD) -> list[DeadLetter]:
        """Return the dead letters (those of `ids`, or all), oldest first."""
        where, chosen = _chosen(ids)
        with self._reading() as db:
            rows = db.execute(
                "SELECT id, received, sender, message, attempts, reason, refused"
                f" FROM registrations WHERE {where} ORDER BY id LIMIT ?",
                (*chosen, limit),
            ).fetchall()
        return [DeadLetter._make((*row[:-1], bool(row[-1]))) for row in rows]

    def retry(self, ids: Iterable[int] | None = None) -> list[int]:
        """Let dead letters (those of `ids`, or all) wait anew, due at once; return their ids."""
        where, chosen = _chosen(ids)
        with self._writing() as db:
            revived = db.execute(
                "UPDATE registrations SET state = 'waiting', due = 0, attempts = 0, refused = 0"
                f" WHERE {where} RETURNING id",
                chosen,
            ).fetchall()
            self._changes.update({DEAD: -len(revived), WAITING: len(revived)})
        return [id_ for (id_,) in revived]

    def discard(self, ids: Iterable[int] | None = None) -> int:
        """Forget dead letters (those of `ids`, or all) for good; return how many."""
        where, chosen = _chosen(ids)
        return self._drop(f"DELETE FROM registrations WHERE {where}", *chosen)

    def sync(self) -> None:
        """Bring what was written since the last call to the disk.

        Raises:
            SpoolError: If the disk refused.
        """
        if self._unsynced:
            self._unsynced = False
            try:
                self._syncer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            except sqlite3.Error as error:
                self._unsynced = True
                raise SpoolError(f"cannot sync the spool {self.path}: {error}") from error

    @property
    def bytes(self) -> int:
        """Size of what is in it."""
        with self._reading() as db:
            return spoolfile.used_bytes(db)

    def _has_room(self, db: sqlite3.Connection) -> bool:
        """Look what is free in a large file; if too little, drop refused registrations: anybody can send those."""
        if spoolfile.used_bytes(db) > self.max_bytes:
            dropped = db.execute("DELETE FROM registrations WHERE state = 'dead' AND refused = 1").rowcount
            self._changes.update({DEAD: -dropped, DISCARDED: dropped})
        return spoolfile.used_bytes(db) <= self.max_bytes

    def _drop(self, statement: str, *parameters: object) -> int:
        with self._writing() as db:
            dropped = db.execute(statement, parameters).rowcount
            self._changes.update({DEAD: -dropped, DISCARDED: dropped})
        return dropped

    def _select(self, where: str, parameters: tuple[object, ...]) -> list[Registration]:
        with self._reading() as db:
            rows = db.execute(
                f"SELECT message, id, received, attempts, state FROM registrations WHERE {where}", parameters
            ).fetchall()
        return [Registration(_meta(row[0]), *row[1:]) for row in rows]

    @contextlib.contextmanager
    def _moving(self, registrations: Sequence[Registration], state: str) -> Iterator[sqlite3.Connection]:
        with self._writing() as db:
            yield db
            self._changes.update(_moved(registrations, state))
        for registration in registrations:
            registration.state = state

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._reading() as db:
            self._changes: dict[str, int] = {}
            try:
                db.execute("BEGIN IMMEDIATE")
                yield db
                db.execute("COMMIT")
            except (sqlite3.Error, SpoolFullError):
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            self._count(self._changes)
            self._unsynced = True

    def _count(self, changes: Mapping[str, int]) -> None:
        self._counts = {state: number + changes.get(state, 0) for state, number in self._counts.items()}

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._db
            except sqlite3.Error as error:
                raise SpoolError(f"cannot use the spool {self.path}: {error}") from error


def _meta(message: str) -> dict[str, Any]:
    """Parse a stored message; one that only another version can read gets a path that is refused, with the reason."""
    try:
        return messages.parse_file(message).meta
    except MessageError as error:
        return {"path": f"(unreadable message: {error})", "pub_id": ""}


def _moved(registrations: Sequence[Registration], state: str) -> dict[str, int]:
    """How the counts change when registrations come into a state."""
    changes = dict.fromkeys(_COUNTED, 0)
    for registration in registrations:
        changes[registration.state] -= 1
    changes[state] += len(registrations)
    return changes


def _ids(registrations: Iterable[Registration]) -> str:
    return json.dumps([registration.id for registration in registrations])


def _chosen(ids: Iterable[int] | None) -> tuple[str, tuple[str, ...]]:
    if ids is None:
        return "state = 'dead'", ()
    return f"state = 'dead' AND {_IDS}", (json.dumps(list(ids)),)
