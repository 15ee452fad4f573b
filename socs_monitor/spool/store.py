"""The spool: stores every accepted registration until its row is safe. Only this module changes a registration's state.

`file` has the layout, `states` the transitions. Guarantees:

* When `Spool.accept` returns, the kernel has the batch: a killed process loses nothing after that.
* `Spool.sync`, called every second by the intake, writes it to the disk: a power cut loses at most that second. The
  fsyncs use a connection of their own, so that `accept` is not delayed.
* `Spool.apply` changes registrations and counts in one transaction. It compares and sets: an outcome that arrives after
  its registration has left the state that the transition starts from is dropped.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from socs_monitor.spool import file
from socs_monitor.spool.file import SpoolError
from socs_monitor.spool.records import Incoming, Record, Transition
from socs_monitor.spool.states import STORED, TRANSITIONS, Event, State
from socs_monitor.suprsync.archive import collapse

# The key in `Spool.counts` of all registrations that were in the spool at the start or accepted since.
RECEIVED = "received"

_CROWDED_OUT = "crowded out"

# Dead letters kept: nobody reads more, and a hostile sender can produce any number.
MAX_DEAD = 10_000

# Default size limit (bytes): about a million registrations.
MAX_BYTES = 1 << 30

# Message size (bytes) at which a claim ends: messages are parsed into objects many times as large.
CLAIM_BYTES = 1 << 20

# Rows per INSERT. Each statement releases the interpreter lock, which a busy thread returns only milliseconds later:
# 500 rows take 0.7 ms, and 36 ms with one row per statement. The sizes are few, so few statements are compiled.
_ROWS = (50, 15, 1)

# Scheduled registrations are claimed before the backlog, so that re-checks are on time. One in `_BACKLOG_PART` places
# of each claim is left to the backlog: anybody can announce missing files, and their retries must not block it.
_BACKLOG_PART = 4

_COLUMNS = "id, state, attempts, rounds, received, sender"
_BY_IDS = "id IN (SELECT value FROM json_each(:ids))"
_SELECT_DUE = [
    f"SELECT {_COLUMNS}, NULL, 0, iif(state = '{State.REGISTERED}', NULL, message) FROM registrations"
    f" WHERE due {condition} AND due <= ? ORDER BY due, id LIMIT ?"
    for condition in ("> 0", "= 0")
]
_CLAIM = (
    f"UPDATE registrations SET due = NULL, state = iif(state = '{State.WAITING}', '{State.PENDING}', state)"
    f" WHERE {_BY_IDS}"
)
_NEXT_DUE = "SELECT min(due) FROM registrations WHERE due IS NOT NULL"
_DEAD_IDS = "SELECT id FROM registrations WHERE state = 'dead' AND refused >= ? ORDER BY refused DESC, id LIMIT ?"

# From the first registered one on: id, whether it is registered, and the path if the message has one.
_PATHS = """
SELECT id, state = 'registered', iif(json_valid(message), json_extract(message, '$.payload.path'), NULL)
FROM registrations
WHERE id >= (SELECT min(id) FROM registrations WHERE state = 'registered') ORDER BY id
"""

# The columns that an event changes, where it is not only `due`. Counters stay below SQLite's largest integer.
_CHANGES: Mapping[Event, str] = {
    Event.COMMITTED: "due = :due, rounds = max(rounds, 1)",
    Event.CHANGED: "due = :due, rounds = min(rounds, 1000000) + 1",
    Event.FAILED: "due = :due, attempts = min(attempts, 1000000) + 1, reason = :reason",
    Event.GIVEN_UP: "due = NULL, attempts = min(attempts, 1000000) + 1, reason = :reason",
    Event.REFUSED: "due = NULL, refused = 1, reason = :reason",
    Event.RETRIED: "due = :due, attempts = 0, refused = 0",
}


def _transition_statement(origin: State, event: Event, target: State) -> str:
    where = f"WHERE state = '{origin}' AND {_BY_IDS}"
    if target not in STORED:
        return f"DELETE FROM registrations {where}"
    return f"UPDATE registrations SET state = '{target}', {_CHANGES.get(event, 'due = :due')} {where}"


_STATEMENTS = {pair: _transition_statement(*pair, target) for pair, target in TRANSITIONS.items()}


@functools.cache
def _insert_statement(rows: int, due: str) -> str:
    values = ", ".join([f"(?, ?, ?, {due})"] * rows)
    return f"INSERT INTO registrations (received, sender, message, due) VALUES {values}"


class SpoolFullError(SpoolError):
    """The spool is full; it accepts nothing until something leaves it."""


class Spool:
    """The spool file, opened for this process alone. Thread-safe.

    Args:
        path: The file. Its folder is created if necessary.
        report: Called with a log line if the file had to be replaced, or has no reserve.
        max_bytes: Size up to which registrations are accepted.
        reserve: Bytes of the file to keep free for a full disk; see `file.reserve`.
        max_dead: Number of dead letters to keep.
        claim_bytes: Message size (bytes) at which a claim of `apply` ends.
        busy_timeout: Seconds to wait for another program's lock.

    Attributes:
        next_due (float): No registration is due before this time, seconds of CLOCK_MONOTONIC.
        crowded_out (int): Number of dead letters discarded since the start for lack of room.

    Raises:
        SpoolBusyError: If another process has the spool open.
        SpoolError: If the file cannot be created or opened.
    """

    def __init__(
        self,
        path: str,
        report: Callable[[str], None],
        max_bytes: int = MAX_BYTES,
        *,
        reserve: int = file.RESERVE,
        max_dead: int = MAX_DEAD,
        claim_bytes: int = CLAIM_BYTES,
        busy_timeout: float = file.BUSY_TIMEOUT_S,
    ) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self._max_dead = max_dead
        self._claim_bytes = claim_bytes
        self.next_due = -math.inf
        self.crowded_out = 0
        self._lock = threading.Lock()
        self._lock_file = file.take_lock(path)
        try:
            self._db = file.open_or_replace(path, report, busy_timeout)
            self._sync_db = file.connect(path, busy_timeout)
            self._journal_keeper = file.keep_journal(path)
            stored = dict(self._db.execute("SELECT state, count(*) FROM registrations GROUP BY state"))
        except (sqlite3.Error, OSError) as error:
            self._lock_file.close()
            raise file.open_error(path, error) from error
        self._counts = {state.value: stored.get(state, 0) for state in State} | {RECEIVED: sum(stored.values())}
        if reserve:
            try:
                file.reserve(self._db, path, reserve)
            except (sqlite3.Error, OSError) as error:
                report(
                    f"The disk has no room for the reserve of the spool {path} ({error}). If it stays full,"
                    " registrations in memory are lost when the agent stops. Make room on it and restart the agent"
                )

    def close(self) -> None:
        """Close the file and release its lock."""
        with self._lock:
            self._sync_db.close()
            file.empty_journal(self._db, self.path)
            self._db.close()
            self._journal_keeper.close()  # last
            self._lock_file.close()

    @property
    def counts(self) -> Mapping[str, int]:
        """Number of registrations per state, consistent at any moment.

        `RECEIVED` is the sum of all states. `State.SETTLED` and `State.DISCARDED` are counted since the start.
        """
        return self._counts  # replaced, never changed, so reading it needs no lock

    @property
    def bytes(self) -> int:
        """Size of the content."""
        with self._reading() as db:
            return file.used_bytes(db)

    def accept(self, batch: Sequence[Incoming], *, held: bool = False) -> list[int]:
        """Store registrations, all or none, and return their ids in order.

        Args:
            batch: The registrations.
            held: Whether the caller processes them; otherwise they are due at once.

        Raises:
            SpoolFullError: If the spool is full.
            SpoolError: If they could not be written.
        """
        with self._writing() as db:
            # a file that is small enough needs no second statement on this hot path
            if file.file_bytes(db) > self.max_bytes and file.used_bytes(db) > self.max_bytes:
                self._crowd_out(db, _dead_ids(db, refused=1))  # anybody can send those
                if file.used_bytes(db) > self.max_bytes:
                    raise SpoolFullError(f"the spool {self.path} is full ({self.max_bytes} bytes, --spool-size)")
            last = done = 0
            for rows in _ROWS:
                while len(batch) - done >= rows:
                    values = tuple(itertools.chain.from_iterable(batch[done : done + rows]))
                    last = db.execute(_insert_statement(rows, "NULL" if held else "0"), values).lastrowid or 0
                    done += rows
            self._changes.update({State.PENDING: done, RECEIVED: done})
            if not held:
                self.next_due = -math.inf
        return list(range(last - done + 1, last + 1))

    def apply(self, transitions: Iterable[Transition], now: float = -math.inf, limit: int = 0) -> list[Record]:
        """Apply transitions, then claim registrations that are due, in one transaction.

        Args:
            transitions: Transitions. Those of their registrations that are not in the origin are skipped.
            now: Registrations that are due at this time are claimed, seconds of CLOCK_MONOTONIC.
            limit: Number to claim at most.

        Returns:
            The claimed registrations with their former state, the longest due first. The caller processes them.

        Raises:
            KeyError: If a transition is not in `states.TRANSITIONS`; nothing took effect.
            SpoolError: If the spool cannot be written now; nothing took effect.
        """
        transitions = [transition for transition in transitions if transition.ids]
        if not transitions and not (limit and self.next_due <= now):
            return []
        with self._writing() as db:
            for transition in transitions:
                self._apply_one(db, transition)
            if (excess := self._counts[State.DEAD] + self._changes[State.DEAD] - self._max_dead) > 0:
                self._crowd_out(db, _dead_ids(db, limit=excess))
            return self._claim(db, now, limit) if limit and self.next_due <= now else []

    def requeue_all(self, retry_at: Callable[[int], float]) -> None:
        """Schedule everything again at a start, when nobody holds any of it.

        Registered files become pending, because their fingerprints were in memory only. One stays registered if its
        path was announced again later, even by what is a dead letter now: the new content is not of the former key.

        Args:
            retry_at: Maps a number of failed attempts to the time of the next one (seconds of CLOCK_MONOTONIC).
        """
        with self._writing() as db:
            latest: dict[str | int, int] = {}  # by path, of registered ones
            for id_, is_registered, path in db.execute(_PATHS):
                key = id_ if path is None else collapse(str(path)).removesuffix(".npy")  # senders often omit the suffix
                latest.pop(key, None)
                if is_registered:
                    latest[key] = id_
            self._apply_one(db, Transition(State.REGISTERED, Event.RESTARTED, list(latest.values()), due=0.0))
            db.execute("UPDATE registrations SET due = 0 WHERE state IN ('pending', 'registered') AND due IS NOT 0")
            db.create_function("retry_at", 1, retry_at)
            db.execute("UPDATE registrations SET due = retry_at(attempts) WHERE state = 'waiting'")
            self.next_due = -math.inf

    def load(self, ids: Sequence[int]) -> list[Record]:
        """Return registrations by id, in order of arrival."""
        return self._select(_BY_IDS, json.dumps(ids), -1)

    def dead(self, limit: int = MAX_DEAD) -> list[Record]:
        """Return the dead letters, oldest first."""
        return self._select("state = 'dead'", None, limit)

    def retry(self, ids: Iterable[int] | None = None) -> int:
        """Make dead letters (those in `ids`, or all) pending and due; return how many."""
        return self._apply_to_dead(Event.RETRIED, ids)

    def discard(self, ids: Iterable[int] | None = None) -> int:
        """Delete dead letters (those in `ids`, or all); return how many."""
        return self._apply_to_dead(Event.DISCARDED, ids)

    def oldest_pending(self) -> tuple[int, float] | None:
        """Return id and reception (unix time) of the oldest pending registration, or None."""
        with self._reading() as db:
            oldest: tuple[int, float] | None = db.execute(file.OLDEST_PENDING).fetchone()
        return oldest

    def sync(self) -> None:
        """Write everything since the last call to the disk.

        Raises:
            SpoolError: If the disk reported an error.
        """
        try:
            self._sync_db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        except sqlite3.Error as error:
            raise SpoolError(f"cannot sync the spool {self.path}: {error}") from error

    def _select(self, where: str, ids: str | None, limit: int) -> list[Record]:
        select = f"SELECT {_COLUMNS}, reason, refused, message FROM registrations"
        with self._reading() as db:
            rows = db.execute(f"{select} WHERE {where} ORDER BY id LIMIT :limit", {"ids": ids, "limit": limit})
            return [Record._make(row) for row in rows]

    def _apply_one(self, db: sqlite3.Connection, transition: Transition) -> int:
        origin, event, ids, due, reason = transition
        values = {"ids": json.dumps(ids), "due": due, "reason": reason}
        changed = db.execute(_STATEMENTS[origin, event], values).rowcount
        self._count_move(origin, event, changed)
        if due is not None and due < self.next_due:
            self.next_due = due
        return changed

    def _apply_to_dead(self, event: Event, ids: Iterable[int] | None) -> int:
        with self._writing() as db:
            chosen = _dead_ids(db) if ids is None else list(ids)
            return self._apply_one(db, Transition(State.DEAD, event, chosen, due=0.0))

    def _crowd_out(self, db: sqlite3.Connection, ids: Sequence[int]) -> None:
        self._changes[_CROWDED_OUT] += self._apply_one(db, Transition(State.DEAD, Event.DISCARDED, ids))

    def _claim(self, db: sqlite3.Connection, now: float, limit: int) -> list[Record]:
        claimed: list[Record] = []
        size = 0
        for statement, most in zip(_SELECT_DUE, (limit - limit // _BACKLOG_PART, limit), strict=True):
            for row in db.execute(statement, (now, most - len(claimed))):
                claimed.append(Record._make(row))
                size += len(row[-1] or "")
                if size >= self._claim_bytes:
                    break
        if claimed:
            db.execute(_CLAIM, {"ids": json.dumps([record.id for record in claimed])})
            waited = sum(record.state == State.WAITING for record in claimed)
            self._count_move(State.WAITING, Event.DUE, waited)
        (next_due,) = db.execute(_NEXT_DUE).fetchone()
        self.next_due = math.inf if next_due is None else next_due
        return claimed

    def _count_move(self, origin: State, event: Event, number: int) -> None:
        self._changes[origin] -= number
        self._changes[TRANSITIONS[origin, event]] += number

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction. `_changes` and `next_due` take effect with it."""
        with self._reading() as db:
            self._changes: Counter[str] = Counter()
            next_due = self.next_due
            try:
                db.execute("BEGIN IMMEDIATE")
                yield db
                db.execute("COMMIT")
            except BaseException:
                self.next_due = next_due
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            self._counts = {state: number + self._changes[state] for state, number in self._counts.items()}
            self.crowded_out += self._changes[_CROWDED_OUT]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._db
            except sqlite3.Error as error:
                raise SpoolError(f"cannot use the spool {self.path}: {error}") from error


def _dead_ids(db: sqlite3.Connection, refused: int = 0, limit: int = -1) -> list[int]:
    """Return the ids of dead letters (with `refused`, only of refused ones), those to be discarded first in front."""
    return [id_ for (id_,) in db.execute(_DEAD_IDS, (refused, limit))]
