"""What several commands need: which agent is meant, and how to show what others wrote."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from typing import TYPE_CHECKING

from socs_monitor import INSTANCE

if TYPE_CHECKING:
    from rich.console import Console

_WIDE = 1000  # columns where no terminal says otherwise: a pipe's reader wants each row on its line


class NotDoneError(Exception):
    """The command could not do what it was asked for; the text says why and what to do."""


def add_agent_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which agent is meant."""
    agent = parser.add_argument_group(
        "which agent",
        "Without these, what the site config in OCS_CONFIG_DIR says, or the agent's defaults. As with ocs-agent-cli,"
        " INSTANCE_ID, SITE_HOST, SITE_HUB and SITE_HTTP of the environment count, too.",
    )
    agent.add_argument(
        "--instance-id", default=os.environ.get("INSTANCE_ID") or INSTANCE, metavar="ID", help="default: %(default)s"
    )
    agent.add_argument("--site-file", metavar="FILE", help="OCS site config")
    agent.add_argument("--site-host", metavar="HOST", help="host in the site config; default: this one, or localhost")
    agent.add_argument("--db-path", metavar="FILE", help="the SupRsync database")
    agent.add_argument("--spool-path", metavar="FILE", help="the agent's spool")


def console() -> Console:
    """Return where tables are printed: as wide as the terminal, or as the rows are where there is none."""
    from rich.console import Console  # here, since the health check shows no table

    is_narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if is_narrow else _WIDE, highlight=False)


def plain(text: object) -> str:
    """Return what a sender or a file name says as it can be shown: one line, no control characters."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def utc(timestamp: float) -> str:
    """Write unix time as a person reads it, in UTC."""
    return datetime.datetime.fromtimestamp(timestamp, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def size(count: float) -> str:
    """Write a number of bytes in the unit that suits it."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
