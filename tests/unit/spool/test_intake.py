"""The spool's front: every registration comes out once, in order, and what is on the queue is on the disk."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from socs_monitor.intake import Intake

from socs_monitor import intake as intake_module
from socs_monitor import messages, spoolfile
from socs_monitor.emulator import data_file, g3_file
from socs_monitor.spool.store import Incoming, Registration, Spool
from socs_monitor.stats import Stats
from tests.chain import write_lock
from tests.harness import wait_until

Take = Callable[[], list[int]]


def meta_of(number: int) -> dict[str, Any]:
    return {**g3_file(f"/a/b/{number}.g3"), "pub_id": "STREAMER:a"}


def number_of(registration: Registration) -> int:
    return int(os.path.basename(registration["path"]).removesuffix(".g3"))


class Front:
    """An intake over a real spool, with what it said."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.said: list[str] = []
        self.open()

    def open(self) -> None:
        self.stats = Stats(lambda _, text: self.said.append(text))
        self.spool = Spool(str(self.path), self.stats.reporter("warn", "spool"))
        self.queue: queue.Queue[dict[str, Any]] = queue.Queue()
        self.intake = Intake(self.spool, self.queue, self.stats, clock=lambda: 77.0)

    def put(self, *numbers: int) -> None:
        for number in numbers:
            meta = meta_of(number)
            self.intake.put(meta, Incoming(5.0, "10.0.0.5:4000", messages.encode_file(meta)))
        self.intake.commit()

    def take(self) -> list[int]:
        return [number_of(registration) for registration in self.intake.take(0.0)]

    def take_all(self) -> list[int]:
        """All there is now; an empty turn is needed to learn that the spool holds nothing more."""
        taken: list[int] = []
        empty = 0
        while empty < 2:
            some = self.take()
            taken += some
            empty = 0 if some else empty + 1
        return taken

    def pending(self) -> list[int]:
        return [number_of(registration) for registration in self.spool.pending(0, 1000)]


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    front = Front(tmp_path / "spool")
    yield front
    front.intake.close()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue so short that most is read from the spool."""
    monkeypatch.setattr(intake_module, "QUEUE_MAX", 5)
    monkeypatch.setattr(intake_module, "BATCH", 3)


def test_what_was_put_is_in_the_spool_and_on_the_queue(front: Front) -> None:
    front.put(0, 1)

    assert front.pending() == [0, 1]
    first = front.queue.get_nowait()
    assert isinstance(first, Registration)
    assert first == meta_of(0)
    assert (first.id, first.received, first.attempts, first.state) == (1, 5.0, 0, "pending")


def test_what_was_put_is_taken_once_in_order(front: Front) -> None:
    front.put(0, 1, 2)
    assert front.take() == [0, 1, 2]
    front.put(3)
    assert front.take() == [3]
    assert front.take() == []


def test_a_batch_has_an_end(front: Front, small: None) -> None:
    front.put(0, 1, 2, 3)

    assert front.take() == [0, 1, 2]


def test_beyond_its_length_the_queue_is_not_fed_and_the_rest_comes_from_the_spool(front: Front, small: None) -> None:
    front.put(*range(12))
    assert front.queue.qsize() == 5
    assert front.take_all() == list(range(12))

    front.put(12)
    assert front.queue.qsize() == 1, "the queue is not used any more"
    assert front.take() == [12]


@given(turns=st.lists(st.integers(0, 9), max_size=40))
@settings(max_examples=50, deadline=None)
def test_however_putting_and_taking_alternate_each_comes_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, turns: list[int]
) -> None:
    """A turn of 0 takes, one of 9 begins anew, others put that many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intake_module, "QUEUE_MAX", 5)
        patch.setattr(intake_module, "BATCH", 3)
        front = Front(tmp_path_factory.mktemp("intake") / "spool")
        sent, taken = 0, []
        for turn in turns:
            if turn == 0:
                taken += front.take()
            elif turn == 9:
                front.intake.restart()
                taken = []
            else:
                front.put(*range(sent, sent + turn))
                sent += turn
            assert front.queue.qsize() <= 5
        taken += front.take_all()
        front.intake.close()

    assert taken == list(range(sent))


def test_what_was_read_from_the_spool_before_it_came_on_the_queue_does_not_come_again(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    front.intake.restart()
    accept, taken = front.spool.accept, []

    def accept_and_be_overtaken(batch: list[Incoming]) -> list[int]:
        ids = accept(batch)
        taken.extend(front.take_all())
        return ids

    monkeypatch.setattr(front.spool, "accept", accept_and_be_overtaken)
    front.put(0)

    assert taken == [0]
    assert front.take_all() == []


def test_after_a_restart_all_that_is_pending_comes_before_what_is_new(front: Front) -> None:
    front.put(0, 1, 2)
    assert front.take() == [0, 1, 2]
    front.spool.remove(front.spool.pending(0, 1))
    front.put(3)
    front.intake.restart()
    front.put(4)

    assert front.take_all() == [1, 2, 3, 4]


def test_another_process_begins_with_what_the_former_one_left(front: Front) -> None:
    front.put(0, 1)
    front.intake.close()
    front.open()
    front.intake.restart()
    front.put(2)

    assert front.take_all() == [0, 1, 2]


def test_a_plain_dict_on_the_queue_is_a_registration_like_any(front: Front) -> None:
    front.put(0)
    front.queue.put(meta_of(1))
    taken = front.take_all()

    assert taken == [0, 1]
    assert front.pending() == [0, 1]
    assert front.spool.counts["received"] == 2
    (adopted,) = front.spool.pending(1, 10)
    assert adopted.received == 77.0
    assert adopted == meta_of(1)


def test_a_plain_dict_on_the_queue_outlives_a_restart(front: Front) -> None:
    front.put(0)
    front.queue.put(meta_of(1))
    front.intake.restart()

    assert sorted(front.take_all()) == [0, 1]
    assert front.pending() == [0, 1]


@pytest.mark.parametrize(
    "garbage", [{}, {"path": 7, "pub_id": "a"}, None, "text", {**data_file("/x"), "timestamp": {1}}]
)
def test_what_is_no_registration_is_dropped_and_reported(front: Front, garbage: Any) -> None:
    front.put(0)
    front.queue.put(garbage)
    front.put(1)

    assert front.take_all() == [0, 1]
    (line,) = front.said
    assert "no registration on file_queue, dropped" in line


@pytest.fixture
def impatient(front: Front, monkeypatch: pytest.MonkeyPatch) -> Front:
    """A front whose spool gives a lock up after a moment."""
    front.intake.close()
    monkeypatch.setattr(spoolfile, "_BUSY_TIMEOUT_S", 0.02)
    monkeypatch.setattr(intake_module, "_RETRY_S", 0.02)
    front.open()
    return front


def test_what_the_spool_cannot_take_is_kept_in_memory_until_it_can(impatient: Front) -> None:
    front = impatient
    front.put(0)
    with write_lock(front.path):
        front.put(1)
        front.put(2)
        assert front.stats.degraded
        assert front.take() == [0], "what is not on the disk was on the queue"
    front.put(3)

    assert not front.stats.degraded
    assert front.pending() == [0, 1, 2, 3]
    assert front.take() == [1, 2, 3]
    assert [("kept in memory" in line, "can be written again" in line) for line in front.said] == [
        (True, False),
        (False, True),
    ]


def test_what_is_kept_in_memory_has_a_limit(impatient: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    front = impatient
    size = len(messages.encode_file(meta_of(0)))
    monkeypatch.setattr(intake_module, "INBOX_MAX", 3 * size)
    with write_lock(front.path):
        overloaded = []
        for number in range(6):
            front.put(number)
            overloaded.append(front.intake.overloaded)
    assert overloaded == [False, True, True, True, True, True]
    assert front.stats.refused == {"spool": 2}
    assert sum("some are refused" in line for line in front.said) == 1
    front.intake.flush()

    assert front.take() == [0, 1, 2, 3]
    assert not front.intake.overloaded
    assert any(line.startswith("no registration is refused any more") for line in front.said)
    assert not front.stats.degraded


def test_a_spool_that_fails_while_a_plain_dict_is_adopted_loses_nothing(impatient: Front) -> None:
    front = impatient
    front.put(0)
    front.queue.put(meta_of(1))
    with write_lock(front.path), pytest.raises(spoolfile.SpoolError):
        front.take_all()

    assert sorted(front.take_all()) == [0, 1]


def test_the_writers_thread_goes_on_when_the_spool_works_again(impatient: Front) -> None:
    front = impatient
    front.intake.start()
    with write_lock(front.path):
        front.put(0)
        wait_until(lambda: front.stats.degraded, 5, "the writer has met the lock")
        front.put(1)

    wait_until(lambda: front.pending() == [0, 1], 5, "the writer has written both")
    wait_until(lambda: not front.stats.degraded, 5, "all is well")


def test_the_writers_thread_keeps_the_order_of_many(front: Front) -> None:
    front.intake.start()
    front.put(*range(2000))
    taken: list[int] = []
    while len(taken) < 2000:
        taken += [number_of(registration) for registration in front.intake.take(5.0)]

    assert taken == list(range(2000))
    assert front.take() == []


def test_a_close_writes_what_the_writer_has_not_yet(front: Front) -> None:
    front.intake.start()
    front.put(*range(50))
    front.intake.close()
    front.open()

    assert front.pending() == list(range(50))


def test_take_waits_no_longer_than_it_is_told(front: Front) -> None:
    assert front.intake.take(0.0) == []
    assert front.intake.take(0.01) == []


@pytest.mark.parametrize("by", ["a registration", "a plain dict", "wake"])
def test_a_take_that_waits_is_ended(front: Front, by: str) -> None:
    taken: list[list[Registration]] = []
    thread = threading.Thread(target=lambda: taken.append(front.intake.take(None)), daemon=True)
    thread.start()
    wait_until(lambda: front.queue.not_empty._waiters, 5, "it waits")  # type: ignore[attr-defined]
    if by == "a registration":
        front.put(0)
    elif by == "a plain dict":
        front.queue.put(meta_of(0))
    else:
        front.intake.wake()
    thread.join(5)

    assert not thread.is_alive()
    assert [number_of(registration) for registration in taken[0]] == ([] if by == "wake" else [0])


def test_a_wake_is_not_missed_by_who_takes_later(front: Front) -> None:
    front.intake.wake()

    assert front.intake.take(None) == []
