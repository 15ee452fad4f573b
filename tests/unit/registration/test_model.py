"""Any order of events: the real spool, intake, registrar and database against a plain model.

The model knows what was accepted and what is on the disk, and from the clock alone what must still be noticed. It is
asked at every moment whether the counts add up, and at the end whether every registration came to what it must.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from socs_monitor import crashpoint, hashers, intake, registrar, spoolfile
from socs_monitor.registration.lookup import Policy
from socs_monitor.suprsync import database as suprsync
from tests.chain import Chain, Clock, execute, md5, write_lock

SETTLE_S = 5.0
GIVE_UP_S = 30.0
SMALL = 10  # bytes; larger files go to the pool
REFUSED = "c.dat"  # the name that a database with the trigger refuses

Key = tuple[str, str]  # name of the file, action

NAMES = ("a.dat", "b.dat", REFUSED)
names = st.sampled_from(NAMES)
keys = st.tuples(names, st.sampled_from(["one", "two"]))
contents = st.binary(min_size=1, max_size=3) | st.binary(min_size=SMALL + 1, max_size=SMALL + 3)


class Killed(BaseException):
    """The process dies at a crash point."""


class Pool:
    """The thread pool, its threads run when the machine says: what fails can be done again."""

    def __init__(self, *_: object, **__: object) -> None:
        self.work: list[Callable[[], object]] = []

    def submit(self, function: Callable[..., object], *args: object) -> None:
        self.work.append(lambda: function(*args))

    def run(self) -> None:
        while self.work:
            self.work.pop(0)()


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(registrar, "SMALL", SMALL)
        self.patch.setattr(hashers, "MEDIUM", SMALL + 2)
        self.patch.setattr(hashers, "ThreadPoolExecutor", Pool)
        self.patch.setattr(intake, "QUEUE_MAX", 3)
        self.patch.setattr(intake, "BATCH", 4)
        self.patch.setattr(registrar, "BATCH", 4)
        self.patch.setattr(spoolfile, "_BUSY_TIMEOUT_S", 0.0)
        self.patch.setattr(suprsync, "_BUSY_TIMEOUT_S", 0.0)
        self.patch.setattr(crashpoint, "reach", self.reach)
        self.killed_at: str | None = None

        self.folder = Path(tempfile.mkdtemp(prefix="model-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
        self.aside = self.folder / "aside"
        self.aside.mkdir()
        self.clock = Clock()
        self.chain = Chain(
            self.folder, self.clock, self.clock.monotonic, Policy(settle_after=SETTLE_S, give_up_after=GIVE_UP_S)
        )
        self.chain.registrar.begin()
        self.locks: dict[Path, contextlib.ExitStack] = {}

        self.disk: dict[str, bytes] = {}
        self.unspooled: set[Key] = set()  # arrived, not acknowledged
        self.required: set[Key] = set()  # a row there must be in the end
        self.stale: set[str] = set()  # names whose rows may have the sum of former content
        # registrations whose file must be looked at again: None while no row can be there yet, else the earliest time
        # of its commit
        self.watched: dict[Key, float | None] = {}

    # --- what the model knows

    def is_watched(self, key: Key) -> bool:
        committed = self.watched.get(key, 0.0)
        return committed is None or self.clock.now < committed + SETTLE_S

    def acknowledged(self) -> None:
        """What has arrived is in the spool."""
        self.required |= self.unspooled
        self.watched.update(dict.fromkeys(self.unspooled))
        self.stale -= {name for name, _ in self.unspooled}
        self.unspooled.clear()

    def changed(self, name: str) -> None:
        if not any(self.is_watched(key) for key in self.watched if key[0] == name):
            self.stale.add(name)

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
        if self.killed_at != "received" and self.spool_works:
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
        for key in self.watched:  # a registered file that vanishes is done
            if key[0] == name:
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

    @rule(seconds=st.sampled_from([0.0, 0.0, 0.1, 2.0, SETTLE_S, GIVE_UP_S]))
    def step(self, seconds: float) -> None:
        self.clock.advance(seconds)
        if self.database_works:
            for key, committed in self.watched.items():
                if committed is None and key[0] in self.disk:
                    self.watched[key] = self.clock.now
        self.mortal(self.chain.step)

    @rule()
    def settle(self) -> None:
        self.step(0.0)
        self.hash_large()
        self.step(0.0)
        self.step(SETTLE_S)

    @rule()
    def hash_large(self) -> None:
        self.chain.registrar._hashers._threads.run()

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

    def unlock(self) -> None:
        while self.locks:
            self.locks.popitem()[1].close()

    @precondition(lambda self: self.killed_at is None)
    @rule(point=st.sampled_from(crashpoint.POINTS))
    def arm(self, point: str) -> None:
        self.killed_at = point

    def reach(self, point: str) -> None:
        if point == self.killed_at:
            raise Killed

    def mortal(self, function: Callable[[], object]) -> None:
        with contextlib.suppress(Killed):
            function()
            return
        self.crash()

    @rule()
    def crash(self) -> None:
        self.killed_at = None
        self.unspooled.clear()
        self.chain.reopen()

    @precondition(lambda self: self.database_works)
    @rule()
    def begin_another_database(self) -> None:
        for path in self.database_files():
            path.unlink()
        self.required = {key for key in self.required if self.is_watched(key)}

    @precondition(lambda self: self.database_works)
    @rule()
    def put_garbage_in_its_place(self) -> None:
        for path in self.database_files():
            path.rename(self.aside / path.name)
        if self.is_garbage:
            self.chain.db_path.write_bytes(b"garbage" * 1000)

    @precondition(lambda self: self.is_garbage)
    @rule()
    def restore(self) -> None:
        assert self.chain.db_path.read_bytes() == b"garbage" * 1000
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

    @rule()
    def calm_down(self) -> None:
        """Let all faults be over, all files be there, and everything be done; look at what has come of it."""
        self.killed_at = None
        self.unlock()
        if self.is_garbage:
            self.restore()
        self.refuse_a_name(refuse=False)
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
            self.chain.registrar._hashers._threads.run()
            self.clock.advance(SETTLE_S)
            busy = sum(self.chain.spool.counts[state] for state in ("pending", "waiting", "settling"))
            if not busy and not self.chain.stats.degraded:
                self.watched.clear()
                return
        raise AssertionError(f"never quiet: {self.chain.spool.counts}, {self.chain.said[-5:]}")

    def look(self) -> None:
        rows = [(os.path.basename(row["local_path"]), row) for row in self.chain.rows()]
        present = [(name, row["remote_path"].split("_")[1].split("/")[0]) for name, row in rows]
        assert len(present) == len(set(present)), "one row for each key"
        assert self.required <= set(present), "nothing is lost"
        # rows of other keys of the path may wait for the caretaker
        for name in {name for name, _ in rows} - self.stale:
            sums = [row["local_md5sum"] for of, row in rows if of == name]
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
            self.unlock()
            self.chain.crash()
            self.patch.undo()
            shutil.rmtree(self.folder)


Machine.TestCase.settings = settings(
    max_examples=300, stateful_step_count=25, deadline=None, report_multiple_bugs=False
)
TestMachine = Machine.TestCase
