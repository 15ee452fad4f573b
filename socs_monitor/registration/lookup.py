"""Which file a registration means, and how long to go on looking for it. Pure but for the options."""

from __future__ import annotations

from dataclasses import dataclass

from socs_monitor.spool.records import Record, Registration
from socs_monitor.suprsync import archive
from socs_monitor.suprsync.archive import ArchiveError, Entry
from socs_monitor.wire import messages

# A file that is missing is looked for after RETRY_FIRST_S, then after twice as long each time, up to RETRY_MAX_S.
RETRY_FIRST_S = 0.1
RETRY_MAX_S = 60.0

# The file of a row is checked again after `Policy.settle_after`, then after twice as long each time that it changed, up
# to this (seconds).
RECHECK_MAX_S = 60.0

# Doublings after which every delay has reached its maximum.
_DOUBLINGS = 20


@dataclass(frozen=True)
class Policy:
    """How files are treated.

    Attributes:
        data_roots: Absolute folders; a file outside of all of them is refused. Empty: any file is taken.
        own: Resolved paths of the database and the spool, which no registration may name.
        hash_workers: Number of large files hashed at a time.
        settle_after: Seconds from the row's commit to the second look at the file.
        give_up_after: Seconds for which a missing or unreadable file is looked for.
    """

    data_roots: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    hash_workers: int = 2
    settle_after: float = 5.0
    give_up_after: float = 3600.0


def entries(registration: Registration) -> list[Entry]:
    """Return the entries that a registration may mean; none if it can never become a row."""
    try:
        return list(archive.candidates(registration))
    except ArchiveError:
        return []


def entry_at(registration: Registration, local_path: str) -> Entry:
    """Return the entry of a registration whose file was found at `local_path`.

    Raises:
        archive.ArchiveError: If there is none.
    """
    for entry in archive.candidates(registration):
        if entry.local_path == local_path:
            return entry
    raise ArchiveError(f"the registration does not mean {local_path!r}")


def parse(row: Record) -> Registration:
    """Return a registration as the spool has it.

    Raises:
        messages.MessageError: If this version cannot parse it.
    """
    meta = messages.parse_file(row.message or "").meta
    return Registration(meta, row.id, row.received, row.sender, row.attempts, row.rounds)


def retry_delay(attempts: int) -> float:
    """Return the seconds until the next attempt, after `attempts` failed ones before this."""
    return min(RETRY_FIRST_S * 2.0 ** min(attempts, _DOUBLINGS), RETRY_MAX_S)


def is_given_up(attempts: int, give_up_after: float) -> bool:
    """Whether a file that failed once more, after `attempts` failed attempts, was looked for long enough (seconds)."""
    looked_for = 0.0
    for attempt in range(min(attempts, _DOUBLINGS)):
        looked_for += retry_delay(attempt)
    return looked_for + max(0, attempts - _DOUBLINGS) * RETRY_MAX_S >= give_up_after


def recheck_delay(rounds: int, settle_after: float) -> float:
    """Return the seconds until a registered file is checked again; `rounds` as of its `Registration`."""
    changes = max(0, rounds - 1)
    return min(settle_after * 2.0 ** min(changes, _DOUBLINGS), max(settle_after, RECHECK_MAX_S))


def duration(seconds: float) -> str:
    """Return a time span as a person reads it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
