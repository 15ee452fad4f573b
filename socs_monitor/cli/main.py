"""The ``socs-monitor`` command: inspect and operate a PysmurfMonitor agent.

Exit codes: 0 success, 1 failure (the reason is on standard error), 2 wrong usage. `status` has more.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sqlite3
import sys
from collections.abc import Collection

from socs_monitor import __version__
from socs_monitor.cli.shared import CommandError
from socs_monitor.spool.file import SpoolError

COMMANDS = {
    "status": "show whether files are being registered",
    "files": "show registered files: the rows of the SupRsync database",
    "failed": "list, retry or discard dead letters",
    "backfill": "register timestream files that have no row",
    "doctor": "check configuration, network, permissions and disks, and suggest fixes",
    "send": "announce files to the agent, as pysmurf does",
    "completion": "print the shell completion script",
}


def make_parser(defined: Collection[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """Return the parser, with the arguments of the commands `defined`."""
    parser = argparse.ArgumentParser(
        prog="socs-monitor", description="Inspect and operate a PysmurfMonitor agent on its SMuRF server."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.set_defaults(make_parser=make_parser)  # for `completion`
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, help_ in COMMANDS.items():
        command = commands.add_parser(name, help=help_)
        if name in defined:
            importlib.import_module(f"socs_monitor.cli.{name}").define(command)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    args = make_parser(words[:1]).parse_args(words)
    try:
        code = args.run(args) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (CommandError, SpoolError, sqlite3.Error, OSError) as error:
        print(f"socs-monitor: {error}", file=sys.stderr)
        return 1
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
