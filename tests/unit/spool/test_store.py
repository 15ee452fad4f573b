"""The spool's limits, failures and query plans. `test_store_model` covers its content and counts."""

from __future__ import annotations

import json
import shutil
import sqlite3
import threading
from collections import Counter
from pathlib import Path

import pytest

from socs_monitor.spool.file import SpoolError
from socs_monitor.spool.records import Record, Transition
from socs_monitor.spool.states import Event, State
from socs_monitor.spool.store import Spool, SpoolFullError
from tests.chain import execute, write_lock
from tests.unit.spool.conftest import OpenSpool, content, counts, incoming, move, states


def sent_by(due: list[Record]) -> list[int]:
    """The numbers that the registrations were created with."""
    return [int(each.received - 1000) for each in due]


@pytest.mark.parametrize("size", [0, 1, 14, 15, 16, 49, 50, 51, 117])
def test_a_batch_of_any_size_is_accepted_in_order(spool: Spool, size: int) -> None:
    spool.accept([incoming(0)])
    ids = spool.accept([incoming(number) for number in range(1, size + 1)])

    assert ids == list(range(2, size + 2))
    loaded = spool.load([*range(1, size + 2)])
    assert [each.id for each in loaded] == [1, *ids]
    assert sent_by(loaded) == list(range(size + 1))
    assert [each.message for each in loaded] == [incoming(number).message for number in range(size + 1)]


def test_a_claim_ends_when_its_messages_are_large(open_spool: OpenSpool) -> None:
    spool = open_spool(reserve=0, claim_bytes=25_000)
    large = [incoming(number, comment="x" * 10_000) for number in range(8)]
    move(spool, State.WAITING, *spool.accept(large[:4], held=True), due=1.0)
    spool.accept(large[4:])

    claims = [sent_by(spool.apply([], 1.0, 100)) for _ in range(4)]
    assert claims == [[0, 1, 2, 4], [3, 5, 6], [7], []]


def test_registered_files_are_claimed_without_their_messages(open_spool: OpenSpool) -> None:
    spool = open_spool(reserve=0, claim_bytes=25_000)
    ids = spool.accept([incoming(number, comment="x" * 10_000) for number in range(8)], held=True)
    move(spool, State.REGISTERED, *ids, due=1.0)

    assert [(each.id, each.message) for each in spool.apply([], 1.0, 100)] == [(id_, None) for id_ in ids]


def test_retries_of_missing_files_do_not_block_the_backlog(spool: Spool) -> None:
    missing = spool.accept([incoming(number) for number in range(100)], held=True)
    spool.accept([incoming(number) for number in range(100, 104)])
    claimed = []
    for now in range(1, 4):
        move(spool, State.WAITING, *missing, due=float(now))
        claimed += spool.apply([], float(now), 8)

    assert set(range(100, 104)) <= set(sent_by(claimed))


def test_an_outcome_that_arrives_too_late_is_dropped(spool: Spool, path: str) -> None:
    (id_,) = spool.accept([incoming(0)], held=True)
    move(spool, State.DEAD, id_)
    before = content(path)
    for _ in range(2):
        spool.apply(
            [Transition(State.PENDING, Event.COMMITTED, [id_], 1.0), Transition(State.PENDING, Event.KNOWN, [99])]
        )

    assert content(path) == before
    assert counts(spool) == {"dead": 1, "received": 1}


def test_a_claim_sees_the_transitions_of_the_same_call(spool: Spool) -> None:
    (id_,) = spool.accept([incoming(0)], held=True)
    (due,) = spool.apply([Transition(State.PENDING, Event.FAILED, [id_], 3.0, "no such file")], 3.0, 1)

    assert (due.id, due.attempts) == (id_, 1)


def test_dead_letters_are_listed_oldest_first(spool: Spool) -> None:
    ids = spool.accept([incoming(number) for number in range(4)])
    move(spool, State.DEAD, *ids[:2])
    spool.apply([Transition(State.PENDING, Event.REFUSED, ids[2:], reason="outside")])

    assert [(letter.id, letter.reason, letter.refused) for letter in spool.dead()] == [
        (1, "no such file", False), (2, "no such file", False), (3, "outside", True), (4, "outside", True)
    ]  # fmt: skip
    assert [letter.id for letter in spool.dead(limit=1)] == [1]
    assert spool.dead()[0].summary() == {
        "id": 1, "received": 1000.0, "sender": "10.0.0.5:4000", "path": "/a/b/0.g3", "reason": "no such file",
        "refused": False, "attempts": 1,
    }  # fmt: skip


@pytest.mark.parametrize("message", ["", "no JSON", "[]", '{"id": 1}', '{"payload": {"path": "\\ud800"}}', "\x00"])
@pytest.mark.parametrize("state", [State.PENDING, State.REGISTERED, State.DEAD])
def test_an_unparsable_message_does_not_block_others(spool: Spool, path: str, message: str, state: State) -> None:
    ids = spool.accept([incoming(0), incoming(1), incoming(0)])
    move(spool, State.REGISTERED, ids[0])
    if state is not State.PENDING:
        move(spool, state, ids[1])
    execute(path, "UPDATE registrations SET message = ? WHERE id = ?", message, ids[1])

    assert_goes_on(spool, path, state, ids)


@pytest.mark.parametrize("column", ["message", "sender", "reason"])
@pytest.mark.parametrize("state", [State.PENDING, State.REGISTERED, State.DEAD])
def test_text_that_is_not_utf8_does_not_block_others(spool: Spool, path: str, column: str, state: State) -> None:
    ids = spool.accept([incoming(0), incoming(1), incoming(0)])
    move(spool, State.REGISTERED, ids[0])
    if state is not State.PENDING:
        move(spool, state, ids[1])
    execute(path, f"UPDATE registrations SET {column} = CAST(x'80ff' AS TEXT) WHERE id = ?", ids[1])

    assert_goes_on(spool, path, state, ids)


def assert_goes_on(spool: Spool, path: str, state: State, ids: list[int]) -> None:
    """The spool works although the second of three registrations is damaged."""
    spool.requeue_all(lambda _: 0.0)
    assert states(path)[ids[0]] == State.REGISTERED, "its path was announced again"
    json.dumps([letter.summary() for letter in spool.dead()])
    assert {each.id for each in spool.load(ids)} == set(ids)
    assert {each.id for each in spool.apply([], 1.0, 9)} == {*ids} - ({ids[1]} if state is State.DEAD else set())


def test_a_start_leaves_a_file_to_its_later_announcement_even_if_that_is_dead(spool: Spool, path: str) -> None:
    ids = spool.accept([incoming(0), incoming(0), incoming(1)], held=True)
    move(spool, State.REGISTERED, ids[0], ids[2])
    move(spool, State.DEAD, ids[1])
    spool.requeue_all(lambda _: 0.0)

    assert states(path) == {ids[0]: "registered", ids[1]: "dead", ids[2]: "pending"}


# --- limits


def test_excess_dead_letters_are_discarded_refused_and_oldest_first(open_spool: OpenSpool) -> None:
    spool = open_spool(reserve=0, max_dead=4)
    ids = spool.accept([incoming(number) for number in range(8)])

    def dead(event: Event, *numbers: int) -> list[int]:
        spool.apply([Transition(State.PENDING, event, [ids[number] for number in numbers])])
        return [letter.id - 1 for letter in spool.dead()]

    dead(Event.GIVEN_UP, 0, 1)
    assert dead(Event.REFUSED, 2, 3) == [0, 1, 2, 3]
    assert dead(Event.REFUSED, 4) == [0, 1, 3, 4]
    assert dead(Event.GIVEN_UP, 5, 6) == [0, 1, 5, 6]
    assert dead(Event.GIVEN_UP, 7) == [1, 5, 6, 7]
    assert counts(spool) == {"dead": 4, "discarded": 4, "received": 8}
    assert spool.crowded_out == 4
    spool.discard([2])
    assert spool.crowded_out == 4, "a person discarded it"


def test_a_full_spool_accepts_nothing_until_something_leaves(open_spool: OpenSpool) -> None:
    spool = open_spool(max_bytes=200_000, reserve=0)
    large = [incoming(number, comment="x" * 10_000) for number in range(30)]
    ids = spool.accept(large)
    for _ in range(2):
        with pytest.raises(SpoolFullError, match="is full"):
            spool.accept(large[:1])
    assert counts(spool) == {"pending": 30, "received": 30}

    move(spool, State.SETTLED, *ids[:15])
    assert spool.accept(large[:1]) == [31]


def test_a_full_spool_discards_refused_dead_letters(open_spool: OpenSpool) -> None:
    spool = open_spool(max_bytes=200_000, reserve=0)
    first, *others = spool.accept([incoming(number, comment="x" * 10_000) for number in range(30)])
    move(spool, State.DEAD, first)
    spool.apply([Transition(State.PENDING, Event.REFUSED, others)])
    spool.accept([incoming(30)])

    assert [letter.id for letter in spool.dead()] == [1]
    assert counts(spool) == {"pending": 1, "dead": 1, "discarded": 29, "received": 31}
    assert spool.crowded_out == 29


# --- failures


def test_a_failed_write_changes_nothing(open_spool: OpenSpool, path: str) -> None:
    spool = open_spool(reserve=0, busy_timeout=0.05)
    (id_,) = spool.accept([incoming(0)], held=True)
    spool.apply([], 0.0, 1)
    before, counted, next_due = content(path), counts(spool), spool.next_due
    failed = Transition(State.PENDING, Event.FAILED, [id_], 1.0, "no such file")
    with write_lock(path):
        for write in (
            lambda: spool.accept([incoming(1)]),
            lambda: spool.apply([failed], 5.0, 5),
            lambda: spool.requeue_all(lambda _: 0.0),
            spool.retry,
            spool.discard,
        ):
            with pytest.raises(SpoolError, match=f"cannot use the spool {path}: database is locked"):
                write()  # type: ignore[operator]
    assert (content(path), counts(spool), spool.next_due) == (before, counted, next_due)

    assert spool.accept([incoming(1)]) == [2]
    assert [due.id for due in spool.apply([failed], 1.0, 5)] == [1, 2]


def test_a_sync_moves_everything_to_the_file_itself(spool: Spool, path: str, tmp_path: Path) -> None:
    def in_the_file() -> int:
        copy = tmp_path / "copy"
        shutil.copy(path, copy)  # without the journal, as if a power failure had lost it
        count: int = execute(copy, "SELECT count(*) FROM registrations")[0][0]
        return count

    spool.accept([incoming(0)])
    spool.sync()
    spool.accept([incoming(1), incoming(2)])
    assert in_the_file() == 1, "the test proves nothing"
    spool.sync()
    assert in_the_file() == 3


def test_a_spool_is_thread_safe(spool: Spool) -> None:
    def accept() -> None:
        for number in range(200):
            spool.accept([incoming(number)])

    threads = [threading.Thread(target=accept) for _ in range(3)]
    for thread in threads:
        thread.start()
    settled: Counter[int] = Counter()
    while settled.total() < 600:
        taken = [due.id for due in spool.apply([], 1.0, 50)]
        settled.update(taken)
        spool.apply([Transition(State.PENDING, Event.KNOWN, taken)])
    for thread in threads:
        thread.join()

    assert settled == Counter(range(1, 601))
    assert counts(spool) == {"settled": 600, "received": 600}


# --- query plans


def test_no_frequent_statement_scans_the_table(spool: Spool, path: str) -> None:
    spool.accept([incoming(number) for number in range(9)])
    spool.apply([], 0.0, 1)
    statements: set[str] = set()
    spool._db.set_trace_callback(statements.add)
    ids = spool.accept([incoming(9)], held=True)
    spool.oldest_pending()
    spool.load(ids)
    for event, due in ((Event.FAILED, 1.0), (Event.COMMITTED, 1.0), (Event.REFUSED, None)):
        spool.apply([Transition(State.PENDING, event, ids, due)], 1.0, 1)
    spool.apply([Transition(State.REGISTERED, Event.UNCHANGED, ids)], 1.0, 1)
    spool._db.set_trace_callback(None)

    looked_at = [statement for statement in statements if "registrations" in statement and "INSERT" not in statement]
    assert len(looked_at) >= 8
    with sqlite3.connect(path) as db:
        for statement in looked_at:
            plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {statement}")]
            slow = [step for step in plan if step.startswith("SCAN registrations") and "INDEX" not in step]
            assert not slow, (statement, plan)
    db.close()
