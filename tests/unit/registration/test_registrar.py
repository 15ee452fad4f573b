"""The registrar, with real files, a real spool, a real database, and a clock that the tests move."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from socs_monitor.registration.retry import StoppedError
from socs_monitor.registration.workers import SMALL
from socs_monitor.spool.intake import BATCH
from socs_monitor.wire.publisher import data_file
from tests.chain import SETTLE_S, Chain, Clock, md5, write_lock
from tests.testbed.processes import wait_until


def test_a_file_is_registered_at_once_and_settles_later(chain: Chain, clock: Clock) -> None:
    sum_ = chain.write("a.dat", b"content")
    chain.accept("a.dat")
    assert chain.counts() == {"received": 1, "pending": 1}

    assert chain.step()
    (row,) = chain.rows()
    assert (row["local_md5sum"], row["timestamp"]) == (sum_, clock.now)
    assert row["remote_path"] == "17000/crate1slot2/1700000000_act/outputs/a.dat"
    assert chain.counts() == {"received": 1, "registered": 1}

    clock.advance(SETTLE_S - 0.01)
    chain.step()
    assert chain.counts() == {"received": 1, "registered": 1}
    clock.advance(0.02)
    chain.step()
    assert chain.counts() == {"received": 1, "settled": 1}
    assert chain.rows() == [row]
    assert not chain.step(), "nothing is left to do"


def test_the_backlog_is_registered_in_order_beside_new_registrations(chain: Chain) -> None:
    names = [f"{number:03}.dat" for number in range(2 * BATCH + 10)]
    for name in names:
        chain.write(name, name.encode())
        chain.accept(name)
    chain.reopen()
    chain.write("new.dat", b"new")
    chain.accept("new.dat")

    chain.step()
    assert [name for name in chain.sums() if name != "new.dat"] == names
    assert chain.sums() == {name: md5(name.encode()) for name in names} | {"new.dat": md5(b"new")}


def test_a_plain_dict_on_the_queue_is_a_registration_in_the_spool(chain: Chain) -> None:
    sum_ = chain.write("a.dat", b"a")
    chain.queue.put({**data_file(str(chain.path("a.dat")), action="act", action_ts="1"), "pub_id": "somebody"})
    chain.step()
    assert chain.sums() == {"a.dat": sum_}
    assert chain.counts() == {"received": 1, "registered": 1}


def test_a_plain_dict_on_the_queue_survives_a_stop_while_the_spool_is_locked(chain: Chain) -> None:
    sum_ = chain.write("a.dat", b"a")
    chain.queue.put({**data_file(str(chain.path("a.dat")), action="act", action_ts="1"), "pub_id": "somebody"})
    with write_lock(chain.spool_path), pytest.raises(StoppedError):
        chain.registrar.step(0.0)
    chain.registrar.begin()
    chain.step()
    assert chain.sums() == {"a.dat": sum_}


def test_run_once_handles_all_that_has_arrived_and_returns(tmp_path: Path) -> None:
    chain = Chain(tmp_path, threads=True)
    sums = {name: chain.write(name, os.urandom(size)) for name, size in (("small", 1), ("large", 2 * SMALL))}
    for name in (*sums, "missing"):
        chain.accept(name)

    chain.registrar.run(once=True)

    assert chain.sums() == sums
    assert chain.counts() == {"received": 3, "registered": 2, "waiting": 1}
    chain.crash()


def test_run_ends_when_stopped_and_goes_on_when_run_again(tmp_path: Path) -> None:
    chain = Chain(tmp_path, threads=True)
    for round_ in range(3):
        with chain.running():
            chain.write(f"{round_}.dat", b"x")
            chain.accept(f"{round_}.dat")
            wait_until(lambda n=round_: chain.spool.counts["registered"] == n + 1, 5, "the file is registered")
    assert list(chain.sums()) == ["0.dat", "1.dat", "2.dat"]
    chain.crash()


# --- files that are not there, or not readable


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


def test_a_crash_repeats_the_delay_and_spends_no_attempt(chain: Chain, clock: Clock) -> None:
    chain.accept("late.dat")
    for _ in range(5):
        chain.step()
        clock.advance_to(chain.next_due())
    chain.step()
    for _ in range(3):
        clock.advance(1)
        chain.reopen()
        chain.step()
        assert chain.next_due() - clock.monotonic() == pytest.approx(0.1 * 2**5)
    clock.advance_to(chain.next_due())
    chain.step()
    assert chain.next_due() - clock.monotonic() == pytest.approx(0.1 * 2**6)


def give_up(chain: Chain, clock: Clock) -> None:
    """Let the only waiting registration be given up."""
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


def test_dead_letters_are_retried_by_id_or_discarded(chain: Chain, clock: Clock) -> None:
    for name in ("a.dat", "b.dat", "c.dat"):
        chain.accept(name)
        give_up(chain, clock)
    first, second, third = (letter.id for letter in chain.spool.dead())
    sums = {name: chain.write(name, name.encode()) for name in ("a.dat", "b.dat", "c.dat")}

    assert chain.registrar.retry([second, 999]) == 1
    chain.step()
    assert chain.sums() == {"b.dat": sums["b.dat"]}
    assert chain.spool.discard([first, second]) == 1
    assert chain.counts() == {"received": 3, "discarded": 1, "registered": 1, "dead": 1}
    assert chain.registrar.retry() == 1
    chain.step()
    assert chain.sums() == {name: sums[name] for name in ("b.dat", "c.dat")}
    assert [letter.id for letter in chain.spool.dead() if letter.id == third] == []


def test_a_retried_dead_letter_is_waited_for_another_hour(chain: Chain, clock: Clock) -> None:
    chain.accept("never.dat")
    give_up(chain, clock)
    begin = clock.now

    chain.registrar.retry()
    chain.step()
    assert chain.next_due() - clock.monotonic() == pytest.approx(0.1)
    give_up(chain, clock)
    assert clock.now - begin >= 3600


def test_a_registered_file_that_is_gone_at_its_recheck_is_done(chain: Chain, clock: Clock) -> None:
    chain.write("a.dat", b"content")
    chain.accept("a.dat")
    chain.step()
    chain.archive("a.dat", remove=True)
    (row,) = chain.rows()
    clock.advance(SETTLE_S)
    chain.step()
    assert chain.counts() == {"received": 1, "settled": 1}
    assert chain.rows() == [row]


@pytest.mark.parametrize("stopped", [False, True])
def test_a_missing_file_with_a_row_settles_instead_of_being_given_up(chain: Chain, clock: Clock, stopped: bool) -> None:
    chain.write("a.dat", b"content")
    chain.accept("a.dat")
    chain.step()
    if stopped:  # before the re-check, which a start forgets
        chain.archive("a.dat", remove=True)
        chain.reopen()
    else:
        clock.advance(SETTLE_S)
        chain.step()
        chain.archive("a.dat", remove=True)
        chain.accept("a.dat")
    rows = chain.rows()
    chain.step()
    assert chain.spool.counts["waiting"] == 1
    give_up(chain, clock)
    received = chain.spool.counts["received"]
    assert chain.counts() == {"received": received, "settled": received}
    assert chain.rows() == rows
    assert [line for line in chain.said if line[0] == "error"] == []


@pytest.mark.parametrize("content", [b"content", b"another"])
def test_a_file_removed_before_it_was_registered_again_is_waited_for(
    chain: Chain, clock: Clock, content: bytes
) -> None:
    chain.write("a.dat", b"content")
    chain.accept("a.dat")
    chain.step()
    chain.archive("a.dat", remove=True)
    clock.advance(SETTLE_S)
    chain.step()

    chain.accept("a.dat")
    chain.step()
    assert chain.counts() == {"received": 2, "settled": 1, "waiting": 1}
    sum_ = chain.write("a.dat", content)
    clock.advance(0.1)
    chain.step()
    (row,) = chain.rows()
    assert (row["local_md5sum"], row["removed"]) == (sum_, None)
    assert row["remote_md5sum"] == (sum_ if content == b"content" else None), "what is archived is not copied again"


def test_restarts_do_not_count_a_file_again(chain: Chain, clock: Clock) -> None:
    chain.write("a.dat", b"content")
    chain.accept("a.dat")
    chain.step()
    for _ in range(5):
        chain.registrar.begin()
        chain.step()

    streams = chain.health.data(chain.spool.counts)["streams"]
    assert streams["crate1slot2"]["files_today"] == 1


def test_restarts_do_not_delay_the_recheck(chain: Chain, clock: Clock) -> None:
    chain.write("a.dat", b"content")
    chain.accept("a.dat")
    chain.step()
    for _ in range(10):
        chain.reopen()
        chain.step()
    clock.advance(SETTLE_S)
    chain.step()
    assert chain.counts() == {"received": 1, "settled": 1}


def test_files_that_cannot_be_opened_are_retried(chain: Chain, clock: Clock) -> None:
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


def test_anything_but_a_regular_file_is_refused(chain: Chain) -> None:
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
