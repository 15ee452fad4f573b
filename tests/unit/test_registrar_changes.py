"""The registrar and files that change, and files that are large."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from socs_monitor import finder, intake
from socs_monitor.checksum import checksum
from tests.chain import SETTLE_S, Chain, Clock, md5, write_lock
from tests.harness import wait_until


def test_a_file_that_grew_is_registered_again_ever_more_rarely_until_it_rests(chain: Chain, clock: Clock) -> None:
    content = b"x"
    chain.write("grows.dat", content)
    chain.accept("grows.dat")
    chain.step()
    waits = []
    for _ in range(7):
        content += b"x"
        sum_ = chain.write("grows.dat", content)
        begin = clock.now
        while chain.sums()["grows.dat"] != sum_:
            clock.advance(0.5)
            chain.step()
        waits.append(clock.now - begin)
    assert waits == [5, 10, 20, 40, 60, 60, 60]

    clock.advance(60)
    chain.step()
    assert chain.counts() == {"received": 1, "settled": 1}
    (row,) = chain.rows()
    assert (row["local_md5sum"], row["timestamp"]) == (sum_, clock.now - 60)


def test_a_file_that_changes_is_one_file_of_its_stream(chain: Chain, clock: Clock) -> None:
    chain.write("a.dat", b"content")
    chain.accept("a.dat")
    chain.step()
    new = chain.write("a.dat", b"more content")
    clock.advance(SETTLE_S)
    chain.step()
    assert chain.sums() == {"a.dat": new}
    assert list(chain.stats.streams.files().values()) == [1]


def test_one_that_vanishes_while_it_settles_keeps_its_row(chain: Chain, clock: Clock) -> None:
    sum_ = chain.write("a.dat", b"content")
    chain.accept("a.dat")
    chain.step()
    chain.path("a.dat").unlink()
    clock.advance(SETTLE_S)
    chain.step()
    assert chain.sums() == {"a.dat": sum_}
    assert chain.counts() == {"received": 1, "settled": 1}


@pytest.mark.parametrize("copied", [False, True])
def test_a_file_that_another_action_overwrites_keeps_the_row_of_the_former_action(
    chain: Chain, clock: Clock, copied: bool
) -> None:
    old = chain.write("plot.png", b"old")
    chain.accept("plot.png", action="first")
    chain.step()
    if copied:
        chain.archive("plot.png", remove=False)
    new = chain.write("plot.png", b"new content")
    clock.advance(1)
    chain.accept("plot.png", action="second")
    chain.step()

    first, second = chain.rows()
    assert (first["local_md5sum"], first["deletable"]) == (old, 0)
    assert (second["local_md5sum"], second["timestamp"]) == (new, clock.now)
    assert "second" in second["remote_path"]


def test_a_change_that_was_announced_under_another_action_belongs_to_that_one_alone(chain: Chain, clock: Clock) -> None:
    old = chain.write("plot.png", b"old")
    chain.accept("plot.png", action="first")
    chain.step()
    clock.advance(1)
    new = chain.write("plot.png", b"new content")
    chain.accept("plot.png", action="second")
    for _ in range(4):
        chain.step()
        clock.advance(SETTLE_S)

    assert [row["local_md5sum"] for row in chain.rows()] == [old, new]
    assert chain.counts() == {"received": 2, "settled": 2}


def test_an_announcement_that_comes_with_the_second_look_is_the_only_one_that_takes_the_new_content(
    chain: Chain, clock: Clock
) -> None:
    old = chain.write("plot.png", b"old")
    chain.accept("plot.png", action="first")
    chain.step()
    clock.advance(SETTLE_S + 0.5)
    new = chain.write("plot.png", b"new content")
    chain.accept("plot.png", action="second")
    for _ in range(4):
        chain.step()
        clock.advance(SETTLE_S)

    assert [row["local_md5sum"] for row in chain.rows()] == [old, new]
    assert chain.counts() == {"received": 2, "settled": 2}


def test_a_change_that_was_announced_for_a_place_of_another_file_belongs_to_no_former_action(
    chain: Chain, clock: Clock
) -> None:
    chain.write("1/plot.png", b"another file")
    chain.accept("1/plot.png", action="taken")
    old = chain.write("2/plot.png", b"old")
    chain.accept("2/plot.png", action="first")
    chain.step()
    chain.write("2/plot.png", b"new content")
    clock.advance(1)
    chain.accept("2/plot.png", action="taken")
    for _ in range(4):
        chain.step()
        clock.advance(SETTLE_S)

    assert chain.rows()[1]["local_md5sum"] == old
    ((name, reason, refused),) = chain.dead_letters()
    assert (name, refused) == ("plot.png", True)
    assert reason.startswith(f"{chain.path('1/plot.png')} holds its place in the archive: 17000/")


def test_a_file_that_changes_while_the_database_is_locked_is_hashed_again(chain: Chain, clock: Clock) -> None:
    chain.write("a.dat", b"old")
    chain.write("b.dat", b"b")
    chain.accept("other.dat")
    chain.step()
    with write_lock(chain.db_path):
        chain.accept("a.dat")
        chain.accept("b.dat")
        assert not chain.step()
        new = chain.write("a.dat", b"new content")
        chain.path("b.dat").unlink()
        clock.advance(5)
    chain.step()
    clock.advance(0.1)
    chain.step()

    assert chain.sums() == {"a.dat": new}, "a removed file has no row that can never be copied"
    assert chain.counts() == {"received": 3, "settling": 1, "waiting": 2}


def test_the_same_path_three_times_in_a_batch(chain: Chain) -> None:
    sum_ = chain.write("a.dat", b"content")
    for action in ("one", "two", "one"):
        chain.accept("a.dat", action=action)
    chain.step()

    assert [row["local_md5sum"] for row in chain.rows()] == [sum_, sum_]
    assert chain.counts() == {"received": 3, "settling": 3}


def large_file(chain: Chain, megabytes: int, name: str = "large.dat") -> None:
    """Make a sparse file."""
    chain.files.mkdir(exist_ok=True)
    with open(chain.path(name), "wb") as file:
        file.truncate(megabytes << 20)


def test_a_large_file_does_not_hold_up_small_ones(chain: Chain, clock: Clock) -> None:
    large_file(chain, 256)
    large = md5(bytes(256 << 20))
    small = chain.write("small.dat", b"small")
    chain.accept("large.dat")
    chain.accept("small.dat")
    chain.step()
    assert chain.sums() == {"small.dat": small}
    assert chain.counts() == {"received": 2, "settling": 1, "pending": 1}

    wait_until(chain.step, 30, "the large file is hashed")
    assert chain.sums() == {"small.dat": small, "large.dat": large}
    clock.advance(SETTLE_S)
    chain.step()
    assert chain.counts() == {"received": 2, "settled": 2}


def test_a_file_of_some_size_goes_before_the_rest_of_larger_ones(chain: Chain) -> None:
    for number in range(4):
        large_file(chain, 512, f"large{number}.dat")
        chain.accept(f"large{number}.dat")
    chain.step()
    large_file(chain, 1, "medium.dat")
    chain.accept("medium.dat")

    wait_until(chain.step, 30, "one of them is hashed")
    assert chain.sums() == {"medium.dat": md5(bytes(1 << 20))}
    chain.registrar.stop()
    chain.registrar._hashers.close()


def test_more_than_the_queue_holds_while_a_large_file_is_hashed(
    chain: Chain, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "QUEUE_MAX", 10)
    hashed: list[str] = []

    def noting(path: str, *arguments: Any) -> Any:
        found = checksum(path, *arguments)
        hashed.extend([path] if found else [])
        return found

    monkeypatch.setattr(finder, "checksum", noting)
    large_file(chain, 256)
    sums = {"large.dat": md5(bytes(256 << 20))}
    chain.accept("large.dat")
    chain.step()
    for number in range(15):
        sums[f"{number}.dat"] = chain.write(f"{number}.dat", b"%d" % number)
        chain.accept(f"{number}.dat")

    while len(chain.sums()) < len(sums):
        wait_until(chain.step, 30, "the next files are registered")
    assert chain.sums() == sums
    clock.advance(SETTLE_S)
    while chain.step():
        pass
    assert chain.counts() == {"received": 16, "settled": 16}
    assert sorted(hashed) == sorted(str(chain.path(name)) for name in sums), "each is hashed once"


def test_stopping_leaves_a_large_file_for_the_next_run(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    large_file(chain, 4096)
    chain.accept("large.dat")
    with chain.running():
        wait_until(lambda: [t for t in threading.enumerate() if t.name.startswith("hash")], 5, "it is being hashed")
    assert chain.counts() == {"received": 1, "pending": 1}
    large_file(chain, 2)
    chain.registrar.run(once=True)
    assert chain.sums() == {"large.dat": md5(bytes(2 << 20))}
    chain.crash()
