"""The registrar and files that change, and files that are large."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chain import SETTLE_S, Chain, Clock, md5
from tests.testbed.processes import wait_until


def test_a_growing_file_is_registered_again_with_doubling_delays(chain: Chain, clock: Clock) -> None:
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
    assert list(chain.health.counters.streams.files().values()) == [1]


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


@pytest.mark.parametrize("after_s", [1, SETTLE_S + 0.5], ids=["before the re-check", "with the re-check"])
def test_a_change_that_was_announced_under_another_action_belongs_to_that_one_alone(
    chain: Chain, clock: Clock, after_s: float
) -> None:
    old = chain.write("plot.png", b"old")
    chain.accept("plot.png", action="first")
    chain.step()
    clock.advance(after_s)
    new = chain.write("plot.png", b"new content")
    chain.accept("plot.png", action="second")
    for _ in range(4):
        chain.step()
        clock.advance(SETTLE_S)

    assert [row["local_md5sum"] for row in chain.rows()] == [old, new]
    assert chain.counts() == {"received": 2, "settled": 2}


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("folder", ["2", "/2/."], ids=["same spelling", "other spelling"])
def test_a_change_that_was_announced_for_a_place_of_another_file_belongs_to_no_former_action(
    chain: Chain, clock: Clock, restart: bool, folder: str
) -> None:
    chain.write("1/plot.png", b"another file")
    chain.accept("1/plot.png", action="taken")
    old = chain.write("2/plot.png", b"old")
    chain.accept("2/plot.png", action="first")
    chain.step()
    chain.write("2/plot.png", b"new content")
    clock.advance(1)
    chain.accept("2/plot.png", action="taken", path=f"{chain.files}/{folder}/plot.png")
    for _ in range(4):
        chain.step()
        if restart:
            chain.reopen()
        clock.advance(SETTLE_S)

    assert chain.rows()[1]["local_md5sum"] == old
    ((name, reason, refused),) = chain.dead_letters()
    assert (name, refused) == ("plot.png", True)
    assert reason.startswith(f"{chain.path('1/plot.png')} holds its place in the archive: 17000/")


def test_a_file_that_changes_while_the_database_is_locked_is_hashed_again(chain: Chain, clock: Clock) -> None:
    chain.write("a.dat", b"old")
    chain.write("b.dat", b"b")
    chain.write("other.dat", b"other")
    chain.accept("other.dat")
    chain.step()

    def change() -> None:
        chain.write("a.dat", b"new content")
        chain.path("b.dat").unlink()

    with chain.lock_for(1, chain.db_path, change):
        chain.accept("a.dat")
        chain.accept("b.dat")
        chain.step()

    assert chain.sums() == {"other.dat": md5(b"other"), "a.dat": md5(b"new content")}, "a removed file has no row"
    assert chain.counts() == {"received": 3, "registered": 2, "waiting": 1}


def test_a_file_that_changes_while_the_registrar_is_busy_is_hashed_again(chain: Chain, clock: Clock) -> None:
    sums = {name: chain.write(name, b"old") for name in ("a.dat", "b.dat")}
    for name in sums:
        chain.accept(name)
    chain.registrar.begin()
    assert chain.registrar.step(0.0), "both are due in the spool, and are hashed"
    assert chain.rows() == []
    sums["a.dat"] = chain.write("a.dat", b"new content")
    clock.advance(1)
    chain.step()
    assert chain.sums() == sums
    assert [row["local_path"] for row in chain.rows()] == [str(chain.path(name)) for name in ("b.dat", "a.dat")]


def test_the_same_path_three_times_in_a_batch(chain: Chain) -> None:
    sum_ = chain.write("a.dat", b"content")
    for action in ("one", "two", "one"):
        chain.accept("a.dat", action=action)
    chain.step()

    assert [row["local_md5sum"] for row in chain.rows()] == [sum_, sum_]
    assert chain.counts() == {"received": 3, "registered": 3}


@pytest.fixture
def lively(tmp_path: Path) -> Iterator[Chain]:
    """A chain whose workers have threads."""
    chain = Chain(tmp_path, threads=True)
    yield chain
    chain.crash()


def large_file(chain: Chain, megabytes: int, name: str = "large.dat") -> str:
    """Make a sparse file."""
    chain.files.mkdir(exist_ok=True)
    with open(chain.path(name), "wb") as file:
        file.truncate(megabytes << 20)
    return name


def test_large_files_hold_up_no_smaller_ones_however_often_they_are_announced(lively: Chain) -> None:
    large_file(lively, 8 << 20)  # 8 TiB
    with lively.running():
        for number in range(300):
            lively.accept("large.dat", action=f"act{number}")
        sums = {large_file(lively, 20, "medium.dat"): md5(bytes(20 << 20)), "a.dat": lively.write("a.dat", b"small")}
        for name in sums:
            lively.accept(name)
        wait_until(lambda: lively.sums() == sums, 60, "the others are registered")
        assert lively.counts() == {"received": 302, "registered": 2, "pending": 300}
    large_file(lively, 1)
    lively.registrar.run(once=True)
    rows = [row["local_md5sum"] for row in lively.rows() if row["local_path"].endswith("large.dat")]
    assert rows == [md5(bytes(1 << 20))] * 300


def test_more_than_the_queue_holds_while_large_files_are_hashed(tmp_path: Path, clock: Clock) -> None:
    chain = Chain(tmp_path, clock, clock.monotonic, small=2, queue_max=10_000, batch=4)
    chain.registrar.begin()
    sums = {}
    for number in range(40):
        content = b"%d" % (number * 50)
        sums[f"{number}.dat"] = chain.write(f"{number}.dat", content)
        chain.accept(f"{number}.dat")
    chain.step()
    assert chain.sums() == {name: sums[name] for name in ("0.dat", "1.dat")}
    chain.hash_large()
    chain.step()
    assert chain.sums() == sums
    clock.advance(SETTLE_S)
    chain.step()
    assert chain.counts() == {"received": 40, "settled": 40}
    chain.crash()


def test_the_registrations_of_a_large_file_are_loaded_in_batches(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are, the spool is locked for a short time only, and accepts others in between."""
    chain = Chain(tmp_path, clock, clock.monotonic, small=2, batch=4)
    chain.registrar.begin()
    chain.write("large.dat", b"large")
    for number in range(10):
        chain.accept("large.dat", action=f"act{number}")
    chain.step()
    sizes: list[int] = []
    load = chain.spool.load
    monkeypatch.setattr(chain.spool, "load", lambda ids: (sizes.append(len(ids)), load(ids))[1])
    chain.hash_large()
    chain.step()

    assert len(chain.rows()) == 10
    assert (sum(sizes), max(sizes)) == (10, 4)
    chain.crash()
