"""The workers: what they find, how they share readings and take turns, and what happens when one hangs."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from socs_monitor.registration import checksum
from socs_monitor.registration.checksum import Access, present_fingerprint
from socs_monitor.registration.lookup import Policy
from socs_monitor.registration.parking import MAX_FOLDERS, HungError, Parking
from socs_monitor.registration.work import (
    Failed,
    FailedLarge,
    Hashed,
    HashedLarge,
    HashResult,
    Recheck,
    Rechecked,
    Result,
    Task,
)
from socs_monitor.registration.workers import HANG_S, MAX_TASKS, STALL_S, Workers
from socs_monitor.spool.records import Registration
from socs_monitor.spool.states import Event
from socs_monitor.suprsync.archive import candidates
from socs_monitor.suprsync.upsert import HashedFile
from socs_monitor.wire.publisher import data_file
from tests.chain import Clock, md5, write_file
from tests.testbed.processes import wait_until

HANGS = str(HungError())
SMALL = 10
LARGE = b"more than the quick worker hashes"


class Hang:
    """Stands in for a disk: each access to one of `paths` lasts until they are released."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._release: dict[str, threading.Event] = {}
        self.hanging: list[str] = []
        find = checksum._find

        def hanging_find(path: str, access: Access) -> tuple[int, os.stat_result]:
            if (release := self._release.get(path)) is not None:
                self.hanging.append(path)
                release.wait()
            return find(path, access)

        monkeypatch.setattr(checksum, "_find", hanging_find)

    def add(self, path: str) -> None:
        self._release[path] = threading.Event()

    def release(self, path: str) -> None:
        self._release.pop(path).set()

    def release_all(self) -> None:
        for path in list(self._release):
            self.release(path)


@pytest.fixture
def hang(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hang]:
    hang = Hang(monkeypatch)
    yield hang
    hang.release_all()


class Bench:
    """Workers with real threads over the data root ``root``, and what they have delivered."""

    def __init__(self, root: Path, clock: Clock, **options: Any) -> None:
        self.root = root
        self.clock = clock
        self._spawned: list[threading.Thread] = []
        self.results: list[Result] = []
        data_roots = options.pop("data_roots", (str(root),))
        policy = Policy(data_roots=data_roots, hash_workers=options.pop("hash_workers", 2))
        self.parking = options.pop("parking", Parking)(Access(policy.data_roots), self.spawn)
        options = {"small": SMALL, **options}
        self.workers = Workers(
            policy, self.parking, lambda: None, spawn=self.spawn, monotonic=clock.monotonic, **options
        )
        self.access = Access(policy.data_roots)

    def spawn(self, work: Callable[[], None], name: str) -> None:
        self._spawned.append(threading.Thread(target=work, name=name, daemon=True))
        self._spawned[-1].start()

    def threads(self) -> list[str]:
        """Names of the threads that are alive."""
        return sorted(thread.name for thread in self._spawned if thread.is_alive())

    def path(self, name: str) -> str:
        return str(self.root / name)

    def write(self, name: str, content: bytes = b"x") -> str:
        return write_file(self.root / name, content)

    def registration(self, name: str, id_: int) -> Registration:
        meta = {**data_file(self.path(name), action="act", action_ts="1", timestamp=1_700_000_000), "pub_id": "a"}
        return Registration(meta, id_, 1.0, "127.0.0.1:1")

    def hashed(self, name: str, id_: int) -> Hashed:
        """What a file would be, had it been hashed now."""
        registration = self.registration(name, id_)
        entry = next(iter(candidates(registration)))
        return Hashed(registration, HashedFile(entry, "sum"), present_fingerprint(self.path(name), self.access, {}))

    def submit(self, *tasks: Task) -> None:
        self.workers.submit(tasks)

    def wait(self, count: int, why: str = "the tasks are done") -> list[Result]:
        """Wait for a total number of results, and return all."""

        def enough() -> bool:
            self.results += self.workers.take()
            return len(self.results) >= count

        wait_until(enough, 20, why)
        return self.results

    def wait_idle(self) -> list[Result]:
        """Wait until there is nothing left to do, and return all results."""

        def idle() -> bool:
            self.results += self.workers.take()
            return not self.workers.busy

        wait_until(idle, 20, "everything is done")
        return self.results

    def supervise_for(self, seconds: float, every: float = 1.0) -> None:
        """Supervise the workers for a number of seconds."""
        self.workers.supervise()
        for _ in range(round(seconds / every)):
            self.clock.advance(every)
            self.workers.supervise()

    def let_hang(self, hang: Hang, path: str) -> None:
        """Wait until somebody hangs at a path, and until that is noticed."""
        wait_until(lambda: path in hang.hanging, 20, "it hangs")
        self.supervise_for(HANG_S)

    def close(self) -> None:
        self.workers.close()


@pytest.fixture
def bench(tmp_path: Path, clock: Clock) -> Iterator[Bench]:
    bench = Bench(tmp_path / "root", clock)
    bench.root.mkdir()
    yield bench
    bench.close()


def reasons(results: list[Result]) -> dict[int, str | None]:
    """Why, by id; None for what has not failed."""
    found: dict[int, str | None] = {}
    for result in results:
        if isinstance(result, (HashedLarge, FailedLarge)):
            found.update(dict.fromkeys(result.ids, result.reason if isinstance(result, FailedLarge) else None))
        elif isinstance(result, Rechecked):
            found[result.task.id] = result.reason or None
        else:
            found[result.registration.id] = result.reason if isinstance(result, Failed) else None
    return found


def test_registrations_are_looked_up_and_hashed_in_order(bench: Bench) -> None:
    sums = [bench.write(f"{number}.dat", b"%d" % number) for number in range(50)]
    bench.submit(*(bench.registration(f"{number}.dat", number) for number in range(50)))
    results = bench.wait(50)
    assert [(result.registration.id, result.file.md5) for result in results if isinstance(result, Hashed)] == list(
        enumerate(sums)
    )
    assert not bench.workers.busy


def test_large_files_are_hashed_by_the_others(bench: Bench) -> None:
    sums = {number: bench.write(f"{number}.dat", LARGE + b"%d" % number) for number in range(20)}
    bench.submit(*(bench.registration(f"{number}.dat", number) for number in range(20)))
    results = bench.wait(20)
    assert {result.ids[0]: result.md5 for result in results if isinstance(result, HashedLarge)} == sums


def test_every_failure_has_a_reason(bench: Bench, tmp_path: Path) -> None:
    bench.root.joinpath("folder").mkdir()
    bench.root.joinpath("loop").symlink_to(bench.root / "loop")
    bench.root.joinpath("link").symlink_to("/etc/passwd")
    bench.write("good")
    names = ("missing", "folder", "loop", "link", "../outside", "good")
    foreign = bench.registration("x", len(names))
    foreign["archive_name"] = "unheard of"
    bench.submit(*(bench.registration(name, number) for number, name in enumerate(names)), foreign)
    results = [result for result in bench.wait(7) if isinstance(result, Failed)]
    assert [(result.registration.id, result.refused, result.withdraw) for result in results] == [
        (0, False, False),
        (1, True, True),
        (2, False, False),
        (3, True, True),
        (4, True, True),
        (6, True, False),
    ]
    words = ("No such file", "a directory", "symbolic links", "outside", "outside", "unknown archive name")
    for result, word in zip(results, words, strict=True):
        assert word in result.reason


@pytest.mark.parametrize("error", [ValueError("odd"), MemoryError(), OverflowError("odd"), RecursionError("odd")])
@pytest.mark.parametrize("size", [1, 100])
def test_an_unexpected_error_fails_one_registration(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception, size: int
) -> None:
    find = checksum._find

    def failing(path: str, access: Access) -> tuple[int, os.stat_result]:
        if path.endswith("bad"):
            raise error
        return find(path, access)

    look = os.lstat

    def failing_look(path: str) -> os.stat_result:
        if path.endswith("bad"):
            raise error
        return look(path)

    for name in ("before", "bad", "after"):
        bench.write(name, b"x" * size)
    fingerprint = present_fingerprint(bench.path("bad"), bench.access, {})
    verified = bench.hashed("bad", 4)
    monkeypatch.setattr(checksum, "_find", failing)
    monkeypatch.setattr(os, "lstat", lambda path: failing_look(str(path)))
    tasks = [bench.registration(name, number) for number, name in enumerate(("before", "bad", "after"))]
    bench.submit(*tasks, Recheck(3, bench.path("bad"), fingerprint), verified)
    found = reasons(bench.wait(5))
    assert sorted(id_ for id_, reason in found.items() if reason) == [1, 3, 4]
    assert all(repr(error) in (found[id_] or "") for id_ in (1, 3, 4))
    bench.submit(bench.registration("after", 5))
    assert reasons(bench.wait(6))[5] is None


def test_a_recheck_finds_every_kind_of_change(bench: Bench) -> None:
    fingerprints = {}
    for name in ("same", "changed", "replaced", "gone", "folder", "loop"):
        bench.write(name)
        fingerprints[name] = present_fingerprint(bench.path(name), bench.access, {})
    bench.write("changed")
    bench.write("new")
    os.rename(bench.path("new"), bench.path("replaced"))
    for name in ("gone", "folder", "loop"):
        os.unlink(bench.path(name))
    os.mkdir(bench.path("folder"))
    os.symlink("loop", bench.path("loop"))
    bench.submit(*(Recheck(id_, bench.path(name), fingerprints[name]) for id_, name in enumerate(fingerprints)))
    results = [result for result in bench.wait(6) if isinstance(result, Rechecked)]
    assert [result.event for result in results] == [
        Event.UNCHANGED,
        Event.CHANGED,
        Event.CHANGED,
        Event.MISSING,
        Event.REFUSED,
        Event.UNREADABLE,
    ]
    assert [result.task.id for result in results] == list(range(6))
    assert "a directory" in results[4].reason
    assert "symbolic links" in results[5].reason


def test_verification_finds_changed_and_missing_files(bench: Bench) -> None:
    for name in ("same", "changed", "gone"):
        bench.write(name)
    same, changed, gone = (bench.hashed(name, id_) for id_, name in enumerate(("same", "changed", "gone")))
    bench.write("changed")
    os.unlink(bench.path("gone"))
    answers: queue.SimpleQueue[list[Result]] = queue.SimpleQueue()
    bench.workers.submit([same, changed, gone], answers.put)
    first, second, third = answers.get(timeout=20)
    assert first is same
    assert isinstance(second, Failed)
    assert second.registration is changed.registration
    assert isinstance(third, Failed)
    assert third.registration is gone.registration
    assert bench.workers.take() == [], "they are delivered to whoever asked"


# --- large files


def sparse(bench: Bench, name: str, size: int) -> None:
    with open(bench.path(name), "wb") as file:
        file.truncate(size)


def test_the_least_read_file_is_next(tmp_path: Path, clock: Clock) -> None:
    bench = Bench(tmp_path, clock, hash_workers=1, slice_size=1 << 20)
    for number in range(3):
        sparse(bench, f"huge{number}", 8 << 40)
        bench.submit(bench.registration(f"huge{number}", number))
    for id_, megabytes in enumerate((20, 1, 5), 10):
        sparse(bench, f"{id_}", megabytes << 20)
        bench.submit(bench.registration(f"{id_}", id_))
    results = bench.wait(3)
    assert [result.ids for result in results if isinstance(result, HashedLarge)] == [[11], [12], [10]]
    bench.close()


@pytest.mark.parametrize("succeeds", [True, False])
def test_registrations_of_one_path_share_one_reading(bench: Bench, hang: Hang, succeeds: bool) -> None:
    path = bench.path("large")
    sum_ = bench.write("large", LARGE)
    blockers = [bench.path(f"blocker{number}") for number in range(2)]  # one for each of the two
    for number, blocker in enumerate(blockers):
        bench.write(f"blocker{number}", LARGE)
        bench.workers.hash(blocker, lambda _: None)
        hang.add(blocker)
    wait_until(lambda: len(hang.hanging) == 2, 20, "both are at work")
    answers: queue.SimpleQueue[HashResult] = queue.SimpleQueue()
    bench.workers.hash(path, answers.put)
    bench.submit(*(bench.registration("large", number) for number in range(300)))
    wait_until(lambda: not bench.workers._tasks, 20, "all are looked up")
    if not succeeds:
        os.unlink(path)
    hang.release_all()
    (result,) = bench.wait_idle()
    assert isinstance(result, HashedLarge if succeeds else FailedLarge)
    assert result.ids == list(range(300))
    assert answers.get(timeout=20) == result._replace(ids=())
    if isinstance(result, HashedLarge):
        assert (result.path, result.md5) == (path, sum_)
        assert result.fingerprint == present_fingerprint(path, bench.access, {})
    else:
        assert result.missing
        assert "No such file" in result.reason


@pytest.mark.parametrize("succeeds", [True, False])
def test_take_returns_a_bounded_number_of_registrations(bench: Bench, hang: Hang, succeeds: bool) -> None:
    bench.write("large", LARGE)
    for number in range(2):
        bench.write(f"blocker{number}", LARGE)
        hang.add(bench.path(f"blocker{number}"))
        bench.workers.hash(bench.path(f"blocker{number}"), lambda _: None)
    bench.submit(*(bench.registration("large", number) for number in range(2 * MAX_TASKS + 1)))
    wait_until(lambda: not bench.workers._tasks, 20, "all are looked up")
    if not succeeds:
        os.unlink(bench.path("large"))
    hang.release_all()
    wait_until(lambda: not bench.workers._waiting, 20, "all are hashed")
    ids: list[int] = []
    for left in (True, True, False):
        (result,) = bench.workers.take()
        assert isinstance(result, HashedLarge if succeeds else FailedLarge)
        ids += result.ids
        assert bench.workers.has_left == left
    assert ids == list(range(2 * MAX_TASKS + 1))
    assert not bench.workers.busy


def test_a_large_file_that_becomes_something_else_is_refused(bench: Bench, hang: Hang) -> None:
    bench.write("large", LARGE)
    for number in range(2):
        bench.write(f"blocker{number}", LARGE)
        hang.add(bench.path(f"blocker{number}"))
        bench.workers.hash(bench.path(f"blocker{number}"), lambda _: None)
    bench.submit(bench.registration("large", 1))
    wait_until(lambda: not bench.workers._tasks, 20, "it is looked up")
    os.unlink(bench.path("large"))
    os.mkfifo(bench.path("large"))
    hang.release_all()
    (result,) = bench.wait_idle()
    assert isinstance(result, FailedLarge)
    assert result.refused
    assert "a FIFO" in result.reason


# --- what hangs


def test_a_file_elsewhere_waits_for_one_stall_only_although_many_folders_hang(
    tmp_path: Path, clock: Clock, hang: Hang
) -> None:
    bench = Bench(tmp_path, clock, data_roots=(str(tmp_path / "hung"), str(tmp_path / "other")))
    names = [f"hung/{number}/a.dat" for number in range(5)] + ["other/a.dat"]
    for name in names:
        bench.write(name)
    for name in names[:-1]:
        hang.add(bench.path(name))
    bench.submit(*(bench.registration(name, number) for number, name in enumerate(names)))
    wait_until(lambda: hang.hanging, 20, "the first one hangs")
    bench.supervise_for(STALL_S, STALL_S)

    assert reasons(bench.wait(1, "the file elsewhere is hashed")) == {5: None}
    hang.release_all()
    assert reasons(bench.wait(6)) == dict.fromkeys(range(6))
    bench.close()


@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_quick_worker_that_hangs_is_replaced_and_its_tasks_are_done(bench: Bench, hang: Hang, place: int) -> None:
    for number in range(7):
        bench.write(f"{number}/a.dat")
    path = bench.path(f"{place}/a.dat")
    hang.add(path)
    bench.submit(*(bench.registration(f"{number}/a.dat", number) for number in range(7)))
    bench.let_hang(hang, path)
    assert reasons(bench.wait_idle()) == {number: HANGS if number == place else None for number in range(7)}
    assert bench.parking.folders == [bench.path(f"{place}")]

    bench.write(f"{place}/b.dat")
    bench.submit(bench.registration(f"{place}/b.dat", 7), Recheck(8, bench.path(f"{place}/b.dat"), 0))
    assert [reasons(bench.wait(9))[id_] for id_ in (7, 8)] == [HANGS, HANGS], "its folder is left alone"

    hang.release(path)
    wait_until(lambda: not bench.parking, 20, "the disk answers")
    bench.submit(bench.registration(f"{place}/a.dat", 9))
    results = bench.wait(10)
    assert reasons(results)[9] is None
    assert len(results) == 10, "what the former worker found is dropped"


def test_files_before_and_after_one_that_stalls_do_not_wait_for_it(bench: Bench, hang: Hang) -> None:
    for number in range(5):
        bench.write(f"{number}/a.dat")
    hang.add(bench.path("3/a.dat"))
    bench.submit(*(bench.registration(f"{number}/a.dat", number) for number in range(5)))
    wait_until(lambda: hang.hanging, 20, "it hangs")
    bench.supervise_for(STALL_S, STALL_S)
    assert reasons(bench.wait(4)) == dict.fromkeys((0, 1, 2, 4))


def test_a_worker_that_hangs_in_a_large_file_is_replaced(bench: Bench, hang: Hang) -> None:
    for name in ("hung/large", "hung/another", "other/large"):
        bench.write(name, LARGE)
    path = bench.path("hung/large")
    answers: queue.SimpleQueue[HashResult] = queue.SimpleQueue()
    bench.workers.hash(path, answers.put)  # it is not looked up, so that it hangs only when it is read
    hang.add(path)
    bench.let_hang(hang, path)
    assert answers.get(timeout=20) == FailedLarge((), HANGS)
    assert bench.parking.folders == [bench.path("hung")]
    bench.submit(*(bench.registration(name, id_) for id_, name in enumerate(("hung/another", "other/large"))))
    bench.workers.hash(bench.path("hung/another"), answers.put)
    assert reasons(bench.wait_idle()) == {0: HANGS, 1: None}
    assert answers.get(timeout=20).reason == HANGS  # type: ignore[union-attr]

    hang.release(path)
    wait_until(lambda: not bench.parking, 20, "the disk answers")
    bench.submit(bench.registration("hung/large", 3))
    assert reasons(bench.wait(3))[3] is None
    assert len(bench.wait_idle()) == 3


def test_each_hung_worker_is_replaced_by_one(bench: Bench, hang: Hang) -> None:
    for number in range(2):
        path = bench.path(f"{number}/large")
        bench.write(f"{number}/large", LARGE)
        hang.add(path)
        bench.workers.hash(path, lambda _: None)
        bench.let_hang(hang, path)
    hang.release_all()
    wait_until(lambda: not bench.parking, 20, "the disk answers")
    names = [f"elsewhere{number}" for number in range(2)]
    for name in names:
        bench.write(name, LARGE)
        hang.add(bench.path(name))
        bench.workers.hash(bench.path(name), lambda _: None)
    wait_until(lambda: {bench.path(name) for name in names} <= set(hang.hanging), 20, "both work at the same time")
    wait_until(lambda: bench.threads() == ["hash", "hash", "quick"], 20, "the former ones have ended")


def test_a_worker_that_makes_progress_is_left_alone(tmp_path: Path, clock: Clock, hang: Hang) -> None:
    bench = Bench(tmp_path, clock)
    for number in range(5):
        bench.write(f"{number}")
        hang.add(bench.path(f"{number}"))
    bench.submit(*(bench.registration(f"{number}", number) for number in range(5)))
    for number in range(5):
        wait_until(lambda n=number: bench.path(f"{n}") in hang.hanging, 20, "it is at the next one")
        bench.supervise_for(STALL_S * 0.8, STALL_S * 0.4)
        hang.release(bench.path(f"{number}"))
    assert reasons(bench.wait_idle()) == dict.fromkeys(range(5))
    assert not bench.parking
    bench.close()


def test_the_stall_timeout_begins_again_with_each_file(tmp_path: Path, clock: Clock, hang: Hang) -> None:
    bench = Bench(tmp_path, clock, hash_workers=1)
    for name in ("empty", "another"):
        bench.write(name, b"")
        hang.add(bench.path(name))
        bench.workers.hash(bench.path(name), lambda _: None)
    wait_until(lambda: bench.path("empty") in hang.hanging, 20, "it is at the first one")
    bench.supervise_for(STALL_S * 0.8, STALL_S * 0.4)
    hang.release(bench.path("empty"))
    wait_until(lambda: bench.path("another") in hang.hanging, 20, "it is at the next one")
    bench.supervise_for(STALL_S * 0.8, STALL_S * 0.4)
    assert not bench.parking
    bench.supervise_for(STALL_S * 0.4, STALL_S * 0.4)
    assert bench.parking
    bench.close()


def test_a_worker_that_comes_back_while_it_is_abandoned_does_no_harm(tmp_path: Path, clock: Clock, hang: Hang) -> None:
    path = str(tmp_path / "a.dat")

    class Slow(Parking):
        """Parks while the worker comes back."""

        def park(self, name: str) -> str:
            folder = super().park(name)
            hang.release(path)
            wait_until(lambda: worker.progress > 0, 20, "the worker is back")
            return folder

    bench = Bench(tmp_path, clock, parking=Slow)
    worker = bench.workers._workers[0]
    bench.write("a.dat")
    hang.add(path)
    bench.submit(bench.registration("a.dat", 1))
    bench.let_hang(hang, path)
    assert reasons(bench.wait_idle()) == {1: HANGS}
    wait_until(lambda: not bench.parking, 20, "the disk answers")
    bench.submit(bench.registration("a.dat", 2))
    assert reasons(bench.wait_idle()) == {1: HANGS, 2: None}
    bench.close()


def test_four_workers_that_hang_park_the_whole_root(bench: Bench, hang: Hang) -> None:
    for number in range(MAX_FOLDERS):
        path = bench.path(f"{number}/a.dat")
        bench.write(f"{number}/a.dat")
        hang.add(path)
        bench.submit(bench.registration(f"{number}/a.dat", number))
        bench.let_hang(hang, path)
    bench.write("elsewhere/a.dat")
    bench.submit(bench.registration("elsewhere/a.dat", 10))
    assert reasons(bench.wait_idle()) == dict.fromkeys((0, 1, 2, 3, 10), HANGS)
    assert str(bench.root) in bench.parking.folders

    hang.release_all()
    wait_until(lambda: not bench.parking, 20, "the disk answers")
    bench.submit(bench.registration("elsewhere/a.dat", 11))
    assert reasons(bench.wait_idle())[11] is None


# --- the end


def test_the_threads_end_when_they_are_closed(tmp_path: Path, clock: Clock) -> None:
    bench = Bench(tmp_path, clock, slice_size=1 << 20)
    for number in range(2):
        sparse(bench, f"{number}", 8 << 40)
        bench.submit(bench.registration(f"{number}", number))
    wait_until(lambda: not bench.workers._tasks, 20, "both are being hashed")
    bench.close()
    wait_until(lambda: not bench.threads(), 20, "they end")


def test_a_worker_that_hangs_does_not_keep_the_others_from_ending(bench: Bench, hang: Hang) -> None:
    bench.write("a.dat")
    hang.add(bench.path("a.dat"))
    bench.submit(bench.registration("a.dat", 1))
    wait_until(lambda: hang.hanging, 20, "it hangs")
    bench.close()
    wait_until(lambda: bench.threads() == ["quick"], 20, "the others have ended")
    hang.release_all()
    wait_until(lambda: not bench.threads(), 20, "it ends, too")


def test_room_shrinks_with_the_tasks_in_hand(bench: Bench, hang: Hang) -> None:
    bench.write("a.dat")
    hang.add(bench.path("a.dat"))
    room = bench.workers.room
    bench.submit(*(bench.registration("a.dat", number) for number in range(room + 5)))
    assert bench.workers.room == 0
    hang.release_all()
    bench.wait_idle()
    assert bench.workers.room == room
    assert md5(b"x") in {result.file.md5 for result in bench.results if isinstance(result, Hashed)}


def test_workers_are_busy_until_their_results_are_delivered(bench: Bench) -> None:
    """Or a run of the test mode would end before it has registered them."""
    for name, content in (("small", b"x"), ("large", LARGE)):
        bench.write(name, content)
    busy: list[bool] = []
    bench.workers.submit([bench.registration("small", 1)], lambda results: busy.append(bench.workers.busy))
    bench.workers.hash(bench.path("large"), lambda result: busy.append(bench.workers.busy))
    wait_until(lambda: len(busy) == 2, 20, "both are delivered")

    assert busy == [True, True]
    bench.wait_idle()
