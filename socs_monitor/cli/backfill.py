"""``socs-monitor backfill``: register timestream files that have no row."""

from __future__ import annotations

import argparse
import os
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from socs_monitor.cli import client
from socs_monitor.cli.offline import spool_if_stopped
from socs_monitor.cli.shared import CommandError, add_agent_arguments
from socs_monitor.completeness.scan import Scan, registration_of
from socs_monitor.suprsync.database import DatabaseUnavailableError
from socs_monitor.wire.text import plural

_POLL_S = 0.5


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Register timestream files that have no row because the agent was down or a datagram was lost. Files changed"
        " within the last two minutes are skipped. The command can be repeated at any time. Ctrl-C aborts it."
    )
    add_agent_arguments(parser)
    parser.add_argument("root", metavar="ROOT", help="folder of the timestreams, e.g. /data/so/timestreams")
    parser.add_argument("--dry-run", action="store_true", help="only list the files that would be registered")
    parser.set_defaults(run=_backfill)


def _backfill(args: argparse.Namespace) -> None:
    settings = client.settings_of(args)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns) as bar, spool_if_stopped(settings.spool_path) as spool:
        task = bar.add_task("timestream files checked", total=None)

        def show(progress: dict[str, Any]) -> None:
            bar.update(task, completed=progress["seen"])

        if spool:
            scan = Scan(args.root, settings.db_path, show)
            try:
                for path in scan:
                    if not args.dry_run:
                        spool.accept([registration_of(path)[1]])
            except DatabaseUnavailableError as error:
                raise CommandError(str(error)) from error
            result, outcome = scan.progress(), "They will be registered when the agent starts."
        else:
            result, outcome = _backfill_by_agent(client.connect(args), args, show), "The agent is registering them."
        bar.update(task, total=result["seen"])
    for path in result["paths"]:
        print(f"no row: {path}")
    seen, missing = result["seen"], result["unregistered"]
    if missing > len(result["paths"]):
        print(f"... and {missing - len(result['paths'])} more")
    outcome = "Dry run: nothing was registered." if args.dry_run else outcome if missing else ""
    print(f"Checked {plural(seen, 'timestream file')}: {missing or 'none'} without a row. {outcome}".rstrip())


def _backfill_by_agent(agent: Any, args: argparse.Namespace, show: Any) -> dict[str, Any]:
    reply = agent.backfill.start(root=os.path.abspath(args.root), dry_run=args.dry_run)
    try:
        while reply.session.get("status") not in (None, "done"):
            reply = agent.backfill.wait(timeout=_POLL_S)
            if reply.session["data"]:
                show(reply.session["data"])
    except KeyboardInterrupt:
        agent.backfill.abort()
        raise
    data: dict[str, Any] = client.done(reply).session["data"]
    return data
