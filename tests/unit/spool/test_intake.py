"""The intake: every registration comes out once, nothing is queued before it is on the disk, and memory is limited."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from socs_monitor.health.health import Health
from socs_monitor.registration import lookup
from socs_monitor.spool.file import SpoolError
from socs_monitor.spool.intake import FileQueue, Intake
from socs_monitor.spool.records import Incoming, Registration, Transition
from socs_monitor.spool.states import Event, State
from socs_monitor.spool.store import Spool
from socs_monitor.wire import messages
from socs_monitor.wire.messages import FileMessage
from socs_monitor.wire.publisher import data_file, g3_file
from tests.chain import Clock, write_lock
from tests.testbed.processes import wait_until
from tests.unit.spool.conftest import content

# Queue memory for three registrations of `meta_of`.
THREE = 3 * 2_500


def meta_of(number: int) -> dict[str, Any]:
    return {**g3_file(f"/a/b/{number}.g3"), "pub_id": "STREAMER:a"}


def number_of(meta: dict[str, Any]) -> int:
    return int(os.path.basename(meta["path"]).removesuffix(".g3"))


class Front:
    """An intake with a real spool and a captured log; `take` does what the registrar does."""

    def __init__(self, path: Path, **limits: Any) -> None:
        self.path = path
        self.limits = limits
        self.clock = Clock()
        self.said: list[tuple[str, str]] = []
        self.open()

    def open(self) -> None:
        self.health = Health(lambda level, text: self.said.append((level, text)))
        self.spool = Spool(
            str(self.path),
            self.health.log.reporter("warn", "spool"),
            self.limits.get("max_bytes", 1 << 30),
            reserve=0,
            busy_timeout=0.0,
        )
        self.queue = FileQueue(self.limits.get("queue_max", 1 << 20))
        self.intake = Intake(
            self.spool,
            self.queue,
            self.health,
            self.clock,
            self.clock.monotonic,
            inbox_max=self.limits.get("inbox_max", 1 << 24),
            retry_s=0.02,
        )

    def put(self, *numbers: int, received: float = 5.0) -> None:
        for number in numbers:
            meta = meta_of(number)
            self.intake.put(meta, Incoming(received, "10.0.0.5:4000", messages.encode_file(meta)))
        self.intake.commit()

    def from_queue(self, limit: int = 100) -> list[Registration]:
        items = self.queue.take(limit, 0.0)
        foreign = [item for item in items if not isinstance(item, Registration)]
        adopted = self.intake.adopt(foreign) if foreign else []
        return [*(item for item in items if isinstance(item, Registration)), *adopted]

    def take(self, limit: int = 100) -> list[int]:
        """Take what is on the queue and claim what is due in the spool."""
        registrations = self.from_queue(limit)
        registrations += lookup.parse(self.spool.apply([], self.clock.monotonic(), limit), [])
        return [number_of(registration) for registration in registrations]

    def take_all(self) -> list[int]:
        taken: list[int] = []
        while some := self.take():
            taken += some
        return taken

    def requeue_all(self) -> None:
        self.intake.requeue_all(lambda _: 0.0)

    def stored(self) -> list[int]:
        """The content of the spool's file, in order."""
        return [number_of(messages.parse_file(row["message"]).meta) for row in content(str(self.path))]

    def texts(self, event: str) -> list[str]:
        return [text for _, text in self.said if f"event={event}" in text]


@pytest.fixture
def make_front(tmp_path: Path) -> Iterator[Callable[..., Front]]:
    fronts: list[Front] = []

    def make(**limits: Any) -> Front:
        fronts.append(Front(tmp_path / "spool", **limits))
        return fronts[-1]

    yield make
    for front in fronts:
        front.intake.close()


@pytest.fixture
def front(make_front: Callable[..., Front]) -> Front:
    return make_front()


def test_a_registration_is_in_the_spool_and_on_the_queue(front: Front) -> None:
    front.put(0, 1)

    assert front.stored() == [0, 1]
    first = front.queue.get_nowait()
    assert isinstance(first, Registration)
    assert first == meta_of(0)
    assert (first.id, first.received, first.sender, first.attempts, first.rounds) == (1, 5.0, "10.0.0.5:4000", 0, 0)


TURNS = st.lists(
    st.tuples(
        st.sampled_from(["put", "put while locked", "put a dict", "take", "restart", "reopen"]), st.integers(1, 9)
    ),
    max_size=30,
)


@given(turns=TURNS)
@settings(max_examples=100, deadline=None)
def test_every_registration_is_taken_once(
    tmp_path_factory: pytest.TempPathFactory, turns: list[tuple[str, int]]
) -> None:
    front = Front(tmp_path_factory.mktemp("intake") / "spool", queue_max=THREE)
    sent, taken = 0, []
    for turn, number in turns:
        if turn == "put":
            front.put(*range(sent, sent + number))
            sent += number
        elif turn == "put while locked":
            with write_lock(front.path):
                front.put(*range(sent, sent + number))
            sent += number
        elif turn == "put a dict":
            front.queue.put(meta_of(sent))
            sent += 1
        elif turn == "take":
            taken += front.take(number)
        else:
            if turn == "reopen":
                taken += [number_of(item) for item in front.from_queue() if item.sender == "file_queue"]
                front.intake.close()
                front.open()
            front.requeue_all()
            taken = []  # nothing of it was registered, so all of it comes again
        assert sum(isinstance(item, Registration) for item in front.queue.queue) <= 3
    front.intake.flush()
    taken += front.take_all()
    front.intake.close()

    assert sorted(taken) == list(range(sent))


def test_registrations_beyond_the_queue_are_due_in_the_spool(make_front: Callable[..., Front]) -> None:
    front = make_front(queue_max=THREE)
    for number in range(9):
        front.put(number)
    assert [number_of(item) for item in front.queue.queue] == [0, 1, 2]
    assert [row["due"] for row in content(str(front.path))] == [None] * 3 + [0.0] * 6
    assert front.take() == list(range(9))

    front.put(9)
    assert front.queue.qsize() == 1, "the queue is no longer used"


def test_emptying_the_queue_by_hand_makes_room_on_it(make_front: Callable[..., Front]) -> None:
    front = make_front(queue_max=THREE)
    for number in range(12):
        front.put(number)

        assert number_of(front.queue.get_nowait()) == number


def test_a_start_removes_only_registrations_from_the_queue(front: Front) -> None:
    front.put(0, 1)
    front.queue.put(meta_of(2))
    front.requeue_all()

    assert [number_of(item) for item in front.queue.queue] == [2]
    assert sorted(front.take_all()) == [0, 1, 2]


# --- plain dicts


def test_a_plain_dict_on_the_queue_becomes_a_registration(front: Front) -> None:
    front.put(0)
    front.queue.put(meta_of(1))
    first, adopted = front.from_queue()

    assert (first.id, adopted.id) == (1, 2)
    assert (adopted.received, adopted.sender) == (front.clock.now, "file_queue")
    assert adopted == meta_of(1)
    assert front.stored() == [0, 1]
    assert front.spool.counts["received"] == 2
    assert front.take() == [], "the caller holds it"


@pytest.mark.parametrize("garbage", [{}, {"path": 7, "pub_id": "a"}, None, "text", {**data_file("/x"), "plot": {1}}])
def test_any_other_item_on_the_queue_is_dropped_and_logged(front: Front, garbage: Any) -> None:
    front.put(0)
    front.queue.put(garbage)
    front.put(1)

    assert front.take_all() == [0, 1]
    (line,) = front.texts("refused")
    assert "an item of file_queue is not a registration" in line


def test_a_failing_spool_stores_no_plain_dict(front: Front) -> None:
    with write_lock(front.path), pytest.raises(SpoolError):
        front.intake.adopt([meta_of(0), meta_of(1)])

    assert front.stored() == []


def test_a_plain_dict_waits_until_a_full_spool_has_room(make_front: Callable[..., Front]) -> None:
    front = make_front(max_bytes=100_000)
    front.put(0)
    (first,) = front.from_queue()
    large = front.spool.accept([Incoming(1.0, "a:1", json.dumps({"x": "x" * 200_000}))], held=True)
    front.queue.put(meta_of(1))
    assert front.from_queue() == [], "the registrar must go on, or nothing ever leaves the spool"
    front.spool.apply([Transition(State.PENDING, Event.KNOWN, [first.id, *large])])
    front.intake.flush()

    assert front.take_all() == [1]


# --- a spool that cannot be written


def test_registrations_are_kept_in_memory_while_the_spool_fails(front: Front) -> None:
    front.put(0)
    with write_lock(front.path):
        front.put(1)
        front.put(2)
        assert bool(front.health.conditions)
        assert [number_of(item) for item in front.queue.queue] == [0], "queued before it was on the disk"
    front.put(3)

    assert not bool(front.health.conditions)
    assert front.stored() == front.take() == [0, 1, 2, 3]
    assert [("kept in memory" in line, "can be written again" in line) for _, line in front.said] == [
        (True, False),
        (False, True),
    ]


def test_registrations_in_memory_are_limited(make_front: Callable[..., Front]) -> None:
    front = make_front(inbox_max=THREE)
    with write_lock(front.path):
        overloaded = []
        for number in range(6):
            front.put(number)
            overloaded.append(front.intake.overloaded)
    assert overloaded == [False, True, True, True, True, True]
    assert front.health.counters.refused == {"spool": 2}
    assert len(front.texts("degraded")) == 2, "the spool, and the intake once"
    front.intake.flush()

    assert front.take() == [0, 1, 2, 3]
    assert not front.intake.overloaded
    assert not bool(front.health.conditions)


NUMBERS = {f"field {number}": number * 1e9 for number in range(40)}
SHAPES: dict[str, dict[str, Any]] = {
    "usual": data_file("/data/smurf_data/20240105/crate1slot2/1704450000/outputs/1704450001.txt", action="take_iv"),
    "many numbers": {"path": "/x", **NUMBERS},
    "many texts": {"path": "/x", **dict.fromkeys(NUMBERS, "x" * 1000)},
    "many wide texts": {"path": "/x", **{key: f"{key:x>1000}\U0001f600" for key in NUMBERS}},
    "short wide texts": {"path": "/x", "a": "x" * 1000 + "\U0001f600"},
    "long path": {"path": "/" + "x" * 60_000},
    "long wide path": {"path": "/" + "x" * 60_000 + "\U0001f600"},
    "long keys": {"path": "/x", **{"x" * 1900 + key: None for key in NUMBERS}},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("where", ["inbox", "queue"])
def test_the_memory_limit_holds_for_any_shape_of_message(
    make_front: Callable[..., Front], where: str, shape: str
) -> None:
    limit = 4 << 20
    front = make_front(inbox_max=limit, queue_max=limit)
    datagram = json.dumps({"id": "crate1slot2", "type": "data_file", "payload": SHAPES[shape]}, ensure_ascii=False)

    def put() -> None:
        message = messages.parse(datagram.encode())
        assert isinstance(message, FileMessage)
        front.intake.put(message.meta, Incoming(5.0, "10.0.0.5:4000", message.text))

    lock = write_lock(front.path) if where == "inbox" else contextlib.nullcontext()
    tracemalloc.start()
    try:
        with lock:
            while not (front.health.counters.refused["spool"] or front.spool.counts["received"] > front.queue.qsize()):
                put()
            used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert limit / 20 < used < 1.1 * limit, f"{used / limit:.2f} times the limit"


def test_a_close_logs_the_paths_of_lost_registrations(front: Front) -> None:
    front.put(0)
    with write_lock(front.path):
        front.put(*range(1, 121))
        front.intake.close()

    lines = front.texts("registrations_lost")
    assert [level for level, text in front.said if "registrations_lost" in text] == ["error"] * 3
    logged = [f"/a/b/{number}.g3" for number in range(121) if any(f"/a/b/{number}.g3" in line for line in lines)]
    assert logged == [f"/a/b/{number}.g3" for number in range(1, 121)]
    assert all("socs-monitor send FILE" in line and "count=120" in line for line in lines)
    front.open()
    assert front.stored() == [0]


# --- the writer thread


def test_the_writer_resumes_when_the_spool_works_again(front: Front) -> None:
    front.intake.start()
    with write_lock(front.path):
        front.put(0)
        wait_until(lambda: bool(front.health.conditions), 5, "reported that the spool is locked")
        front.put(1)

    wait_until(lambda: front.stored() == [0, 1], 5, "wrote both")
    wait_until(lambda: not bool(front.health.conditions), 5, "cleared the condition")


def test_the_writer_keeps_the_order(make_front: Callable[..., Front]) -> None:
    front = make_front(queue_max=1 << 24)
    front.intake.start()
    for number in range(0, 2000, 4):
        front.put(*range(number, number + 4))
    taken: list[int] = []
    while len(taken) < 2000:
        taken += [number_of(item) for item in front.queue.take(100, 5.0)]

    assert taken == front.stored() == list(range(2000))


def test_a_flush_includes_what_the_writer_was_about_to_write(front: Front) -> None:
    front.intake.start()
    with front.intake._flushing:
        front.put(0)
        wait_until(front.intake._bell.empty, 5, "woke the writer, which waits for the lock")
        front.put(1)
    front.intake.flush()

    assert front.stored() == [0, 1]


def test_a_close_writes_the_rest(front: Front) -> None:
    front.intake.start()
    front.put(*range(50))
    front.intake.close()
    front.open()

    assert front.stored() == list(range(50))


# --- waiting on the queue


def test_take_respects_limit_and_timeout(front: Front) -> None:
    assert front.queue.take(10, 0.0) == []
    assert front.queue.take(10, 0.01) == []
    front.put(0, 1, 2)
    assert front.queue.take(0, 0.0) == []
    assert [number_of(item) for item in front.queue.take(2, None)] == [0, 1]


@pytest.mark.parametrize("by", ["a registration", "one that is due", "a plain dict", "wake"])
def test_a_waiting_take_is_ended(make_front: Callable[..., Front], by: str) -> None:
    front = make_front(queue_max=0 if by == "one that is due" else THREE)
    taken: list[list[dict[str, Any]]] = []
    thread = threading.Thread(target=lambda: taken.append(front.queue.take(10, None)), daemon=True)
    thread.start()
    wait_until(lambda: front.queue.not_empty._waiters, 5, "it waits")  # type: ignore[attr-defined]
    if by in ("a registration", "one that is due"):
        front.put(0)
    elif by == "a plain dict":
        front.queue.put(meta_of(0))
    else:
        front.queue.wake()
    thread.join(5)

    assert not thread.is_alive()
    on_it = by in ("a registration", "a plain dict")
    assert [number_of(item) for item in taken[0]] == ([0] if on_it else [])


def test_a_wake_is_remembered_until_the_next_take(front: Front) -> None:
    front.queue.wake()

    assert front.queue.take(10, None) == []


# --- ages


@pytest.mark.parametrize("step", [-86_400.0, -90.0, 90.0, 86_400.0])
def test_the_age_of_the_oldest_ignores_steps_of_the_wall_clock(front: Front, step: float) -> None:
    front.intake.measure()
    assert front.intake.measured.oldest is None
    front.put(0, received=front.clock.now)
    first = front.clock.monotonic()
    front.clock.advance(10)
    front.clock.step(step)
    front.put(1, received=front.clock.now)
    second = front.clock.monotonic()
    front.clock.advance(10)

    for arrival in (first, second):
        front.intake.measure()
        assert front.intake.measured.oldest == pytest.approx(arrival)
        assert front.intake.measured.bytes == front.spool.bytes
        (oldest, *_) = front.from_queue(1)
        front.spool.apply([Transition(State.PENDING, Event.KNOWN, [oldest.id])])
    front.intake.measure()
    assert front.intake.measured.oldest is None
