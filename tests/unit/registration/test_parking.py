"""Folders whose disk hangs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from socs_monitor.registration.checksum import Access
from socs_monitor.registration.parking import MAX_FOLDERS, PROBE_S, HungError, Parking


class Threads:
    """What was to be done by threads; done when a test says so."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []

    def __call__(self, work: Callable[[], None], name: str) -> None:
        self.work.append(work)

    def run(self) -> None:
        while self.work:
            self.work.pop(0)()


@pytest.fixture
def threads() -> Threads:
    return Threads()


@pytest.fixture
def parking(threads: Threads) -> Parking:
    return Parking(Access(("/data/a", "/data/b")), threads)


def covers(parking: Parking, path: str) -> bool:
    """Whether a path is in a suspended or parked folder."""
    try:
        parking.check(path)
    except HungError:
        return True
    return False


def park(parking: Parking, path: str, now: float) -> str:
    """Have a call stall, and hang on, at a path."""
    return parking.park(parking.suspend(path, 0, now))


def test_a_folder_where_a_call_stalls_is_left_alone_but_not_reported(parking: Parking) -> None:
    folder = parking.suspend("/data/a/x/z.dat", 0, 0.0)
    assert covers(parking, "/data/a/x/other.dat")
    assert parking.folders == []
    parking.release(folder)
    assert not parking
    assert parking.park(folder) == folder, "it came back just before"
    assert not parking


def test_nothing_is_parked_at_first(parking: Parking) -> None:
    assert not parking
    assert not covers(parking, "/data/a/x/y")


def test_the_first_folder_below_the_data_root_is_parked(parking: Parking) -> None:
    assert park(parking, "/data/a/x/y/z.dat", 0.0) == "/data/a/x"
    assert parking
    assert parking.folders == ["/data/a/x"]
    for path in (
        "/data/a/x",
        "/data/a/x/q",
        "/data/a/x/y/z.dat",
        "/data/a//x/q",
        "/data/a/./x/q",
        "/data/a/k/../x/q",
        "/data/a/x/../k/q",
    ):
        assert covers(parking, path), path
    for path in ("/data/a/xx/q", "/data/a/k", "/data/b/x/q", "/data/a"):
        assert not covers(parking, path), path


def test_a_file_in_the_data_root_itself_is_parked_alone(parking: Parking) -> None:
    assert park(parking, "/data/a/z.dat", 0.0) == "/data/a/z.dat"
    assert covers(parking, "/data/a/z.dat")
    assert not covers(parking, "/data/a/y.dat")


def test_a_root_is_parked_with_its_fourth_folder(parking: Parking) -> None:
    for number in range(MAX_FOLDERS - 1):
        park(parking, f"/data/a/{number}/z.dat", 0.0)
        park(parking, "/data/b/x/z.dat", 0.0)  # counts once, and for the other root
    assert not covers(parking, "/data/a/other/z.dat")
    assert park(parking, "/data/a/last/z.dat", 0.0) == "/data/a"
    assert covers(parking, "/data/a/other/z.dat")
    assert not covers(parking, "/data/b/y/z.dat")


def test_without_roots_the_first_folders_of_all_are_parked_but_never_all(threads: Threads) -> None:
    parking = Parking(Access(), threads)
    for number in range(2 * MAX_FOLDERS):
        assert park(parking, f"/mnt{number}/z.dat", 0.0) == f"/mnt{number}"
    assert not covers(parking, "/data/z.dat")


def test_paths_outside_of_the_roots_never_park_all_of_the_disk(parking: Parking) -> None:
    for number in range(2 * MAX_FOLDERS):
        assert park(parking, f"/mnt{number}/z.dat", 0.0) == f"/mnt{number}"
    assert not covers(parking, "/data/a/x/z.dat")


def test_a_folder_is_released_when_a_call_comes_back(parking: Parking) -> None:
    first, second = park(parking, "/data/a/x/z.dat", 0.0), park(parking, "/data/a/y/z.dat", 0.0)
    parking.release(first)
    assert parking.folders == [second]
    parking.release(first)
    assert not covers(parking, "/data/a/x/z.dat")


@pytest.mark.parametrize("path", ["/data/a/x/missing", "/data/a/x/" + "n" * 256, "/"])
def test_a_disk_that_answers_anything_is_released_by_a_probe(parking: Parking, threads: Threads, path: str) -> None:
    park(parking, path, 100.0)
    parking.probe(100.0 + PROBE_S - 1)
    assert not threads.work
    parking.probe(100.0 + PROBE_S)
    assert parking, "it has not answered yet"
    threads.run()
    assert not parking


def test_a_probe_that_hangs_is_the_only_one(parking: Parking, threads: Threads) -> None:
    park(parking, "/data/a/x/z.dat", 0.0)
    for minute in range(1, 100):
        parking.probe(minute * PROBE_S)
    assert len(threads.work) == 1
    park(parking, "/data/a/x/another.dat", 0.0)
    parking.probe(200 * PROBE_S)
    assert len(threads.work) == 1


def test_a_folder_that_hangs_again_is_probed_again(parking: Parking, threads: Threads) -> None:
    park(parking, "/data/a/x/z.dat", 0.0)
    parking.probe(PROBE_S)
    threads.run()
    park(parking, "/data/a/x/z.dat", 2 * PROBE_S)
    parking.probe(2 * PROBE_S)
    assert not threads.work
    parking.probe(3 * PROBE_S)
    threads.run()
    assert not parking


@pytest.mark.parametrize("offset", [0, 5])
def test_a_probe_reads_the_byte_where_a_call_hung(
    tmp_path: Path, threads: Threads, monkeypatch: pytest.MonkeyPatch, offset: int
) -> None:
    """A disk may answer look-ups and hang in reads: a released folder would cost a thread a minute."""
    path = tmp_path / "x" / "z.dat"
    path.parent.mkdir()
    path.write_bytes(b"content")
    parking = Parking(Access((str(tmp_path),)), threads)
    parking.park(parking.suspend(str(path), offset, 0.0))
    read: list[tuple[str, int, int]] = []

    def pread(file: int, count: int, offset: int) -> bytes:
        assert parking, "it is released only when the read has returned"
        read.append((os.readlink(f"/proc/self/fd/{file}"), count, offset))
        return b"x"

    monkeypatch.setattr(os, "pread", pread)
    parking.probe(PROBE_S)
    threads.run()
    assert read == [(str(path), 1, offset)]
    assert not parking
