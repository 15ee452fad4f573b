"""``socs-monitor send``: announce files to the agent, as pysmurf does."""

from __future__ import annotations

import argparse
import os
import time

from socs_monitor import UDP_PORT
from socs_monitor.cli.shared import CommandError
from socs_monitor.wire.publisher import Publisher

_TO = f"127.0.0.1:{UDP_PORT}"


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Announce files to the agent, as pysmurf does. The agent reads the files itself, so it must see them under the"
        " same path. Files with the suffix .g3 go to the archive timestreams, all others to smurf."
    )
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--to", type=_address, default=_TO, metavar="HOST:PORT", help="default: %(default)s")
    parser.add_argument("--id", default="manual", help="publisher id, a folder in the archive; default: %(default)s")
    parser.add_argument("--action", default="send", help="pysmurf action, part of a folder name; default: %(default)s")
    parser.set_defaults(run=_send)


def _send(args: argparse.Namespace) -> None:
    now = time.time()
    with Publisher(args.id, args.to) as publisher:
        for name in args.files:
            path = os.path.abspath(name)
            if not os.path.isfile(path):
                raise CommandError(f"{path} is not a file, so it was not sent.")
            if path.endswith(".g3"):
                publisher.g3_file(path)
            else:
                kind = {"file_type": "manual", "file_format": os.path.splitext(path)[1].lstrip(".")}
                publisher.data_file(path, **kind, timestamp=now, action=args.action, action_ts=str(int(now)))
            print(f"sent to {args.to[0]}:{args.to[1]}: {path}")


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, e.g. {_TO} or [::1]:8200")
    return host.strip("[]"), int(port)
