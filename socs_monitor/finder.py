"""Finding and hashing the file of a registration, and how long to go on looking for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from socs_monitor import archive
from socs_monitor.archive import ArchiveError
from socs_monitor.checksum import FileRefusedError, StoppedError, checksum
from socs_monitor.messages import brief
from socs_monitor.spool import Failure, Registration
from socs_monitor.suprsync import Database, DatabaseUnavailableError, HashedFile

# Files up to this size (bytes) are hashed at once, in turn; larger ones by `hashers`, so that no small one waits.
SMALL = 128 * 1024

# A file that is missing is looked for after RETRY_FIRST_S, then after twice as long each time, up to RETRY_MAX_S.
RETRY_FIRST_S = 0.1
RETRY_MAX_S = 60.0
_DOUBLINGS = math.ceil(math.log2(RETRY_MAX_S / RETRY_FIRST_S))


@dataclass(frozen=True)
class Policy:
    """How files are treated.

    Attributes:
        data_roots: Absolute, resolved folders; a file outside of all of them is refused. Empty: any file is taken.
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


class Hashed(NamedTuple):
    """A registration whose file was found and hashed."""

    registration: Registration
    file: HashedFile
    fingerprint: int


def retry_delay(attempts: int, give_up_after: float) -> float | None:
    """Return the seconds until the next attempt to find a file, or None to give up.

    Args:
        attempts: Number of failed attempts before the present one.
        give_up_after: Seconds to spend on the file in total.
    """
    doublings = min(attempts, _DOUBLINGS)  # 2.0**1024 overflows
    waited = RETRY_FIRST_S * (2.0**doublings - 1) + RETRY_MAX_S * (attempts - doublings)
    return min(RETRY_FIRST_S * 2.0**doublings, RETRY_MAX_S) if waited < give_up_after else None


def look(
    registration: Registration, policy: Policy, at_most: int | None, stopped: Callable[[], bool]
) -> Hashed | Failure | None:
    """Find and hash a registration's file; None if it is larger than `at_most` bytes."""
    missing: OSError | None = None
    try:
        for entry in archive.candidates(registration):
            try:
                found = checksum(entry.local_path, policy.data_roots, at_most, stopped, policy.own)
            except (FileNotFoundError, NotADirectoryError) as error:
                missing = missing or error
            except FileRefusedError as error:
                return Failure(registration, brief(str(error)), refused=True, entry=entry)
            else:
                return Hashed(registration, HashedFile(entry, found.md5), found.fingerprint) if found else None
    except ArchiveError as error:
        return Failure(registration, brief(str(error)), refused=True)
    except OSError as error:
        missing = error
    except StoppedError:
        raise
    except Exception as error:  # noqa: BLE001 (one registration that nobody foresaw must not hold up all others)
        return Failure(registration, brief(f"unforeseen {error!r}; please report it"), refused=True)
    return Failure(registration, brief(f"{registration['path']}: {missing and missing.strerror}"))


def archived(registrations: Sequence[Registration], database: Database) -> dict[int, Registration] | None:
    """Those of which a row tells that they were registered, or archived and removed, since they arrived.

    None where the database cannot be asked.
    """
    if not registrations:
        return {}
    entries = {registration.id: list(archive.candidates(registration)) for registration in registrations}
    try:
        rows = database.rows(entry.local_path for candidates in entries.values() for entry in candidates)
    except DatabaseUnavailableError:
        return None
    return {
        registration.id: registration
        for registration in registrations
        for entry in entries[registration.id]
        for row in rows.get(entry.local_path, ())
        if row.is_of(entry) and max(row.timestamp, row.removed or 0.0) >= registration.received
    }
