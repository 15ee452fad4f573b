"""The ``socs-monitor`` command: what a person does beside the agent.

Exit codes: 0 done, 1 not done (the reason is on standard error), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from socs_monitor import __version__, client, options
from socs_monitor.backfill import Scan, registration_of
from socs_monitor.client import ClientError
from socs_monitor.emulator import Publisher
from socs_monitor.spool import Spool
from socs_monitor.spoolfile import SpoolBusyError, SpoolError
from socs_monitor.suprsync import DatabaseUnavailableError

_TO = f"127.0.0.1:{options.UDP_PORT}"
_POLL_S = 0.5

Letters = list[dict[str, Any]]
Ids = list[int] | None


class NotDoneError(Exception):
    """The command could not do what it was asked for; the text says why and what to do."""


class _DeadLetters(Protocol):
    """The dead letters, in the running agent or in the spool of one that does not run."""

    def list(self) -> tuple[int, Letters]: ...
    def retry(self, ids: Ids) -> str: ...
    def discard(self, ids: Ids) -> str: ...


class _OfAgent:
    def __init__(self, agent: Any) -> None:
        self._agent = agent

    def list(self) -> tuple[int, Letters]:
        data = _done(self._agent.list_failed()).session["data"]
        return data["total"], data["failed"]

    def retry(self, ids: Ids) -> str:
        return _message(_done(self._agent.retry_failed(ids=ids)))

    def discard(self, ids: Ids) -> str:
        return _message(_done(self._agent.discard_failed(ids=ids)))


class _OfSpool:
    def __init__(self, spool: Spool) -> None:
        self._spool = spool

    def list(self) -> tuple[int, Letters]:
        letters = [letter.summary() for letter in self._spool.dead()]
        return len(letters), letters

    def retry(self, ids: Ids) -> str:
        return _all(ids, len(self._spool.retry(ids)), "will be tried again when the agent starts")

    def discard(self, ids: Ids) -> str:
        return _all(ids, self._spool.discard(ids), "discarded")


def _all(ids: Ids, changed: int, what: str) -> str:
    """Say what became of dead letters; as with the running agent, an id that is none of them is a failure."""
    if ids is not None and (missing := len(set(ids)) - changed):
        raise NotDoneError(f"{changed} dead letters {what}, {missing} ids are no dead letters.")
    return f"{changed} dead letters {what}."


def _done(reply: Any) -> Any:
    """Return the reply of an operation that succeeded."""
    if not (reply.session and reply.session.get("success")):
        raise NotDoneError(_message(reply))
    return reply


def _message(reply: Any) -> str:
    messages = [text for _, text in (reply.session or {}).get("messages", ()) if not text.startswith("Status is now")]
    return str(messages[-1] if messages else reply.msg)


@contextlib.contextmanager
def _spool_of_stopped_agent(path: str) -> Iterator[Spool | None]:
    """Open the spool, or yield None if the agent runs and has it."""
    if not os.path.exists(path):
        raise NotDoneError(f"there is no spool {path}: name the agent's with --spool-path, or its --db-path")
    owner = os.stat(path).st_uid
    if os.geteuid() not in (0, owner):
        raise NotDoneError(f"the spool {path} belongs to user {owner}: run this as that user (sudo -u '#{owner}' ...)")
    try:
        spool = Spool(path, lambda text: print(text, file=sys.stderr))
    except SpoolBusyError:
        yield None
        return
    try:
        yield spool
    finally:
        spool.close()


@contextlib.contextmanager
def _dead_letters(args: argparse.Namespace) -> Iterator[_DeadLetters]:
    with _spool_of_stopped_agent(options.spool_path(client.configuration(args))) as spool:
        yield _OfSpool(spool) if spool else _OfAgent(client.connect(args))


def _failed_list(args: argparse.Namespace) -> None:
    with _dead_letters(args) as letters:
        total, listed = letters.list()
    table = Table("id", "received", "sender", "path", "why", title=f"{len(listed)} of {total} dead letters")
    for letter in listed:
        received = datetime.datetime.fromtimestamp(letter["received"], datetime.UTC).isoformat(" ", "seconds")
        why = ("refused: " if letter["refused"] else "") + letter["reason"]
        cells = (str(letter["id"]), received, letter["sender"], letter["path"], why)
        table.add_row(*map(Text, cells))  # as they are: a sender's brackets are no markup
    Console().print(table if total else "No dead letters.")


def _failed_retry(args: argparse.Namespace) -> None:
    with _dead_letters(args) as letters:
        print(letters.retry(args.ids or None))


def _failed_discard(args: argparse.Namespace) -> None:
    with _dead_letters(args) as letters:
        print(letters.discard(args.ids or None))


def _backfill(args: argparse.Namespace) -> None:
    configuration = client.configuration(args)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns) as bar, _spool_of_stopped_agent(options.spool_path(configuration)) as spool:
        task = bar.add_task("timestream files seen", total=None)

        def show(progress: dict[str, Any]) -> None:
            bar.update(task, completed=progress["seen"])

        if spool:
            scan = Scan(args.root, configuration.db_path, show)
            for path in scan:
                if not args.dry_run:
                    spool.accept([registration_of(path)[1]])
            result, then = scan.progress(), "registered when the agent starts"
        else:
            result, then = _backfill_by_agent(client.connect(args), args, show), "registered by the agent now"
        bar.update(task, total=result["seen"])
    for path in result["paths"]:
        print(f"no row names {path}")
    if result["unregistered"] > len(result["paths"]):
        print(f"... and {result['unregistered'] - len(result['paths'])} more")
    then = "not registered: this was a dry run" if args.dry_run else then
    print(f"{result['seen']} timestream files seen, {result['unregistered']} of them in no row; {then}.")


def _backfill_by_agent(agent: Any, args: argparse.Namespace, show: Any) -> dict[str, Any]:
    reply = agent.backfill.start(root=os.path.abspath(args.root), dry_run=args.dry_run)
    while reply.session.get("status") not in (None, "done"):
        reply = agent.backfill.wait(timeout=_POLL_S)
        if reply.session["data"]:
            show(reply.session["data"])
    data: dict[str, Any] = _done(reply).session["data"]
    return data


def _send(args: argparse.Namespace) -> None:
    now = time.time()
    with Publisher(args.id, args.to) as publisher:
        for name in args.files:
            path = os.path.abspath(name)
            if not os.path.isfile(path):
                raise NotDoneError(f"{path} is no file, not sent")
            if path.endswith(".g3"):
                publisher.g3_file(path)
            else:
                file_format = os.path.splitext(path)[1].lstrip(".")
                publisher.data_file(
                    path,
                    file_type="manual",
                    file_format=file_format,
                    timestamp=now,
                    action=args.action,
                    action_ts=str(int(now)),
                )
            print(f"sent to {args.to[0]}:{args.to[1]}: {path}")


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form HOST:PORT, e.g. {_TO} or [::1]:8200")
    return host.strip("[]"), int(port)


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
    send.add_argument("--to", type=_address, default=_TO, metavar="HOST:PORT", help="default: %(default)s")
    send.add_argument("--id", default="manual", help="publisher id, a folder in the archive; default: %(default)s")
    send.add_argument("--action", default="send", help="pysmurf action, part of a folder's name; default: %(default)s")
    send.set_defaults(run=_send)

    which = argparse.ArgumentParser(add_help=False)
    agent = which.add_argument_group(
        "which agent", "Without these, what the site config in OCS_CONFIG_DIR says, or the agent's defaults."
    )
    agent.add_argument("--instance-id", default=options.INSTANCE, help="default: %(default)s")
    agent.add_argument("--site-file", metavar="FILE", help="OCS site config")
    agent.add_argument("--site-host", metavar="HOST", help="host in the site config; default: this one, or localhost")
    agent.add_argument("--db-path", metavar="FILE", help="the SupRsync database")
    agent.add_argument("--spool-path", metavar="FILE", help="the agent's spool")

    failed = commands.add_parser("failed", help="registrations that failed: list, retry or discard them")
    actions = failed.add_subparsers(required=True, metavar="ACTION")
    for name, run, help_ in (
        ("list", _failed_list, "show them, with the reason"),
        ("retry", _failed_retry, "try them again, as if they had just arrived"),
        ("discard", _failed_discard, "forget them for good"),
    ):
        action = actions.add_parser(name, parents=[which], help=help_, description=help_.capitalize() + ".")
        if name != "list":
            action.add_argument("ids", nargs="*", type=int, metavar="ID", help="which ones; default: all")
        action.set_defaults(run=run)

    backfill = commands.add_parser(
        "backfill",
        parents=[which],
        help="register timestream files that no row names",
        description="Register timestream files that no row names, because the agent was down or a datagram was lost."
        " Files that changed within the last two minutes are left alone. May be repeated at will.",
    )
    backfill.add_argument("root", metavar="ROOT", help="folder of the timestreams, e.g. /data/so/timestreams")
    backfill.add_argument("--dry-run", action="store_true", help="only say what would be registered")
    backfill.set_defaults(run=_backfill)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (NotDoneError, ClientError, SpoolError, DatabaseUnavailableError, OSError) as error:
        print(f"socs-monitor: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
