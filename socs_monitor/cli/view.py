"""What `status` shows in a terminal. A report may lack any part: of a stopped agent, or of an older one."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from socs_monitor.cli.health import Health, State
from socs_monitor.cli.shared import console, plain, size, utc
from socs_monitor.health.units import span

_COLOURS = {State.ALL_WELL: "green", State.UNKNOWN: "yellow", State.DEGRADED: "red", State.NOT_RUNNING: "red"}
_HEADLINES = {
    State.ALL_WELL: "all well",
    State.UNKNOWN: "UNKNOWN: the agent could not be asked",
    State.DEGRADED: "DEGRADED: files do not get through as they should",
    State.NOT_RUNNING: "NOT RUNNING",
}

_PROBLEMS_SHOWN = 5

_Row = tuple[str, RenderableType]


def show(report: Health, agent: str) -> None:
    """Print the view once."""
    console().print(render(report, agent))


def live() -> Live:
    """Return the display in which `show` is repeated."""
    return Live(console=console(), screen=True, auto_refresh=False)


def render(report: Health, agent: str) -> RenderableType:
    """Return the view of a report about an agent."""
    now = time.time()
    colour = _COLOURS[report.state]
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    for name, cell in _rows(report.data, now):
        rows.add_row(name, cell)
    head = [Text(_HEADLINES[report.state], style=f"bold {colour}")]
    head += [_joined((f"{condition}: ", "bold"), reason) for condition, reason in report.reasons.items()]
    head += [_text(report.note, "yellow")] if report.note else []
    return Panel(
        Group(*head, Text(), rows),
        title=_joined((agent, "bold"), f"  {utc(report.data.get('timestamp', now))} UTC"),
        title_align="left",
        border_style=colour,
        padding=(0, 1),
        expand=sys.stdout.isatty(),
    )


def _rows(data: Mapping[str, Any], now: float) -> Iterator[_Row]:
    parts = {
        "files": _files,
        "queue": _queue,
        "datagrams": _datagrams,
        "lost": _lost,
        "socket": _socket,
        "database": _database,
        "spool": _spool,
        "streams": _streams,
        "problems": _problems,
    }
    for key, part in parts.items():
        if key in data:
            yield from part(data, now)


def _files(data: Mapping[str, Any], now: float) -> Iterator[_Row]:
    files = data["files"]
    running = "received" in files
    places = ("registered" if running else "settling", "pending", "waiting", "dead", "discarded")
    sum_ = f"{files['received']} received = " if running else ""
    text = sum_ + (" + " if sum_ else ", ").join(f"{files[place]} {place}" for place in places if place in files)
    if running and files.get("settling"):
        text += f" ({files['settling']} of them settling)"
    if text:
        yield "files", _text(text, "yellow" if files.get("dead") else "")
    if files.get("last"):
        age = f"  {_ago(files['last_time'], now)}" if "last_time" in files else ""
        yield "last file", _joined(files["last"], (age, "dim"))


def _queue(data: Mapping[str, Any], now: float) -> Iterator[_Row]:
    queue = data["queue"]
    oldest = f", the oldest for {span(queue['oldest'])}" if queue["depth"] else ""
    yield "queue", _text(f"{queue['depth']} wait for their row{oldest}")


def _datagrams(data: Mapping[str, Any], now: float) -> Iterator[_Row]:
    datagrams = data["datagrams"]
    yield "datagrams", _text(f"{datagrams['total']} ({size(datagrams['bytes'])}): {_counts(datagrams['by_type'])}")
    for key in ("malformed", "refused", "unpublished"):
        if data.get(key):
            yield key, _text(_counts(data[key]), "yellow")


def _lost(data: Mapping[str, Any], now: float) -> Iterator[_Row]:
    lost = data["lost"]
    gaps = f"{lost['gaps']} missing by sequence number, " if "gaps" in lost else ""
    any_ = lost.get("gaps") or lost["kernel"]
    yield "lost", _text(f"{gaps}{lost['kernel']} dropped by the kernel", "yellow" if any_ else "")
    for sender in lost.get("senders", ()):
        who = f"{sender['id']} {sender['script']} at {sender['sender']}"
        yield "", _joined(f"{sender['lost']} of {who}", (f"  {_ago(sender['last'], now)}", "dim"))


def _socket(data: Mapping[str, Any], now: float) -> Iterator[_Row]:
    socket = data["socket"]
    text = Text("listening") if socket["listening"] else Text("NOT LISTENING", style="bold red")
    if "buffer" in socket:
        is_short = socket["buffer"] < socket["buffer_asked"]
        of = f" of {size(socket['buffer_asked'])} asked for: see `socs-monitor doctor`" if is_short else ""
        text += _text(f", receive buffer {size(socket['buffer'])}{of}", "yellow" if is_short else "")
        text += _text(f", bound again {socket['rebinds']} times") if socket["rebinds"] else ""
    yield "socket", text


def _database(data: Mapping[str, Any], now: float) -> Iterator[_Row]:
    database = data["database"]
    text = f"last commit {span(database['write'])}, longest of the last minute {span(database['write_max'])}"
    yield "database", _text(text) + _text(f", {database['errors']} errors", "yellow" if database["errors"] else "")


def _spool(data: Mapping[str, Any], now: float) -> Iterator[_Row]:
    yield "spool", _text(f"{size(data['spool']['bytes'])} of {size(data['spool']['max_bytes'])}")


def _streams(data: Mapping[str, Any], now: float) -> Iterator[_Row]:
    if data["streams"]:
        table = Table(
            "stream", "files today", "last file", "last metadata", box=None, header_style="dim", pad_edge=False
        )
        for name, stream in data["streams"].items():
            ages = (_ago(stream[key], now) for key in ("last_file", "last_metadata"))
            table.add_row(*map(_text, (name, stream["files_today"], *ages)))
        yield "", Text()
        yield "streams", table


def _problems(data: Mapping[str, Any], now: float) -> Iterator[_Row]:
    latest = data["problems"][-_PROBLEMS_SHOWN:]
    names = itertools.chain(["problems"], itertools.repeat(""))
    if latest:
        yield "", Text()
    for name, problem in zip(names, reversed(latest), strict=False):
        yield name, _joined((f"{_ago(problem['time'], now)}  ", "dim"), problem["text"])


def _counts(counts: Mapping[str, int]) -> str:
    most_first = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{count} {kind}" for kind, count in most_first)


def _ago(timestamp: float | None, now: float) -> str:
    return "never" if timestamp is None else f"{span(max(0.0, now - timestamp))} ago"


def _text(text: object, style: str = "") -> Text:
    """Text as it is: what a sender wrote is no markup, and has no control characters."""
    return Text(plain(text), style=style)


def _joined(*parts: object) -> Text:
    pairs: Iterable[Any] = (part if isinstance(part, tuple) else (part, "") for part in parts)
    return Text.assemble(*((plain(text), style) for text, style in pairs))
