"""``socs-monitor failed``: list, retry or discard dead letters, of a running agent or in a stopped agent's spool."""

from __future__ import annotations

import argparse

from rich.table import Table
from rich.text import Text

from socs_monitor.cli import client
from socs_monitor.cli.offline import spool_if_stopped
from socs_monitor.cli.shared import CommandError, add_agent_arguments, console
from socs_monitor.health.units import utc
from socs_monitor.wire.text import plural, sanitize


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's actions and their arguments."""
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for name, run, help_ in (
        ("list", _list, "show the dead letters and their reasons"),
        ("retry", _change, "process dead letters again, as if they had just arrived"),
        ("discard", _change, "delete dead letters; their files stay where they are, unregistered"),
    ):
        action = actions.add_parser(name, help=help_, description=help_.capitalize() + ".")
        add_agent_arguments(action)
        if name == "retry":
            action.add_argument("ids", nargs="*", type=int, metavar="ID", help="ids to retry; default: all")
        elif name == "discard":
            which = action.add_mutually_exclusive_group(required=True)
            which.add_argument("ids", nargs="*", default=[], type=int, metavar="ID", help="ids to discard")
            which.add_argument("--all", action="store_true", help="discard all dead letters")
        action.set_defaults(run=run, action=name)


def _list(args: argparse.Namespace) -> None:
    with spool_if_stopped(client.settings_of(args).spool_path) as spool:
        if spool:
            listed = [letter.summary() for letter in spool.dead()]
            total = len(listed)
        else:
            data = client.done(client.connect(args).list_failed()).session["data"]
            total, listed = data["total"], data["failed"]
    title = f"{len(listed)} of {plural(total, 'dead letter')}"
    table = Table("id", "received (UTC)", "sender", "path", "reason", title=title)
    for letter in listed:
        reason = ("refused: " if letter["refused"] else "") + letter["reason"]
        cells = (letter["id"], utc(letter["received"]), letter["sender"], letter["path"], reason)
        table.add_row(*(Text(sanitize(cell, None)) for cell in cells))  # not str: a sender's brackets are not markup
    console().print(table if total else "No dead letters.")


def _change(args: argparse.Namespace) -> None:
    ids = args.ids or None
    retries = args.action == "retry"
    with spool_if_stopped(client.settings_of(args).spool_path) as spool:
        if not spool:
            agent = client.connect(args)
            reply = agent.retry_failed(ids=ids) if retries else agent.discard_failed(ids=ids, all=ids is None)
            print(client.message(client.done(reply)))
            return
        changed = spool.retry(ids) if retries else spool.discard(ids)
    text = f"{plural(changed, 'dead letter')} {'will be retried when the agent starts' if retries else 'discarded'}."
    if ids and (missing := len(set(ids)) - changed):
        raise CommandError(f"{text} {plural(missing, 'id')} not found. Run: socs-monitor failed list")
    print(text)
