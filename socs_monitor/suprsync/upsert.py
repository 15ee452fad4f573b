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

# SupRsync's default of --max-copy-attempts. It does not copy a row again after as many failures.
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
    def is_inert(self) -> bool:
        """Whether SupRsync neither copies the row's file nor deletes it, whatever it commits late."""
        return bool(self.ignore) and self.removed is not None and not self.deletable


class Action(enum.Enum):
    """What a registration does to the newest row of its key."""

    INSERT = "insert"  # there is none
    KEEP = "keep"  # it is right as it is
    CONFIRM = "confirm"  # verified: it is not removed, and may or may not be deleted
    RETRY = "retry"  # it has the content already, but is not verified: copied again from attempt 0
    RESET = "reset"  # it takes the content, and is copied as if it were new
    REFUSE = "refuse"  # another local path holds its place in the archive


class Plan(NamedTuple):
    """What to write for one registration.

    Attributes:
        action: What happens to the key's newest row.
        row: That row; None for `Action.INSERT` and `Action.REFUSE`.
        undeletable: Ids of rows whose ``deletable`` becomes false.
        retired: Ids of rows that become inert.
        holder: For `Action.REFUSE`, the local path of the row that holds the place in the archive.
    """

    action: Action
    row: Row | None = None
    undeletable: tuple[int, ...] = ()
    retired: tuple[int, ...] = ()
    holder: str | None = None


INSERT = Plan(Action.INSERT)


def plan_upsert(rows: Sequence[Row], file: HashedFile, holders: Iterable[str] = ()) -> Plan:
    """Plan how the content of a file is registered.

    Args:
        rows: All rows of the file's local path, oldest (lowest id) first.
        file: The content to register.
        holders: Local paths of all rows, of any content, with the file's archive and remote path.

    Returns:
        The plan. Only the row registered last may delete the file, so every other row of the path becomes
        undeletable. ``removed`` of other keys' rows is never touched, since SupRsync may be about to write it.
    """
    entry, md5 = file
    for holder in holders:
        if holder != entry.local_path:
            return Plan(Action.REFUSE, None, tuple(row.id for row in rows if row.deletable), (), holder)
    if not rows:
        return INSERT
    own = [row for row in rows if row.is_of(entry)]
    newest = own.pop() if own else None
    retired = tuple(row.id for row in own if not row.is_inert)
    undeletable = tuple(row.id for row in rows if row.deletable and row is not newest and row.id not in retired)
    if newest is None:
        return Plan(Action.INSERT, None, undeletable)
    if newest.local_md5sum != md5:
        action = Action.RESET
    elif newest.remote_md5sum != md5:
        action = Action.RETRY
    elif retired:
        # an older row of the same key may have replaced the content in the archive since this one was verified
        action = Action.RESET
    else:
        action = Action.CONFIRM
    is_right = newest.removed is None and bool(newest.deletable) == entry.deletable
    if is_right and (action is Action.CONFIRM or (action is Action.RETRY and newest.failed_copy_attempts == 0)):
        action = Action.KEEP
    return Plan(action, newest, undeletable, retired)


class Correction(NamedTuple):
    """New sums of a row that SupRsync cannot finish. It is not removed, and copied again from attempt 0.

    `row` is the row as it was selected.
    """

    row: Row
    local_md5sum: str
    remote_md5sum: str | None


def needs_retry(row: Row) -> bool:
    """Whether SupRsync does not copy the row again by itself."""
    return (row.failed_copy_attempts or 0) >= MAX_COPY_ATTEMPTS or row.removed is not None


def plan_correction(row: Row, md5: str) -> Correction | None:
    """Plan how a row that is not verified is corrected; None if there is nothing to correct.

    Args:
        row: The row, one that `tables.STUCK` selects.
        md5: MD5 sum of the file's present content.
    """
    if md5 != row.local_md5sum:
        return Correction(row, md5, None)
    if needs_retry(row):
        return Correction(row, md5, row.remote_md5sum)
    return None
