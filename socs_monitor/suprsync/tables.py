"""SQLAlchemy models of the SupRsync database, and the SQL that creates its tables and indexes.

The tables are exactly the published ones, because the published agents use the same file. They accept an added index,
but not an added or changed column.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Boolean, Column, Float, ForeignKey, Integer, String
from sqlalchemy.dialects.sqlite.base import SQLiteDialect
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.schema import CreateTable


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
    """A timecode's folder in the archive. Only SupRsync writes these rows."""

    __tablename__ = "timecode_dirs_v0"

    id = Column(Integer, primary_key=True)
    timecode = Column(Integer, nullable=False)
    archive_name = Column(String, nullable=False)
    completed = Column(Boolean, default=False)
    synced = Column(Boolean, default=False)
    finalized = Column(Boolean, default=False)
    finalize_file_id = Column(Integer, ForeignKey("supersync_v0.id"))


STUCK: Final = (
    '"ignore" = 0 AND local_md5sum IS NOT remote_md5sum AND (failed_copy_attempts > 0 OR removed IS NOT NULL)'
)
"""Condition of rows that are not verified, and that SupRsync failed to copy or takes for removed.

SupRsync may never copy them. SQLite uses the partial index only in a query that repeats its condition.
"""

# Without the first two, each look-up reads the whole table, which grows to millions of rows. The third one holds only
# stuck rows, so inserting a row does not touch it.
INDEXES: Final = {
    "ix_supersync_v0_local_path": "(local_path)",
    "ix_supersync_v0_remote_path": "(remote_path)",
    "ix_supersync_v0_stuck": f"(id) WHERE {STUCK}",
}
"""Name of each added index, and what it is on."""

CREATE_TABLES: Final = [
    str(CreateTable(table, if_not_exists=True).compile(dialect=SQLiteDialect()))
    for table in Base.metadata.sorted_tables
]
CREATE_INDEXES: Final = {
    name: f"CREATE INDEX IF NOT EXISTS {name} ON supersync_v0 {what}" for name, what in INDEXES.items()
}
