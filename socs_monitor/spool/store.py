"""The spool: every accepted registration until its row is safe, and the only place that changes a registration's state.

What the file looks like is in `file`, the states and transitions in `states`. What is promised:

* `Spool.accept` has handed its batch to the kernel when it returns: from then on a killed process loses none.
* `Spool.sync`, called every second by the intake, has it on the disk: a power cut loses at most that second.
* The fsyncs of a checkpoint happen in `sync`, on a connection of its own: accepting goes on meanwhile.
* `Spool.apply` moves registrations and their counts in one transaction. It compares and sets: a transition applies only
  to registrations that are still in the state it starts from, so an outcome that comes too late is dropped.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from socs_monitor.spool import file
from socs_monitor.spool.file import SpoolError
from socs_monitor.spool.states import STORED, TRANSITIONS, Event, State
from socs_monitor.suprsync.archive import collapse
from socs_monitor.wire import messages

# Counted beside the states: every registration that ever was in the spool since the start.
RECEIVED = "received"

_CROWDED_OUT = "crowded out"

# Dead letters kept at most: nobody reads more, and a hostile sender can make any number.
MAX_DEAD = 10_000

# Bytes that registrations may take by default: about a million of them.
MAX_BYTES = 1 << 30

# A claim ends when its messages have this size (bytes), since they are parsed into objects many times as large.
CLAIM_BYTES = 1 << 20


def _insert(rows: int, columns: str, values: str) -> str:
    return f"INSERT INTO registrations (received, sender, message{columns}) VALUES " + ", ".join(
        [f"(?, ?, ?{values})"] * rows
    )


# Several rows a statement, since each statement lets other threads have the interpreter, and while the reactor is
# busy it is milliseconds until it is given back; of few sizes, so that few statements are compiled.
_ROWS = (50, 15, 1)
_ACCEPT_HELD = {rows: _insert(rows, "", "") for rows in _ROWS}
_ACCEPT_DUE = {rows: _insert(rows, ", due", ", 0") for rows in _ROWS}

_STATES = tuple(str(state) for state in STORED)
# A state that this version does not have is as good as none.
_KNOWN_STATES = f"UPDATE registrations SET state = '{State.PENDING}' WHERE state NOT IN {_STATES}"

_BY_STATE = f"SELECT iif(state IN {_STATES}, state, '{State.PENDING}'), count(*) FROM registrations GROUP BY 1"

_IDS = "id IN (SELECT value FROM json_each(?))"

_COLUMNS = "id, state, attempts, rounds, received, sender"
# What is scheduled goes before the backlog, so that re-checks keep up with it. This part of each claim is left to the
# backlog: anybody can announce files that do not exist, and each of those is scheduled again and again.
_BACKLOG_PART = 4
_DUE = [
    f"SELECT {_COLUMNS}, iif(state = '{State.REGISTERED}', NULL, message) FROM registrations"
    f" WHERE due {condition} AND due <= ? ORDER BY due, id LIMIT ?"
    for condition in ("> 0", "= 0")
]
_HOLD = (
    f"UPDATE registrations SET due = NULL, state = iif(state = '{State.WAITING}', '{State.PENDING}', state)"
    f" WHERE {_IDS}"
)
_NEXT_DUE = "SELECT min(due) FROM registrations WHERE due IS NOT NULL"


def _one_more(column: str) -> str:
    """Count up, but not beyond what SQLite's integers hold, whatever the file says."""
    return f"min({column}, 1000000) + 1"


# How a transition to each state changes a row: `:due` and `:reason` are the transition's.
_CHANGES: Mapping[State, str] = {
    State.PENDING: "due = :due",
    State.REGISTERED: "due = :due",
    State.WAITING: f"due = :due, attempts = {_one_more('attempts')}, reason = :reason",
    State.DEAD: "due = NULL, reason = :reason",
}
_MORE_CHANGES: Mapping[Event, str] = {
    Event.COMMITTED: ", rounds = max(rounds, 1)",
    Event.CHANGED: f", rounds = {_one_more('rounds')}",
    Event.GIVEN_UP: f", attempts = {_one_more('attempts')}",
    Event.REFUSED: ", refused = 1",
    Event.RETRIED: ", attempts = 0, refused = 0",
}


def _statement(origin: State, event: Event, target: State) -> str:
    where = f"WHERE state = '{origin}' AND {_IDS.replace('?', ':ids')}"
    if target not in STORED:
        return f"DELETE FROM registrations {where}"
    changes = _CHANGES[target] + _MORE_CHANGES.get(event, "")
    return f"UPDATE registrations SET state = '{target}', {changes} {where}"


_STATEMENTS = {(origin, event): _statement(origin, event, target) for (origin, event), target in TRANSITIONS.items()}

# Refused ones first: anybody can send those.
_OLDEST_DEAD = "SELECT id FROM registrations WHERE state = 'dead' ORDER BY refused DESC, id LIMIT ?"
_REFUSED = "SELECT id FROM registrations WHERE state = 'dead' AND refused = 1"


class SpoolFullError(SpoolError):
    """The spool has its size; nothing more is accepted until something leaves it."""


class TransitionError(Exception):
    """There is no such transition in `states.TRANSITIONS`: an error of the program."""


class Incoming(NamedTuple):
    """A registration on its way into the spool; `received` is unix time, `sender` ``host:port``."""

    received: float
    sender: str
    message: str


class Registration(dict[str, Any]):
    """The metadata of one registered file (payload plus ``pub_id``), with its key and counters in the spool.

    Attributes:
        id (int): Its key in the spool.
        received (float): Unix time of acceptance.
        sender (str): ``host:port``.
        attempts (int): Number of failed attempts to read its file, when it was taken from the spool.
        rounds (int): 0 if its row was never committed, else one more than its file changed since, likewise.
    """

    __slots__ = ("attempts", "id", "received", "rounds", "sender")

    def __init__(
        self,
        meta: dict[str, Any],
        id: int,  # noqa: A002
        received: float,
        sender: str,
        attempts: int = 0,
        rounds: int = 0,
    ) -> None:
        self.update(meta)
        self.id = id
        self.received = received
        self.sender = sender
        self.attempts = attempts
        self.rounds = rounds


class Due(NamedTuple):
    """A registration that is taken up again; `message` is None where only its file is to be checked again."""

    id: int
    state: State
    attempts: int
    rounds: int
    received: float
    sender: str
    message: str | None


class Transition(NamedTuple):
    """What happened to registrations.

    Attributes:
        origin: The state that they are in.
        event: What happened.
        ids: Which registrations.
        due: When they are taken up again, seconds of CLOCK_MONOTONIC; None where the caller goes on holding them.
        reason: Why they wait or are dead, for a person.
    """

    origin: State
    event: Event
    ids: Sequence[int]
    due: float | None = None
    reason: str | None = None


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
        """Return what a person wants to know of it."""
        try:
            path = messages.parse_file(self.message).meta["path"]
        except messages.MessageError:
            path = self.message
        return {
            "id": self.id,
            "received": self.received,
            "sender": self.sender,
            "path": messages.brief(path),
            "reason": self.reason,
            "refused": self.refused,
            "attempts": self.attempts,
        }


class Spool:
    """The spool file, opened for this process alone. Safe to use from several threads.

    Args:
        path: The file; its folder is made where it is missing.
        report: Called with a line for a person where something unusual was done to the file.
        max_bytes: Size up to which registrations are accepted.
        reserve: Bytes of the file that are kept free for a full disk; see `file.reserve`.
        max_dead: Number of dead letters that are kept.
        claim_bytes: Size of messages (bytes) at which `apply` takes up no more.
        busy_timeout: Seconds for which a lock of another program is waited for.

    Attributes:
        next_due (float): When the next registration is due, seconds of CLOCK_MONOTONIC; infinite where none is.
        crowded_out (int): Number of dead letters that were discarded since the start for lack of room.

    Raises:
        SpoolBusyError: If another process holds the spool.
        SpoolError: If the file cannot be made or opened.
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
        self._unsynced = False
        self._lock_file = file.take_lock(path)
        try:
            self._db = file.open_or_begin(path, report, busy_timeout)
            self._syncer = file.connect(path, busy_timeout)
            self._journal_keeper = file.keep_journal(path)
            states = dict(self._db.execute(_BY_STATE))
            self._counts = {state.value: states.get(state, 0) for state in State} | {RECEIVED: sum(states.values())}
        except (sqlite3.Error, OSError) as error:
            self._lock_file.close()
            raise SpoolError(f"cannot open the spool {path}: {error}") from error
        if reserve:
            try:
                file.reserve(self._db, path, reserve)
            except (sqlite3.Error, OSError) as error:
                report(
                    f"The spool {path} has no room of its own for a full disk ({error}). If the disk stays full,"
                    " registrations that are in memory are lost at a stop. Make room on that disk"
                )

    def close(self) -> None:
        """Close the file and let go of it."""
        with self._lock:
            self._syncer.close()
            file.empty_journal(self._db, self.path)
            self._db.close()
            self._journal_keeper.close()  # the last one
            self._lock_file.close()

    @property
    def counts(self) -> Mapping[str, int]:
        """How many registrations are where, consistent at any moment.

        `RECEIVED` counts all since the start, those then found in the spool included; it equals the sum of all states,
        of which `State.SETTLED` and `State.DISCARDED` count since the start.
        """
        return self._counts  # never changed in place, so no lock is waited for

    def accept(self, batch: Sequence[Incoming], *, held: bool = False) -> list[int]:
        """Put registrations into the spool, all or none, and return their ids, in order.

        Args:
            batch: The registrations.
            held: Whether the caller hands them on itself; otherwise they are due at once.

        Raises:
            SpoolFullError: If the spool has its size.
            SpoolError: If they could not be written.
        """
        with self._writing() as db:
            if file.file_bytes(db) > self.max_bytes and not self._has_room(db):
                raise SpoolFullError(f"the spool {self.path} is full ({self.max_bytes} bytes, --spool-size)")
            last = done = 0
            for rows, statement in (_ACCEPT_HELD if held else _ACCEPT_DUE).items():
                while len(batch) - done >= rows:
                    values = tuple(itertools.chain.from_iterable(batch[done : done + rows]))
                    last = db.execute(statement, values).lastrowid or 0
                    done += rows
            self._count(State.PENDING, len(batch))
            self._count(RECEIVED, len(batch))
            if not held:
                self.next_due = -math.inf
        return list(range(last - len(batch) + 1, last + 1))

    def begin(self, retry_at: Callable[[int], float]) -> None:
        """Make all that is in the spool due, as at a start: nobody holds any of it.

        A registered file whose path was announced again later stays registered and is due; it may be settled, since
        that announcement takes care of the file. All other registered ones are pending again: what was known of their
        files is gone.

        Args:
            retry_at: Gives, for a number of failed attempts, when to try again (seconds of CLOCK_MONOTONIC).
        """
        with self._writing() as db:
            db.execute(_KNOWN_STATES)
            superseded = self._superseded(db)
            restarted = db.execute(
                "UPDATE registrations SET state = 'pending' WHERE state = 'registered'"
                " AND id NOT IN (SELECT value FROM json_each(?))",
                (json.dumps(superseded),),
            ).rowcount
            self._move(State.REGISTERED, TRANSITIONS[State.REGISTERED, Event.RESTARTED], restarted)
            db.execute("UPDATE registrations SET due = 0 WHERE state IN ('pending', 'registered') AND due IS NOT 0")
            for (attempts,) in db.execute(
                "SELECT DISTINCT attempts FROM registrations WHERE state = 'waiting'"
            ).fetchall():
                db.execute(
                    "UPDATE registrations SET due = ? WHERE state = 'waiting' AND attempts = ?",
                    (retry_at(attempts), attempts),
                )
            self.next_due = -math.inf

    def _superseded(self, db: sqlite3.Connection) -> list[int]:
        """Return the registered ones whose path was announced again by a registration that is in the spool, too."""
        path = "json_extract(message, '$.payload.path')"
        latest: dict[str, int] = {}
        registered: dict[int, str] = {}
        for id_, state, announced in db.execute(
            f"SELECT id, state, {path} FROM registrations WHERE json_valid(message)"
            " AND id >= (SELECT min(id) FROM registrations WHERE state = 'registered') ORDER BY id"
        ):
            name = collapse(str(announced)).removesuffix(".npy")  # senders often leave it out
            if state == State.REGISTERED:
                registered[id_] = name
            if state == State.REGISTERED or name in latest:
                latest[name] = id_
        return [id_ for id_, name in registered.items() if latest[name] != id_]

    def apply(self, transitions: Iterable[Transition], now: float = -math.inf, limit: int = 0) -> list[Due]:
        """Carry out transitions, then take up what is due, in one transaction.

        Args:
            transitions: What happened. Those of their registrations that are no longer in the transition's origin stay
                as they are.
            now: Registrations that are due by then are taken up, seconds of CLOCK_MONOTONIC.
            limit: How many at most.

        Returns:
            What was taken up, in the states from before, the longest due first: the caller holds it from now on.

        Raises:
            TransitionError: If a transition is not in `states.TRANSITIONS`; nothing took effect.
            SpoolError: If the spool cannot be written now; nothing took effect.
        """
        transitions = [transition for transition in transitions if transition.ids]
        if not transitions and not (limit and self.next_due <= now):
            return []
        with self._writing() as db:
            for transition in transitions:
                self._carry_out(db, transition)
            if (excess := self._counts[State.DEAD] + self._changes[State.DEAD] - self._max_dead) > 0:
                self._crowd_out(db, [id_ for (id_,) in db.execute(_OLDEST_DEAD, (excess,))])
            return self._take_up(db, now, limit) if limit and self.next_due <= now else []

    def _carry_out(self, db: sqlite3.Connection, transition: Transition) -> int:
        origin, event, ids, due, reason = transition
        try:
            target, statement = TRANSITIONS[origin, event], _STATEMENTS[origin, event]
        except KeyError:
            raise TransitionError(f"no transition from {origin} by {event!r}") from None
        changed = db.execute(statement, {"ids": json.dumps(ids), "due": due, "reason": reason}).rowcount
        self._move(origin, target, changed)
        if due is not None and due < self.next_due:
            self.next_due = due
        return changed

    def _crowd_out(self, db: sqlite3.Connection, ids: Sequence[int]) -> None:
        self._count(_CROWDED_OUT, self._carry_out(db, Transition(State.DEAD, Event.DISCARDED, ids)))

    def _take_up(self, db: sqlite3.Connection, now: float, limit: int) -> list[Due]:
        taken: list[Due] = []
        size = 0
        for statement, most in zip(_DUE, (limit - limit // _BACKLOG_PART, limit), strict=True):
            for row in db.execute(statement, (now, most - len(taken))):
                taken.append(Due._make(row))
                size += len(row[-1] or "")
                if size >= self._claim_bytes:
                    break
        if taken:
            db.execute(_HOLD, (json.dumps([due.id for due in taken]),))
            waited = sum(due.state == State.WAITING for due in taken)
            self._move(State.WAITING, TRANSITIONS[State.WAITING, Event.DUE], waited)
        (next_due,) = db.execute(_NEXT_DUE).fetchone()
        self.next_due = math.inf if next_due is None else next_due
        return taken

    def load(self, ids: Sequence[int]) -> list[Due]:
        """Return registrations as they are, in order."""
        with self._reading() as db:
            return [
                Due._make(row)
                for row in db.execute(
                    f"SELECT {_COLUMNS}, message FROM registrations WHERE {_IDS} ORDER BY id",
                    (json.dumps(ids),),
                )
            ]

    def oldest_pending(self) -> tuple[int, float] | None:
        """Return the id of the oldest pending registration, and its unix time; None where nothing is pending."""
        with self._reading() as db:
            oldest: tuple[int, float] | None = db.execute(file.OLDEST_PENDING).fetchone()
        return oldest

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

    def retry(self, ids: Iterable[int] | None = None) -> int:
        """Make dead letters (those of `ids`, or all) pending again, due at once; return how many."""
        return self._revise(Event.RETRIED, ids)

    def discard(self, ids: Iterable[int] | None = None) -> int:
        """Forget dead letters (those of `ids`, or all) for good; return how many."""
        return self._revise(Event.DISCARDED, ids)

    def _revise(self, event: Event, ids: Iterable[int] | None) -> int:
        where, chosen = _chosen(ids)
        with self._writing() as db:
            dead = [id_ for (id_,) in db.execute(f"SELECT id FROM registrations WHERE {where}", chosen)]
            return self._carry_out(db, Transition(State.DEAD, event, dead, due=0.0))

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
            return file.used_bytes(db)

    def _has_room(self, db: sqlite3.Connection) -> bool:
        """Look what is free in a large file; if too little, discard refused dead letters: anybody can send those."""
        if file.used_bytes(db) > self.max_bytes:
            self._crowd_out(db, [id_ for (id_,) in db.execute(_REFUSED)])
        return file.used_bytes(db) <= self.max_bytes

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
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
            self._unsynced = True

    def _count(self, state: str, number: int) -> None:
        self._changes[state] += number

    def _move(self, origin: State, target: State, number: int) -> None:
        self._changes[origin] -= number
        self._changes[target] += number

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._db
            except sqlite3.Error as error:
                raise SpoolError(f"cannot use the spool {self.path}: {error}") from error


def _chosen(ids: Iterable[int] | None) -> tuple[str, tuple[str, ...]]:
    if ids is None:
        return "state = 'dead'", ()
    return f"state = 'dead' AND {_IDS}", (json.dumps(list(ids)),)
