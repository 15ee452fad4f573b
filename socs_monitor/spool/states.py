"""The states of a registration and the transitions between them, as data.

Pure. `TRANSITIONS` is the whole life of a registration: `store.Spool.apply` carries out what stands here and refuses
everything else. Every accepted registration is counted in exactly one state at any moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class State(StrEnum):
    """Where a registration is. The first four are stored in the spool; the last two are counted only."""

    PENDING = "pending"  # accepted; its file is to be looked up and hashed, and its row to be committed
    WAITING = "waiting"  # its file could not be read; it is tried again when it is due
    REGISTERED = "registered"  # its row is committed; its file is checked again when that is due
    DEAD = "dead"  # refused or given up; kept for a person as a dead letter
    SETTLED = "settled"  # gone: nothing more to do, the row is safe
    DISCARDED = "discarded"  # gone: a dead letter that a person discarded, or for which there was no room


STORED = (State.PENDING, State.WAITING, State.REGISTERED, State.DEAD)


class Event(StrEnum):
    """What can happen to a registration."""

    COMMITTED = "its row was committed"
    FAILED = "its file is missing, unreadable or hanging, or an unexpected error occurred"
    GIVEN_UP = "the same, for longer than --give-up-after; or an unexpected error, twice"
    KNOWN = "the same, but its key has a row"
    REFUSED = "it can never become a row"
    DUE = "its delay is over"
    RETRIED = "a person retries it"
    UNCHANGED = "its file is unchanged and the database is synced"
    MISSING = "its file is missing: archived and removed, or deleted"
    SUPERSEDED = "its file was announced again later, which takes care of it"
    CHANGED = "its file changed"
    UNREADABLE = "its file cannot be checked now: unreadable or hanging"
    RESTARTED = "the process started, or the database was replaced"
    DISCARDED = "a person discarded it, or there was no room"


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
    (State.REGISTERED, Event.REFUSED): State.DEAD,
    (State.REGISTERED, Event.GIVEN_UP): State.DEAD,
    (State.DEAD, Event.RETRIED): State.PENDING,
    (State.DEAD, Event.DISCARDED): State.DISCARDED,
}
