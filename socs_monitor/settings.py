"""The agent's options: one parser for the command line and the site config, and the `Settings` they result in."""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import os
import sys
from collections.abc import Sequence
from typing import TypeAlias

from ocs import site_config

from socs_monitor import DB_PATH, INSTANCE, UDP_PORT
from socs_monitor.registration.lookup import Policy
from socs_monitor.spool.store import MAX_BYTES
from socs_monitor.wire.receiver import BUFFER

AGENT_CLASS = "PysmurfMonitor"

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

# Seconds, as --crossbar-timeout takes them.
_WAIT_FOREVER = 0
_NOT_GIVEN = -1


@dataclasses.dataclass(frozen=True)
class Settings:
    """The agent's options, complete and validated.

    Attributes:
        udp_port: UDP port to listen on.
        udp_host: Address of the interface to listen on; empty for all IPv4 interfaces.
        udp_buffer: Receive buffer to request from the kernel, in bytes.
        allow_sender: Networks from which datagrams are accepted; empty for all.
        db_path: The SupRsync database.
        create_table: Whether missing database files and tables are created.
        echo_sql: Whether every SQL statement is logged.
        test_mode: Whether `run` ends when it has processed what has arrived.
        spool_path: The spool.
        spool_size: Size of the spool up to which registrations are accepted, in bytes.
        policy: Which files are accepted, and how they are read.
    """

    udp_port: int
    udp_host: str
    udp_buffer: int
    allow_sender: tuple[Network, ...]
    db_path: str
    create_table: bool
    echo_sql: bool
    test_mode: bool
    spool_path: str
    spool_size: int
    policy: Policy

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Settings:
        """Return the settings for parsed arguments, with the default of each option that `args` does not have.

        A monitor constructed by hand has only the documented options (documentation).
        """
        defaults = vars(make_parser().parse_args([]))
        values = {name: getattr(args, name, default) for name, default in defaults.items()}
        instance = getattr(args, "instance_id", None) or INSTANCE  # every agent needs a spool of its own
        spool_path = values["spool_path"] or f"{values['db_path']}.{instance}.spool"
        return cls(
            udp_port=values["udp_port"],
            udp_host=values["udp_host"],
            udp_buffer=values["udp_buffer"],
            allow_sender=tuple(values["allow_sender"]),
            db_path=values["db_path"],
            create_table=values["create_table"],
            echo_sql=values["echo_sql"],
            test_mode=values["test_mode"],
            spool_path=spool_path,
            spool_size=values["spool_size"],
            policy=Policy(
                data_roots=tuple(os.path.abspath(root) for root in values["data_root"]),
                own=(os.path.realpath(values["db_path"]), os.path.realpath(spool_path)),
                hash_workers=values["hash_workers"],
                give_up_after=values["give_up_after"],
            ),
        )


def _boolean(text: str) -> bool:
    try:
        return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False (also yes/no, 1/0)") from None


def _network(text: str) -> Network:
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
        type=_network,
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


def parse_args(args: list[str] | None) -> argparse.Namespace:
    """Parse the command line together with the site config, as OCS does, but with this agent's defaults.

    Returns:
        What OCS needs to start an agent; `Settings.from_args` takes this agent's own options from it.
    """
    parser = make_parser()
    parser.set_defaults(crossbar_timeout=_NOT_GIVEN)
    parsed: argparse.Namespace = site_config.parse_args(agent_class=AGENT_CLASS, parser=parser, args=args)
    _, host, instance = site_config.get_config(parsed, AGENT_CLASS)
    given = sys.argv[1:] if args is None else args
    in_site_config = [str(word) for word in _words(instance.arguments)]

    def repeated(option: str) -> list[str]:
        return _values_of(given, option) or _values_of(in_site_config, option)

    parsed.data_root = repeated("--data-root")
    parsed.allow_sender = [_network(value) for value in repeated("--allow-sender")]
    if parsed.crossbar_timeout == _NOT_GIVEN:
        # With OCS's default the agent would exit 10 s after losing the router, but registration does not need one.
        parsed.crossbar_timeout = host.data.get("crossbar_timeout", _WAIT_FOREVER)
    return parsed


def _words(argument: object) -> list[object]:
    return [word for part in argument for word in _words(part)] if isinstance(argument, list) else [argument]


def _values_of(words: Sequence[str], option: str) -> list[str]:
    """Return the values of every `option` in a command line, because OCS keeps only those of the last one."""
    values: list[str] = []
    is_open = False
    for word in words:
        if word.startswith("--"):
            name, given, value = word.partition("=")
            is_open = len(name) > 2 and option.startswith(name)  # argparse accepts abbreviations
            if is_open and given:
                values.append(value)
        elif is_open:
            values.append(word)
    return values
