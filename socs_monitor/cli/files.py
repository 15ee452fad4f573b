"""``socs-monitor files``: show the rows of the SupRsync database, without locking out its writers."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import re
import sqlite3
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from socs_monitor.cli import client
from socs_monitor.cli.shared import CommandError, add_agent_arguments, console
from socs_monitor.health.units import utc
from socs_monitor.suprsync import readonly
from socs_monitor.wire.text import plural, sanitize

_LIMIT = 100
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}

# The rows that SupRsync copies.
_UNCOPIED = "local_md5sum IS NOT remote_md5sum AND removed IS NULL AND NOT coalesce(ignore, 0)"


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Show registered files: the rows of the SupRsync database, newest last. The database is only read; agent and"
        " SupRsync can keep running. --since and --uncopied may have to read the whole table: a few seconds for"
        " millions of rows."
    )
    add_agent_arguments(parser)
    parser.add_argument("--archive", metavar="A", help="only rows of this archive: smurf or timestreams")
    parser.add_argument(
        "--since",
        type=_time,
        metavar="T",
        help="only rows added since T: unix time, ISO date or time (default: UTC), or an age (30m, 2h, 3d)",
    )
    parser.add_argument("--uncopied", action="store_true", help="only files that SupRsync has not copied yet")
    parser.add_argument("--limit", type=_number, default=_LIMIT, metavar="N", help="newest N; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object per row, with all columns")
    parser.set_defaults(run=_files)


def _files(args: argparse.Namespace) -> None:
    path = client.settings_of(args).db_path
    try:
        rows = _rows(path, args)
    except (sqlite3.Error, OSError) as error:
        raise CommandError(f"The database {path} cannot be read: {error}. Check --db-path.") from error
    more = f"Only the newest {args.limit} are shown. For more, use --limit." if len(rows) > args.limit else ""
    rows = rows[-args.limit :]
    if args.json:
        for row in rows:
            print(json.dumps(row))
        if more:
            print(f"socs-monitor: {more}", file=sys.stderr)
    elif rows:
        table = Table("id", "added (UTC)", "archive", "state", "local path, remote path", caption=more or None)
        for row in rows:
            paths = f"{sanitize(row['local_path'], None)}\n{sanitize(row['remote_path'], None)}"
            cells = (row["id"], utc(row["timestamp"]), row["archive_name"], _state(row))
            table.add_row(*(Text(sanitize(cell, None)) for cell in cells), Text(paths, overflow="fold"))
        console().print(table)
    else:
        print("No matching rows.")


def _rows(path: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the newest matching rows, oldest first, and one more than the limit if there is one."""
    wanted: dict[str, Any] = {"archive_name = ?": args.archive, "timestamp >= ?": args.since}
    chosen = {condition: value for condition, value in wanted.items() if value is not None}
    where = " AND ".join(["1", *chosen, *([_UNCOPIED] if args.uncopied else [])])
    with contextlib.closing(readonly.connect(path)) as db:
        db.row_factory = sqlite3.Row
        db.text_factory = lambda text: text.decode(errors="backslashreplace")  # a malformed row must not hide others
        newest_first = db.execute(
            f"SELECT * FROM supersync_v0 WHERE {where} ORDER BY id DESC LIMIT ?",  # noqa: S608 (own constants)
            (*chosen.values(), args.limit + 1),
        )
        return [dict(row) for row in newest_first][::-1]


def _state(row: Mapping[str, Any]) -> str:
    if row["ignore"]:
        return "ignored"
    removed = ", removed" if row["removed"] is not None else ""
    if row["local_md5sum"] == row["remote_md5sum"]:
        return f"copied{removed}"
    attempts = row["failed_copy_attempts"]
    return f"not copied{removed}" + (f", {plural(attempts, 'failed attempt')}" if attempts else "")


def _time(text: str) -> float:
    if ago := re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text):
        return time.time() - float(ago[1]) * _UNITS[ago[2]]
    with contextlib.suppress(ValueError):
        return float(text)
    with contextlib.suppress(ValueError):
        moment = datetime.datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a time; examples: 1700000000, 2024-01-31, 2024-01-31T12:00, 30m, 2h, 3d"
    )


def _number(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rows")
    return int(text)
