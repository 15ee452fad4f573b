"""The wall clock steps, by a day at most: no delay, throttle, alarm or age notices. Only what is shown follows it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from socs_monitor.feeds.forwarding import BACKLOG_AGE_S
from socs_monitor.health.activity import MAX_STREAMS
from socs_monitor.health.log import THROTTLE_S
from socs_monitor.registration.retry import StoppedError
from socs_monitor.report import BACKLOG_S, LOSS_S
from socs_monitor.wire.sequences import GRACE_S
from tests.chain import SETTLE_S, Chain, Clock, execute, write_lock
from tests.unit.feeds.test_forwarding import NO_ROUTER
from tests.unit.feeds.test_forwarding import Bench as FeedBench
from tests.unit.test_report import Bench

DAY_S = 86_400.0


@pytest.fixture(params=[-DAY_S, -90.0, 90.0, DAY_S])
def step(request: pytest.FixtureRequest) -> float:
    """Seconds by which the wall clock steps."""
    seconds: float = request.param
    return seconds


@pytest.fixture
def bench(chain: Chain, clock: Clock) -> Iterator[Bench]:
    bench = Bench(chain, clock)
    yield bench
    bench.port.close()


def test_a_file_is_looked_at_again_when_it_is_due_and_not_before(chain: Chain, clock: Clock, step: float) -> None:
    chain.write("a.dat", b"content")
    chain.accept("a.dat")
    chain.step()
    clock.step(step)
    clock.advance(SETTLE_S - 0.5)
    chain.step()
    assert chain.counts() == {"received": 1, "registered": 1}
    clock.advance(1)
    chain.step()

    assert chain.counts() == {"received": 1, "settled": 1}


def test_a_missing_file_is_looked_for_when_it_is_due_and_not_before(chain: Chain, clock: Clock, step: float) -> None:
    chain.accept("late.dat")
    for _ in range(8):
        chain.step()
        clock.advance_to(chain.next_due())
    chain.step()
    sum_ = chain.write("late.dat", b"there at last")
    clock.step(step)
    clock.advance_to(chain.next_due() - 1)
    chain.step()
    assert chain.rows() == []
    clock.advance(1)
    chain.step()

    assert chain.sums() == {"late.dat": sum_}


@pytest.mark.parametrize("due", [1e-3, 1e6, 1_700_000_000.0], ids=["of an older boot", "of a longer one", "unix time"])
def test_what_waits_at_a_start_waits_no_longer_than_its_full_delay(chain: Chain, clock: Clock, due: float) -> None:
    chain.accept("late.dat")
    for _ in range(4):
        chain.step()
        clock.advance_to(chain.next_due())
    sum_ = chain.write("late.dat", b"there at last")
    execute(chain.spool_path, "UPDATE registrations SET due = ?", due)
    chain.reopen()
    chain.step()
    assert chain.rows() == [] or due < clock.monotonic()
    clock.advance(0.1 * 2**3)
    chain.step()

    assert chain.sums() == {"late.dat": sum_}


def test_the_age_of_the_oldest_registration_is_that_of_its_wait(bench: Bench, clock: Clock, step: float) -> None:
    seen = []

    def locked() -> bool:
        clock.step(step)
        assert bench.look(BACKLOG_S)["queue"] == {"depth": 1, "oldest": BACKLOG_S}
        assert set(bench.degraded()) == {"database"}
        seen.append(set(bench.degraded(1)))
        return False

    bench.chain.locked = locked
    bench.chain.write("a.dat", b"content")
    bench.chain.accept("a.dat")
    with write_lock(bench.chain.db_path), pytest.raises(StoppedError):
        bench.chain.step()

    assert seen == [{"database", "backlog"}]


def test_the_age_is_right_of_one_that_only_the_spool_holds(bench: Bench, clock: Clock, step: float) -> None:
    for name in ("a.dat", "b.dat"):
        bench.chain.accept(name)
        clock.advance(10)
    clock.step(step)
    bench.chain.registrar.begin()

    assert bench.look()["queue"] == {"depth": 2, "oldest": 20.0}


def test_a_late_message_has_its_time_of_grace_and_a_gap_its_alarm(bench: Bench, clock: Clock, step: float) -> None:
    bench.arrive(0, 2)
    clock.step(step)
    seen = clock.now
    assert bench.degraded(GRACE_S / 2) == {}
    data = bench.look(GRACE_S / 2)
    assert set(data["degraded"]) == {"messages_lost"}
    assert [sender["last"] for sender in data["lost"]["senders"]] == [seen]
    clock.step(step)

    assert set(bench.degraded(LOSS_S - 1)) == {"messages_lost"}
    assert bench.degraded(1) == {}


def test_a_throttled_line_is_written_once_a_minute(chain: Chain, clock: Clock, step: float) -> None:
    for number in range(3):
        chain.health.log.log_throttled("warn", "field", f"name {number}")
        chain.health.count_malformed("not JSON", "10.0.0.1")
        clock.step(step)
        chain.health.tick()
    assert len(chain.said) == 2, "one of each kind"
    clock.advance(THROTTLE_S)
    chain.health.tick()

    assert len(chain.said) == 4


def test_the_first_line_of_a_kind_is_written_at_once_even_just_after_a_boot(tmp_path: Path) -> None:
    chain = Chain(tmp_path, monotonic=lambda: 0.5)
    chain.health.log.log_throttled("warn", "field", "name")
    chain.health.count_malformed("not JSON", "10.0.0.1")
    chain.health.count_registered(1, ["a"], "/x")
    chain.crash()

    assert len(chain.said) == 3


def test_the_longest_write_is_of_the_last_minute(chain: Chain, clock: Clock, step: float) -> None:
    chain.health.counters.writes.wrote(3.0)
    clock.step(step)
    clock.advance(30)
    chain.health.counters.writes.wrote(0.1)
    assert chain.health.counters.writes.data()["write_max"] == 3.0
    clock.advance(31)

    assert chain.health.counters.writes.data()["write_max"] == 0.1


def test_the_stream_that_is_silent_longest_gives_way(chain: Chain, clock: Clock, step: float) -> None:
    for number in range(MAX_STREAMS):
        clock.advance(1)
        chain.health.counters.streams.registered([f"s{number}"])
    clock.step(step)
    chain.health.counters.streams.registered(["new"])
    clock.advance(1)
    chain.health.counters.streams.registered(["newer"])

    assert set(chain.health.counters.streams.data()) == {
        *(f"s{number}" for number in range(2, MAX_STREAMS)),
        "new",
        "newer",
    }


def test_a_session_message_waits_for_the_router_as_long_as_ever(step: float) -> None:
    bench = FeedBench()
    bench.agent.leave()
    bench.session(0)
    bench.clock.advance(1)
    bench.session(1)
    bench.clock.step(step)
    bench.clock.advance(BACKLOG_AGE_S)
    bench.agent.join()

    assert bench.numbers() == [1]
    assert bench.health.counters.unpublished == {NO_ROUTER: 1}
