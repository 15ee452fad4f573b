"""``socs-monitor status``: whether files get through, at a glance; and the container's health check."""

from __future__ import annotations

import argparse
import enum
import json
import time
from typing import Any, NamedTuple

from socs_monitor import client
from socs_monitor.commands.shared import add_agent_arguments, plain

_WATCH_S = 1.0


class State(enum.Enum):
    """How the agent is; the value is the command's exit code."""

    ALL_WELL = 0
    UNKNOWN = 1
    DEGRADED = 3
    NOT_RUNNING = 4

    def __str__(self) -> str:
        return self.name.lower().replace("_", " ")


class Report(NamedTuple):
    """How the agent is, and who says so.

    Attributes:
        state: In a word.
        reasons: What is wrong: condition to reason.
        note: What else there is to say, or nothing.
        data: ``session.data`` of `run`, or as much of it as is known.
    """

    state: State
    reasons: dict[str, str]
    note: str
    data: dict[str, Any]

    def line(self) -> str:
        """Return the report without its data, in a line."""
        parts = [f"{condition}: {reason}" for condition, reason in self.reasons.items()]
        return plain("; ".join([str(self.state), *parts, *([self.note] if self.note else [])]))

    def json(self) -> dict[str, Any]:
        """Return the report as ``--json`` prints it."""
        return {"state": str(self.state), "reasons": self.reasons, "note": self.note, "data": self.data}


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


def report(args: argparse.Namespace) -> Report:
    """Ask the agent how it is, or look at what it left."""
    try:
        session = client.session_of_run(args)
    except client.ClientError as error:
        return _look(args, error)
    data = session.get("data") or {}
    status = session.get("status", "not started")
    if status != "running":
        return Report(State.NOT_RUNNING, {"run": f"it is {status}: start it, or restart the agent"}, "", data)
    reasons = data.get("degraded", {})
    return Report(State.DEGRADED if reasons else State.ALL_WELL, reasons, "", data)


def _look(args: argparse.Namespace, error: client.ClientError) -> Report:
    from socs_monitor import offline  # see `client`: the health check of an agent that answers needs none of it

    try:
        lives, data = offline.look(client.configuration(args), time.time())
    except (client.ClientError, OSError) as other:
        spool = f"it cannot be looked at ({other}): is this the agent's host, and --spool-path or --db-path its own?"
        return Report(State.UNKNOWN, {"agent": str(error), "spool": spool}, "", {})
    reasons = data["degraded"]
    if not lives:
        state, reasons = State.NOT_RUNNING, {"agent": "no process has its spool open: start it", **reasons}
    elif reasons:
        state = State.DEGRADED
    else:
        state = State.ALL_WELL if isinstance(error, client.RouterAwayError) else State.UNKNOWN
    return Report(state, reasons, f"{error}; this is what spool, database and kernel say", data)


def _status(args: argparse.Namespace) -> int:
    if args.watch:
        return _watch(args)
    found = report(args)
    if args.json:
        print(json.dumps(found.json()))
    elif args.brief:
        print(found.line())
    else:
        from socs_monitor.commands import view

        view.show(found, args.instance_id)
    return found.state.value


def _watch(args: argparse.Namespace) -> int:
    from socs_monitor.commands import view

    found = report(args)
    try:
        with view.live() as live:
            while True:
                live.update(view.render(found, args.instance_id), refresh=True)
                time.sleep(_WATCH_S)
                found = report(args)
    except KeyboardInterrupt:
        view.show(found, args.instance_id)  # the last one stays when the live one is gone
    return found.state.value
