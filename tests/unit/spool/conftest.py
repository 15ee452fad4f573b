"""Fixtures and helpers for the tests of the spool: registrations in any state."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable
from typing import Any

import pytest

from socs_monitor.spool.records import Incoming, Transition
from socs_monitor.spool.states import Event, State
from socs_monitor.spool.store import Spool
from socs_monitor.wire.publisher import g3_file
from tests.chain import execute

OpenSpool = Callable[..., Spool]

DUE = 50.0

# The event that moves a pending registration to a state.
_EVENTS = {
    State.WAITING: Event.FAILED,
    State.REGISTERED: Event.COMMITTED,
    State.DEAD: Event.GIVEN_UP,
    State.SETTLED: Event.KNOWN,
}


def incoming(number: int, **extra: Any) -> Incoming:
    envelope = {"id": "STREAMER:a", "type": "g3_file", "payload": {**g3_file(f"/a/b/{number}.g3"), **extra}}
    return Incoming(1000.0 + number, "10.0.0.5:4000", json.dumps(envelope))


def counts(spool: Spool) -> dict[str, int]:
    """Number of registrations per state, without zeros."""
    return {state: count for state, count in spool.counts.items() if count}


def content(path: str) -> list[dict[str, Any]]:
    """The rows of the spool's file, in order."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.row_factory = sqlite3.Row
        return [dict(row) for row in db.execute("SELECT * FROM registrations ORDER BY id")]


def states(path: str) -> dict[int, str]:
    """State by id in the spool's file."""
    return dict(execute(path, "SELECT id, state FROM registrations ORDER BY id"))


def move(spool: Spool, state: State, *ids: int, due: float = DUE, reason: str = "no such file") -> None:
    """Move pending registrations to a state."""
    spool.apply([Transition(State.PENDING, _EVENTS[state], ids, due, reason)])


def prepare(spool: Spool, path: str, id_: int, state: State) -> None:
    """Move a pending registration to a state, with two failed attempts and an old reason."""
    if state is not State.PENDING:
        move(spool, state, id_)
    execute(path, "UPDATE registrations SET attempts = 2, reason = 'former' WHERE id = ?", id_)


@pytest.fixture
def spool(open_spool: OpenSpool) -> Spool:
    return open_spool(reserve=0)
