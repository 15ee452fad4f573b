"""The agent's options: parses the command line and the site config into one validated, frozen `Settings`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import ipaddress
import os
import sys
from collections.abc import Callable, Sequence
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
        db_path = values["db_path"]
        instance = getattr(args, "instance_id", None) or INSTANCE  # every agent needs a spool of its own
        spool_path = values["spool_path"] or f"{db_path}.{instance}.spool"
        unchanged = ("udp_port", "udp_host", "udp_buffer", "create_table", "echo_sql", "test_mode", "spool_size")
        return cls(
            **{name: values[name] for name in unchanged},
            db_path=db_path,
            spool_path=spool_path,
            allow_sender=tuple(values["allow_sender"]),
            policy=Policy(
                data_roots=tuple(os.path.abspath(root) for root in values["data_root"]),
                own=(os.path.realpath(db_path), os.path.realpath(spool_path)),
                hash_workers=values["hash_workers"],
                give_up_after=values["give_up_after"],
            ),
        )


def sender_filter(networks: Sequence[Network]) -> Callable[[str], bool]:
    """Return a function that tells whether an address is in one of `networks`; without networks, every address is."""
    if not networks:
        return lambda _: True

    @functools.lru_cache(maxsize=4096)
    def is_allowed(host: str) -> bool:
        address = ipaddress.ip_address(host)
        address = getattr(address, "ipv4_mapped", None) or address  # an IPv6 socket shows IPv4 senders like this
        return any(address in network for network in networks)

    return is_allowed


def _boolean(text: str) -> bool:
    try:
        return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False (also yes/no, 1/0)") from None


def _network(text: str) -> Network:
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
    option = parser.add_argument_group("Agent Options").add_argument
    option("--udp-port", type=int, default=UDP_PORT, help="UDP port to listen on. Default: %(default)s")
    option(
        "--create-table",
        type=_boolean,
        default=True,
        metavar="True|False",
        help="Whether to create the database and its tables if they are missing. With False and no table, run is"
        " degraded and files wait in the spool. Default: %(default)s",
    )
    option("--db-path", default=DB_PATH, help="Path to the suprsync SQLite database. Default: %(default)s")
    option("--echo-sql", action="store_true", help="Log every SQL statement. Default: %(default)s")
    option(
        "--test-mode",
        action="store_true",
        help="Do not start run at start-up. When a client starts it, it processes what has arrived and stops."
        " Default: %(default)s",
    )
    option(
        "--spool-path",
        help="File, on a local disk, in which registrations are kept until their row is safe. Default:"
        " <db-path>.<instance-id>.spool",
    )
    option(
        "--give-up-after",
        type=_seconds,
        default=Policy.give_up_after,
        metavar="SECONDS",
        help="How long to retry a missing or unreadable file before its registration becomes a dead letter."
        " Default: %(default)s",
    )
    option(
        "--spool-size",
        type=int,
        default=MAX_BYTES,
        metavar="BYTES",
        help="Size of the spool up to which registrations are accepted. Default: %(default)s",
    )
    option(
        "--hash-workers",
        type=int,
        default=Policy.hash_workers,
        metavar="N",
        help="Number of large files hashed at the same time. Default: %(default)s",
    )
    option(
        "--data-root",
        nargs="+",
        action="extend",
        default=[],
        metavar="DIR",
        help="Folder that may contain files, spelled as in the senders' paths. A path outside, or one that resolves to"
        " a place outside, is refused. May be repeated. Without it, any file that a sender names is registered, and"
        " SupRsync may delete it.",
    )
    option(
        "--udp-host",
        default="",
        metavar="ADDRESS",
        help="Address of the interface to listen on, IPv4 or IPv6 (:: for all). Default: all IPv4 interfaces",
    )
    option(
        "--allow-sender",
        nargs="+",
        action="extend",
        type=_network,
        default=[],
        metavar="CIDR",
        help="Addresses from which datagrams are accepted, e.g. 10.0.0.0/24. Others are dropped and counted. May be"
        " repeated. Default: all",
    )
    option(
        "--udp-buffer",
        type=int,
        default=BUFFER,
        metavar="BYTES",
        help="Receive buffer to request from the kernel. Default: %(default)s",
    )
    return parser


def parse_args(args: list[str] | None) -> argparse.Namespace:
    """Parse the command line and the site config as OCS does, but with this agent's defaults.

    Returns:
        The arguments with which OCS starts an agent. `Settings.from_args` reads this agent's own options from them.
    """
    parser = make_parser()
    parser.set_defaults(crossbar_timeout=_NOT_GIVEN)
    parsed: argparse.Namespace = site_config.parse_args(agent_class=AGENT_CLASS, parser=parser, args=args)
    _, host, instance = site_config.get_config(parsed, AGENT_CLASS)
    # OCS keeps only the last --data-root and --allow-sender, so the agent's own parser reads both sources again
    by_command, _ = make_parser().parse_known_args(sys.argv[1:] if args is None else args)
    by_site, _ = make_parser().parse_known_args([str(word) for word in _words(instance.arguments)])
    parsed.data_root = by_command.data_root or by_site.data_root
    parsed.allow_sender = by_command.allow_sender or by_site.allow_sender
    if parsed.crossbar_timeout == _NOT_GIVEN:
        # with OCS's default the agent would exit 10 s after losing the router, but registration does not need one
        parsed.crossbar_timeout = host.data.get("crossbar_timeout", _WAIT_FOREVER)
    return parsed


def _words(argument: object) -> list[object]:
    """Flatten a site config's arguments, which may be nested lists."""
    return [word for part in argument for word in _words(part)] if isinstance(argument, list) else [argument]
