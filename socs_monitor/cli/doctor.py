"""``socs-monitor doctor``: is everything as the agent needs it? Nothing is changed."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from socs_monitor.cli import checks, client
from socs_monitor.cli.checks import Finding, Verdict
from socs_monitor.cli.shared import add_agent_arguments, console, plain
from socs_monitor.spool import file


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Check what the agent needs on this host: configuration, router, UDP port, receive buffer, database and spool"
        " with their permissions and disks, data roots and clock; and say what to do. Nothing is changed. Run it where"
        " the agent runs (docker exec ocs-pysmurf-monitor socs-monitor doctor). Exit codes: 0 no failure, warnings"
        " perhaps; 1 a failure; 2 wrong usage."
    )
    add_agent_arguments(parser)
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    table = Table.grid(padding=(0, 2))
    worst = Verdict.OK
    for finding in _findings(args):
        text = Text(plain(finding.text))
        if finding.verdict is not Verdict.OK:
            worst = Verdict.FAILURE if Verdict.FAILURE in (worst, finding.verdict) else Verdict.WARNING
        if finding.advice and finding.verdict is not Verdict.OK:
            text.append(f"\n-> {plain(finding.advice)}", style="bold")
        table.add_row(Text(finding.verdict.name.lower(), style=finding.verdict.value), Text(finding.what), text)
    console().print(table)
    return int(worst is Verdict.FAILURE)


def _findings(args: argparse.Namespace) -> Iterator[Finding]:
    try:
        settings = client.settings_of(args)
    except client.ClientError as error:
        advice = "correct it, or name another; the other checks need it"
        yield Finding(Verdict.FAILURE, "configuration", str(error), advice)
        return
    if client.has_site_config(args):
        yield Finding(Verdict.OK, "configuration", f"the site config has {args.instance_id}")
    else:
        text = f"no site config is named, so these are the defaults of {args.instance_id}"
        yield Finding(Verdict.WARNING, "configuration", text, "set OCS_CONFIG_DIR, or use --site-file")
    data: dict[str, Any] = {}
    lives = False
    with contextlib.suppress(OSError):  # `permissions` tells
        lives = file.is_locked(settings.spool_path)
    yield from _agent(args, lives, data)
    for what, findings in {
        "UDP port": checks.port(settings, lives),
        "receive buffer": checks.receive_buffer(settings, data),
        "database": checks.database(settings),
        "permissions": checks.permissions(settings),
        "disks": checks.disks(settings),
        "data roots": checks.data_roots(settings),
        "clock": checks.clock(),
    }.items():
        try:
            yield from findings
        except OSError as error:
            advice = "run this as the user that runs the agent, or as root"
            yield Finding(Verdict.FAILURE, what, f"this cannot be seen: {error}", advice)


def _agent(args: argparse.Namespace, lives: bool, data: dict[str, Any]) -> Iterator[Finding]:
    """Ask router and agent; what the agent says of itself goes into `data`."""
    try:
        session = client.session_of_run(args)
    except client.RouterAwayError as error:
        advice = "files are registered without it; operations and feeds are not there: see whether the router is up"
        yield Finding(Verdict.WARNING, "router", str(error), advice)
    except client.ClientError as error:
        verdict = Verdict.FAILURE if lives else Verdict.WARNING
        yield Finding(verdict, "agent", str(error), "see the agent's log" if lives else "start the agent")
    else:
        data |= session.get("data") or {}
        yield Finding(Verdict.OK, "router", "it answers, and the agent by way of it")
        if session.get("status") != "running":
            text = f"its operation run is {session.get('status', 'not started')}"
            yield Finding(Verdict.FAILURE, "agent", text, "start it, or restart the agent")
        for condition, reason in data.get("degraded", {}).items():
            yield Finding(Verdict.FAILURE, "agent", f"{condition}: {reason}", "see socs-monitor status")
