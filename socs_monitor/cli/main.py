"""The ``socs-monitor`` command: what a person does beside the agent.

Exit codes: 0 done, 1 not done (the reason is on standard error), 2 wrong usage; `status` has more, see there.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sqlite3
import sys
from collections.abc import Collection

from socs_monitor import __version__
from socs_monitor.cli.client import ClientError
from socs_monitor.cli.shared import NotDoneError
from socs_monitor.spool.file import SpoolError

COMMANDS = {
    "status": "whether files get through, at a glance",
    "files": "what is registered: the rows of the SupRsync database",
    "failed": "registrations that failed: list, retry or discard them",
    "backfill": "register timestream files that no row names",
    "doctor": "check configuration, port, permissions and disks, and say what to do",
    "send": "announce files to the agent as pysmurf does",
    "completion": "print the script that completes this command in a shell",
}


def make_parser(defined: Collection[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """Return the command line's parser, with the arguments of the commands `defined`."""
    parser = argparse.ArgumentParser(prog="socs-monitor", description="Tools around the PysmurfMonitor agent.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.set_defaults(make_parser=make_parser)  # for `completion`
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, help_ in COMMANDS.items():
        command = commands.add_parser(name, help=help_)
        if name in defined:
            importlib.import_module(f"socs_monitor.cli.{name}").define(command)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    args = make_parser(words[:1]).parse_args(words)
    try:
        code = args.run(args) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read has enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (NotDoneError, ClientError, SpoolError, sqlite3.Error, OSError) as error:
        print(f"socs-monitor: {error}", file=sys.stderr)
        return 1
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
