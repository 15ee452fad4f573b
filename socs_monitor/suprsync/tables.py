"""SQLAlchemy models of the SupRsync database.

The tables are exactly the published ones, because the published agents work on the same file: an added index is
allowed, an added or changed column is not.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Boolean, Column, Float, ForeignKey, Index, Integer, String, and_, literal_column, or_
from sqlalchemy.orm import DeclarativeBase


class Base(DeclarativeBase):
    """The tables of version 0."""


class SupRsyncFile(Base):
    """A file for SupRsync to copy, verify and perhaps delete; times are unix seconds."""

    __tablename__ = "supersync_v0"

    id = Column(Integer, primary_key=True)
    local_path = Column(String, nullable=False)
    local_md5sum = Column(String, nullable=False)
    archive_name = Column(String, nullable=False)
    remote_path = Column(String, nullable=False)
    timestamp = Column(Float, nullable=False)
    remote_md5sum = Column(String)
    copied = Column(Float)
    removed = Column(Float)
    failed_copy_attempts = Column(Integer, default=0)
    deletable = Column(Boolean, default=True)
    ignore = Column(Boolean, default=False)


class TimecodeDir(Base):
    """A folder of one timecode in the archive. Only SupRsync writes these rows."""

    __tablename__ = "timecode_dirs_v0"

    id = Column(Integer, primary_key=True)
    timecode = Column(Integer, nullable=False)
    archive_name = Column(String, nullable=False)
    completed = Column(Boolean, default=False)
    synced = Column(Boolean, default=False)
    finalized = Column(Boolean, default=False)
    finalize_file_id = Column(Integer, ForeignKey("supersync_v0.id"))


FILES: Final[Any] = SupRsyncFile.__table__

# SQLite uses a partial index only if the query repeats the condition literally, so it has no parameters.
STUCK: Final = and_(
    literal_column('"ignore" = 0'),
    FILES.c.local_md5sum.is_distinct_from(FILES.c.remote_md5sum),
    or_(FILES.c.failed_copy_attempts > literal_column("0"), FILES.c.removed.is_not(None)),
)
"""Rows that are not verified, and that SupRsync failed to copy or takes for removed. It may never copy them."""

# Without the first two, each look-up reads the whole table, which grows to millions of rows. The last one holds only
# the few rows that `STUCK` selects, so inserting a row does not touch it.
INDEXES: Final = (
    Index("ix_supersync_v0_local_path", FILES.c.local_path),
    Index("ix_supersync_v0_remote_path", FILES.c.remote_path),
    Index("ix_supersync_v0_stuck", FILES.c.id, sqlite_where=STUCK),
)
