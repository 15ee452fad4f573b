"""The published SupRsync reads our database, copies with real rsync, verifies, and deletes what may be deleted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from socs_monitor.wire.publisher import Publisher
from tests.chain import execute, md5, write_file
from tests.socs import Round, server_root, suprsync
from tests.testbed.processes import Agent, rows
from tests.testbed.smurf_server import SmurfServer

StartAgent = Callable[..., Agent]


@pytest.fixture
def root() -> Iterator[Path]:
    with server_root() as root:
        yield root


class Site:
    """An agent, a pysmurf file that it is told about, and the archive that SupRsync copies to."""

    def __init__(self, agent: Agent, root: Path, base: Path) -> None:
        self.agent = agent
        self.base = base
        self.timestamp = time.time()  # SupRsync finalizes only the folders of former time codes
        self.path = root / "20240105" / "crate1slot2" / "1704450000" / "outputs" / "fixed_name.txt"
        self._publisher = Publisher("crate1slot2", agent.address)

    def close(self) -> None:
        self._publisher.close()

    def register(self, content: bytes, action: str = "first") -> None:
        """Write the file, announce it, and wait until the database says so."""
        md5 = write_file(self.path, content)
        self._publisher.data_file(str(self.path), timestamp=self.timestamp, action=action, action_ts="1704450000")
        self.agent.wait_for(lambda: self._row(action).get("local_md5sum") == md5, 10, "registered it")

    def _row(self, action: str) -> dict[str, Any]:
        of_action = [row for row in self.rows() if f"_{action}/" in row["remote_path"]]
        return of_action[0] if len(of_action) == 1 else {}

    def rows(self) -> list[dict[str, Any]]:
        return rows(self.agent.db_path)

    def archive(self, action: str = "first") -> Path:
        """Where the file is in the archive."""
        return self.base / str(self.timestamp)[:5] / "crate1slot2" / f"1704450000_{action}" / "outputs" / self.path.name

    def wait_for_correction(self, content: bytes) -> None:
        """Wait until the caretaker has given a row of the former action the present content; a start hastens it."""
        self.agent.stop()
        self.agent.start()

        def sums() -> set[str]:
            return {row["local_md5sum"] for row in self.rows() if row["local_path"] == str(self.path)}

        self.agent.wait_for(lambda: sums() == {md5(content)}, 30, "corrected the row")

    def suprsync(self, **how: Any) -> Round:
        return suprsync(self.agent.db_path, "smurf", self.base, **how)


@pytest.fixture
def site(agent: StartAgent, root: Path, tmp_path: Path) -> Iterator[Site]:
    site = Site(agent(), root, tmp_path / "archive")
    yield site
    site.close()


def is_done(stats: dict[str, Any]) -> bool:
    """Nothing is left to copy, and the archive is final until now."""
    return stats["uncopied_files"] == 0 and abs(stats["finalized_until"] - time.time()) < 10


def test_every_file_of_an_observation_is_archived_byte_for_byte_and_what_may_go_goes(
    agent: StartAgent, root: Path, tmp_path: Path
) -> None:
    monitor = agent()
    sizes = {"g3": 300_000}  # one that is hashed as a large file
    with SmurfServer(root, monitor.address, streams=2, sizes=sizes, smurf_data="") as server:
        sent = [message.file for message in server.send(server.messages(40, ("npy", "png", "txt", "tune", "g3")))]
    contents = {path: Path(path).read_bytes() for path in sent if path is not None}
    monitor.wait_for(lambda: len(monitor.rows()) >= len(contents), 20, "registered all")
    assert monitor.stop() == 0

    for archive in ("smurf", "timestreams"):
        base = tmp_path / archive
        ours = [row for row in monitor.rows() if row["archive_name"] == archive]
        first = suprsync(monitor.db_path, archive, base)
        assert sorted(first.copied) == sorted((row["local_path"], True) for row in ours)
        assert (first.before["uncopied_files"], first.before["num_files"]) == (len(ours), len(ours))
        assert first.before["finalized_until"] == min(row["timestamp"] for row in ours) - 1
        assert is_done(first.after)
        for row in ours:
            assert (base / row["remote_path"]).read_bytes() == contents[row["local_path"]]
            assert Path(row["local_path"]).exists(), "too early"

        second = suprsync(monitor.db_path, archive, base, delete_after=-1)
        assert second.copied == []
        assert is_done(second.after)
        for row in ours:
            assert Path(row["local_path"]).exists() == (not row["deletable"])
        assert {bool(row["deletable"]) for row in ours} == ({True, False} if archive == "smurf" else {True})
    assert {row["removed"] is not None for row in monitor.rows() if row["deletable"]} == {True}


def test_a_copied_file_that_is_overwritten_is_copied_anew(site: Site) -> None:
    site.register(b"old")
    assert site.suprsync().copied == [(str(site.path), True)]
    site.register(b"new!")
    again = site.suprsync()

    assert again.before["uncopied_files"] == 1
    assert again.copied == [(str(site.path), True)]
    assert site.archive().read_bytes() == b"new!"
    assert is_done(again.after)
    assert len(site.rows()) == 1


def test_a_file_that_is_overwritten_before_it_was_copied_is_copied_as_it_is(site: Site) -> None:
    site.register(b"old")
    site.register(b"new!")
    done = site.suprsync()

    assert done.copied == [(str(site.path), True)]
    assert site.archive().read_bytes() == b"new!"
    assert is_done(done.after)
    assert len(site.rows()) == 1


@pytest.mark.parametrize("copied_before", [True, False])
def test_a_file_that_another_action_overwrites_holds_nothing_back(site: Site, copied_before: bool) -> None:
    site.register(b"old")
    if copied_before:
        site.suprsync()
    site.register(b"new!", action="second")
    if not copied_before:
        site.suprsync()
        site.wait_for_correction(b"new!")
    done = site.suprsync()

    assert dict(done.copied) == {str(site.path): True}
    assert site.archive("second").read_bytes() == b"new!"
    assert site.archive("first").read_bytes() == (b"old" if copied_before else b"new!")
    assert is_done(done.after)
    assert len(site.rows()) == 2
    gone = site.suprsync(delete_after=-1)
    assert not site.path.exists()
    assert is_done(gone.after)


def test_attempts_that_failed_do_not_count_against_new_content(site: Site) -> None:
    site.register(b"old")
    execute(site.agent.db_path, "UPDATE supersync_v0 SET failed_copy_attempts = 5")
    assert site.suprsync().copied == [], "SupRsync has given it up"
    site.register(b"new!")
    done = site.suprsync()

    assert done.copied == [(str(site.path), True)]
    assert is_done(done.after)


def test_a_path_that_is_used_again_after_the_file_was_deleted_is_archived_again(site: Site) -> None:
    site.register(b"old")
    site.suprsync(delete_after=-1)
    assert not site.path.exists()
    site.register(b"new!")
    again = site.suprsync(delete_after=-1)

    assert again.copied == [(str(site.path), True)]
    assert site.archive().read_bytes() == b"new!"
    assert not site.path.exists()
    assert is_done(again.after)


def test_a_folder_in_which_a_file_was_overwritten_is_finalized(site: Site) -> None:
    site.timestamp = 1704450000.5
    site.register(b"old")
    site.register(b"new!", action="second")
    assert rows(site.agent.db_path, "timecode_dirs_v0") == [], "these rows are SupRsync's to write"
    site.suprsync()
    site.wait_for_correction(b"new!")
    site.suprsync()

    finalized = {folder["timecode"]: folder["finalized"] for folder in rows(site.agent.db_path, "timecode_dirs_v0")}
    assert finalized[17044] == 1
    assert site.rows()[-1]["local_path"].endswith("_smurf_17044_finalized.yaml")
