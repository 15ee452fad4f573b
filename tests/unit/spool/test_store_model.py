"""A stateful model test: the spool has the same rows, counts and next due time as a plain dict."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from socs_monitor.spool.records import Transition
from socs_monitor.spool.states import STORED, TRANSITIONS, Event, State
from socs_monitor.spool.store import RECEIVED, Spool
from tests.unit.spool.conftest import content, incoming

MAX_DEAD = 4

# Few paths, so that many are announced more than once.
PATHS = st.lists(st.integers(0, 3), max_size=8)
TIMES = st.integers(0, 9).map(float)
IDS = st.sets(st.integers(1, 30), max_size=6) | st.just(set(range(1, 100)))


@dataclass
class Row:
    """A registration in the model."""

    path: int
    state: State = State.PENDING
    attempts: int = 0
    rounds: int = 0
    due: float | None = None
    reason: str | None = None
    refused: int = 0


def retry_at(attempts: int) -> float:
    return 100.0 + attempts


class SpoolMachine(RuleBasedStateMachine):
    """A spool and its model."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp(prefix="spool-")
        self.path = f"{self.folder}/spool"
        self.rows: dict[int, Row] = {}
        self.open()

    def open(self) -> None:
        self.spool = Spool(self.path, print, reserve=0, max_dead=MAX_DEAD)
        self.gone = dict.fromkeys((State.SETTLED, State.DISCARDED), 0)
        self.received = len(self.rows)

    def teardown(self) -> None:
        self.spool.close()
        shutil.rmtree(self.folder)

    def leave(self, ids: Iterable[int], state: State) -> None:
        for id_ in ids:
            del self.rows[id_]
            self.gone[state] += 1

    def in_state(self, state: State, ids: Iterable[int] | None = None) -> list[int]:
        return [id_ for id_, row in self.rows.items() if row.state is state and (ids is None or id_ in ids)]

    @rule(paths=PATHS, held=st.booleans(), target=held)
    def accept(self, paths: list[int], held: bool) -> object:
        ids = self.spool.accept([incoming(path) for path in paths], held=held)
        assert ids == sorted(ids)
        assert min(ids, default=math.inf) > max(self.rows, default=0), "an id was reused"
        self.rows |= {id_: Row(path, due=None if held else 0.0) for id_, path in zip(ids, paths, strict=True)}
        self.received += len(ids)
        return multiple(*ids)

    @rule(
        pair=st.sampled_from(sorted(TRANSITIONS)),
        held=st.lists(consumes(held), max_size=3),
        others=IDS,
        due=st.none() | TIMES,
        now=TIMES,
        limit=st.integers(0, 9),
    )
    def apply(
        self, pair: tuple[State, Event], held: list[int], others: set[int], due: float | None, now: float, limit: int
    ) -> None:
        origin, event = pair
        ids = {*held, *others}
        claimed = self.spool.apply([Transition(origin, event, [*ids], due, str(event))], now, limit)

        moved, state = self.in_state(origin, ids), TRANSITIONS[pair]
        if state not in STORED:
            self.leave(moved, state)
        for id_ in moved if state in STORED else ():
            row = self.rows[id_]
            row.state, row.due = state, due if state is not State.DEAD else None
            row.attempts += event in (Event.FAILED, Event.GIVEN_UP)
            row.rounds = max(row.rounds, event is Event.COMMITTED) + (event is Event.CHANGED)
            if state in (State.WAITING, State.DEAD):
                row.reason = str(event)
            if event is Event.REFUSED:
                row.refused = 1
            if event is Event.RETRIED:
                row.attempts = row.refused = 0
        dead = sorted(self.in_state(State.DEAD), key=lambda id_: (-self.rows[id_].refused, id_))
        if ids or limit:
            self.leave(dead[: max(0, len(dead) - MAX_DEAD)], State.DISCARDED)

        before = {id_: row.state for id_, row in self.rows.items()}
        assert [each.id for each in claimed] == self.claim(now, limit)
        for each in claimed:
            row = self.rows[each.id]
            assert (each.state, each.attempts, each.rounds) == (before[each.id], row.attempts, row.rounds)
            message = None if row.state is State.REGISTERED else incoming(row.path).message
            assert (each.received, each.sender, each.message) == (1000.0 + row.path, "10.0.0.5:4000", message)

    def claim(self, now: float, limit: int) -> list[int]:
        """Claim what is due: scheduled registrations first, but a quarter of the places is for the backlog."""
        due = sorted((row.due, id_) for id_, row in self.rows.items() if row.due is not None and row.due <= now)
        scheduled = [id_ for when, id_ in due if when][: limit - limit // 4]
        claimed = [*scheduled, *(id_ for when, id_ in due if not when)][:limit]
        for id_ in claimed:
            row = self.rows[id_]
            row.due = None
            if row.state is State.WAITING:
                row.state = State.PENDING
        if limit and len(claimed) < limit:
            earliest = min((row.due for row in self.rows.values() if row.due is not None), default=math.inf)
            assert now < self.spool.next_due <= earliest or len(scheduled) == limit - limit // 4
        return claimed

    @rule(ids=st.none() | IDS)
    def retry(self, ids: set[int] | None) -> None:
        dead = self.in_state(State.DEAD, ids)
        assert self.spool.retry(ids) == len(dead)
        for id_ in dead:
            row = self.rows[id_]
            row.state, row.due, row.attempts, row.refused = State.PENDING, 0.0, 0, 0

    @rule(ids=st.none() | IDS)
    def discard(self, ids: set[int] | None) -> None:
        dead = self.in_state(State.DEAD, ids)
        assert self.spool.discard(ids) == len(dead)
        self.leave(dead, State.DISCARDED)

    @rule(reopen=st.booleans())
    def requeue_all(self, reopen: bool) -> None:
        if reopen:
            self.spool.close()
            self.open()
            self.check()
        self.spool.requeue_all(retry_at)
        latest = {row.path: id_ for id_, row in sorted(self.rows.items())}
        for id_, row in self.rows.items():
            if row.state is State.REGISTERED and latest[row.path] == id_:
                row.state = State.PENDING
            if row.state in (State.PENDING, State.REGISTERED):
                row.due = 0.0
            elif row.state is State.WAITING:
                row.due = retry_at(row.attempts)

    @rule(ids=IDS)
    def load(self, ids: set[int]) -> None:
        loaded = {each.id: (each.state, json.loads(each.message or "")) for each in self.spool.load([*ids])}
        assert loaded == {
            id_: (row.state, json.loads(incoming(row.path).message)) for id_, row in self.rows.items() if id_ in ids
        }

    @invariant()
    def check(self) -> None:
        stored = {row.pop("id"): row for row in content(self.path)}
        for row in stored.values():
            row["path"] = int(row.pop("received") - 1000)
            del row["sender"], row["message"]
        assert stored == {id_: vars(row) for id_, row in self.rows.items()}
        states = {state: len(self.in_state(state)) for state in STORED}
        assert self.spool.counts == {**states, **self.gone, RECEIVED: self.received}
        assert self.spool.counts[RECEIVED] == sum(states.values()) + sum(self.gone.values())
        assert self.spool.next_due <= min(
            (row.due for row in self.rows.values() if row.due is not None), default=math.inf
        )
        pending = min(self.in_state(State.PENDING), default=None)
        assert self.spool.oldest_pending() == (pending and (pending, 1000.0 + self.rows[pending].path))
        dead = sorted(self.in_state(State.DEAD))
        assert [(letter.id, letter.refused) for letter in self.spool.dead()] == [
            (id_, bool(self.rows[id_].refused)) for id_ in dead
        ]


TestSpoolMachine = SpoolMachine.TestCase
TestSpoolMachine.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
