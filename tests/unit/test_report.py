"""The session data of real parts, and the conditions: when they begin, what they say, and that each ends by itself."""

from __future__ import annotations

import contextlib
import errno
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from socs_monitor.health.conditions import FILE_MISSING_S
from socs_monitor.health.log import THROTTLE_S
from socs_monitor.report import BACKLOG_S, LOSS_S, NEARLY_FULL, Report
from socs_monitor.wire.sequences import GRACE_S, Sequences
from tests import chain
from tests.chain import Chain, Clock, write_lock
from tests.testbed.processes import wait_until
from tests.unit.health.test_logpipe import LINE, Pipe
from tests.unit.wire.test_receiver import ASKED, overflow, twisted_lets_go_of_it
from tests.unit.wire.test_receiver import Bench as Port

SENDER = ("10.0.0.1", 40000)


class Bench:
    """A report of a chain, a port and sequences; all but the port have the chain's clock."""

    def __init__(self, chain: Chain, clock: Clock) -> None:
        self.chain = chain
        self.clock = clock
        self.port = Port()
        self.sequences = Sequences(clock, clock.monotonic)
        self.report = Report(chain.health, self.sequences, chain.spool, chain.intake, clock.monotonic)
        self.report.receiver = self.port.receiver

    def arrive(self, *numbers: int, id_: str = "crate1slot2") -> None:
        for number in numbers:
            self.sequences.seen(SENDER, {"id": id_, "script": "undeclared", "seq_no": number})

    def look(self, after: float = 0.0) -> dict[str, Any]:
        """Let time pass, update the report, and return the session data."""
        self.clock.advance(after)
        self.chain.intake.measure()
        self.report.update()
        data = json.loads(json.dumps(self.report.data()))
        assert len(json.dumps(data)) < 100_000
        return data

    def degraded(self, after: float = 0.0) -> dict[str, str]:
        degraded: dict[str, str] = self.look(after)["degraded"]
        return degraded

    def lines(self, event: str) -> list[tuple[str, str]]:
        """Levels and lines of an event."""
        return [(level, text) for level, text in self.chain.said if f"| event={event}" in text]


@pytest.fixture
def bench(chain: Chain, clock: Clock) -> Iterator[Bench]:
    bench = Bench(chain, clock)
    yield bench
    bench.port.close()


def test_the_session_data_has_all_the_documented_keys(bench: Bench, clock: Clock) -> None:
    bench.chain.write("x", b"x")
    bench.chain.accept("x")
    bench.look()
    clock.advance(2)
    data = bench.look()

    assert data["queue"] == {"depth": 1, "oldest": 2.0}
    assert data["lost"] == {"gaps": 0, "kernel": 0, "reordered": 0, "senders": []}
    socket_data = {"buffer_asked": ASKED, "buffer": ASKED, "rebinds": 0, "listening": True}
    assert data["socket"] == socket_data
    assert data["spool"] == {"bytes": bench.chain.spool.bytes, "max_bytes": bench.chain.spool.max_bytes}
    assert data["spool"]["bytes"] > 0
    assert data["streams"] == {}
    assert data["log"] == {"dropped": 0}
    assert data["database"] == {"write": 0.0, "write_max": 0.0, "errors": 0, "corrected": 0, "row_without_file": 0}
    bench.chain.step()
    assert bench.report.data()["queue"] == {"depth": 0, "oldest": 0.0}, "measured before it had its row"
    data = bench.look()
    assert data["queue"] == {"depth": 0, "oldest": 0.0}
    assert data["files"]["last_time"] == data["timestamp"] == clock.now
    assert data["streams"] == {"crate1slot2": {"files_today": 1, "last_file": clock.now, "last_metadata": None}}
    assert 0 < data["database"]["write"] == data["database"]["write_max"] < 5
    assert data["degraded"] == {}


def test_a_file_that_changed_is_not_counted_again(bench: Bench, clock: Clock) -> None:
    bench.chain.write("x", b"x")
    bench.chain.accept("x")
    bench.chain.step()
    bench.chain.write("x", b"y")
    clock.advance(10)
    bench.chain.step()

    assert len(bench.lines("registered")) == 2
    assert bench.look()["streams"]["crate1slot2"]["files_today"] == 1


def test_before_there_is_a_port_nobody_listens(bench: Bench) -> None:
    bench.report.receiver = None

    data = bench.look()
    assert data["socket"] == {"buffer_asked": 0, "buffer": 0, "rebinds": 0, "listening": False}
    assert data["degraded"] == {}


def test_lost_messages_are_reported_and_degrade_for_five_minutes(bench: Bench, clock: Clock) -> None:
    bench.arrive(0, 4)
    seen = clock.now
    assert bench.degraded() == {}, "they may still come"
    data = bench.look(GRACE_S)

    sender = {"sender": "10.0.0.1:40000", "id": "crate1slot2", "script": "undeclared", "lost": 3, "last": seen}
    assert data["lost"] == {"gaps": 3, "kernel": 0, "reordered": 0, "senders": [sender]}
    reason = data["degraded"]["messages_lost"]
    assert reason.startswith("Lost 3 messages from crate1slot2 (10.0.0.1:40000) at 2023-11-14 22:13:")
    assert reason.endswith("Run: socs-monitor backfill ROOT")
    ((level, text),) = bench.lines("messages_lost")
    assert level == "warn"
    assert text == f"{reason} | event=messages_lost sender=10.0.0.1:40000 id=crate1slot2 script=undeclared lost=3"
    assert data["problems"][-1]["text"] == reason
    assert bench.degraded(LOSS_S - 1)
    assert bench.degraded(1) == {}


def test_any_number_of_losses_is_one_line_per_minute(bench: Bench) -> None:
    for number in range(0, 200, 2):
        bench.arrive(number)
        bench.look(GRACE_S / 2)
    bench.look(THROTTLE_S)

    assert 2 <= len(bench.lines("messages_lost")) <= 3
    assert bench.look()["lost"]["gaps"] == 99
    assert "more like this in the last 60 s" in bench.lines("messages_lost")[-1][1]


def test_kernel_drops_degrade_for_five_minutes(bench: Bench) -> None:
    assert bench.degraded() == {}
    dropped = overflow(bench.port)
    data = bench.look()

    assert data["lost"]["kernel"] == dropped > 0
    reason = data["degraded"]["kernel_drops"]
    assert reason.startswith(f"The kernel dropped {dropped} datagrams")
    assert reason.endswith("Run: socs-monitor backfill ROOT")
    assert [level for level, _ in bench.lines("kernel_drops")] == ["warn"]
    bench.port.receiver.asked = 2 * ASKED
    overflow(bench.port)
    assert bench.degraded()["kernel_drops"].endswith(f"Run: sysctl -w net.core.rmem_max={2 * ASKED}")
    dropped = bench.look()["lost"]["kernel"]
    assert bench.degraded(LOSS_S - 1)
    assert bench.degraded(1) == {}
    assert bench.look()["lost"]["kernel"] == dropped


@twisted_lets_go_of_it
def test_a_lost_port_degrades_until_it_is_bound_again(bench: Bench) -> None:
    bench.port.break_socket(OSError(errno.EIO, "broken"))
    bench.port.receiver.socket._real.close()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(bench.port.address)
        bench.port.read()
        data = bench.look()
        assert data["socket"]["listening"] is False
        assert "cannot be bound" in data["degraded"]["socket"]
        assert "ss -ulpn" in data["degraded"]["socket"]
    bench.port.reactor.advance(1)
    data = bench.look()

    assert (data["degraded"], data["socket"]["rebinds"]) == ({}, 1)


def test_a_backlog_of_more_than_a_minute_degrades_until_the_row_is_written(bench: Bench, clock: Clock) -> None:
    with contextlib.ExitStack() as lock:

        def locked() -> bool:
            assert set(bench.degraded(BACKLOG_S)) == {"database"}
            degraded = bench.degraded(1)
            assert set(degraded) == {"database", "backlog"}
            assert "61 s" in degraded["backlog"]
            assert bench.look()["queue"] == {"depth": 1, "oldest": BACKLOG_S + 1}
            lock.close()
            return True

        bench.chain.write("x", b"x")
        bench.chain.accept("x")
        lock.enter_context(write_lock(bench.chain.db_path))
        bench.chain.locked = locked
        bench.chain.step()
    assert bench.chain.health.counters.writes.errors == 1

    assert bench.degraded() == {}


def test_what_a_stopped_agent_left_is_a_backlog_a_minute_after_the_start(bench: Bench, clock: Clock) -> None:
    bench.chain.accept("x")
    clock.advance(10_000)
    bench.chain.reopen()
    bench = Bench(bench.chain, clock)

    data = bench.look(BACKLOG_S)
    bench.port.close()
    assert data["queue"] == {"depth": 1, "oldest": 10_000 + BACKLOG_S}
    assert data["degraded"] == {}
    assert set(bench.degraded(1)) == {"backlog"}


def test_a_nearly_full_spool_degrades_until_it_has_room(bench: Bench, clock: Clock) -> None:
    spool = bench.chain.spool
    bench.chain.accept("x", filler="x" * 100_000)
    bench.chain.write("x", b"x")
    spool.max_bytes = int(spool.bytes / NEARLY_FULL) + 1
    assert bench.degraded() == {}
    spool.max_bytes = int(spool.bytes / NEARLY_FULL) - 1
    reason = bench.degraded()["spool_size"]
    assert f"{spool.bytes} of its {spool.max_bytes} bytes" in reason
    assert "--spool-size" in reason
    bench.chain.step()
    clock.advance(10)
    bench.chain.step()

    assert bench.degraded() == {}


def test_a_missing_file_degrades_for_an_hour_and_a_refused_one_does_not(bench: Bench, clock: Clock) -> None:
    bench.chain.accept("x", action="..")
    bench.chain.step()
    assert bench.look()["files"]["dead"] == 1
    assert bench.degraded() == {}
    ((level, text),) = bench.lines("refused")
    assert level == "warn"
    assert f"sender={chain.SENDER} " in text
    bench.chain.accept("never_comes")
    while bench.look()["files"]["dead"] == 1:
        bench.chain.step()
        clock.advance(60)
    reason = bench.degraded()["file_missing"]

    assert "never_comes: No such file or directory, given up after 1 h" in reason
    ((level, text),) = bench.lines("file_missing")
    assert level == "error"
    assert f"sender={chain.SENDER} id=crate1slot2 path={bench.chain.path('never_comes')}" in text
    assert bench.degraded(FILE_MISSING_S - 120)
    assert bench.degraded(120) == {}


def test_dropped_lines_of_the_log_are_reported_when_it_is_read_again(bench: Bench) -> None:
    pipe = Pipe()
    bench.report.log = pipe.log
    count = pipe.fill()
    data = bench.look()
    assert (data["log"], data["degraded"], bench.lines("log_dropped")) == ({"dropped": 10}, {}, [])
    pipe.read((count - 10) * len(LINE))
    wait_until(lambda: not pipe.log.stuck, 10, "it is read again")
    bench.look()
    bench.look(THROTTLE_S)
    pipe.close()

    ((level, text),) = bench.lines("log_dropped")
    assert level == "warn"
    assert text.startswith("Dropped 10 lines of this log because ")
    assert text.endswith(" | event=log_dropped lines=10")


def test_an_idle_agent_logs_nothing(bench: Bench) -> None:
    for _ in range(1000):
        bench.look(1)

    assert bench.chain.said == []


def test_discarded_dead_letters_are_one_line_per_minute(bench: Bench) -> None:
    bench.port.close()
    bench.chain.limits["max_dead"] = 2
    bench.chain.reopen()
    bench = Bench(bench.chain, bench.clock)
    for number in range(10):
        bench.chain.accept(f"{number}", action="..")
        bench.chain.step()
        bench.look()
    bench.port.close()
    assert bench.look()["files"]["dead"] == 2
    bench.look(THROTTLE_S)

    assert [level for level, _ in bench.lines("dead_letters")] == ["warn", "warn"]
    assert "count=7" in bench.lines("dead_letters")[1][1]
