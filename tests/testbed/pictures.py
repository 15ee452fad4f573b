"""`make pictures`: draw docs/pictures/ from a real run of router, agent and a simulated SMuRF server.

The scratch folder is removed from the paths, so that they look as on a SMuRF server.
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
RATE = 50.0  # messages per second


def evaluate(agent: Agent, root: Path) -> status.Health:
    """Return the agent's health without the scratch folder `root` in its paths."""
    words = ["status", "--site-file", str(agent.site_config), "--site-host", "localhost"]
    health = status.evaluate(cli.make_parser(words[:1]).parse_args(words))
    reasons, data = json.loads(json.dumps([health.reasons, health.data]).replace(str(root), ""))
    return health._replace(reasons=reasons, data=data)


def draw(name: str, health: status.Health, agent: Agent) -> None:
    """Write the output of `socs-monitor status` as an SVG file."""
    shown = view.render(health, agent.INSTANCE)
    width = Console(width=WIDTH).measure(shown).maximum
    screen = Console(record=True, width=width, file=io.StringIO())
    screen.print(shown)
    PICTURES.mkdir(exist_ok=True)
    screen.save_svg(str(PICTURES / name), title="socs-monitor status --watch", unique_id="status")


def main() -> int:
    """Draw an agent that is well, and a degraded one."""
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
                    lambda: evaluate(agent, root).data.get("files", {}).get("registered") == rows,
                    30,
                    "all files are reported",
                )
                draw("status.svg", evaluate(agent, root), agent)
                with contextlib.closing(sqlite3.connect(agent.db_path, isolation_level=None)) as locked:
                    locked.execute("BEGIN IMMEDIATE")
                    server.send(server.messages(12), RATE)
                    wait_until(lambda: "database" in evaluate(agent, root).reasons, 30, "the agent is degraded")
                    draw("degraded.svg", evaluate(agent, root), agent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
