"""``socs-monitor doctor``: check everything that the agent needs on its host, and suggest fixes. Changes nothing."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from socs_monitor.cli import checks, client
from socs_monitor.cli.checks import Finding, Verdict, failure, ok, warning
from socs_monitor.cli.shared import CommandError, add_agent_arguments, console
from socs_monitor.spool import file
from socs_monitor.wire.text import sanitize


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Check what the agent needs on this host, and suggest fixes: configuration, router, UDP port, receive buffer,"
        " permissions and disks of database and spool, data roots, and clock. Nothing is changed. Run it where the"
        " agent runs: docker exec ocs-pysmurf-monitor socs-monitor doctor. Exit codes: 0 no failures; 1 at least one"
        " failure; 2 wrong usage."
    )
    add_agent_arguments(parser)
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    table = Table.grid(padding=(0, 2))
    code = 0
    for subject, (verdict, text, advice) in _findings(args):
        cell = Text(sanitize(text, None))
        if advice and verdict is not Verdict.OK:
            cell.append(f"\n-> {sanitize(advice, None)}", style="bold")
        table.add_row(Text(verdict.name.lower(), style=verdict.value), Text(subject), cell)
        code |= verdict is Verdict.FAILURE
    console().print(table)
    return code


def _findings(args: argparse.Namespace) -> Iterator[tuple[str, Finding]]:
    """Yield each finding with its subject."""
    try:
        settings = client.settings_of(args)
    except CommandError as error:
        yield "configuration", failure(str(error), "Fix this first: the other checks need it.")
        return
    agent, db_path, spool_path = args.instance_id, settings.db_path, settings.spool_path
    if client.has_site_config(args):
        yield "configuration", ok(f"The site config has an entry for agent '{agent}'.")
    else:
        text = f"No site config given. The default options of agent '{agent}' are checked."
        yield "configuration", warning(text, "Use --site-file, or set OCS_CONFIG_DIR.")
    data: dict[str, Any] = {}
    running = False
    with contextlib.suppress(OSError):  # reported by `permissions`
        running = file.is_locked(spool_path)
    yield from _agent(args, running, data)
    user = checks.agent_user(settings)
    for subject, findings in (
        ("UDP port", checks.udp_port(settings, running)),
        ("receive buffer", checks.receive_buffer(settings.udp_buffer, data.get("socket", {}).get("buffer"))),
        ("database", checks.database(settings)),
        ("database", checks.permissions(user, db_path)),
        ("database", checks.sharing(db_path)),
        ("spool", checks.permissions(user, spool_path)),
        ("database's disk", checks.disk(db_path)),
        ("spool's disk", checks.disk(spool_path, settings.spool_size)),
        ("data roots", checks.data_roots(user, settings.policy.data_roots)),
        ("clock", checks.clock(db_path)),
    ):
        try:
            for finding in findings:
                yield subject, finding
        except OSError as error:
            yield subject, failure(f"The check failed: {error}.", "Run this as the agent's user, or as root.")


def _agent(args: argparse.Namespace, running: bool, data: dict[str, Any]) -> Iterator[tuple[str, Finding]]:
    """Check router and agent; the agent's ``session.data`` goes into `data`."""
    try:
        session = client.run_session(args)
    except client.RouterAwayError as error:
        yield "router", warning(str(error), "Start the router: until then there are no feeds and operations.")
    except CommandError as error:
        if running:
            yield "agent", failure(str(error), "The agent's process is running. See its log.")
        else:
            yield "agent", warning(str(error), "The agent is not running: messages sent now are lost. Start it.")
    else:
        data |= session.get("data") or {}
        yield "router", ok("The router is up, and the agent answers.")
        if (status := session.get("status", "not started")) != "running":
            text = f"The operation run is {status}: files are not registered."
            yield "agent", failure(text, "Start the operation, or restart the agent.")
        for condition, reason in data.get("degraded", {}).items():
            yield "agent", failure(f"{condition}: {reason}", "Run: socs-monitor status")
