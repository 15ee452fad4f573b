"""The scan for timestream files that no row names, over real folders and a real database."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from socs_monitor.completeness import scan as scan_module
from socs_monitor.completeness.scan import QUIET_S, Scan, registration_of
from socs_monitor.suprsync.archive import Entry, candidates
from socs_monitor.suprsync.database import Database, DatabaseUnavailableError
from socs_monitor.suprsync.upsert import HashedFile
from socs_monitor.wire import messages
from tests.chain import Clock


class Bench:
    """A folder of timestreams, a database, and a clock."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "timestreams"
        self.root.mkdir()
        self.db_path = str(folder / "suprsync.db")
        self.clock = Clock()
        self.reports: list[dict[str, Any]] = []

    def write(self, name: str, age_s: float = QUIET_S + 1) -> str:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        os.utime(path, (self.clock.now - age_s,) * 2)
        return str(path)

    def register(self, *paths: str, archive_name: str = "timestreams") -> None:
        database = Database(self.db_path, create_table=True, echo=False, report=print)
        database.register([HashedFile(Entry(archive_name, path, path[1:], True), "0" * 32) for path in paths])
        database.close()

    def scan(self, root: str | None = None) -> Scan:
        return Scan(str(self.root) if root is None else root, self.db_path, self.reports.append, self.clock)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(tmp_path)
    bench.register()
    return bench


def test_files_that_no_row_names_are_found_in_order(bench: Bench) -> None:
    names = ("17001/a/2.g3", "17000/b/1.g3", "17000/a/2.g3", "17000/a/1.g3")
    paths = sorted(bench.write(name) for name in names)
    bench.register(paths[1])
    scan = bench.scan()

    assert list(scan) == [paths[0], *paths[2:]]
    assert (scan.seen, scan.unregistered) == (4, 3)
    assert scan.progress() == {"timestamp": bench.clock.now, "seen": 4, "unregistered": 3, "paths": list(scan)}


def test_other_files_are_not_timestreams(bench: Bench) -> None:
    right = bench.write("17000/a/1.g3")
    for name in (
        "17000/1.g3",
        "1.g3",
        "170/a/1.g3",
        "170000/a/1.g3",
        "status/a/1.g3",
        "17000/a/b/1.g3",
        "17000/a/1.txt",
    ):
        bench.write(name)
    (bench.root / "17000" / "a" / "folder.g3").mkdir()
    os.mkfifo(bench.root / "17000" / "a" / "fifo.g3")
    (bench.root / "17000" / "a" / "dangling.g3").symlink_to("nowhere")

    assert list(bench.scan()) == [right]


@pytest.mark.parametrize(("age_s", "found"), [(0, False), (QUIET_S - 1, False), (QUIET_S + 1, True)])
def test_a_file_that_may_still_be_written_is_skipped(bench: Bench, age_s: float, found: bool) -> None:
    path = bench.write("17000/a/1.g3", age_s)
    scan = bench.scan()

    assert list(scan) == ([path] if found else [])
    assert scan.seen == found


def test_a_row_names_a_file_in_whatever_state_it_is(bench: Bench) -> None:
    paths = [bench.write(f"17000/a/{number}.g3") for number in range(2)]
    bench.register(paths[0])
    bench.register(paths[1], archive_name="smurf")

    assert list(bench.scan()) == []


def test_files_are_looked_up_and_reported_in_batches(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "_BATCH", 10)
    paths = [bench.write(f"17000/a/{number:03}.g3") for number in range(35)]
    bench.register(*paths[::2])
    found = list(bench.scan())

    assert found == paths[1::2]
    assert [report["seen"] for report in bench.reports] == [10, 20, 30, 35]
    assert [report["unregistered"] for report in bench.reports] == [5, 10, 15, 17]


def test_at_most_twenty_paths_are_listed(bench: Bench) -> None:
    paths = [bench.write(f"17000/a/{number:03}.g3") for number in range(25)]
    scan = bench.scan()

    assert list(scan) == paths
    assert scan.progress()["paths"] == paths[:20]


def test_a_relative_folder_is_the_same_as_its_absolute_path(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bench.write("17000/a/1.g3")
    monkeypatch.chdir(bench.root.parent)

    assert list(bench.scan("timestreams")) == list(bench.scan("./timestreams/")) == [path]


def test_an_empty_folder_has_nothing(bench: Bench) -> None:
    assert list(bench.scan()) == []
    assert bench.reports[-1]["seen"] == 0


def test_a_folder_that_is_not_there_is_an_error(bench: Bench) -> None:
    with pytest.raises(FileNotFoundError):
        list(bench.scan(f"{bench.root}/none"))


def test_without_a_database_nothing_is_made(bench: Bench) -> None:
    os.unlink(bench.db_path)
    bench.write("17000/a/1.g3")
    with pytest.raises(DatabaseUnavailableError, match="does not exist"):
        list(bench.scan())

    assert not os.path.exists(bench.db_path)


def test_a_found_file_is_registered_like_an_announced_one() -> None:
    path = "/data/so/timestreams/17000/a/1.g3"
    meta, incoming = registration_of(path)

    assert messages.parse_file(incoming.message).meta == meta
    assert list(candidates(meta)) == [Entry("timestreams", path, "17000/a/1.g3", True)]
    assert incoming.sender == "backfill"


@pytest.mark.parametrize("looks", [0, 1, 5, 13, 24])
def test_a_scan_that_is_stopped_ends_at_once(bench: Bench, looks: int) -> None:
    for number in range(10):
        bench.write(f"17000/a/{number}.g3")
    asked = iter([False] * looks + [True] * 100)
    scan = Scan(str(bench.root), bench.db_path, bench.reports.append, bench.clock, lambda: next(asked))

    assert list(scan) == []
    assert not bench.reports, "it would not be true of all"
