"""The registrar, with real files, a real spool, a real database, and a clock that the tests move."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from socs_monitor import archive, crashpoint, intake
from socs_monitor.emulator import data_file
from socs_monitor.registration.lookup import SMALL, retry_delay
from tests.chain import SETTLE_S, Chain, Clock, md5
from tests.harness import wait_until


def test_a_file_is_registered_at_once_and_settles_later(chain: Chain, clock: Clock) -> None:
    sum_ = chain.write("a.dat", b"content")
    chain.accept("a.dat")
    assert chain.counts() == {"received": 1, "pending": 1}

    assert chain.step()
    (row,) = chain.rows()
    assert (row["local_md5sum"], row["timestamp"]) == (sum_, clock.now)
    assert row["remote_path"] == "17000/crate1slot2/1700000000_act/outputs/a.dat"
    assert chain.counts() == {"received": 1, "settling": 1}

    clock.advance(SETTLE_S - 0.01)
    chain.step()
    assert chain.counts() == {"received": 1, "settling": 1}
    clock.advance(0.02)
    chain.step()
    assert chain.counts() == {"received": 1, "settled": 1}
    assert chain.rows() == [row]
    assert not chain.step(), "nothing is left to do"


def test_what_the_spool_holds_comes_first_and_in_order(chain: Chain) -> None:
    names = [f"{number:03}.dat" for number in range(2 * intake.BATCH + 10)]
    for name in names:
        chain.write(name, name.encode())
        chain.accept(name)
    chain.reopen()
    chain.write("new.dat", b"new")
    chain.accept("new.dat")

    while chain.step():
        pass
    assert list(chain.sums()) == [*names, "new.dat"]
    assert chain.sums() == {name: md5(name.encode()) for name in names} | {"new.dat": md5(b"new")}


def test_what_is_put_on_the_queue_while_the_writer_is_at_work_overtakes_nothing(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted, go_on = threading.Event(), threading.Event()

    def reach(point: str) -> None:
        if point == "spooled" and threading.current_thread() is writer:
            accepted.set()
            go_on.wait(5)

    monkeypatch.setattr(crashpoint, "reach", reach)
    sums = {name: chain.write(name, name.encode()) for name in ("a.dat", "b.dat")}
    writer = threading.Thread(target=chain.accept, args=("a.dat",))
    taker = threading.Thread(target=chain.registrar.step, args=(0.0,))
    writer.start()
    accepted.wait(5)
    chain.queue.put({**data_file(str(chain.path("b.dat")), action="act", action_ts="1"), "pub_id": "somebody"})
    taker.start()
    taker.join(0.2)  # it may have to wait for the writer
    go_on.set()
    writer.join()
    taker.join()
    while chain.step():
        pass
    assert chain.sums() == sums


def test_run_once_handles_all_that_has_arrived_and_returns(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    sums = {name: chain.write(name, os.urandom(size)) for name, size in (("small", 1), ("large", 2 * SMALL))}
    for name in (*sums, "missing"):
        chain.accept(name)

    chain.registrar.run(once=True)

    assert chain.sums() == sums
    assert chain.counts() == {"received": 3, "settling": 2, "waiting": 1}
    chain.crash()


def test_run_ends_when_stopped_and_goes_on_when_run_again(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    for round_ in range(3):
        with chain.running():
            chain.write(f"{round_}.dat", b"x")
            chain.accept(f"{round_}.dat")
            wait_until(lambda n=round_: chain.spool.counts["settling"] == n + 1, 5, "the file is registered")
    assert list(chain.sums()) == ["0.dat", "1.dat", "2.dat"]
    chain.crash()


# --- files that are not there, or not readable


def test_the_wait_for_a_file_doubles_from_a_tenth_of_a_second_to_a_minute_for_an_hour() -> None:
    delays = []
    while (delay := retry_delay(len(delays), 3600.0)) is not None:
        delays.append(delay)

    assert delays[:10] == [pytest.approx(0.1 * 2**n) for n in range(10)]
    assert set(delays[10:]) == {60.0}
    assert 3600 <= sum(delays) < 3660


@pytest.mark.parametrize("attempts", [1023, 1024, 2**62])
def test_a_file_may_be_waited_for_any_number_of_times(attempts: int) -> None:
    assert retry_delay(attempts, math.inf) == 60.0
    assert retry_delay(attempts, 3600.0) is None


def test_a_late_file_is_found_when_it_is_due_and_not_before(chain: Chain, clock: Clock) -> None:
    chain.accept("late.dat")
    waits = []
    for _ in range(12):
        chain.step()
        assert chain.counts() == {"received": 1, "waiting": 1}
        waits.append(chain.next_due() - clock.monotonic())
        clock.advance(waits[-1])
    assert waits == [pytest.approx(min(0.1 * 2**n, 60.0), rel=1e-4) for n in range(12)]

    chain.step()
    sum_ = chain.write("late.dat", b"there at last")
    clock.advance_to(chain.next_due() - 0.01)
    chain.step()
    assert chain.rows() == []
    clock.advance(0.02)
    chain.step()
    assert chain.sums() == {"late.dat": sum_}
    clock.advance(SETTLE_S + 0.5)  # second looks are gathered
    chain.step()
    assert chain.counts() == {"received": 1, "settled": 1}


def test_the_wait_goes_on_where_it_was_after_a_crash(chain: Chain, clock: Clock) -> None:
    chain.accept("late.dat")
    for _ in range(5):
        chain.step()
        clock.advance_to(chain.next_due())
    chain.step()
    due = chain.next_due()

    chain.reopen()
    chain.step()
    assert chain.next_due() == due
    clock.advance_to(due)
    chain.step()
    assert chain.next_due() - clock.monotonic() == pytest.approx(0.1 * 2**6)


def give_up(chain: Chain, clock: Clock) -> None:
    """Let the only registration that waits wait in vain."""
    chain.step()
    while chain.spool.counts["waiting"]:
        clock.advance_to(chain.next_due())
        chain.step()


def test_a_file_that_never_comes_is_a_dead_letter_with_its_reason(chain: Chain, clock: Clock) -> None:
    begin = clock.now
    chain.accept("never.dat")
    give_up(chain, clock)

    assert 3600 <= clock.now - begin < 3700
    assert chain.counts() == {"received": 1, "dead": 1}
    ((name, reason, refused),) = chain.dead_letters()
    assert (name, refused) == ("never.dat", False)
    assert "No such file" in reason
    assert "given up after 1 h" in reason
    assert len([text for level, text in chain.said if level == "error"]) == 1
    assert len(chain.said) < 5, "a line a state change, not one a look"


def test_dead_letters_are_tried_again_by_id_or_discarded(chain: Chain, clock: Clock) -> None:
    for name in ("a.dat", "b.dat", "c.dat"):
        chain.accept(name)
        give_up(chain, clock)
    first, second, third = (letter.id for letter in chain.spool.dead())
    sums = {name: chain.write(name, name.encode()) for name in ("a.dat", "b.dat", "c.dat")}

    assert chain.registrar.retry([second, 999]) == 1
    chain.step()
    assert chain.sums() == {"b.dat": sums["b.dat"]}
    assert chain.spool.discard([first, second]) == 1
    assert chain.counts() == {"received": 3, "discarded": 1, "settling": 1, "dead": 1}
    assert chain.registrar.retry() == 1
    chain.step()
    assert chain.sums() == {name: sums[name] for name in ("b.dat", "c.dat")}
    assert [letter.id for letter in chain.spool.dead([third])] == []


def test_a_dead_letter_that_is_tried_again_has_its_whole_hour(chain: Chain, clock: Clock) -> None:
    chain.accept("never.dat")
    give_up(chain, clock)
    begin = clock.now

    chain.registrar.retry()
    chain.step()
    assert chain.next_due() - clock.monotonic() == pytest.approx(0.1)
    give_up(chain, clock)
    assert clock.now - begin >= 3600


def test_a_file_archived_and_removed_before_it_was_settled_is_done(chain: Chain, clock: Clock) -> None:
    chain.write("a.dat", b"content")
    chain.accept("a.dat")
    clock.advance(0.1)
    chain.step()
    clock.advance(1)
    chain.archive("a.dat", remove=True)
    (row,) = chain.rows()

    chain.reopen()
    chain.step()
    assert chain.counts() == {"received": 1, "settled": 1}
    assert chain.rows() == [row]


def test_a_file_removed_before_its_second_registration_was_looked_at_is_done(chain: Chain, clock: Clock) -> None:
    chain.write("a.dat", b"content")
    chain.accept("a.dat")
    chain.step()
    clock.advance(SETTLE_S)
    chain.step()
    clock.advance(60)
    chain.accept("a.dat")
    clock.advance(0.1)
    chain.archive("a.dat", remove=True)

    chain.step()
    assert chain.counts() == {"received": 2, "settled": 2}


@pytest.mark.parametrize("anew", [b"content", b"another"])
def test_a_file_removed_before_it_was_registered_again_is_waited_for(chain: Chain, clock: Clock, anew: bytes) -> None:
    chain.write("a.dat", b"content")
    chain.accept("a.dat")
    chain.step()
    chain.archive("a.dat", remove=True)
    clock.advance(SETTLE_S)
    chain.step()

    chain.accept("a.dat")
    chain.step()
    assert chain.counts() == {"received": 2, "settled": 1, "waiting": 1}
    sum_ = chain.write("a.dat", anew)
    clock.advance(0.1)
    chain.step()
    (row,) = chain.rows()
    assert (row["local_md5sum"], row["removed"]) == (sum_, None)
    assert row["remote_md5sum"] == (sum_ if anew == b"content" else None), "what is archived is not copied again"


def test_a_file_counts_once_however_often_the_process_starts(chain: Chain, clock: Clock) -> None:
    chain.write("a.dat", b"content")
    chain.accept("a.dat")
    chain.step()
    for _ in range(5):
        chain.registrar.begin()
        chain.step()

    streams = chain.stats.data(chain.spool.counts)["streams"]
    assert streams["crate1slot2"]["files_today"] == 1


def test_what_cannot_be_opened_is_tried_again(chain: Chain, clock: Clock) -> None:
    loop = chain.path("loop.dat")
    loop.parent.mkdir()
    loop.symlink_to(loop)
    chain.path("file").write_bytes(b"a file where a folder belongs")
    for name in ("loop.dat", "file/below.dat"):
        chain.accept(name)
    chain.step()
    assert chain.counts() == {"received": 2, "waiting": 2}

    loop.unlink()
    chain.path("file").unlink()
    sums = {"loop.dat": chain.write("loop.dat", b"1"), "below.dat": chain.write("file/below.dat", b"2")}
    clock.advance(0.1)
    chain.step()
    assert chain.sums() == sums


def test_what_is_no_file_is_refused(chain: Chain) -> None:
    chain.path("folder.dat").mkdir(parents=True)
    os.mkfifo(chain.path("fifo.dat"))
    chain.accept("folder.dat")
    chain.accept("fifo.dat")
    chain.accept("other.dat", archive_name="elsewhere")
    chain.step()

    letters = chain.dead_letters()
    assert [(name, refused) for name, _, refused in letters] == [
        ("folder.dat", True),
        ("fifo.dat", True),
        ("other.dat", True),
    ]
    for word, (_, reason, _) in zip(("directory", "FIFO", "elsewhere"), letters, strict=True):
        assert word in reason


def test_a_registration_that_nobody_foresaw_does_not_hold_up_the_others(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("poison.dat", "good.dat"):
        chain.write(name, b"content")
        chain.accept(name)
    candidates = archive.candidates

    def fail_on_poison(meta: archive.Meta) -> Iterator[archive.Entry]:
        if meta["path"].endswith("poison.dat"):
            raise KeyError("unheard of")
        return candidates(meta)

    monkeypatch.setattr(archive, "candidates", fail_on_poison)
    chain.step()

    assert list(chain.sums()) == ["good.dat"]
    ((_, reason, refused),) = chain.dead_letters()
    assert "unheard of" in reason
    assert refused
