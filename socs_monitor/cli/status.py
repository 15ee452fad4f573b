"""``socs-monitor status``: whether files get through, at a glance; and the container's health check."""

from __future__ import annotations

import argparse
import json
import signal
import time

from socs_monitor.cli import client
from socs_monitor.cli.health import Health, State
from socs_monitor.cli.shared import add_agent_arguments

_WATCH_S = 1.0


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Show whether files get through: what the running agent says or, where router or agent do not answer, what"
        " its spool, its database and the kernel say. Exit codes: 0 all well; 1 the agent could not be asked;"
        " 2 wrong usage; 3 degraded, files do not get through; 4 not running. A router that does not answer is no"
        " fault: files are registered without it."
    )
    add_agent_arguments(parser)
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--watch", action="store_true", help="refresh each second, until Ctrl-C")
    forms.add_argument("--json", action="store_true", help="one JSON object: state, reasons, note, data")
    forms.add_argument("--brief", action="store_true", help="one line, as health checks want it")
    parser.set_defaults(run=_status)


def evaluate(args: argparse.Namespace) -> Health:
    """Ask the agent how it is, or look at what it left."""
    try:
        session = client.session_of_run(args)
    except client.ClientError as error:
        return _look(args, error)
    data = session.get("data") or {}
    status = session.get("status", "not started")
    if status != "running":
        return Health(State.NOT_RUNNING, {"run": f"it is {status}: start it, or restart the agent"}, "", data)
    reasons = data.get("degraded", {})
    return Health(State.DEGRADED if reasons else State.ALL_WELL, reasons, "", data)


def _look(args: argparse.Namespace, error: client.ClientError) -> Health:
    from socs_monitor.cli import offline  # see `client`: the health check of an agent that answers needs none of it

    try:
        lives, data = offline.look(client.settings_of(args), time.time())
    except (client.ClientError, OSError) as other:
        spool = f"it cannot be looked at ({other}): is this the agent's host, and --spool-path or --db-path its own?"
        return Health(State.UNKNOWN, {"agent": str(error), "spool": spool}, "", {})
    reasons = data["degraded"]
    if not lives:
        state, reasons = State.NOT_RUNNING, {"agent": "no process has its spool open: start it", **reasons}
    elif reasons:
        state = State.DEGRADED
    else:
        state = State.ALL_WELL if isinstance(error, client.RouterAwayError) else State.UNKNOWN
    return Health(state, reasons, f"{error}; this is what spool, database and kernel say", data)


def _status(args: argparse.Namespace) -> int:
    if args.watch:
        return _watch(args)
    found = evaluate(args)
    if args.json:
        print(json.dumps(found.json()))
    elif args.brief:
        print(found.line())
    else:
        from socs_monitor.cli import view

        view.show(found, args.instance_id)
    return found.state.value


def _watch(args: argparse.Namespace) -> int:
    from socs_monitor.cli import view

    for number in (signal.SIGINT, signal.SIGTERM):  # also if the parent ignores SIGINT: nohup, background jobs
        signal.signal(number, signal.default_int_handler)
    found = evaluate(args)
    try:
        with view.live() as live:
            while True:
                live.update(view.render(found, args.instance_id), refresh=True)
                time.sleep(_WATCH_S)
                found = evaluate(args)
    except KeyboardInterrupt:
        view.show(found, args.instance_id)  # the live view is gone from the terminal by now
    return found.state.value
