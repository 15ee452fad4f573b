"""The life of a registration is the table of the design: every transition in it, and no other."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from socs_monitor.spool.states import STORED, TRANSITIONS, Event, State
from socs_monitor.spool.store import Spool, Transition, TransitionError
from tests.chain import execute
from tests.unit.spool.conftest import DUE, bring_about, content, counts, incoming

# As the design has it. A registration begins as PENDING.
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

# Of what a transition does to a row beside its state, due time and reason; from a row that failed twice.
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


def test_the_transitions_are_those_of_the_design() -> None:
    assert dict(TRANSITIONS) == LIFE


def test_what_is_gone_has_no_way_back_and_everything_else_has_one_out() -> None:
    assert {origin for origin, _ in TRANSITIONS} == set(STORED)
    assert set(TRANSITIONS.values()) | {State.PENDING} == set(State)


@pytest.mark.parametrize(("origin", "event"), LIFE, ids=str)
def test_a_transition_does_what_the_table_has(spool: Spool, path: str, origin: State, event: Event) -> None:
    target = LIFE[origin, event]
    first, other = spool.accept([incoming(0), incoming(1)], held=True)
    bring_about(spool, path, first, origin)
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
def test_every_other_transition_is_refused_and_nothing_changes(
    spool: Spool, path: str, state: State, event: Event
) -> None:
    for id_, stored in zip(spool.accept([incoming(number) for number in range(4)]), STORED, strict=True):
        bring_about(spool, path, id_, stored)
    before, counted = execute(path, "SELECT * FROM registrations"), counts(spool)
    valid = Transition(State.PENDING, Event.COMMITTED, [1, 2, 3, 4], DUE)
    with pytest.raises(TransitionError, match=f"no transition from {state}"):
        spool.apply([valid, Transition(state, event, [1, 2, 3, 4], DUE)])

    assert execute(path, "SELECT * FROM registrations") == before
    assert counts(spool) == counted
