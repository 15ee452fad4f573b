"""The rule by which content that is registered goes in among the rows of its path."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from socs_monitor.archive import Entry
from socs_monitor.suprsync import HashedFile, Row, merge

OLD, NEW = "0" * 32, "1" * 32


def entry(action: str = "a") -> Entry:
    return Entry("smurf", "/data/x", f"17000/slot2/{action}/outputs/x", deletable=True)


def row(id_: int, md5: str = OLD, remote: str | None = None, removed: float | None = None, action: str = "a") -> Row:
    return Row(id_, *entry(action)[:3], 5.0, md5, remote, removed)


@pytest.mark.parametrize(
    ("known", "outcome"),
    [
        ([], ([], None, True)),
        # the key's own row: left alone if it says so already, made new in place otherwise
        ([row(1, NEW)], ([], None, False)),
        ([row(1, NEW, remote=NEW)], ([], None, False)),
        ([row(1, NEW, remote=OLD)], ([], None, False)),
        ([row(1, NEW, remote=NEW, removed=9.0)], ([], 1, False)),
        ([row(1, OLD)], ([], 1, False)),
        ([row(1, OLD, remote=OLD)], ([], 1, False)),
        ([row(1, OLD, remote=OLD, removed=9.0)], ([], 1, False)),
        ([row(1, OLD, remote=OLD, removed=0.0)], ([], 1, False)),
        # rows of other keys: what is copied stays, what is not could never be copied, and takes the new sum
        ([row(1, action="b")], ([1], None, True)),
        ([row(1, OLD, remote=NEW, action="b")], ([1], None, True)),
        ([row(1, OLD, remote=OLD, action="b")], ([], None, True)),
        ([row(1, OLD, remote=OLD, removed=9.0, action="b")], ([], None, True)),
        ([row(1, action="b"), row(2, NEW)], ([1], None, False)),
        ([row(1, action="b"), row(2, action="c"), row(3, OLD)], ([1, 2], 3, False)),
        ([row(1, action="b"), row(2, OLD, remote=OLD, action="c")], ([1], None, True)),
        # rows of one key, as the published agent leaves them
        ([row(1, OLD), row(2, NEW)], ([1], None, False)),
        ([row(1, OLD), row(2, OLD)], ([1], 2, False)),
        ([row(1, OLD, remote=OLD), row(2, OLD)], ([], 2, False)),
    ],
)
def test_content_goes_in_among_the_rows_of_its_path_by_the_rule(
    known: list[Row], outcome: tuple[list[int], int | None, bool]
) -> None:
    assert merge(known, HashedFile(entry(), NEW)) == outcome


def apply(known: list[Row], wanted: HashedFile) -> list[Row]:
    """The rows after a merge, in memory."""
    retaken, reset, inserted = merge(known, wanted)
    after = []
    for each in known:
        if each.id == reset:
            each = each._replace(local_md5sum=wanted.md5, remote_md5sum=None, removed=None)
        elif each.id in retaken:
            each = each._replace(local_md5sum=wanted.md5)
        after.append(each)
    if inserted:
        after.append(Row(len(known) + 1, *wanted.entry[:3], 5.0, wanted.md5, None, None))
    return after


KNOWN = st.lists(
    st.tuples(st.sampled_from([OLD, NEW]), st.sampled_from([None, OLD, NEW]), st.sampled_from([None, 0.0, 9.0]),
              st.sampled_from("abc")),
    max_size=6,
).map(lambda drawn: [row(number, *fields) for number, fields in enumerate(drawn, 1)])  # fmt: skip


@given(known=KNOWN)
def test_after_a_merge_nothing_can_hold_suprsync_back_and_another_changes_nothing(known: list[Row]) -> None:
    after = apply(known, HashedFile(entry(), NEW))

    assert all(each.local_md5sum in (NEW, each.remote_md5sum) for each in after)
    own = [each for each in after if each.is_of(entry())]
    assert any(each.local_md5sum == NEW and each.removed is None for each in own)
    assert len(after) - len(known) == (not any(each.is_of(entry()) for each in known))
    archived = [each for each in known if each.local_md5sum == each.remote_md5sum and not each.is_of(entry())]
    assert [each for each in after if each in archived] == archived
    assert apply(after, HashedFile(entry(), NEW)) == after
