"""The rules by which rows are inserted, reset and corrected."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from socs_monitor.suprsync.archive import Entry
from socs_monitor.suprsync.upsert import (
    Action,
    Correction,
    HashedFile,
    Plan,
    Row,
    plan_correction,
    plan_upsert,
)

OLD, NEW = "0" * 32, "1" * 32


def entry(action: str = "a", deletable: bool = True) -> Entry:
    return Entry("smurf", "/data/x", f"17000/slot2/{action}/outputs/x", deletable)


def row(id_: int = 1, md5: str = OLD, remote: str | None = None, action: str = "a", **changed: Any) -> Row:
    archive_name, local_path, remote_path, deletable = entry(action)
    known = Row(id_, local_path, md5, archive_name, remote_path, 5.0, remote, None, None, 0, deletable, False)
    return known._replace(**changed)


def retired(id_: int, md5: str = OLD, remote: str | None = None) -> Row:
    return row(id_, md5, remote, removed=0.0, deletable=False, ignore=True)


NEW_FILE = HashedFile(entry(), NEW)


@pytest.mark.parametrize(
    ("newest", "action"),
    [
        # verified with this content: nothing to do, except to say that the file is there, and may be deleted again
        (row(1, NEW, NEW), Action.KEEP),
        (row(1, NEW, NEW, failed_copy_attempts=3), Action.KEEP),
        (row(1, NEW, NEW, ignore=True), Action.KEEP),
        (row(1, NEW, NEW, removed=9.0), Action.CONFIRM),
        (row(1, NEW, NEW, removed=0.0), Action.CONFIRM),
        (row(1, NEW, NEW, deletable=False), Action.CONFIRM),
        # not verified: copied again from attempt 0
        (row(1, NEW), Action.KEEP),
        (row(1, NEW, OLD), Action.KEEP),
        (row(1, NEW, failed_copy_attempts=6), Action.RETRY),
        (row(1, NEW, removed=9.0), Action.RETRY),
        (row(1, NEW, deletable=False), Action.RETRY),
        # other content
        (row(1, OLD), Action.RESET),
        (row(1, OLD, OLD), Action.RESET),
        (row(1, OLD, NEW), Action.RESET),
        (row(1, OLD, OLD, removed=9.0), Action.RESET),
        (row(1, OLD, ignore=True), Action.RESET),
    ],
)
def test_the_row_of_a_key_is_treated_by_its_content_and_state(newest: Row, action: Action) -> None:
    assert plan_upsert([newest], NEW_FILE) == Plan(action, newest)


def test_a_path_without_rows_gets_one() -> None:
    assert plan_upsert([], NEW_FILE) == Plan(Action.INSERT)


@pytest.mark.parametrize("other", [row(1, action="b"), row(1, OLD, OLD, "b"), row(1, NEW, NEW, "b", removed=9.0)])
def test_only_the_row_that_was_registered_last_may_delete_the_file(other: Row) -> None:
    assert plan_upsert([other], NEW_FILE) == Plan(Action.INSERT, None, undeletable=(1,))
    newest = row(2, NEW, NEW)
    assert plan_upsert([other, newest], NEW_FILE) == Plan(Action.KEEP, newest, undeletable=(1,))
    assert plan_upsert([other._replace(deletable=False), newest], NEW_FILE) == Plan(Action.KEEP, newest)


def test_a_file_that_must_stay_makes_its_row_undeletable() -> None:
    known = row(1, NEW, NEW)
    assert plan_upsert([known], HashedFile(entry(deletable=False), NEW)) == Plan(Action.CONFIRM, known)


def test_older_rows_of_a_key_are_retired_and_the_newest_is_copied_again() -> None:
    older, newest = row(1, NEW, NEW), row(2, NEW, NEW)
    assert plan_upsert([older, newest], NEW_FILE) == Plan(Action.RESET, newest, retired=(1,))
    assert plan_upsert([retired(1), newest], NEW_FILE) == Plan(Action.KEEP, newest)
    assert plan_upsert([older, retired(2), row(3, NEW)], NEW_FILE) == Plan(Action.KEEP, row(3, NEW), retired=(1,))


@pytest.mark.parametrize("content", [OLD, NEW])
def test_a_place_in_the_archive_belongs_to_one_local_path(content: str) -> None:
    known = [row(1, content), row(2, action="b"), row(3, action="c", deletable=False)]
    plan = plan_upsert(known, NEW_FILE, ["/data/x", "/data/y"])
    assert plan == Plan(Action.REFUSE, None, undeletable=(1, 2), holder="/data/y")
    assert plan_upsert(known[:1], NEW_FILE, ["/data/x"]).action in (Action.KEEP, Action.RESET)


def apply(known: list[Row], wanted: HashedFile) -> list[Row]:
    """The rows after an upsert at time 7, in memory."""
    plan = plan_upsert(known, wanted)
    after = []
    for each in known:
        if plan.row is each:
            match plan.action:
                case Action.RESET:
                    each = each._replace(local_md5sum=wanted.md5, remote_md5sum=None, copied=None, timestamp=7.0)
                    each = each._replace(removed=None, failed_copy_attempts=0, deletable=wanted.entry.deletable)
                case Action.CONFIRM:
                    each = each._replace(removed=None, deletable=wanted.entry.deletable)
                case Action.RETRY:
                    each = each._replace(removed=None, failed_copy_attempts=0, deletable=wanted.entry.deletable)
        elif each.id in plan.undeletable:
            each = each._replace(deletable=False)
        elif each.id in plan.retired:
            each = each._replace(deletable=False, removed=0.0, ignore=True)
        after.append(each)
    if plan.action is Action.INSERT:
        after.append(row(len(known) + 1, wanted.md5, deletable=wanted.entry.deletable))
    return after


KNOWN = st.lists(
    st.builds(
        lambda md5, remote, action, **fields: row(0, md5, remote, action, **fields),
        st.sampled_from([OLD, NEW]), st.sampled_from([None, OLD, NEW]), st.sampled_from("abc"),
        removed=st.sampled_from([None, 0.0, 9.0]), failed_copy_attempts=st.sampled_from([0, 1, 6]),
        deletable=st.booleans(), ignore=st.booleans(),
    ),
    max_size=6,
).map(lambda drawn: [each._replace(id=number) for number, each in enumerate(drawn, 1)])  # fmt: skip


@given(known=KNOWN, deletable=st.booleans())
def test_after_an_upsert_one_row_may_delete_and_another_upsert_changes_nothing(
    known: list[Row], deletable: bool
) -> None:
    wanted = HashedFile(entry(deletable=deletable), NEW)
    after = apply(known, wanted)

    own = [each for each in after if each.is_of(wanted.entry)]
    newest = own.pop()
    assert (newest.local_md5sum, newest.removed, newest.deletable) == (NEW, None, deletable)
    assert all(each.is_retired for each in own)
    assert not any(each.deletable for each in after if each is not newest)
    others = [each._replace(deletable=False) for each in after if not each.is_of(wanted.entry)]
    assert others == [each._replace(deletable=False) for each in known if not each.is_of(wanted.entry)]
    assert len(after) - len(known) == (not any(each.is_of(wanted.entry) for each in known))
    assert apply(after, wanted) == after
    assert plan_upsert(after, wanted) == Plan(Action.KEEP, newest)


@pytest.mark.parametrize(
    ("known", "md5", "expected"),
    [
        (row(failed_copy_attempts=1), NEW, (NEW, None)),
        (row(remote=NEW, removed=9.0), NEW, (NEW, None)),
        (row(failed_copy_attempts=4), OLD, None),
        (row(failed_copy_attempts=5), OLD, (OLD, None)),
        (row(remote=NEW, failed_copy_attempts=6), OLD, (OLD, NEW)),
        (row(removed=9.0), OLD, (OLD, None)),
    ],
)
def test_a_row_that_suprsync_cannot_finish_is_corrected(
    known: Row, md5: str, expected: tuple[str, str | None] | None
) -> None:
    assert plan_correction(known, md5) == (expected and Correction(known, *expected))
