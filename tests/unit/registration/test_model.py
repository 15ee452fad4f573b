"""Any order of events: the real spool, intake, registrar and database against a plain model.

The model knows what was accepted and what is on the disk, and from the clock alone what must still be noticed. It is
asked at every moment whether the counts add up, and at the end whether every registration came to what it must.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from socs_monitor import crashpoint
from socs_monitor.registration.lookup import Policy
from socs_monitor.registration.retry import StoppedError
from tests.chain import Chain, Clock, execute, md5, write_lock

SETTLE_S = 5.0
GIVE_UP_S = 30.0
SMALL = 10  # bytes; larger files are hashed when the machine says so
BATCH = 4
QUEUE_MAX = 3 * 2400  # bytes, of three registrations
REFUSED = "c.dat"  # the name that a database with the trigger refuses
GARBAGE = b"garbage" * 1000

# Points that a batch of the intake passes; it may not be the last one.
ON_ARRIVAL = ("received", "spooled", "queued")

Key = tuple[str, str]  # name of the file, action

NAMES = ("a.dat", "b.dat", REFUSED)
names = st.sampled_from(NAMES)
keys = st.tuples(names, st.sampled_from(["one", "two"]))
contents = st.binary(min_size=1, max_size=3) | st.binary(min_size=SMALL + 1, max_size=SMALL + 3)
# after how many waits what the registrar waits for is over; None if it is stopped instead
patience = st.none() | st.integers(0, 2)


class Killed(BaseException):
    """The process dies at a crash point."""


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(crashpoint, "reach", self.reach)
        self.killed_at: str | None = None
        self.patience: int | None = None
        self.waited_for_nothing = False

        self.folder = Path(tempfile.mkdtemp(prefix="model-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
        self.aside = self.folder / "aside"
        self.aside.mkdir()
        self.clock = Clock()
        self.chain = Chain(
            self.folder,
            self.clock,
            self.clock.monotonic,
            Policy(settle_after=SETTLE_S, give_up_after=GIVE_UP_S),
            small=SMALL,
            queue_max=QUEUE_MAX,
            batch=BATCH,
            busy_timeout=0.0,
        )
        self.chain.locked = self.locked
        self.has_begun = True
        self.chain.registrar.begin()
        self.locks: dict[Path, contextlib.ExitStack] = {}

        self.disk: dict[str, bytes] = {}
        self.unspooled: set[Key] = set()  # arrived, not acknowledged
        self.required: set[Key] = set()  # a row there must be in the end
        self.stale: set[str] = set()  # names whose rows may have the sum of former content
        # registrations whose file must be looked at again: None while no row can be there yet, else the earliest time
        # of its commit
        self.watched: dict[Key, float | None] = {}
        self.since: dict[Key, float] = {}  # when the latest registration was acknowledged, in this order
        self.superseded: set[Key] = set()  # at a start, by a later announcement of the path

    # --- what the model knows

    def is_watched(self, key: Key) -> bool:
        committed = self.watched.get(key, 0.0)
        return committed is None or self.clock.now < committed + SETTLE_S

    def acknowledged(self) -> None:
        """What has arrived is in the spool."""
        self.required |= self.unspooled
        self.watched.update(dict.fromkeys(self.unspooled))
        for key in self.unspooled:
            self.since.pop(key, None)
            self.since[key] = self.clock.now
        self.superseded -= self.unspooled
        self.stale -= {name for name, _ in self.unspooled}
        self.unspooled.clear()

    def changed(self, name: str) -> None:
        if not any(self.is_watched(key) for key in self.watched if key[0] == name):
            self.stale.add(name)

    def may_have_committed(self) -> None:
        """A row may be there since now."""
        if self.database_works:
            for key, committed in self.watched.items():
                if committed is None and key[0] in self.disk:
                    self.watched[key] = self.clock.now

    def may_have_given_up(self) -> None:
        """A missing file that has a row was waited for long enough, and has settled."""
        if not self.is_garbage:
            for key in self.watched.keys() & self.row_keys():
                if key[0] not in self.disk and self.clock.now >= self.since[key] + GIVE_UP_S:
                    self.watched[key] = 0.0

    def row_keys(self) -> list[Key]:
        return [
            (os.path.basename(row["local_path"]), row["remote_path"].split("_")[1].split("/")[0])
            for row in self.chain.rows()
        ]

    def spooled_keys(self) -> set[Key]:
        payloads = [
            json.loads(message)["payload"]
            for (message,) in execute(self.chain.spool_path, "SELECT message FROM registrations")
        ]
        return {(os.path.basename(payload["path"]), payload["action"]) for payload in payloads}

    @property
    def database_works(self) -> bool:
        return self.chain.db_path not in self.locks and not self.is_garbage

    @property
    def spool_works(self) -> bool:
        return self.chain.spool_path not in self.locks

    @property
    def is_garbage(self) -> bool:
        return bool(os.listdir(self.aside))

    # --- senders and files

    @rule(key=keys, content=st.none() | contents)
    def register(self, key: Key, content: bytes | None) -> None:
        """A registration arrives, perhaps after its file was written."""
        name, action = key
        if content is not None:
            self.write(name, content, grows=False)
        self.clock.advance(0.001)  # what arrives after a row's commit does so at a later time
        self.unspooled.add(key)
        dies = self.killed_at == "received" or (self.killed_at in ON_ARRIVAL and len(self.unspooled) > BATCH)
        if self.spool_works and not dies:
            self.acknowledged()
        self.mortal(lambda: self.chain.accept(name, action=action))

    @rule(name=names, content=contents, grows=st.booleans())
    def write(self, name: str, content: bytes, grows: bool) -> None:
        self.disk[name] = self.disk.get(name, b"") + content if grows else content
        self.chain.write(name, self.disk[name])
        self.changed(name)

    @rule(name=names)
    def delete(self, name: str) -> None:
        self.disk.pop(name, None)
        self.chain.path(name).unlink(missing_ok=True)
        for key, committed in self.watched.items():  # a registered file that vanishes is done
            if key[0] == name and committed is not None:
                self.watched[key] = 0.0

    @precondition(lambda self: self.database_works)
    @rule(name=names, remove=st.booleans())
    def suprsync(self, name: str, remove: bool) -> None:
        """Copy a file whose sum is right, as SupRsync does, and perhaps remove it."""
        sums = {row["local_md5sum"] for row in self.chain.rows() if row["local_path"].endswith(name)}
        if name in self.disk and sums == {md5(self.disk[name])}:
            self.chain.archive(name, remove=remove)
            if remove:
                self.delete(name)

    # --- time, and the registrar

    @rule(seconds=st.sampled_from([0.0, 0.0, 0.1, 2.0, SETTLE_S, GIVE_UP_S]), patience=patience)
    def step(self, seconds: float, patience: int | None) -> None:
        self.clock.advance(seconds)
        self.patience = patience
        self.may_have_committed()
        if self.has_begun or self.begin():
            self.mortal(self.chain.step)
        self.may_have_committed()
        self.may_have_given_up()

    def begin(self) -> bool:
        """Begin, as `run` does; return whether that was not stopped."""
        latest = {name: (name, action) for name, action in self.since}
        self.superseded |= self.since.keys() - set(latest.values())
        self.has_begun = self.mortal(self.chain.registrar.begin)
        if self.has_begun and self.spool_works:  # it writes what has arrived
            self.acknowledged()
        return self.has_begun

    @rule(patience=patience)
    def settle(self, patience: int | None) -> None:
        self.step(0.0, patience)
        self.hash_large()
        self.step(0.0, patience)
        self.step(SETTLE_S, patience)

    @rule()
    def hash_large(self) -> None:
        if self.has_begun:
            self.chain.hash_large()

    def locked(self) -> bool:
        """The registrar waits; return whether it is not stopped."""
        if not (self.locks or self.is_garbage):
            self.waited_for_nothing = True
            return False
        if self.patience == 0:
            self.end_faults()
        if self.patience is not None:
            self.patience -= 1
        return self.patience is not None

    @precondition(lambda self: self.spool_works)
    @rule()
    def retry(self) -> None:
        self.chain.registrar.retry()

    @precondition(lambda self: self.spool_works)
    @rule()
    def discard(self) -> None:
        gone = [os.path.basename(letter.summary()["path"]) for letter in self.chain.spool.dead()]
        assert self.chain.spool.discard() == len(gone)
        self.stale.update(gone)
        self.required = {key for key in self.required if key[0] not in gone}

    # --- faults

    @rule(which=st.sampled_from(["db_path", "spool_path"]))
    def lock_or_unlock(self, which: str) -> None:
        path = getattr(self.chain, which)
        if path in self.locks:
            self.locks.pop(path).close()
        elif path.exists() and not (which == "db_path" and self.is_garbage):
            self.locks[path] = contextlib.ExitStack()
            self.locks[path].enter_context(write_lock(path))

    def end_faults(self) -> None:
        while self.locks:
            self.locks.popitem()[1].close()
        if self.is_garbage:
            self.restore()

    @precondition(lambda self: self.killed_at is None)
    @rule(point=st.sampled_from(crashpoint.POINTS))
    def arm(self, point: str) -> None:
        self.killed_at = point

    def reach(self, point: str) -> None:
        if point == self.killed_at:
            raise Killed

    def mortal(self, function: Callable[[], object]) -> bool:
        """Do something; return whether neither a crash nor a stop prevented it."""
        try:
            function()
        except Killed:
            self.crash()
            return False
        except StoppedError:
            self.has_begun = False
            return False
        return True

    @rule()
    def crash(self) -> None:
        self.killed_at = None
        self.unspooled.clear()
        self.chain.crash()
        self.chain.open()
        self.has_begun = False

    @precondition(lambda self: self.database_works)
    @rule()
    def begin_another_database(self) -> None:
        for path in self.database_files():
            path.unlink()
        self.required = {key for key in self.required - self.superseded if self.is_watched(key)}

    @precondition(lambda self: self.database_works)
    @rule()
    def put_garbage_in_its_place(self) -> None:
        for path in self.database_files():
            path.rename(self.aside / path.name)
        if self.is_garbage:
            self.chain.db_path.write_bytes(GARBAGE)

    @precondition(lambda self: self.is_garbage)
    @rule()
    def restore(self) -> None:
        assert self.chain.db_path.read_bytes() == GARBAGE
        for path in self.aside.iterdir():
            path.rename(self.folder / path.name)

    def database_files(self) -> list[Path]:
        return list(self.folder.glob("suprsync.db*"))

    @precondition(lambda self: self.database_works)
    @rule(refuse=st.booleans())
    def refuse_a_name(self, refuse: bool) -> None:
        if self.chain.rows():
            execute(self.chain.db_path, "DROP TRIGGER IF EXISTS bad")
            if refuse:
                execute(
                    self.chain.db_path,
                    f"CREATE TRIGGER bad BEFORE INSERT ON supersync_v0 WHEN NEW.local_path LIKE '%/{REFUSED}'"
                    " BEGIN SELECT RAISE(ABORT, 'it is bad'); END",
                )

    # --- what holds

    @invariant()
    def the_counts_are_right(self) -> None:
        self.chain.check()

    @invariant()
    def nothing_is_lost(self) -> None:
        """What was accepted is in the spool or has its row, at any moment."""
        assert not self.waited_for_nothing
        if not self.is_garbage:
            rows = self.row_keys()
            assert len(rows) == len(set(rows)), "one row for each key"
            assert self.required <= {*rows, *self.spooled_keys()}

    @invariant()
    def nothing_was_unexpected(self) -> None:
        assert [text for level, text in self.chain.said if "Unexpected error" in text] == []

    @rule()
    def calm_down(self) -> None:
        """Let all faults be over, all files be there, and everything be done; look at what has come of it."""
        self.killed_at = None
        self.end_faults()
        self.refuse_a_name(refuse=False)
        if not self.has_begun:
            assert self.begin()
        self.chain.intake.flush()
        self.acknowledged()
        for name in NAMES:
            if name not in self.disk:
                self.write(name, b"late", grows=False)
        while True:
            self.quiet()
            if not self.chain.registrar.retry():
                break
        self.look()

    def quiet(self) -> None:
        for _ in range(100):
            self.chain.step()
            self.chain.hash_large()
            self.clock.advance(SETTLE_S)
            busy = sum(self.chain.spool.counts[state] for state in ("pending", "waiting", "registered"))
            if not busy and not self.chain.health.conditions:
                self.watched.clear()
                return
        raise AssertionError(f"never quiet: {self.chain.spool.counts}, {self.chain.said[-5:]}")

    def look(self) -> None:
        rows = self.chain.rows()
        assert self.required <= set(self.row_keys()), "nothing is lost"
        # rows of other keys of the path may wait for the caretaker
        for name in {name for name, _ in self.row_keys()} - self.stale:
            sums = [row["local_md5sum"] for row in rows if row["local_path"].endswith(name)]
            assert md5(self.disk[name]) in sums, "the content that was announced last has a row"

    def teardown(self) -> None:
        try:
            self.calm_down()
            # and from here, whatever came before, one more registration of each makes all right
            for key in sorted({*self.required, *((name, "one") for name in self.disk)}):
                self.register(key, None)
            self.calm_down()
            assert not self.stale
        finally:
            self.end_faults()
            self.chain.crash()
            self.patch.undo()
            shutil.rmtree(self.folder)


Machine.TestCase.settings = settings(
    max_examples=300, stateful_step_count=25, deadline=None, report_multiple_bugs=False
)
TestMachine = Machine.TestCase
