"""What is a loss and what is none, for any order of arrival; and that no sender can make it cost anything."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from socs_monitor.wire.sequences import (
    GRACE_S,
    MAX_JUMP,
    MAX_RANGES,
    MAX_SENDERS,
    MAX_SHOWN,
    REPEAT_WINDOW,
    Loss,
    Sequences,
)
from tests.chain import Clock

ADDR = ("10.0.0.1", 40000)
WINDOW = 20


class Bench(Sequences):
    """Sequences with a clock of their own; a message's time is that of its number, unless told otherwise."""

    def __init__(self) -> None:
        self.clock = Clock()
        super().__init__(self.clock, self.clock.monotonic)

    def arrive(
        self, numbers: Iterable[Any], begin: float | None = 1000.0, addr: tuple[str, int] = ADDR, **more: Any
    ) -> None:
        for number in numbers:
            sent = {} if begin is None else {"time": begin + number}
            self.seen(addr, {"id": "crate1slot2", "script": "undeclared", "seq_no": number, **sent, **more})

    def settled(self) -> int:
        """How many are lost in all, some time later."""
        self.clock.advance(GRACE_S)
        self.settle()
        return self.lost


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_messages_in_order_lose_nothing_wherever_they_begin(bench: Bench) -> None:
    bench.arrive(range(500, 1500))

    assert bench.settled() == 0
    assert bench.latest() == []


def test_a_loss_is_reported_once_with_sender_number_and_time(bench: Bench) -> None:
    bench.arrive([0, 1, 5])
    seen = bench.clock.now
    assert bench.settle() == [], "they may still come"
    bench.clock.advance(GRACE_S)

    assert bench.settle() == [Loss("10.0.0.1:40000", "crate1slot2", "undeclared", 3, seen)]
    assert bench.settle() == []
    assert (bench.lost, bench.reordered) == (3, 0)
    bench.arrive([8])
    bench.clock.advance(GRACE_S)
    assert [loss.lost for loss in bench.settle()] == [2]
    assert [(loss.lost, loss.last) for loss in bench.latest()] == [(5, seen + GRACE_S)]


def test_a_late_message_is_no_loss(bench: Bench) -> None:
    bench.arrive([0, 2, 1, 3])

    assert bench.settled() == 0
    assert bench.reordered == 1


def test_a_very_late_message_is_no_longer_counted_as_lost(bench: Bench) -> None:
    bench.arrive([0, 4])
    assert bench.settled() == 3
    bench.arrive([2])
    assert (bench.lost, bench.latest()[0].lost, bench.reordered) == (2, 2, 1)
    bench.arrive([2, 1, 3])

    assert (bench.settled(), bench.latest(), bench.reordered) == (0, [], 3)


@pytest.mark.parametrize("begin", [1000.0, None], ids=["with time", "without time"])
@pytest.mark.parametrize("count", [1, 5, 5000])
def test_a_repeated_message_is_no_loss(bench: Bench, count: int, begin: float | None) -> None:
    bench.arrive(range(count), begin)
    bench.arrive(range(max(0, count - REPEAT_WINDOW), count), begin)
    bench.arrive([0] if begin else [], begin)
    bench.arrive(range(count, count + 3), begin)

    assert (bench.settled(), bench.reordered) == (0, 0)


@pytest.mark.parametrize("count", [1, 3, 5000])
def test_a_restarted_sender_loses_nothing_and_is_followed_at_once(bench: Bench, count: int) -> None:
    bench.arrive(range(count), begin=1000.0)
    bench.arrive([0, 1, 3], begin=10_000.0)

    assert bench.settled() == 1
    bench.arrive([4, 5], begin=10_000.0)
    assert bench.settled() == 1


def test_a_sender_without_times_has_restarted_if_its_number_is_far_back(bench: Bench) -> None:
    bench.arrive(range(REPEAT_WINDOW + 10), begin=None)
    bench.arrive([0, 1, 3], begin=None)

    assert bench.settled() == 1


def test_what_is_missing_when_a_sender_restarts_is_lost(bench: Bench) -> None:
    bench.arrive([0, 10], begin=1000.0)
    bench.arrive([0, 1, 2], begin=10_000.0)

    assert bench.settled() == 9


@pytest.mark.parametrize("jump", [MAX_JUMP + 2, 2**62, -(2**62)])
def test_an_absurd_jump_is_another_sequence(bench: Bench, jump: int) -> None:
    bench.arrive([100, 100 + jump, 101 + jump, 103 + jump], begin=None)

    assert bench.settled() == 1


def test_a_large_jump_is_a_loss(bench: Bench) -> None:
    bench.arrive([0, MAX_JUMP])

    assert bench.settled() == MAX_JUMP - 1


@pytest.mark.parametrize("change", ["port", "host", "id", "script"])
def test_address_id_and_script_each_identify_a_sequence(bench: Bench, change: str) -> None:
    addr = {"port": ("10.0.0.1", 40001), "host": ("10.0.0.2", 40000)}.get(change, ADDR)
    more = {change: "another"} if addr is ADDR else {}
    bench.arrive([0, 1, 2])
    bench.arrive([100, 101], addr=addr, **more)
    bench.arrive([3, 4])

    assert bench.settled() == 0
    bench.arrive([200], addr=addr, **more)
    assert bench.settled() == 98


def test_a_message_dropped_by_its_sender_is_not_a_loss(bench: Bench) -> None:
    bench.arrive([0, 1])
    bench.arrive([3], type="backend_error")
    bench.arrive([4])
    assert bench.settled() == 0
    bench.arrive([7], type="backend_error")

    assert bench.settled() == 1
    bench.arrive([8], type="backend_error")
    assert bench.settled() == 1


ODD = [None, True, 1.0, "1", [], {}, 2**63, -(2**63), 10**4000, float("nan")]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd)[:20])
@pytest.mark.parametrize("field", ["seq_no", "id", "script", "time", "type"])
def test_a_message_with_odd_fields_is_ignored(bench: Bench, field: str, odd: Any) -> None:
    bench.arrive([0, 1])
    bench.seen(ADDR, {"id": "crate1slot2", "script": "undeclared", "seq_no": 2, "time": 1002.0, field: odd})
    bench.seen(ADDR, {})
    bench.arrive([2, 3])

    assert bench.settled() == 0


def test_long_names_are_not_remembered(bench: Bench) -> None:
    bench.arrive([0, 2], id="x" * 1000)
    bench.arrive([0, 2], id="x\n" * 50, script="é" * 100)
    bench.clock.advance(GRACE_S)

    (loss,) = bench.settle()
    assert loss.id.isprintable()
    assert len(loss.id) <= 100


def test_silent_senders_are_forgotten_and_active_ones_are_not(bench: Bench) -> None:
    bench.arrive([0])
    for port in range(3 * MAX_SENDERS):
        bench.arrive([0, 10], addr=("10.0.0.9", port))
        bench.arrive([port + 1])
    remembered = {**bench._senders, **bench._former}

    assert len(remembered) <= MAX_SENDERS
    assert len(bench._unsettled) <= MAX_SENDERS
    assert bench.settled() == 9 * MAX_SENDERS, "those of the others are not counted"
    assert len(bench._unsettled) == 0
    assert len(bench.latest()) == MAX_SHOWN


def test_a_sender_with_many_gaps_takes_little_memory(bench: Bench) -> None:
    bench.arrive(range(0, 10 * MAX_RANGES, 2))
    (sender,) = bench._senders.values()

    assert len(sender.missing) == MAX_RANGES
    assert sys.getsizeof(sender.missing) < 2000
    assert bench.settled() == 5 * MAX_RANGES - 1
    assert len(bench._losers) == 1


numbers = st.integers(2, 200).flatmap(
    lambda count: st.tuples(
        st.just(count),
        st.lists(st.integers(0, WINDOW), min_size=count, max_size=count),  # how late each one comes
        st.lists(st.integers(0, WINDOW) | st.none(), min_size=count, max_size=count),  # and a second time
        st.sets(st.integers(0, count - 1)),
    )
)


def arrival(late: Sequence[int], again: Sequence[int | None], dropped: set[int]) -> list[int]:
    """The numbers in the order in which they arrive."""
    times = [(number + by, number) for number, by in enumerate(late) if number not in dropped]
    times += [(number + by, number) for number, by in enumerate(again) if by is not None and number not in dropped]
    return [number for _, number in sorted(times)]


@given(numbers, st.sampled_from([1000.0, None]), st.integers(1, 50))
def test_exactly_what_never_arrives_is_lost_in_any_order(
    case: tuple[int, list[int], list[int | None], set[int]], begin: float | None, settle_each: int
) -> None:
    count, late, again, dropped = case
    bench = Bench()
    bench.arrive([-1], begin)
    for place, number in enumerate(arrival(late, again, dropped)):
        bench.arrive([number], begin)
        if place % settle_each == 0:
            bench.settled()
    bench.arrive([count], begin)

    assert bench.settled() == len(dropped)
    assert sum(loss.lost for loss in bench.latest()) == len(dropped)


@given(st.lists(st.tuples(st.integers(-5, 5) | st.integers(-(2**63), 2**63), st.floats() | st.none()), max_size=50))
def test_the_counts_stay_sane_for_any_numbers(messages: list[tuple[int, float | None]]) -> None:
    bench = Bench()
    for number, sent in messages:
        bench.arrive([number], begin=None, time=sent)
        bench.settled()

    assert 0 <= bench.lost <= MAX_JUMP * len(messages)
    assert bench.lost == sum(loss.lost for loss in bench.latest())
