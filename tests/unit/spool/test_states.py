"""The lifecycle of a registration: every transition of the design's table, and no other."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from socs_monitor.spool.records import Transition
from socs_monitor.spool.states import STORED, TRANSITIONS, Event, State
from socs_monitor.spool.store import Spool
from tests.chain import execute
from tests.unit.spool.conftest import DUE, content, counts, incoming, prepare

# The table of the design. A new registration is PENDING.
TABLE = """
    PENDING     COMMITTED   REGISTERED
    PENDING     FAILED      WAITING
    PENDING     GIVEN_UP    DEAD
    PENDING     KNOWN       SETTLED
    PENDING     REFUSED     DEAD
    WAITING     DUE         PENDING
    REGISTERED  UNCHANGED   SETTLED
    REGISTERED  MISSING     SETTLED
    REGISTERED  SUPERSEDED  SETTLED
    REGISTERED  CHANGED     PENDING
    REGISTERED  UNREADABLE  REGISTERED
    REGISTERED  RESTARTED   PENDING
    REGISTERED  REFUSED     DEAD
    REGISTERED  GIVEN_UP    DEAD
    DEAD        RETRIED     PENDING
    DEAD        DISCARDED   DISCARDED
"""
LIFE = {
    (State[origin], Event[event]): State[target]
    for origin, event, target in (line.split() for line in TABLE.strip().splitlines())
}
ATTEMPT, REFUSED = {"attempts": 3}, {"refused": 1}

# What a transition changes in a row that failed twice, in addition to state, due time and reason.
MORE = {
    (State.PENDING, Event.COMMITTED): {"rounds": 1},
    (State.PENDING, Event.FAILED): ATTEMPT,
    (State.PENDING, Event.GIVEN_UP): ATTEMPT,
    (State.PENDING, Event.REFUSED): REFUSED,
    (State.REGISTERED, Event.CHANGED): {"rounds": 2},
    (State.REGISTERED, Event.REFUSED): REFUSED,
    (State.REGISTERED, Event.GIVEN_UP): ATTEMPT,
    (State.DEAD, Event.RETRIED): {"attempts": 0, "refused": 0},
}
NEW_REASON = {State.WAITING, State.DEAD}


def test_transitions_match_the_design() -> None:
    assert dict(TRANSITIONS) == LIFE


def test_only_stored_states_can_be_left() -> None:
    assert {origin for origin, _ in TRANSITIONS} == set(STORED)
    assert set(TRANSITIONS.values()) | {State.PENDING} == set(State)


@pytest.mark.parametrize(("origin", "event"), LIFE, ids=str)
def test_a_transition_changes_the_row_and_the_counts(spool: Spool, path: str, origin: State, event: Event) -> None:
    target = LIFE[origin, event]
    first, other = spool.accept([incoming(0), incoming(1)], held=True)
    prepare(spool, path, first, origin)
    (before,) = (row for row in content(path) if row["id"] == first)
    spool.apply([Transition(origin, event, [first], DUE, "a reason")])

    rows = {row.pop("id"): row for row in content(path)}
    assert counts(spool) == {"received": 2, **Counter([target, State.PENDING])}
    assert rows.pop(other)["state"] == State.PENDING
    if target in STORED:
        reason = "a reason" if target in NEW_REASON else before["reason"]
        due = None if target is State.DEAD else DUE
        del before["id"]
        changed = {"state": target, "due": due, "reason": reason, **MORE.get((origin, event), {})}
        assert rows == {first: {**before, **changed}}
    else:
        assert rows == {}


@pytest.mark.parametrize(
    ("state", "event"), [pair for pair in itertools.product(State, Event) if pair not in LIFE], ids=str
)
def test_any_other_transition_is_rejected_and_changes_nothing(
    spool: Spool, path: str, state: State, event: Event
) -> None:
    for id_, stored in zip(spool.accept([incoming(number) for number in range(4)]), STORED, strict=True):
        prepare(spool, path, id_, stored)
    before, counted = execute(path, "SELECT * FROM registrations"), counts(spool)
    valid = Transition(State.PENDING, Event.COMMITTED, [1, 2, 3, 4], DUE)
    with pytest.raises(KeyError):
        spool.apply([valid, Transition(state, event, [1, 2, 3, 4], DUE)])

    assert execute(path, "SELECT * FROM registrations") == before
    assert counts(spool) == counted
