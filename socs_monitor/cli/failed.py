"""``socs-monitor failed``: the dead letters, of the running agent or in the spool of one that does not run."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from rich.table import Table
from rich.text import Text

from socs_monitor.cli import client
from socs_monitor.cli.shared import NotDoneError, add_agent_arguments, console, plain, utc
from socs_monitor.cli.stopped import spool_of_stopped_agent
from socs_monitor.spool.store import Spool

Letters = list[dict[str, Any]]
Ids = list[int] | None


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's actions and their arguments."""
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for name, run, help_ in (
        ("list", _list, "show them, with the reason"),
        ("retry", _retry, "try them again, as if they had just arrived"),
        ("discard", _discard, "forget them for good"),
    ):
        action = actions.add_parser(name, help=help_, description=help_.capitalize() + ".")
        add_agent_arguments(action)
        if name == "retry":
            action.add_argument("ids", nargs="*", type=int, metavar="ID", help="which ones; default: all")
        elif name == "discard":
            which = action.add_mutually_exclusive_group(required=True)
            which.add_argument("ids", nargs="*", default=[], type=int, metavar="ID", help="which ones")
            which.add_argument("--all", action="store_true", help="all of them")
        action.set_defaults(run=run)


class _DeadLetters(Protocol):
    def list(self) -> tuple[int, Letters]: ...
    def retry(self, ids: Ids) -> str: ...
    def discard(self, ids: Ids) -> str: ...


class _OfAgent:
    def __init__(self, agent: Any) -> None:
        self._agent = agent

    def list(self) -> tuple[int, Letters]:
        data = client.done(self._agent.list_failed()).session["data"]
        return data["total"], data["failed"]

    def retry(self, ids: Ids) -> str:
        return client.message(client.done(self._agent.retry_failed(ids=ids)))

    def discard(self, ids: Ids) -> str:
        return client.message(client.done(self._agent.discard_failed(ids=ids, all=ids is None)))


class _OfSpool:
    def __init__(self, spool: Spool) -> None:
        self._spool = spool

    def list(self) -> tuple[int, Letters]:
        letters = [letter.summary() for letter in self._spool.dead()]
        return len(letters), letters

    def retry(self, ids: Ids) -> str:
        return _all(ids, self._spool.retry(ids), "will be tried again when the agent starts")

    def discard(self, ids: Ids) -> str:
        return _all(ids, self._spool.discard(ids), "discarded")


def _all(ids: Ids, changed: int, what: str) -> str:
    """Say what became of dead letters; as with the running agent, an id that is none of them is a failure."""
    if ids is not None and (missing := len(set(ids)) - changed):
        raise NotDoneError(f"{changed} dead letters {what}, {missing} ids are no dead letters.")
    return f"{changed} dead letters {what}."


@contextlib.contextmanager
def _dead_letters(args: argparse.Namespace) -> Iterator[_DeadLetters]:
    with spool_of_stopped_agent(client.settings_of(args).spool_path) as spool:
        yield _OfSpool(spool) if spool else _OfAgent(client.connect(args))


def _list(args: argparse.Namespace) -> None:
    with _dead_letters(args) as letters:
        total, listed = letters.list()
    table = Table("id", "received (UTC)", "sender", "path", "why", title=f"{len(listed)} of {total} dead letters")
    for letter in listed:
        why = ("refused: " if letter["refused"] else "") + letter["reason"]
        cells = (letter["id"], utc(letter["received"]), letter["sender"], letter["path"], why)
        table.add_row(*(Text(plain(cell)) for cell in cells))  # as they are: a sender's brackets are no markup
    console().print(table if total else "No dead letters.")


def _retry(args: argparse.Namespace) -> None:
    with _dead_letters(args) as letters:
        print(letters.retry(args.ids or None))


def _discard(args: argparse.Namespace) -> None:
    with _dead_letters(args) as letters:
        print(letters.discard(args.ids or None))
