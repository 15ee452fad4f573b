"""Rows never lose a version and never get stuck: any order of events, with a model of the published SupRsync.

The machine interleaves the steps of two SupRsync agents with announcements, overwrites, removals, locks, a person's
``ignore``, re-checks, passes of the caretaker, restarts and restored backups, beginning with tables that the published
agent may have left, and checks the four invariants of decision record 10. What it exempts is what that record names as
inherent. ``ROWS_EXAMPLES`` in the environment sets the number of examples.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from socs_monitor.completeness.caretaker import RETRY_S, Caretaker
from socs_monitor.registration.lookup import Policy
from socs_monitor.registration.retry import StoppedError
from socs_monitor.registration.work import FailedLarge, HashedLarge
from socs_monitor.suprsync.database import Database, DatabaseUnavailableError
from socs_monitor.suprsync.sql import Outcome
from socs_monitor.suprsync.upsert import HashedFile
from socs_monitor.wire.publisher import g3_file
from tests.chain import SETTLE_S, Chain, Clock, execute, md5, write_lock
from tests.suprsync_model import SupRsync

EXAMPLES = int(os.environ.get("ROWS_EXAMPLES", "100"))

DELETE_AFTER_S = 30.0

_folders = itertools.count(time.time_ns())


class Key(NamedTuple):
    """What is announced: a file, and where it goes."""

    name: str
    archive: str
    action: str

    @property
    def remote_path(self) -> str:
        if self.archive == "timestreams":
            return self.name
        return f"17000/crate1slot2/1700000000_{self.action}/outputs/{os.path.basename(self.name)}"


# Two paths share a place in the archive, and one is in two archives.
X, SAME_NAME, Y = "17000/s/x.g3", "17001/s/x.g3", "17000/s/y.g3"
NAMES = (X, SAME_NAME, Y)
KEYS = (
    Key(X, "smurf", "one"),
    Key(X, "smurf", "two"),
    Key(X, "timestreams", ""),
    Key(SAME_NAME, "smurf", "one"),
    Key(SAME_NAME, "smurf", "three"),
    Key(Y, "smurf", "one"),
)
CONTENTS = (b"1", b"22", b"333")
ARCHIVES = ("smurf", "timestreams")

names = st.sampled_from((X, X, *NAMES))
keys = st.sampled_from((*KEYS[:3], *KEYS))
contents = st.sampled_from(CONTENTS)
archives = st.sampled_from(("smurf", "smurf", "timestreams"))


class Driver:
    """The agent: announcements, time, files, restarts and the caretaker. The machine knows nothing else of it.

    Args:
        folder: Scratch folder.
        clock: Time.
        registered: Called after each transaction with the files that were written, and their outcomes.
    """

    def __init__(
        self, folder: Path, clock: Clock, registered: Callable[[list[HashedFile], list[Outcome]], None]
    ) -> None:
        self._clock = clock
        self._registered = registered
        self._chain = Chain(folder, clock, clock.monotonic, Policy(settle_after=SETTLE_S), busy_timeout=0.0)
        self.db_path = self._chain.db_path
        self.path = self._chain.path
        self.write = self._chain.write
        self.rows = self._chain.rows
        self._chain.registrar.begin()
        self._begin()
        self._chain.database.register([])

    def _begin(self) -> None:
        register = self._chain.database.register

        def noting(files: list[HashedFile]) -> list[Outcome]:
            outcomes = register(files)
            self._registered(files, outcomes)
            return outcomes

        self._chain.database.register = noting  # type: ignore[assignment, method-assign]
        # None for a stop: the next caretaker makes one of its own
        self._caretaker_database = Database(
            str(self.db_path),
            create_table=False,
            echo=False,
            report=lambda _: None,
            clock=self._clock,
            busy_timeout=0.0,
        )
        self._meanwhile: Callable[[], None] | None = None
        self._caretaker = Caretaker(self._caretaker_database, self._hash, self._chain.health, self._clock.monotonic)

    def _hash(self, path: str, stopped: Callable[[], bool]) -> HashedLarge | FailedLarge | None:
        answers: list[HashedLarge | FailedLarge] = []
        self._chain.registrar.workers.hash(path, answers.append)
        self._chain.hash_large()
        if self._meanwhile is not None:
            self._meanwhile()
        return answers[0]

    def announce(self, key: Key) -> None:
        """Have an announcement arrive."""
        if key.archive == "smurf":
            self._chain.accept(key.name, action=key.action)
        else:
            payload = g3_file(str(self.path(key.name)))
            self._chain.accept_datagram({"id": "s", "type": "g3_file", "payload": payload})

    def step(self) -> None:
        """Do all that can be done now. A step that would wait for a lock ends as `run` does when it is stopped."""
        try:
            self._chain.step()
        except StoppedError:
            self._chain.registrar.begin()

    @property
    def unregistered(self) -> int:
        """How many announcements have not been registered since they came, or since the start."""
        counts = self._chain.spool.counts
        return counts["pending"] + counts["waiting"]

    @property
    def unsettled(self) -> int:
        """How many registrations are yet to be done."""
        counts = self._chain.spool.counts
        return sum(counts[state] for state in ("pending", "waiting", "registered"))

    def correct(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Have the caretaker make a pass, with something happening after it hashed each file."""
        self._meanwhile = meanwhile
        with contextlib.suppress(DatabaseUnavailableError):
            self._caretaker.run_pass()

    def restart(self) -> None:
        """Kill and start."""
        self._caretaker_database.close()
        self._chain.reopen()
        self._begin()

    def close(self) -> None:
        """End."""
        self._caretaker_database.close()
        self._chain.crash()


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        # the third component is the dated folder of deletable files
        top = Path("/dev/shm" if os.path.isdir("/dev/shm") else "/tmp/rows")
        self.folder = top / str(next(_folders))
        self.folder.mkdir(parents=True)
        self.backup = self.folder / "backup"
        self.clock = Clock()
        self.suprsyncs = {archive: SupRsync(self.folder / "suprsync.db", archive, self.clock) for archive in ARCHIVES}
        self.selected = dict.fromkeys(ARCHIVES, 0)
        self.lock = contextlib.ExitStack()
        self.locked = False

        self.events = itertools.count(1)
        self.version: dict[str, int] = {}  # of each file: changes with each writing
        self.announced: dict[str, Key] = {}  # by file, the key that was announced last
        self.announced_at: dict[Key, int] = {}
        self.committed: dict[tuple[str, int], int] = {}  # when a version was last registered
        self.verified: dict[Key, tuple[str, int]] = {}  # what each key's row says
        self.unknown: set[tuple[str, str]] = set()  # places of which a restored backup says what is not so
        self.driver = Driver(self.folder, self.clock, self.registered)

    # --- what the published agent left

    @initialize(
        left=st.lists(
            st.tuples(keys, contents, st.sampled_from(("copy", "copy half", "give up", "delete", "ignore", "nothing"))),
            max_size=4,
        )
    )
    def begin(self, left: list[tuple[Key, bytes, str]]) -> None:
        """Let the published agent register files, each with a row of its own, and SupRsync work in between."""
        columns = (
            "local_path, local_md5sum, archive_name, remote_path, timestamp, failed_copy_attempts, deletable, ignore"
        )
        for key, content, then in left:
            self.write(key.name, content)
            values = (
                str(self.driver.path(key.name)),
                md5(content),
                key.archive,
                key.remote_path,
                self.clock.now,
                0,
                1,
                0,
            )
            execute(self.driver.db_path, f"INSERT INTO supersync_v0 ({columns}) VALUES ({', '.join('?' * 8)})", *values)
            if then in ("copy", "delete"):
                self.work(key.archive)
                if then == "delete":
                    self.clock.advance(DELETE_AFTER_S + 1)
                    self.work(key.archive)
            elif then == "copy half":
                self.suprsyncs[key.archive].select()
                for _ in range(2):
                    self.continue_session(key.archive)
            elif then == "give up":
                execute(
                    self.driver.db_path, "UPDATE supersync_v0 SET failed_copy_attempts = 6 WHERE remote_md5sum IS NULL"
                )
            elif then == "ignore":
                execute(
                    self.driver.db_path,
                    "UPDATE supersync_v0 SET ignore = 1 WHERE id = (SELECT max(id) FROM supersync_v0)",
                )
        self.note_lies()
        self.note_verified()

    # --- senders and files

    @rule(name=names, content=contents)
    def write(self, name: str, content: bytes) -> None:
        self.driver.write(name, content)
        self.version[name] = next(self.events)

    @rule(name=names)
    def remove(self, name: str) -> None:
        self.driver.path(name).unlink(missing_ok=True)

    @rule(key=keys, content=st.none() | contents, step=st.booleans())
    def announce(self, key: Key, content: bytes | None, step: bool) -> None:
        if content is not None:
            self.write(key.name, content)
        self.clock.advance(0.001)
        self.announced[key.name] = key
        self.announced_at[key] = next(self.events)
        self.driver.announce(key)
        if step:
            self.step(0.0)

    @rule(key=keys, content=contents, then=keys, overwritten=st.none() | contents)
    def archive_and_announce_again(self, key: Key, content: bytes, then: Key, overwritten: bytes | None) -> None:
        """The usual life of a file, and then another announcement, perhaps of the same path."""
        self.announce(key, content, step=True)
        self.work(key.archive)
        self.announce(then, overwritten, step=True)

    # --- the agent

    @rule(seconds=st.sampled_from((0.0, 0.1, 1.0, SETTLE_S, 2 * SETTLE_S)))
    def step(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.driver.step()
        self.look_at_rows()

    def registered(self, files: list[HashedFile], outcomes: list[Outcome]) -> None:
        for file, outcome in zip(files, outcomes, strict=False):
            entry = file.entry
            name = os.path.relpath(entry.local_path, self.driver.path(""))
            assert md5(Path(entry.local_path).read_bytes()) == file.md5, "looked at immediately before"
            self.committed[name, self.version[name]] = next(self.events)
            if outcome.changed:
                self.unknown.discard((entry.archive_name, entry.remote_path))

    @rule(
        meanwhile=st.none()
        | st.tuples(st.just("write"), names, contents)
        | st.tuples(st.just("announce"), keys, contents, st.just(True))
        | st.tuples(st.just("continue_session"), archives),
        seconds=st.sampled_from((60.0, RETRY_S)),
    )
    def correct(self, meanwhile: tuple[Any, ...] | None, seconds: float) -> None:
        self.clock.advance(seconds)
        self.driver.correct((lambda: getattr(self, meanwhile[0])(*meanwhile[1:])) if meanwhile else None)
        self.look_at_rows()

    @rule()
    def restart(self) -> None:
        self.driver.restart()

    # --- SupRsync

    @rule(archive=archives)
    def begin_to_copy(self, archive: str) -> None:
        if not self.suprsyncs[archive].next:
            self.suprsyncs[archive].select()

    @rule(archive=archives, seconds=st.sampled_from((0.0, DELETE_AFTER_S + 1)))
    def begin_to_delete(self, archive: str, seconds: float) -> None:
        if not self.suprsyncs[archive].next:
            self.clock.advance(seconds)
            self.suprsyncs[archive].select_deletable(DELETE_AFTER_S)
            self.selected[archive] = next(self.events)

    @rule(archive=archives)
    def delete_what_is_old(self, archive: str) -> None:
        self.finish_session(archive)
        self.begin_to_delete(archive, DELETE_AFTER_S + 1)
        self.finish_session(archive)

    @rule(archive=archives)
    def continue_session(self, archive: str) -> None:
        suprsync = self.suprsyncs[archive]
        if not suprsync.next:
            return
        for path in suprsync.doomed:
            self.check_loss(archive, path)
        with contextlib.suppress(sqlite3.OperationalError):  # a lock
            suprsync.step()
        self.look_at_rows()

    @rule(archive=archives)
    def finish_session(self, archive: str) -> None:
        while self.suprsyncs[archive].next:
            self.continue_session(archive)

    @rule(archive=archives)
    def work(self, archive: str) -> None:
        """A round without interference."""
        self.finish_session(archive)
        self.begin_to_copy(archive)
        self.finish_session(archive)
        self.begin_to_delete(archive, 0.0)
        self.finish_session(archive)

    @rule(archive=archives)
    def suprsync_restarts(self, archive: str) -> None:
        self.suprsyncs[archive].abort()

    # --- people and faults

    @precondition(lambda self: not self.locked)
    @rule(number=st.integers(0, 5))
    def ignore(self, number: int) -> None:
        """A person gives up a row that is not verified."""
        bad = [row for row in self.driver.rows() if row["local_md5sum"] != row["remote_md5sum"]]
        if bad:
            execute(
                self.driver.db_path, "UPDATE supersync_v0 SET ignore = 1 WHERE id = ?", bad[number % len(bad)]["id"]
            )

    @rule()
    def lock_or_unlock(self) -> None:
        if self.locked:
            self.lock.close()
        else:
            self.lock.enter_context(write_lock(self.driver.db_path))
        self.locked = not self.locked

    @rule()
    def back_up(self) -> None:
        self.backup.unlink(missing_ok=True)
        execute(self.driver.db_path, "VACUUM INTO ?", str(self.backup))

    @precondition(lambda self: not self.locked and self.backup.exists())
    @rule()
    def restore(self) -> None:
        """Put the backup in the database's place, with the agents stopped."""
        for suprsync in self.suprsyncs.values():
            suprsync.abort()
        self.driver.close()
        for path in self.folder.glob("suprsync.db*"):
            path.unlink()
        shutil.copy(self.backup, self.driver.db_path)
        self.driver.restart()
        self.note_lies()
        self.verified.clear()
        self.committed.clear()  # the restored rows know nothing of it

    # --- what holds

    def contents_of(self, row: dict[str, Any]) -> bytes | None:
        return self.suprsyncs[row["archive_name"]].archive.get(row["remote_path"])

    def is_true(self, row: dict[str, Any]) -> bool:
        content = self.contents_of(row)
        return content is not None and md5(content) == row["remote_md5sum"] == row["local_md5sum"]

    def shared(self) -> set[tuple[str, str]]:
        """Places that the published agent gave to several paths."""
        holders: dict[tuple[str, str], set[str]] = {}
        for row in self.driver.rows():
            holders.setdefault((row["archive_name"], row["remote_path"]), set()).add(row["local_path"])
        return {place for place, paths in holders.items() if len(paths) > 1}

    def note_lies(self) -> None:
        """What a restored backup, or the published agent, left that is not so."""
        for row in self.driver.rows():
            if row["local_md5sum"] == row["remote_md5sum"] and not self.is_true(row):
                self.unknown.add((row["archive_name"], row["remote_path"]))

    def check_loss(self, archive: str, path: str) -> None:
        """No loss: SupRsync is about to delete a file."""
        name = os.path.relpath(path, self.driver.path(""))
        committed = self.committed.get((name, self.version.get(name, 0)), 0)
        if not os.path.exists(path) or not 0 < committed < self.selected[archive]:
            return  # never announced as it is; or inherent: SupRsync selected it before that was registered
        content = md5(Path(path).read_bytes())
        rows = [row for row in self.driver.rows() if row["local_path"] == path]
        exempt = self.shared() | self.unknown
        assert any(
            (self.is_true(row) and row["local_md5sum"] == content)
            or (row["archive_name"], row["remote_path"]) in exempt
            for row in rows
        ), f"{name} is lost: {content} is nowhere in the archive; {rows}"

    @invariant()
    def no_lie(self) -> None:
        rows = self.driver.rows()
        exempt = self.shared() | self.unknown
        for row in rows:
            place = row["archive_name"], row["remote_path"]
            if row["local_md5sum"] == row["remote_md5sum"] and place not in exempt:
                of_place = [other for other in rows if (other["archive_name"], other["remote_path"]) == place]
                assert self.is_true(row) or len(of_place) > 1, f"not so: {row}"

    def note_verified(self) -> None:
        """Remember what each key's row says, and up to which event its announcements are surely registered."""
        now = 0 if self.driver.unregistered else next(self.events)
        former = self.verified
        self.verified = {}
        for row, key in itertools.product(self.driver.rows(), KEYS):
            if self.is_row(row, key) and self.is_true(row):
                content, since = former.get(key, ("", 0))
                kept = since if content == row["local_md5sum"] else 0
                self.verified[key] = row["local_md5sum"], kept or now

    def is_row(self, row: dict[str, Any], key: Key) -> bool:
        return (row["archive_name"], row["local_path"], row["remote_path"]) == (
            key.archive,
            str(self.driver.path(key.name)),
            key.remote_path,
        )

    def look_at_rows(self) -> None:
        """An archived version stays until its key is announced again, or was announced last and its file changed."""
        rows = self.driver.rows()
        for key, (content, since) in self.verified.items():
            of_key = [row for row in rows if self.is_row(row, key)]
            if len(of_key) == 1 and of_key[0]["local_md5sum"] != content:
                again = self.announced_at.get(key, 0) > since or self.announced.get(key.name) == key
                assert again, f"{key} gave up {content}"
        self.note_verified()

    def calm(self) -> None:
        """Let everything be done that does not delete."""
        if self.locked:
            self.lock_or_unlock()
        for archive in ARCHIVES:
            self.finish_session(archive)
        for _ in range(6):  # several rows of one key get their copies one after the other
            for _ in range(8):
                if self.driver.unsettled:
                    self.step(60.0)
            for archive in ARCHIVES:
                self.begin_to_copy(archive)
                self.finish_session(archive)
            if not self.driver.unsettled and not self.waiting():
                break
            self.correct(None, RETRY_S)

    def waiting(self) -> list[dict[str, Any]]:
        """Rows of files that are there, which SupRsync has yet to copy."""
        shared = self.shared()
        return [
            row
            for row in self.driver.rows()
            if row["local_md5sum"] != row["remote_md5sum"]
            and os.path.exists(row["local_path"])
            and not row["ignore"]
            and (row["archive_name"], row["remote_path"]) not in shared
        ]

    def check_progress(self) -> None:
        """Progress: no row of a file that is there waits, once everything is calm."""
        assert not (stuck := self.waiting()), stuck

    @rule()
    def calm_down(self) -> None:
        self.calm()
        self.check_progress()

    def teardown(self) -> None:
        try:
            self.calm_down()
            for name in NAMES:
                if self.driver.path(name).exists():
                    self.announce_again([key for key in KEYS if key.name == name])
            for archive in ARCHIVES:
                self.begin_to_delete(archive, DELETE_AFTER_S + 1)
                self.finish_session(archive)
        finally:
            self.lock.close()
            self.driver.close()
            shutil.rmtree(self.folder)

    def announce_again(self, again: list[Key]) -> None:
        """Again means again: each key gets the present content."""
        for key in again:
            content = self.driver.path(key.name).read_bytes()
            place = key.archive, key.remote_path
            before = [row for row in self.driver.rows() if (row["archive_name"], row["remote_path"]) == place]
            self.announce(key, None, step=True)
            self.calm()
            self.check_progress()
            if any(not self.is_row(row, key) for row in before):
                continue  # refused
            if before and before[-1]["ignore"] and before[-1]["local_md5sum"] == md5(content):
                continue  # a person said so
            assert self.suprsyncs[key.archive].archive[key.remote_path] == content or place in self.unknown


Machine.TestCase.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=40, deadline=None, report_multiple_bugs=False
)
TestMachine = Machine.TestCase
