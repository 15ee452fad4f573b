"""The spool: what it accepted it has, in the state it is in, until it is told that its row is safe."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from socs_monitor import spool as spool_module
from socs_monitor.emulator import g3_file
from socs_monitor.spool import (
    PENDING,
    SETTLING,
    STATES,
    WAITING,
    Failure,
    Incoming,
    Registration,
    Spool,
    SpoolFullError,
)
from socs_monitor.spool import file as spoolfile
from socs_monitor.spool.file import SpoolError
from tests.chain import execute, write_lock

OpenSpool = Callable[..., Spool]


def incoming(number: int, **extra: Any) -> Incoming:
    envelope = {"id": "STREAMER:a", "type": "g3_file", "payload": {**g3_file(f"/a/b/{number}.g3"), **extra}}
    return Incoming(1000.0 + number, "10.0.0.5:4000", json.dumps(envelope))


def names(registrations: Sequence[Registration]) -> list[int]:
    """The numbers that registrations were made with."""
    return [int(os.path.basename(registration["path"]).removesuffix(".g3")) for registration in registrations]


@pytest.fixture
def spool(open_spool: OpenSpool) -> Spool:
    return open_spool()


def counts(spool: Spool) -> dict[str, int]:
    return {state: count for state, count in spool.counts.items() if count}


def fail(registrations: Sequence[Registration], **how: Any) -> list[Failure]:
    return [Failure(registration, "no such file", **how) for registration in registrations]


def all_pending(spool: Spool) -> list[Registration]:
    return spool.pending(0, 100_000)


def test_what_was_accepted_is_pending_in_order(spool: Spool) -> None:
    assert spool.accept([incoming(0), incoming(1), incoming(2)]) == [1, 2, 3]
    assert spool.accept([incoming(3)]) == [4]

    first, second = spool.pending(after=0, limit=2)
    assert first == {**g3_file("/a/b/0.g3"), "pub_id": "STREAMER:a"}
    assert (first.id, first.received, first.attempts, first.state) == (1, 1000.0, 0, PENDING)
    assert names(spool.pending(second.id, 2)) == [2, 3]
    assert spool.pending(4, 2) == []


def test_every_state_is_left_the_way_it_is_meant_to_be(spool: Spool) -> None:
    spool.accept([incoming(number) for number in range(6)])
    settling, waiting, dead = all_pending(spool)[:3], all_pending(spool)[3:4], all_pending(spool)[4:]
    spool.registered(settling)
    waiting[0].attempts = 1
    spool.wait(fail(waiting, due=50.0))
    spool.bury(fail(dead))
    assert counts(spool) == {"settling": 3, "waiting": 1, "dead": 2, "received": 6}
    assert {registration.state for registration in settling} == {SETTLING}

    assert spool.waiting_times() == [(50.0, 4, 1)]
    (again,) = spool.waiting([1, 4, 5, 99])
    assert (again.id, again.attempts, again.state) == (4, 1, WAITING)
    spool.remove(settling[:1])
    spool.registered([again])
    assert counts(spool) == {"settling": 3, "settled": 1, "dead": 2, "received": 6}

    spool.unsettle()
    assert names(all_pending(spool)) == [1, 2]
    assert spool.waiting_times() == [(50.0, 4, 1)]
    assert counts(spool) == {"pending": 2, "waiting": 1, "settled": 1, "dead": 2, "received": 6}


def test_dead_letters_can_be_read_tried_again_and_discarded(spool: Spool) -> None:
    spool.accept([incoming(number) for number in range(4)])
    failed = all_pending(spool)
    failed[0].attempts = 7
    spool.bury(fail(failed[:2]) + fail(failed[2:], refused=True))

    assert [(letter.id, letter.refused) for letter in spool.dead()] == [(1, False), (2, False), (3, True), (4, True)]
    assert [letter.id for letter in spool.dead([2, 4, 99])] == [2, 4]
    assert [letter.id for letter in spool.dead(limit=1)] == [1]
    assert spool.dead([1])[0].summary() == {
        "id": 1, "received": 1000.0, "sender": "10.0.0.5:4000", "path": "/a/b/0.g3", "reason": "no such file",
        "refused": False, "attempts": 7,
    }  # fmt: skip

    assert spool.retry([1, 3, 99]) == [1, 3]
    assert spool.waiting_times() == [(0.0, 1, 0), (0.0, 3, 0)]
    assert [registration.attempts for registration in spool.waiting([1, 3])] == [0, 0]
    assert spool.discard([2, 1]) == 1
    assert counts(spool) == {"waiting": 2, "dead": 1, "discarded": 1, "received": 4}
    assert spool.discard() == 1
    assert spool.dead() == []
    spool.bury(fail(spool.waiting([1, 3])))
    assert spool.retry() == [1, 3]


def test_a_closed_spool_is_found_as_it_was(open_spool: OpenSpool) -> None:
    spool = open_spool()
    spool.accept([incoming(number) for number in range(5)])
    first, second, third, fourth, _ = all_pending(spool)
    second.attempts = third.attempts = 3
    spool.remove([first])
    spool.wait(fail([second], due=77.0))
    spool.bury(fail([third], refused=True))
    spool.registered([fourth])
    letters = spool.dead()
    spool.close()

    spool = open_spool()
    assert counts(spool) == {"pending": 2, "waiting": 1, "dead": 1, "received": 4}
    assert names(all_pending(spool)) == [3, 4]
    assert spool.waiting_times() == [(77.0, 2, 3)]
    assert spool.waiting([2])[0].attempts == 3
    assert spool.dead() == letters


def test_what_settles_in_a_spool_of_the_first_version_is_taken_up_again(open_spool: OpenSpool, path: str) -> None:
    spool = open_spool()
    spool.accept([incoming(0), incoming(1)])
    spool.close()
    execute(path, "UPDATE registrations SET state = 'settling' WHERE id = 1")

    spool = open_spool()
    spool.unsettle()
    assert names(all_pending(spool)) == [0, 1]
    assert counts(spool) == {"pending": 2, "received": 2}


def test_no_id_is_used_twice(open_spool: OpenSpool) -> None:
    spool = open_spool()
    spool.accept([incoming(0)])
    spool.remove(all_pending(spool))
    assert spool.accept([incoming(1)]) == [2]
    spool.remove(all_pending(spool))
    spool.close()

    assert open_spool().accept([incoming(2)]) == [3]


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "accept",
                "register",
                "settle",
                "wait",
                "bury",
                "refuse",
                "remove",
                "unsettle",
                "retry",
                "discard",
                "reopen",
            ]
        ),
        st.sets(st.integers(1, 8), max_size=4),
    ),
    max_size=25,
)


@given(operations=OPERATIONS)
@settings(max_examples=60, deadline=None)
def test_the_counts_add_up_and_are_the_files_whatever_happens(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[str, set[int]]]
) -> None:
    path = str(tmp_path_factory.mktemp("spool") / "spool")
    spool = Spool(path, print)
    settling: dict[int, Registration] = {}
    for operation, ids in operations:
        known = [settling.get(found.id, found) for found in all_pending(spool) + spool.waiting(ids)]
        live = [registration for registration in known if registration.id in ids]
        if operation == "accept":
            spool.accept([incoming(number) for number in ids] or [incoming(0)])
        elif operation == "register":
            spool.registered(live)
            settling.update({registration.id: registration for registration in live})
        elif operation == "settle":
            spool.settle([settling.pop(id_).id for id_ in ids & settling.keys()])
        elif operation == "wait":
            spool.wait(fail(live, due=1.0))
        elif operation in ("bury", "refuse"):
            spool.bury(fail(live, refused=operation == "refuse"))
        elif operation == "remove":
            spool.remove(live)
        elif operation == "unsettle":
            spool.unsettle()
            settling.clear()
        elif operation == "retry":
            spool.retry(ids)
        elif operation == "discard":
            spool.discard(ids)
        else:
            spool.close()
            spool = Spool(path, print)
            settling.clear()
        now = spool.counts
        assert now["received"] == sum(now[state] for state in (*STATES, "settled", "discarded"))
        settling = {id_: registration for id_, registration in settling.items() if registration.state == SETTLING}
        stored = Counter(
            SETTLING if id_ in settling else state
            for id_, state in execute(path, "SELECT id, state FROM registrations")
        )
        assert {state: now[state] for state in STATES if now[state]} == stored
    spool.close()


def test_the_oldest_dead_letters_give_way_refused_ones_first(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "MAX_DEAD", 4)
    spool.accept([incoming(number) for number in range(7)])
    failed = all_pending(spool)
    assert spool.bury(fail(failed[:2]) + fail(failed[2:4], refused=True)) == 0
    assert spool.bury(fail(failed[4:5], refused=True)) == 1
    assert [letter.id for letter in spool.dead()] == [1, 2, 4, 5]
    assert spool.bury(fail(failed[5:])) == 2
    assert [letter.id for letter in spool.dead()] == [1, 2, 6, 7]
    spool.accept([incoming(9)])
    assert spool.bury(fail(all_pending(spool))) == 1

    assert [letter.id for letter in spool.dead()] == [2, 6, 7, 8]
    assert counts(spool) == {"dead": 4, "discarded": 4, "received": 8}


def test_a_full_spool_accepts_nothing_more_until_something_leaves(open_spool: OpenSpool) -> None:
    spool = open_spool(max_bytes=200_000)
    large = [incoming(number, comment="x" * 10_000) for number in range(30)]
    spool.accept(large)
    with pytest.raises(SpoolFullError, match="is full"):
        spool.accept(large[:1])
    assert counts(spool) == {"pending": 30, "received": 30}

    spool.remove(all_pending(spool)[:15])
    assert spool.accept(large[:1]) == [31]


def test_in_a_full_spool_refused_registrations_make_room(open_spool: OpenSpool) -> None:
    spool = open_spool(max_bytes=200_000)
    spool.accept([incoming(number, comment="x" * 10_000) for number in range(30)])
    first, *others = all_pending(spool)
    spool.bury(fail([first]) + fail(others, refused=True))
    spool.accept([incoming(30)])

    assert [letter.id for letter in spool.dead()] == [1]
    assert counts(spool) == {"pending": 1, "dead": 1, "discarded": 29, "received": 31}


def test_what_cannot_be_written_is_not_accepted(
    open_spool: OpenSpool, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spoolfile, "_BUSY_TIMEOUT_S", 0.05)
    spool = open_spool()
    spool.accept([incoming(0)])
    with write_lock(path), pytest.raises(SpoolError, match=f"cannot use the spool {path}: database is locked"):
        spool.accept([incoming(1)])
    assert counts(spool) == {"pending": 1, "received": 1}

    assert spool.accept([incoming(1)]) == [2]


def test_a_failed_move_changes_neither_the_file_nor_the_registration(
    open_spool: OpenSpool, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spoolfile, "_BUSY_TIMEOUT_S", 0.05)
    spool = open_spool()
    spool.accept([incoming(0)])
    (registration,) = all_pending(spool)
    with write_lock(path), pytest.raises(SpoolError):
        spool.remove([registration])

    assert registration.state == PENDING
    assert counts(spool) == {"pending": 1, "received": 1}


def test_after_a_sync_all_is_in_the_file_itself(spool: Spool, path: str, tmp_path: Path) -> None:
    def in_the_file() -> int:
        copy = tmp_path / "copy"
        shutil.copy(path, copy)  # without the journal, as if that were lost with the power
        return execute(copy, "SELECT count(*) FROM registrations")[0][0]

    spool.accept([incoming(0)])
    spool.sync()
    spool.accept([incoming(1), incoming(2)])
    assert in_the_file() == 1, "the test cannot tell"
    spool.sync()
    assert in_the_file() == 3


def test_threads_may_share_a_spool(spool: Spool) -> None:
    def accept() -> None:
        for number in range(200):
            spool.accept([incoming(number)])

    threads = [threading.Thread(target=accept) for _ in range(3)]
    for thread in threads:
        thread.start()
    removed = 0
    while removed < 600:
        batch = spool.pending(0, 50)
        spool.remove(batch)
        removed += len(batch)
    for thread in threads:
        thread.join()

    assert counts(spool) == {"settled": 600, "received": 600}
