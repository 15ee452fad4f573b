"""The lifecycle of a registration as data: its states, and the events that move it from one to another.

Pure. `store.Spool.apply` executes these transitions and rejects all others, so every accepted registration is in
exactly one state at any moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class State(StrEnum):
    """The state of a registration. The first four are stored in the spool, the last two are only counted."""

    PENDING = "pending"  # accepted; the file is still to be found and hashed, and its row to be committed
    WAITING = "waiting"  # the file could not be read; a retry is scheduled
    REGISTERED = "registered"  # the row is committed; a re-check of the file is scheduled
    DEAD = "dead"  # refused or given up; kept as a dead letter
    SETTLED = "settled"  # gone: the row is safe and nothing is left to do
    DISCARDED = "discarded"  # gone: a dead letter that was discarded


STORED = (State.PENDING, State.WAITING, State.REGISTERED, State.DEAD)


class Event(StrEnum):
    """An event in the life of a registration, worded as in the documentation's table."""

    COMMITTED = "row committed"
    FAILED = "missing, unreadable, hanging, unexpected error"
    GIVEN_UP = "the same, after --give-up-after; unexpected error twice"
    KNOWN = "the same, but its key has a row"
    REFUSED = "refused, unparsable"
    DUE = "due"
    UNCHANGED = "unchanged, and the database is synced"
    MISSING = "missing (archived and removed, or deleted)"
    SUPERSEDED = "announced again later; that announcement takes care of it"
    CHANGED = "changed"
    UNREADABLE = "unreadable, hanging"
    RESTARTED = "start of the process, or the database was replaced"
    RETRIED = "retry"
    DISCARDED = "discard, too many dead letters, no room"


TRANSITIONS: Mapping[tuple[State, Event], State] = {
    (State.PENDING, Event.COMMITTED): State.REGISTERED,
    (State.PENDING, Event.FAILED): State.WAITING,
    (State.PENDING, Event.GIVEN_UP): State.DEAD,
    (State.PENDING, Event.KNOWN): State.SETTLED,
    (State.PENDING, Event.REFUSED): State.DEAD,
    (State.WAITING, Event.DUE): State.PENDING,
    (State.REGISTERED, Event.UNCHANGED): State.SETTLED,
    (State.REGISTERED, Event.MISSING): State.SETTLED,
    (State.REGISTERED, Event.SUPERSEDED): State.SETTLED,
    (State.REGISTERED, Event.CHANGED): State.PENDING,
    (State.REGISTERED, Event.UNREADABLE): State.REGISTERED,
    (State.REGISTERED, Event.RESTARTED): State.PENDING,
    (State.REGISTERED, Event.REFUSED): State.DEAD,  # a link was retargeted
    (State.REGISTERED, Event.GIVEN_UP): State.DEAD,
    (State.DEAD, Event.RETRIED): State.PENDING,
    (State.DEAD, Event.DISCARDED): State.DISCARDED,
}
