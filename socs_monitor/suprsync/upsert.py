"""The rules for inserting, resetting and correcting rows. Pure: reads no disk and no database.

A row makes SupRsync copy a file and later delete it, so the rules follow from four invariants (decision record 10):

1. No loss: if SupRsync deletes an announced version, the archive holds it under the remote path of a row that says so.
2. No lie: a row that says verified is true of the archive.
3. Progress: while a file can be read, none of its rows holds back ``finalized_until`` forever.
4. Again means again: announcing a file again archives its present content, whatever the history of its rows.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from socs_monitor.suprsync.archive import Entry

# The default of SupRsync's --max-copy-attempts. After this many failures it does not copy a row again.
MAX_COPY_ATTEMPTS = 5


class HashedFile(NamedTuple):
    """A file to register, and the MD5 sum (hexadecimal) of its content."""

    entry: Entry
    md5: str


class Row(NamedTuple):
    """A row of the table `SupRsyncFile`, in the order of its columns."""

    id: int
    local_path: str
    local_md5sum: str
    archive_name: str
    remote_path: str
    timestamp: float
    remote_md5sum: str | None
    copied: float | None
    removed: float | None
    failed_copy_attempts: int
    deletable: bool
    ignore: bool

    def is_of(self, entry: Entry) -> bool:
        """Whether the row has the entry's key: archive, local path and remote path."""
        return (
            self.local_path == entry.local_path
            and self.remote_path == entry.remote_path
            and self.archive_name == entry.archive_name
        )

    @property
    def is_retired(self) -> bool:
        """Whether SupRsync neither copies the row's file nor deletes it, whatever it commits late."""
        return bool(self.ignore) and self.removed is not None and not self.deletable

    @property
    def is_abandoned(self) -> bool:
        """Whether SupRsync will not copy the row again, because it failed too often or is taken for removed."""
        return (self.failed_copy_attempts or 0) >= MAX_COPY_ATTEMPTS or self.removed is not None


class Action(enum.Enum):
    """What a registration does to the newest row of its key."""

    INSERT = "insert"  # there is none
    KEEP = "keep"  # it is right
    CONFIRM = "confirm"  # it is verified: only `removed` and `deletable` change
    RETRY = "retry"  # it has the content but is not verified: SupRsync copies it again, from attempt 0
    RESET = "reset"  # it takes the content, and SupRsync copies it like a new row
    REFUSE = "refuse"  # another local path holds its place in the archive


class Plan(NamedTuple):
    """What to write for one registration.

    Attributes:
        action: What happens to the newest row of the key.
        row: That row; None for `Action.INSERT` and `Action.REFUSE`.
        undeletable: Ids of the rows whose ``deletable`` becomes false.
        retired: Ids of the rows to retire: older rows of the key that SupRsync must no longer copy or delete.
        holder: The local path that holds the place in the archive, for `Action.REFUSE`.
    """

    action: Action
    row: Row | None = None
    undeletable: tuple[int, ...] = ()
    retired: tuple[int, ...] = ()
    holder: str | None = None


INSERT = Plan(Action.INSERT)


def plan_upsert(rows: Sequence[Row], file: HashedFile, holders: Iterable[str] = ()) -> Plan:
    """Plan how to register the content of a file.

    Only the row that was registered last may delete the file, so all other rows of the path become undeletable.
    ``removed`` of other keys' rows is never changed, because SupRsync may be about to write it.

    Args:
        rows: All rows of the file's local path, oldest (lowest id) first.
        file: The content to register.
        holders: Local paths of all rows with the file's archive and remote path, whatever their content.
    """
    entry, md5 = file
    for holder in holders:
        if holder != entry.local_path:
            return Plan(Action.REFUSE, None, tuple(row.id for row in rows if row.deletable), (), holder)
    if not rows:
        return INSERT
    own = [row for row in rows if row.is_of(entry)]
    newest = own.pop() if own else None
    retired = tuple(row.id for row in own if not row.is_retired)
    undeletable = tuple(row.id for row in rows if row.deletable and row is not newest and row.id not in retired)
    if newest is None:
        return Plan(Action.INSERT, None, undeletable)
    is_right = newest.removed is None and bool(newest.deletable) == entry.deletable
    if newest.local_md5sum != md5:
        action = Action.RESET
    elif newest.remote_md5sum != md5:
        action = Action.KEEP if is_right and newest.failed_copy_attempts == 0 else Action.RETRY
    elif retired:
        # An older row of the key may have replaced the content in the archive since this one was verified.
        action = Action.RESET
    else:
        action = Action.KEEP if is_right else Action.CONFIRM
    return Plan(action, newest, undeletable, retired)


class Correction(NamedTuple):
    """New MD5 sums of a stuck row. SupRsync then copies it from attempt 0, and does not take it for removed.

    Attributes:
        row: The row as it was selected.
        local_md5sum: The sum of the file's present content.
        remote_md5sum: The sum of the archived content, if known.
    """

    row: Row
    local_md5sum: str
    remote_md5sum: str | None


def plan_correction(row: Row, md5: str) -> Correction | None:
    """Plan how to correct a stuck row; return None if SupRsync can still finish it.

    Args:
        row: A row that `tables.STUCK` selects.
        md5: MD5 sum of the file's present content.
    """
    if md5 != row.local_md5sum:
        return Correction(row, md5, None)
    return Correction(row, md5, row.remote_md5sum) if row.is_abandoned else None
