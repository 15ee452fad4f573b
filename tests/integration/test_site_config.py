"""The example site config: OCS can read it, and its values and comments are right."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import yaml
from ocs import site_config

from socs_monitor.agent import make_parser
from tests.testbed.processes import REALM, ROOT, SITE_CONFIG, Router, write_site_config


def parse(path: Path) -> Namespace:
    """Return the agent's arguments as OCS derives them from a site config."""
    arguments = ["--site-file", str(path), "--instance-id", "pysmurf-monitor"]
    return site_config.parse_args("PysmurfMonitor", make_parser(), arguments)


def test_ocs_reads_the_example() -> None:
    args = parse(SITE_CONFIG)

    assert (args.site_hub, args.site_http) == ("ws://127.0.0.1:8001/ws", "http://127.0.0.1:8001/call")
    assert (args.site_realm, args.address_root) == (REALM, "observatory")
    assert args.udp_port == 8200
    assert args.create_table is True
    assert args.crossbar_timeout == 0


def test_the_example_names_the_agent_class_of_the_plugin() -> None:
    config = site_config.SiteConfig.from_yaml(str(SITE_CONFIG))

    assert [each["agent-class"] for each in config.hosts["localhost"].instances] == ["PysmurfMonitor"]


def test_the_commented_database_is_the_default(tmp_path: Path) -> None:
    text = SITE_CONFIG.read_text()
    assert text.count("# - ['--db-path'") == 1
    with_database = tmp_path / "site.yaml"
    with_database.write_text(text.replace("# - ['--db-path'", "- ['--db-path'"))

    assert "--db-path" in dict(
        yaml.safe_load(with_database.read_text())["hosts"]["localhost"]["agent-instances"][0]["arguments"]
    )
    assert parse(with_database).db_path == parse(SITE_CONFIG).db_path == make_parser().get_default("db_path")


def test_the_router_serves_the_realm_of_the_example() -> None:
    router = json.loads((ROOT / "tests" / "crossbar" / "config.json").read_text())["workers"][0]

    assert [realm["name"] for realm in router["realms"]] == [parse(SITE_CONFIG).site_realm]
    assert router["transports"][0]["endpoint"]["port"] == 8001


def test_overrides_reach_the_agent(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    write_site_config(path, Router(tmp_path, port=8123), 8234, tmp_path / "x.db", [["--create-table", False]])

    args = parse(path)
    assert args.site_hub == "ws://127.0.0.1:8123/ws"
    assert (args.udp_port, args.db_path, args.create_table) == (8234, str(tmp_path / "x.db"), False)
