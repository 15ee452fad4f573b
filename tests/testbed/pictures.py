"""`make pictures`: draws docs/pictures/ from a real run: router, agent, and an emulated SMuRF server that loses a file.

Paths are shown as on a SMuRF server: without the scratch folder that they lie in.
"""

from __future__ import annotations

import contextlib
import io
import json
import sqlite3
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from socs_monitor.cli import main as cli
from socs_monitor.cli import status, view
from tests.testbed.processes import ROOT, Agent, Router, wait_until
from tests.testbed.smurf_server import FULL_MIX, REGISTERS, SmurfServer

PICTURES = ROOT / "docs" / "pictures"
WIDTH = 116
RATE = 50.0  # messages a second


def report(agent: Agent, root: Path) -> status.Health:
    """What `socs-monitor status` finds."""
    words = ["status", "--site-file", str(agent.site_config), "--site-host", "localhost"]
    found = status.evaluate(cli.make_parser(words[:1]).parse_args(words))
    reasons, data = json.loads(json.dumps([found.reasons, found.data]).replace(str(root), ""))
    return found._replace(reasons=reasons, data=data)


def draw(name: str, found: status.Health, agent: Agent) -> None:
    """Write what `socs-monitor status` shows as a picture."""
    shown = view.render(found, agent.INSTANCE)
    width = Console(width=WIDTH).measure(shown).maximum
    screen = Console(record=True, width=width, file=io.StringIO())
    screen.print(shown)
    PICTURES.mkdir(exist_ok=True)
    screen.save_svg(str(PICTURES / name), title="socs-monitor status --watch", unique_id="status")


def main() -> int:
    """Draw all well, and what is not."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch).resolve()
        work = root / "data" / "so" / "databases"
        with Router(work) as router, Agent(work, router) as agent:
            agent.wait_listening()
            agent.client()
            with SmurfServer(root / "data", agent.address, streams=4) as server:
                server.send(server.messages(4 * len(FULL_MIX) * 2, FULL_MIX), RATE)
                server.send(server.messages(4 * len(REGISTERS), ("metadata",)), RATE)
                rows = len(agent.rows())
                wait_until(
                    lambda: report(agent, root).data.get("files", {}).get("registered") == rows, 30, "all is told of"
                )
                draw("status.svg", report(agent, root), agent)
                with contextlib.closing(sqlite3.connect(agent.db_path, isolation_level=None)) as locked:
                    locked.execute("BEGIN IMMEDIATE")
                    server.send(server.messages(12), RATE)
                    wait_until(lambda: "database" in report(agent, root).reasons, 30, "it misses the database")
                    draw("degraded.svg", report(agent, root), agent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
