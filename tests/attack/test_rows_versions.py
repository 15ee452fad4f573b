"""No version is lost and no row gets stuck: the real agent beside the published SupRsync, with real rsync."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from socs_monitor.wire.publisher import Publisher
from tests.chain import execute, md5, write_file, write_lock
from tests.socs import Round, add_file, server_root, session, suprsync
from tests.testbed.processes import Agent, rows

StartAgent = Callable[..., Agent]

# An existing database's rows get a time that is long past: SupRsync finalizes the folders of former time codes only.
ACTION_TS = "1704450000"


class Site:
    """An agent, a folder of files, and the archive that SupRsync copies to."""

    def __init__(self, agent: Agent, root: Path, base: Path) -> None:
        self.agent = agent
        self.root = root
        self.base = base
        self.timestamp = time.time()
        self.path = root / "20240105" / "f.txt"
        self._publisher = Publisher("crate1slot2", agent.address)

    def close(self) -> None:
        self._publisher.close()

    def write(self, content: bytes, path: Path | None = None) -> None:
        write_file(path or self.path, content)

    def announce(self, action: str = "a1", path: Path | str | None = None) -> None:
        """Announce a file, and wait until the agent has made something of it."""
        path = path or self.path
        place = re.escape(self.remote_path(action))
        done = re.compile(rf"event=(?:registered .*remote={place}|refused .*path={re.escape(str(path))})")
        before = len(done.findall(self.agent.log))
        self.send(action, path)
        self.agent.wait_for(lambda: len(done.findall(self.agent.log)) > before, 20, f"registered {action}")

    def send(self, action: str, path: Path | str | None = None) -> None:
        """Announce a file."""
        fields = {"timestamp": self.timestamp, "action": action, "action_ts": ACTION_TS}
        self._publisher.data_file(str(path or self.path), **fields)

    def wait_settled(self) -> None:
        """Wait until the agent has looked at all files again."""
        client = self.agent.client()

        def is_settled() -> bool:
            files = client.run.status().session["data"]["files"]
            return files["received"] == files["registered"] + files["dead"] and files["settling"] == 0

        self.agent.wait_for(is_settled, 30, "looked again")

    def remote_path(self, action: str = "a1") -> str:
        return f"{str(self.timestamp)[:5]}/crate1slot2/{ACTION_TS}_{action}/outputs/{self.path.name}"

    def archived(self, action: str = "a1") -> bytes | None:
        """The content that the archive holds for an action."""
        place = self.base / self.remote_path(action)
        return place.read_bytes() if place.exists() else None

    def rows(self) -> list[dict[str, Any]]:
        return rows(self.agent.db_path)

    def row(self, action: str = "a1") -> dict[str, Any]:
        (row,) = (row for row in self.rows() if row["remote_path"] == self.remote_path(action))
        return row

    def suprsync(self, **how: Any) -> Round:
        return suprsync(self.agent.db_path, "smurf", self.base, **how)

    def session(self, kind: str) -> Any:
        return session(kind, self.agent.db_path, "smurf", self.base)

    def delete(self) -> None:
        """Let SupRsync delete whatever it may, before it copies anything."""
        with self.session("delete"):
            pass

    def finish(self) -> Round:
        """Let SupRsync do all that it can do."""
        self.suprsync()
        return self.suprsync()


@pytest.fixture
def site(agent: StartAgent, tmp_path: Path) -> Iterator[Site]:
    with server_root() as root:
        site = Site(agent(env={"LOGLEVEL": "debug"}), root, tmp_path / "archive")
        yield site
        site.close()


def is_done(done: Round) -> bool:
    """Nothing is left to copy, and the archive is final until now."""
    return done.after["uncopied_files"] == 0 and abs(done.after["finalized_until"] - time.time()) < 10


def test_a_file_that_was_given_up_and_is_back_is_archived_when_it_is_announced_again(site: Site) -> None:
    site.write(b"v1")
    site.announce()
    site.path.unlink()
    for _ in range(3):
        site.suprsync()
    assert site.row()["failed_copy_attempts"] >= 5
    site.write(b"v1")
    site.announce()

    assert is_done(site.finish())
    assert site.archived() == b"v1"


def test_a_corrected_file_is_archived_although_a_person_ignored_the_former_one(site: Site) -> None:
    site.write(b"bad")
    site.announce()
    execute(site.agent.db_path, "UPDATE supersync_v0 SET ignore = 1")
    site.write(b"corrected")
    site.announce()

    assert is_done(site.finish())
    assert site.archived() == b"corrected"


def test_an_archived_version_stays_when_another_action_overwrites_the_file_before_the_recheck(site: Site) -> None:
    site.write(b"v1")
    site.announce("a1")
    site.suprsync()
    site.write(b"v2!")
    site.announce("a2")
    site.wait_settled()

    assert is_done(site.finish())
    assert (site.archived("a1"), site.archived("a2")) == (b"v1", b"v2!")


def test_a_version_that_is_copied_and_not_yet_verified_stays_when_another_action_overwrites_the_file(
    site: Site,
) -> None:
    site.write(b"v1")
    site.announce("a1")
    with site.session("copy"):
        site.write(b"v2!")
        site.announce("a2")

    assert is_done(site.finish())
    assert (site.archived("a1"), site.archived("a2")) == (b"v1", b"v2!")


def test_a_former_row_does_not_delete_a_version_that_is_not_archived_yet(site: Site) -> None:
    site.write(b"v1")
    site.announce("a1")
    site.suprsync()
    site.write(b"v2!")
    site.announce("a2")
    site.delete()
    assert site.path.read_bytes() == b"v2!"

    assert is_done(site.finish())
    assert (site.archived("a1"), site.archived("a2")) == (b"v1", b"v2!")
    site.delete()
    assert not site.path.exists()


def test_two_files_do_not_share_a_place_in_the_archive(site: Site) -> None:
    other = site.root / "20240106" / site.path.name
    site.write(b"one")
    site.write(b"another", other)
    site.announce("a1")
    site.suprsync()
    site.announce("a1", other)
    assert is_done(site.finish())
    site.delete()

    assert site.archived() == b"one"
    assert other.read_bytes() == b"another"
    assert not site.path.exists()
    assert f"{site.path} holds its place in the archive" in site.agent.log


def test_a_file_that_suprsync_removes_while_the_database_is_locked_leaves_no_row_that_waits_for_it(
    site: Site,
) -> None:
    site.write(b"v1")
    site.announce("a1")
    site.suprsync()
    with contextlib.ExitStack() as removing:
        with write_lock(site.agent.db_path):
            site.send("a2")
            site.agent.wait_log("event=degraded condition=database")  # so it was hashed
            removing.enter_context(site.session("delete"))
            assert not site.path.exists()
        # the agent writes before SupRsync commits
        site.agent.wait_log("event=recovered condition=database|event=waiting")

    assert is_done(site.finish())
    assert site.archived("a1") == b"v1"


def test_a_commit_that_lands_after_a_reset_and_says_given_up_is_corrected(site: Site) -> None:
    site.write(b"v1")
    site.announce()
    site.path.unlink()
    site.suprsync()
    site.suprsync()
    with site.session("copy"):
        site.write(b"v2!")
        site.announce()
        assert site.row()["failed_copy_attempts"] == 0
        site.agent.stop()
    assert site.row()["failed_copy_attempts"] >= 5, "SupRsync has written over the reset"
    site.agent.start()
    site.agent.wait_for(lambda: site.row()["failed_copy_attempts"] == 0, 30, "corrected it")

    assert is_done(site.finish())
    assert site.archived() == b"v2!"


def test_a_commit_that_lands_after_a_reset_and_says_removed_is_corrected(site: Site) -> None:
    site.write(b"v1")
    site.announce()
    site.suprsync()
    with site.session("delete"):
        site.write(b"v2!")
        site.announce()
        assert site.row()["removed"] is None
        site.wait_settled()
        site.agent.stop()
    assert site.row()["removed"] is not None, "SupRsync has written over the reset"
    site.agent.start()
    site.agent.wait_for(lambda: site.row()["removed"] is None, 30, "corrected it")

    assert is_done(site.finish())
    assert site.archived() == b"v2!"


def test_of_several_rows_of_a_key_the_archive_gets_what_is_announced(site: Site) -> None:
    for content in (b"v1", b"v2!"):
        site.write(content)
        add_file(site.agent.db_path, "smurf", site.path, site.remote_path())
        site.suprsync()
    assert site.archived() == b"v2!"
    site.write(b"v1")
    site.announce()
    assert is_done(site.finish())
    site.delete()

    assert site.archived() == b"v1"
    assert not site.path.exists()


def test_a_file_has_one_row_however_its_path_is_spelled(site: Site) -> None:
    site.write(b"v1")
    site.announce("a1", f"{site.root}/./20240105//{site.path.name}")
    site.write(b"v2!")
    site.announce("a1")

    assert [row["local_path"] for row in site.rows()] == [str(site.path)]
    assert is_done(site.finish())
    assert site.archived() == b"v2!"


def test_a_row_that_the_published_agent_left_is_corrected(site: Site) -> None:
    site.agent.stop()
    site.write(b"v1")
    add_file(site.agent.db_path, "smurf", site.path, site.remote_path("left"))
    site.write(b"v2!")
    for _ in range(6):
        site.suprsync()
    assert site.row("left")["failed_copy_attempts"] >= 5
    site.agent.start()
    site.agent.wait_for(lambda: site.row("left")["local_md5sum"] == md5(b"v2!"), 30, "corrected it")

    assert is_done(site.finish())
    assert site.archived("left") == b"v2!"
