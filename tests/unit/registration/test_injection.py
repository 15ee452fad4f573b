"""Any error in any operation on one registration, and any text in the spool: the others are registered all the same."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from socs_monitor.registration import checksum
from socs_monitor.registration.checksum import FileRefusedError
from socs_monitor.registration.lookup import Policy
from socs_monitor.spool.states import STORED, State
from socs_monitor.suprsync import archive
from socs_monitor.suprsync.archive import ArchiveError
from socs_monitor.suprsync.database import Database
from tests.chain import SETTLE_S, Chain, Clock, execute, md5
from tests.strategies import json_values, nasty_text

BAD = "bad.dat"
GOOD = ("a.dat", "b.dat", "large.dat")
SMALL = 100  # bytes

errors = st.one_of(
    st.sampled_from(sorted(errno.errorcode)).map(lambda number: OSError(number, os.strerror(number))),
    st.sampled_from(
        [
            OSError("of no number"),
            ValueError("odd"),
            MemoryError(),
            OverflowError("odd"),
            RecursionError("odd"),
            KeyError("odd"),
            UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"),
            ArchiveError("odd"),
            FileRefusedError("odd"),
        ]
    ),
)

OS_CALLS = ("open", "stat", "fstat", "readlink", "read", "lseek", "posix_fadvise")
DATABASE_CALLS = ("register", "rows", "withdraw")


def is_bad(value: object) -> bool:
    """Whether an argument of a call means the bad file: its path, a descriptor of it, or something with its path."""
    if isinstance(value, int) or (isinstance(value, str) and value.isdigit()):
        value = os.path.realpath(f"/proc/self/fd/{value}")
    return BAD in str(value)


class Fault:
    """An error that one operation raises whenever it is about the bad file, `times` times.

    Args:
        where: The operation: ``os.NAME``, ``database.NAME``, or ``candidates``.
        error: What it raises.
        times: How often.
    """

    def __init__(self, where: str, error: Exception, times: int) -> None:
        self.where = where
        self.error = error
        self.times = times

    def wrap(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*arguments: Any, **options: Any) -> Any:
            # the argument of a method is the second one, and may be an iterator
            arguments = tuple(list(value) if isinstance(value, Iterator) else value for value in arguments)
            if self.times and any(is_bad(value) for value in arguments):
                self.times -= 1
                raise self.error
            return operation(*arguments, **options)

        return failing

    @contextmanager
    def present(self) -> Iterator[None]:
        where, _, name = self.where.partition(".")
        target: Any = {"os": checksum.os, "database": Database, "candidates": archive}[where]
        with pytest.MonkeyPatch.context() as patch:
            name = name or where
            patch.setattr(target, name, self.wrap(getattr(target, name)))
            yield


faults = st.builds(
    Fault,
    st.sampled_from(
        [*(f"os.{name}" for name in OS_CALLS), *(f"database.{name}" for name in DATABASE_CALLS), "candidates"]
    ),
    errors,
    st.sampled_from([1, 2, 3, 1000]),
)

# What happens one after the other; in between the registrar does what it can.
EVENTS = ("announce", "announce otherwise", "change", "remove", "link elsewhere", "settle", "give up", "restart")
events = st.lists(st.sampled_from(EVENTS), max_size=6)


class Bench:
    def __init__(self, folder: Path, *, has_roots: bool) -> None:
        self.clock = Clock()
        roots = (str(folder / "files"),) if has_roots else ()
        policy = Policy(data_roots=roots, give_up_after=30.0)
        self.chain = Chain(folder, self.clock, self.clock.monotonic, policy, small=SMALL, busy_timeout=0.0)
        self.chain.files.mkdir()
        self.chain.registrar.begin()
        self.sums: dict[str, str] = {}

    def write(self, name: str, content: bytes) -> None:
        path = self.chain.path(name)
        path.unlink(missing_ok=True)
        self.sums[name] = self.chain.write(name, content)

    def happen(self, event: str) -> None:
        bad = self.chain.path(BAD)
        if event == "settle":
            self.clock.advance(SETTLE_S)
        elif event == "give up":
            for _ in range(12):
                self.step()
                self.clock.advance(60)
        elif event == "restart":
            self.chain.reopen()
        elif event == "change":
            self.write(BAD, os.urandom(8) * (30 if self.clock.now % 2 else 1))
        elif event == "remove":
            bad.unlink(missing_ok=True)
        elif event == "link elsewhere":
            bad.unlink(missing_ok=True)
            bad.symlink_to("/dev/null")
        else:
            self.chain.accept(BAD, action="act" if event == "announce" else "other")
        self.clock.advance(0.1)

    def step(self) -> None:
        self.chain.step()
        self.chain.hash_large()
        self.chain.step()

    def check_others(self) -> None:
        """The others are registered and settled, and what is not says why."""
        self.clock.advance(2 * 60.0)
        self.step()
        self.clock.advance(2 * 60.0)
        self.step()
        rows = {os.path.basename(row["local_path"]): row["local_md5sum"] for row in self.chain.rows()}
        assert {name: rows[name] for name in GOOD} == {name: self.sums[name] for name in GOOD}
        left = execute(self.chain.spool_path, "SELECT message, state, reason FROM registrations")
        for message, state, reason in left:
            assert not any(name in message for name in GOOD), "these are settled"
            assert state in (State.WAITING, State.DEAD, State.REGISTERED)
            assert reason or state == State.REGISTERED, "whoever looks learns why"

    def close(self) -> None:
        self.chain.crash()


@contextmanager
def bench_of(has_roots: bool) -> Iterator[Bench]:
    base = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=base) as folder:
        bench = Bench(Path(folder), has_roots=has_roots)
        try:
            yield bench
        finally:
            bench.close()


@settings(max_examples=300, deadline=None)
@given(fault=faults, happening=events, size=st.sampled_from([1, 2 * SMALL]), has_roots=st.booleans())
def test_an_error_of_one_registration_stops_no_other(
    fault: Fault, happening: list[str], size: int, has_roots: bool
) -> None:
    with bench_of(has_roots) as bench:
        for name in GOOD:
            bench.write(name, name.encode() * (30 if name == "large.dat" else 1))
        bench.write(BAD, b"x" * size)
        with fault.present():
            for name in (GOOD[0], BAD, *GOOD[1:]):
                bench.chain.accept(name)
            bench.step()
            for event in happening:
                bench.happen(event)
                bench.step()
            bench.check_others()
        # once the fault is over, it is registered as any other
        bench.write(BAD, b"good again")
        bench.chain.accept(BAD, action="final")
        bench.chain.registrar.retry()
        for _ in range(20):
            bench.step()
            bench.clock.advance(60)
        rows = {row["remote_path"]: row["local_md5sum"] for row in bench.chain.rows()}
        assert rows["17000/crate1slot2/1700000000_final/outputs/bad.dat"] == md5(b"good again")
        counts = bench.chain.counts()
        assert counts == {"received": counts["received"], "settled": counts["received"]}


good = {"id": "a", "type": "g3_file", "payload": {"path": "/x/y/z.g3", "archive_name": "timestreams"}}
messages = st.one_of(
    nasty_text(),
    json_values().map(json.dumps),
    st.builds(lambda field, value: json.dumps({**good, field: value}), st.sampled_from(list(good)), json_values()),
    st.builds(
        lambda field, value: json.dumps({**good, "payload": {**good["payload"], field: value}}),  # type: ignore[dict-item]
        st.sampled_from(["path", "archive_name", "format", "timestamp", "action", "action_ts", "plot"]),
        json_values(),
    ),
)
entries = st.fixed_dictionaries(
    {
        "message": messages,
        "state": st.sampled_from([str(state) for state in STORED]),
        "attempts": st.integers(0, 2**62),
        "rounds": st.integers(0, 2**62),
        "due": st.none() | st.floats(allow_nan=False),
        "received": st.floats(allow_nan=False),
        "reason": st.none() | nasty_text(),
        "refused": st.integers(0, 1),
    }
)


def insert(chain: Chain, **columns: Any) -> None:
    """Put an entry into the spool's file."""
    columns["message"] = columns["message"] if isinstance(columns["message"], bytes) else columns["message"].encode()
    marks = ", ".join("CAST(? AS TEXT)" if name == "message" else "?" for name in columns)
    execute(
        chain.spool_path,
        f"INSERT INTO registrations (sender, {', '.join(columns)}) VALUES ('x', {marks})",
        *columns.values(),
    )


@settings(max_examples=200, deadline=None)
@given(strange=st.lists(entries, min_size=1, max_size=5))
def test_no_entry_of_the_spool_stops_any_registration(strange: list[dict[str, Any]]) -> None:
    with bench_of(has_roots=False) as bench:
        for entry in strange:
            insert(bench.chain, **entry)
        bench.chain.reopen()
        for name in GOOD:
            bench.write(name, name.encode() * (30 if name == "large.dat" else 1))
            bench.chain.accept(name)
        bench.step()
        bench.chain.registrar.retry()
        bench.check_others()
        assert len(bench.chain.dead_letters()) == bench.chain.spool.counts["dead"]


@pytest.mark.parametrize(
    "message",
    [
        b'{"id": "a", "type": "g3_file", "payload": {"path": "/x/\xff"}}',
        b"[" * 50_000,
        b'{"id": "a", "type": "g3_file", "payload": ' + b'{"path": ' * 5000 + b"}" * 5000,
        b'{"id": "a", "type": "g3_file", "payload": {"path": "/x/\\ud800"}}',
        b'{"id": "a", "type": "g3_file", "payload": {"path": "/x/y", "timestamp": 1' + b"0" * 5000 + b"}}",
    ],
    ids=["no Unicode", "deep lists", "deep objects", "half a surrogate pair", "large number"],
)
def test_a_message_that_cannot_be_parsed_stops_no_registration(chain: Chain, message: bytes) -> None:
    for state in STORED:
        insert(chain, message=message, state=str(state), received=1.0, attempts=3, due=0.0)
    chain.reopen()
    sum_ = chain.write("a.dat", b"a")
    chain.accept("a.dat")
    chain.step()
    assert chain.sums() == {"a.dat": sum_}
    assert [reason for _, reason, _ in chain.dead_letters() if reason]
    assert chain.spool.counts["pending"] == 0
