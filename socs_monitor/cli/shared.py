"""Shared by the commands: the options that select an agent, and how values are displayed."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from socs_monitor import INSTANCE

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_COLUMNS = 1000  # without a terminal: each row of a table stays on one line


class CommandError(Exception):
    """The command failed. The text says why, and what to do."""


def add_agent_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that select an agent."""
    agent = parser.add_argument_group(
        "agent",
        "Default: the agent in the site config of OCS_CONFIG_DIR, or the agent's default options. The environment"
        " variables INSTANCE_ID, SITE_HOST, SITE_HUB and SITE_HTTP have the same effect as for ocs-agent-cli.",
    )
    instance = os.environ.get("INSTANCE_ID") or INSTANCE
    agent.add_argument("--instance-id", default=instance, metavar="ID", help="instance-id; default: %(default)s")
    agent.add_argument("--site-file", metavar="FILE", help="OCS site config")
    agent.add_argument("--site-host", metavar="HOST", help="host in the site config; default: this host or localhost")
    agent.add_argument("--db-path", metavar="FILE", help="SupRsync database")
    agent.add_argument("--spool-path", metavar="FILE", help="the agent's spool")


def console() -> Console:
    """Return a console as wide as the terminal, or wide enough for any row if there is none."""
    from rich.console import Console  # not needed by the health check

    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if has_width else _PIPE_COLUMNS, highlight=False)


def size(count: float) -> str:
    """Format a number of bytes in a readable unit."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
