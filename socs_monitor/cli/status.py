"""``socs-monitor status``: agent health, via the router or from its files. Also the container's health check."""

from __future__ import annotations

import argparse
import json
import signal
import time

from socs_monitor.cli import client
from socs_monitor.cli.health import Health, State
from socs_monitor.cli.shared import CommandError, add_agent_arguments

_WATCH_S = 1.0


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Show whether files are being registered. The agent is asked via the router. If router or agent do not answer,"
        " the agent's spool, its database and the kernel are read instead. Exit codes: 0 all well; 1 the agent could"
        " not be asked; 2 wrong usage; 3 degraded, files are not registered or messages are lost; 4 not running. If"
        " only the router is down, the exit code does not change: files are registered without it."
    )
    add_agent_arguments(parser)
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--watch", action="store_true", help="refresh every second until Ctrl-C")
    forms.add_argument("--json", action="store_true", help="print one JSON object: state, reasons, note, data")
    forms.add_argument("--brief", action="store_true", help="print one line, for health checks")
    parser.set_defaults(run=_status)


def evaluate(args: argparse.Namespace) -> Health:
    """Ask the agent for its health, or derive it from its files and sockets."""
    try:
        session = client.run_session(args)
    except CommandError as error:
        return _evaluate_offline(args, error)
    data = session.get("data") or {}
    status = session.get("status", "not started")
    if status != "running":
        reason = f"The operation run is {status}: files are not registered. Start it, or restart the agent."
        return Health(State.NOT_RUNNING, {"run": reason}, "", data)
    reasons = data.get("degraded", {})
    return Health(State.DEGRADED if reasons else State.ALL_WELL, reasons, "", data)


def _evaluate_offline(args: argparse.Namespace, error: CommandError) -> Health:
    from socs_monitor.cli import offline  # costs time that the health check of a running agent does not need

    try:
        running, data = offline.inspect(client.settings_of(args), time.time())
    except CommandError as other:
        return Health(State.UNKNOWN, {"agent": str(error), "configuration": str(other)}, "", {})
    except OSError as other:
        spool = f"The spool cannot be read ({other}). Run this on the agent's host, or use --spool-path or --db-path."
        return Health(State.UNKNOWN, {"agent": str(error), "spool": spool}, "", {})
    reasons = data["degraded"]
    if not running:
        reason = "The agent is not running: messages sent now are lost. Start it."
        state, reasons = State.NOT_RUNNING, {"agent": reason, **reasons}
    elif reasons:
        state = State.DEGRADED
    else:
        state = State.ALL_WELL if isinstance(error, client.RouterAwayError) else State.UNKNOWN
    return Health(state, reasons, f"{error} This status is from spool, database and kernel.", data)


def _status(args: argparse.Namespace) -> int:
    if args.watch:
        return _watch(args)
    health = evaluate(args)
    if args.json:
        print(json.dumps(health.json()))
    elif args.brief:
        print(health.line())
    else:
        from socs_monitor.cli import view

        view.show(health, args.instance_id)
    return health.state.value


def _watch(args: argparse.Namespace) -> int:
    from socs_monitor.cli import view

    for number in (signal.SIGINT, signal.SIGTERM):  # also if the parent ignores SIGINT: nohup, background jobs
        signal.signal(number, signal.default_int_handler)
    health = evaluate(args)
    try:
        with view.live() as live:
            while True:
                live.update(view.render(health, args.instance_id), refresh=True)
                time.sleep(_WATCH_S)
                health = evaluate(args)
    except KeyboardInterrupt:
        view.show(health, args.instance_id)  # the live view is gone from the terminal by now
    return health.state.value
