"""Which files a registration may mean, and the schedule of retries and re-checks.

Pure. Every delay doubles up to a maximum, so that no number of attempts makes the registrar busy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from socs_monitor.registration.work import Failed, FailedLarge, Hashed, HashResult
from socs_monitor.spool.records import Record, Registration
from socs_monitor.spool.states import State
from socs_monitor.suprsync import archive
from socs_monitor.suprsync.archive import ArchiveError, Entry
from socs_monitor.suprsync.upsert import HashedFile
from socs_monitor.wire import messages
from socs_monitor.wire.text import sanitize

# Seconds before the first and, after doublings, between the last attempts to read a missing file.
RETRY_FIRST_S = 0.1
RETRY_MAX_S = 60.0

# Longest delay of a re-check (seconds), unless `Policy.settle_after` is longer.
RECHECK_MAX_S = 60.0

# Doublings after which every delay has reached its maximum.
_DOUBLINGS = 20


@dataclass(frozen=True)
class Policy:
    """The options that decide which files are read, by how many threads, and how long a missing file is waited for.

    Attributes:
        data_roots: Absolute folders (``--data-root``). A file outside of all of them is refused. If empty, any file
            is accepted.
        own: Resolved paths of the SupRsync database and the spool. No registration may name them.
        hash_workers: Number of large files hashed at the same time (``--hash-workers``).
        settle_after: Seconds from the commit of a row to the re-check of its file.
        give_up_after: Seconds after which a missing or unreadable file becomes a dead letter (``--give-up-after``).
    """

    data_roots: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    hash_workers: int = 2
    settle_after: float = 5.0
    give_up_after: float = 3600.0


def entries(registration: Registration) -> list[Entry]:
    """Return the entries that a registration may mean. The list is empty if it can never become a row."""
    try:
        return list(archive.candidates(registration))
    except ArchiveError:
        return []


def parse(rows: Iterable[Record], failed: list[Failed]) -> list[Registration]:
    """Return registrations that were loaded from the spool. Those that this version cannot parse go to `failed`."""
    registrations: list[Registration] = []
    for row in rows:
        try:
            meta = messages.parse_file(row.message or "").meta
        except Exception as error:  # noqa: BLE001 (whatever the spool holds, it must not stop the others)
            unknown = Registration({"path": row.message, "pub_id": ""}, row.id, row.received, row.sender)
            origin = State.REGISTERED if row.state == State.REGISTERED else State.PENDING
            failed.append(Failed(unknown, sanitize(f"it cannot be parsed: {error}"), refused=True, origin=origin))
        else:
            registrations.append(Registration(meta, row.id, row.received, row.sender, row.attempts, row.rounds))
    return registrations


def expand(result: HashResult, registrations: Iterable[Registration]) -> Iterator[Hashed | Failed]:
    """Yield the result of a large file for each registration that waited for it."""
    for registration in registrations:
        if isinstance(result, FailedLarge):
            yield Failed(registration, result.reason, result.refused, withdraw=result.refused)
            continue
        entry = next((one for one in entries(registration) if one.local_path == result.path), None)
        if entry is not None:
            yield Hashed(registration, HashedFile(entry, result.md5), result.fingerprint)
        else:
            yield Failed(registration, sanitize(f"it does not name {result.path}"), refused=True)


def retry_delay(attempts: int) -> float:
    """Return the seconds until the next attempt, when `attempts` had failed before the present failure."""
    return min(RETRY_FIRST_S * 2.0 ** min(attempts, _DOUBLINGS), RETRY_MAX_S)


def is_given_up(attempts: int, give_up_after: float) -> bool:
    """Return whether the delays after `attempts` failed attempts add up to at least `give_up_after` seconds."""
    waited = sum(retry_delay(attempt) for attempt in range(min(attempts, _DOUBLINGS)))
    return waited + max(0, attempts - _DOUBLINGS) * RETRY_MAX_S >= give_up_after


def recheck_delay(rounds: int, settle_after: float) -> float:
    """Return the seconds until a registered file is checked again.

    Args:
        rounds: The `rounds` of its `Registration`: the delay doubles with each change of the file.
        settle_after: The first delay, in seconds.
    """
    changes = max(0, rounds - 1)
    return min(settle_after * 2.0 ** min(changes, _DOUBLINGS), max(settle_after, RECHECK_MAX_S))
