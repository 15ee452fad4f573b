"""The ``socs-monitor`` command: what a person does beside the agent."""

from __future__ import annotations

import argparse
import os
import sys
import time

from socs_monitor import __version__
from socs_monitor.emulator import Publisher

DEFAULT_TO = "127.0.0.1:8200"


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form HOST:PORT, e.g. {DEFAULT_TO} or [::1]:8200")
    return host.strip("[]"), int(port)


def _send(args: argparse.Namespace) -> int:
    now = time.time()
    with Publisher(args.id, args.to) as publisher:
        for name in args.files:
            path = os.path.abspath(name)
            if not os.path.isfile(path):
                print(f"{path} is no file, not sent", file=sys.stderr)
                return 1
            if path.endswith(".g3"):
                publisher.g3_file(path)
            else:
                extension = os.path.splitext(path)[1].lstrip(".")
                publisher.data_file(path, file_type="manual", file_format=extension, timestamp=now, action=args.action)
            print(f"sent to {args.to[0]}:{args.to[1]}: {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="socs-monitor", description="Tools around the PysmurfMonitor agent.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    send = commands.add_parser(
        "send",
        help="announce files to the agent as pysmurf does",
        description="Announce files to the agent as pysmurf does. The agent reads them itself: they must be visible"
        " to it under the same path. Files named *.g3 go to the archive timestreams, all others to smurf.",
    )
    send.add_argument("files", nargs="+", metavar="FILE")
    send.add_argument("--to", type=_address, default=DEFAULT_TO, metavar="HOST:PORT", help="default: %(default)s")
    send.add_argument("--id", default="manual", help="publisher id, a folder in the archive; default: %(default)s")
    send.add_argument("--action", default="send", help="pysmurf action, part of a folder's name; default: %(default)s")
    send.set_defaults(run=_send)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code (0 for success)."""
    args = _parser().parse_args(argv)
    code: int = args.run(args)
    return code


if __name__ == "__main__":
    sys.exit(main())
