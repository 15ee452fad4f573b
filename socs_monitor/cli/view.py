"""The terminal view of `socs-monitor status`. Data of a stopped or an older agent is incomplete."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from socs_monitor.cli.health import Health, State
from socs_monitor.cli.shared import console, size
from socs_monitor.health.units import span, utc
from socs_monitor.wire.text import plural, sanitize

_HEADLINES = {
    State.ALL_WELL: ("green", "all well"),
    State.UNKNOWN: ("yellow", "UNKNOWN: the agent could not be asked"),
    State.DEGRADED: ("red", "DEGRADED: files are not registered, or messages are lost"),
    State.NOT_RUNNING: ("red", "NOT RUNNING"),
}
_PROBLEMS_SHOWN = 5

_Row = tuple[str, RenderableType]


def show(health: Health, agent: str) -> None:
    """Print the view once."""
    console().print(render(health, agent))


def live() -> Live:
    """Return a full-screen display."""
    return Live(console=console(), screen=True, auto_refresh=False)


def render(health: Health, agent: str) -> RenderableType:
    """Return the view of an agent's health."""
    now = time.time()
    colour, headline = _HEADLINES[health.state]
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    for row in _rows(health.data, now):
        rows.add_row(*row)
    head = [Text(headline, style=f"bold {colour}")]
    head += [_text((f"{condition}: ", "bold"), reason) for condition, reason in health.reasons.items()]
    head += [_text((health.note, "yellow"))] if health.note else []
    return Panel(
        Group(*head, Text(), rows),
        title=_text((agent, "bold"), f"  {utc(health.data.get('timestamp', now))} UTC"),
        title_align="left",
        border_style=colour,
        padding=(0, 1),
        expand=sys.stdout.isatty(),
    )


def _rows(data: Mapping[str, Any], now: float) -> Iterator[_Row]:
    if files := data.get("files"):
        yield from _files(files, now)
    if queue := data.get("queue"):
        oldest = f", the oldest for {span(queue['oldest'])}" if queue["depth"] else ""
        yield "queue", _text(f"{queue['depth']} pending{oldest}")
    if datagrams := data.get("datagrams"):
        yield "datagrams", _text(f"{datagrams['total']} ({size(datagrams['bytes'])}): {_counts(datagrams['by_type'])}")
    for key in ("malformed", "refused", "unpublished"):
        if data.get(key):
            yield key, _text((_counts(data[key]), "yellow"))
    if lost := data.get("lost"):
        yield from _lost(lost, now)
    if socket := data.get("socket"):
        yield "socket", _socket(socket)
    if database := data.get("database"):
        text = f"last commit {span(database['write'])}, slowest of the last minute {span(database['write_max'])}, "
        errors = plural(database["errors"], "error")
        yield "database", _text(text, (errors, "yellow" if database["errors"] else ""))
    if spool := data.get("spool"):
        yield "spool", _text(f"{size(spool['bytes'])} of {size(spool['max_bytes'])}")
    if data.get("streams"):
        header = ("stream", "files today", "last file", "last metadata")
        table = Table(*header, box=None, header_style="dim", pad_edge=False)
        for name, stream in data["streams"].items():
            ages = [_ago(stream[key], now) for key in ("last_file", "last_metadata")]
            table.add_row(*map(_text, (name, stream["files_today"], *ages)))
        yield from (("", Text()), ("streams", table))
    for index, problem in enumerate(reversed(data.get("problems", [])[-_PROBLEMS_SHOWN:])):
        if index == 0:
            yield "", Text()
        yield "" if index else "problems", _text((f"{_ago(problem['time'], now)}  ", "dim"), problem["text"])


def _files(files: Mapping[str, Any], now: float) -> Iterator[_Row]:
    is_complete = "received" in files  # from the agent itself
    states = ("registered" if is_complete else "settling", "pending", "waiting", "dead", "discarded")
    counts = [f"{files[state]} {state}" for state in states if state in files]
    if counts:
        text = f"{files['received']} received = {' + '.join(counts)}" if is_complete else ", ".join(counts)
        if is_complete and files.get("settling"):
            text += f" ({files['settling']} of them settling)"
        yield "files", _text((text, "yellow" if files.get("dead") else ""))
    if files.get("last"):
        age = f"  {_ago(files['last_time'], now)}" if "last_time" in files else ""
        yield "last file", _text(files["last"], (age, "dim"))


def _lost(lost: Mapping[str, Any], now: float) -> Iterator[_Row]:
    gaps = f"{lost['gaps']} missing by sequence number, " if "gaps" in lost else ""
    has_loss = lost.get("gaps") or lost["kernel"]
    yield "lost", _text((f"{gaps}{lost['kernel']} dropped by the kernel", "yellow" if has_loss else ""))
    for sender in lost.get("senders", ()):
        who = f"{sender['id']} {sender['script']} at {sender['sender']}"
        yield "", _text(f"{sender['lost']} from {who}", (f"  {_ago(sender['last'], now)}", "dim"))


def _socket(socket: Mapping[str, Any]) -> Text:
    text = Text("listening") if socket["listening"] else Text("NOT LISTENING", style="bold red")
    if "buffer" in socket:
        is_short = socket["buffer"] < socket["buffer_asked"]
        of = f" of {size(socket['buffer_asked'])} requested; run: socs-monitor doctor" if is_short else ""
        text += _text((f", receive buffer {size(socket['buffer'])}{of}", "yellow" if is_short else ""))
        text += _text(f", bound again {plural(socket['rebinds'], 'time')}") if socket["rebinds"] else Text()
    return text


def _counts(counts: Mapping[str, int]) -> str:
    most_first = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{count} {kind}" for kind, count in most_first)


def _ago(timestamp: float | None, now: float) -> str:
    return "never" if timestamp is None else f"{span(max(0.0, now - timestamp))} ago"


def _text(*parts: object) -> Text:
    """Join parts, each a value or (value, style). Text from senders is neither markup nor control characters."""
    pairs = [part if isinstance(part, tuple) else (part, "") for part in parts]
    return Text.assemble(*((sanitize(value, None), style) for value, style in pairs))
