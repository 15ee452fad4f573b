"""`socs` and this package in one environment, as during a migration."""

from __future__ import annotations

import subprocess
from pathlib import Path

from socs_monitor import agent
from tests.testbed.processes import PEER_BIN, ROOT, Agent, Router, require

PLUGIN = """\
[ocs.plugins]
socs_monitor = socs_monitor.plugin
"""


def _beside_socs(folder: Path) -> dict[str, str]:
    """Return environment variables that add this package and its plugin to the environment of the published socs."""
    metadata = folder / "packages" / "socs_monitor-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: socs-monitor\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(PLUGIN)
    return {"PYTHONPATH": f"{ROOT}:{metadata.parent}"}


def test_ocs_warns_about_two_plugins_with_the_class(tmp_path: Path) -> None:
    python = require(PEER_BIN / "python")
    found = subprocess.run(
        [python, "-c", "from ocs.agent_cli import build_agent_list as b; print(b()['PysmurfMonitor']['module'])"],
        env=_beside_socs(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "duplicate agent-class PysmurfMonitor" in found.stderr
    assert found.stdout.splitlines()[-1] in ("socs_monitor.agent", "socs.agents.pysmurf_monitor.agent")


def test_the_readme_s_command_starts_this_one(tmp_path: Path, router: Router) -> None:
    own = ["--agent", agent.__file__, "--entrypoint", "main"]
    with Agent(tmp_path, router, arguments=own, env=_beside_socs(tmp_path), bin_dir=PEER_BIN) as started:
        assert "list_failed" in dir(started.client())  # the published agent has no such task
