"""The agent's options. A monitor made by hand may lack all but the documented ones."""

from __future__ import annotations

import argparse
import ipaddress
import os
from collections.abc import Sequence
from typing import TypeAlias

from socs_monitor.defaults import DB_PATH, INSTANCE, UDP_PORT
from socs_monitor.registration.lookup import Policy
from socs_monitor.spool.store import MAX_BYTES
from socs_monitor.udp import BUFFER

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


def _boolean(text: str) -> bool:
    try:
        return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False (also yes/no, 1/0)") from None


def network(text: str) -> Network:
    """Parse addresses as ``--allow-sender`` takes them."""
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}: write e.g. 10.0.0.0/24, 10.0.0.5 or fd00::/8") from None


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
    group.add_argument(
        "--spool-size",
        type=int,
        default=MAX_BYTES,
        metavar="BYTES",
        help="Size up to which the spool takes registrations. Default: %(default)s",
    )
    group.add_argument(
        "--hash-workers",
        type=int,
        default=Policy.hash_workers,
        metavar="N",
        help="Number of large files hashed at a time. Default: %(default)s",
    )
    group.add_argument(
        "--data-root",
        nargs="+",
        action="extend",
        default=[],
        metavar="DIR",
        help="Folder in which files may lie, spelled as the senders spell their paths; a path that is outside, or"
        " resolves to a place outside, is refused. May be repeated. Without it any file that a sender names is"
        " registered, and SupRsync may delete it.",
    )
    group.add_argument(
        "--udp-host",
        default="",
        metavar="ADDRESS",
        help="Address of the interface to listen on, IPv4 or IPv6 (:: for all of both). Default: all of IPv4",
    )
    group.add_argument(
        "--allow-sender",
        nargs="+",
        action="extend",
        type=network,
        default=[],
        metavar="CIDR",
        help="Addresses from which datagrams are taken, e.g. 10.0.0.0/24; others are dropped and counted. May be"
        " repeated. Default: all",
    )
    group.add_argument(
        "--udp-buffer",
        type=int,
        default=BUFFER,
        metavar="BYTES",
        help="Receive buffer to ask the kernel for. Default: %(default)s",
    )
    return parser


def repeated(words: Sequence[str], option: str) -> list[str]:
    """Return the values of every `option` among command line words: OCS itself keeps only the last one's."""
    values: list[str] = []
    of_option = False
    for word in words:
        if word.startswith("--"):
            name, given, value = word.partition("=")
            of_option = len(name) > 2 and option.startswith(name)  # argparse takes abbreviations
            if of_option and given:
                values.append(value)
        elif of_option:
            values.append(word)
    return values


def spool_path(args: argparse.Namespace) -> str:
    """The spool's file; its name holds the instance, since every agent needs one of its own."""
    instance = getattr(args, "instance_id", None) or INSTANCE
    return getattr(args, "spool_path", None) or f"{args.db_path}.{instance}.spool"


def policy(args: argparse.Namespace) -> Policy:
    """How files are treated."""
    return Policy(
        data_roots=tuple(os.path.abspath(root) for root in getattr(args, "data_root", ())),
        own=(os.path.realpath(args.db_path), os.path.realpath(spool_path(args))),
        hash_workers=getattr(args, "hash_workers", Policy.hash_workers),
        give_up_after=getattr(args, "give_up_after", Policy.give_up_after),
    )
