"""The agent's options. A monitor made by hand may lack all but the documented ones."""

from __future__ import annotations

import argparse

from socs_monitor.registrar import Policy

INSTANCE = "pysmurf-monitor"
DB_PATH = "/data/so/databases/suprsync.db"
UDP_PORT = 8200


def _boolean(text: str) -> bool:
    try:
        return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False (also yes/no, 1/0)") from None


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds


def make_parser(parser: argparse.ArgumentParser | None = None) -> argparse.ArgumentParser:
    """Add the agent's options to `parser`, or to a new one."""
    if parser is None:
        parser = argparse.ArgumentParser()
    group = parser.add_argument_group("Agent Options")
    group.add_argument(
        "--udp-port",
        type=int,
        default=UDP_PORT,
        help="UDP port on which the pysmurf publishers' messages arrive. Default: %(default)s",
    )
    group.add_argument(
        "--create-table",
        type=_boolean,
        default=True,
        metavar="True|False",
        help="Whether the agent makes the database and its tables where they are missing. With False, and no"
        " table, files wait in the spool and run says so. Default: %(default)s",
    )
    group.add_argument("--db-path", default=DB_PATH, help="Path to the suprsync SQLite database. Default: %(default)s")
    group.add_argument("--echo-sql", action="store_true", help="Log every SQL statement. Default: %(default)s")
    group.add_argument(
        "--test-mode",
        action="store_true",
        help="Do not start run at start-up; when a client starts it, it handles what has arrived and stops."
        " Default: %(default)s",
    )
    group.add_argument(
        "--spool-path",
        help="File in which registrations are kept until their row is safe; on a local disk. Default:"
        " <db-path>.<instance-id>.spool",
    )
    group.add_argument(
        "--give-up-after",
        type=_seconds,
        default=Policy.give_up_after,
        metavar="SECONDS",
        help="How long a missing or unreadable file is looked for before its registration becomes a dead letter."
        " Default: %(default)s",
    )
    return parser


def spool_path(args: argparse.Namespace) -> str:
    """The spool's file; its name holds the instance, since every agent needs one of its own."""
    instance = getattr(args, "instance_id", None) or INSTANCE
    return getattr(args, "spool_path", None) or f"{args.db_path}.{instance}.spool"


def policy(args: argparse.Namespace) -> Policy:
    """How files are treated."""
    return Policy(give_up_after=getattr(args, "give_up_after", Policy.give_up_after))
